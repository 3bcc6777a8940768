"""Ctrl-C while the `sparseopt` command still imports, first of all this file: it ends at once, without a traceback."""

import itertools
import os
import signal
import sys
from typing import Any

# The exit status after Ctrl-C, and what is said of a command that has not begun to write.
STOPPED, NOTHING = 130, "stopped; nothing was written"


def _end(*_: Any) -> None:
    try:
        os.write(2, f"{NOTHING}\n".encode())
    finally:
        os._exit(STOPPED)


# While `python -m` imports a package, the first argument is "-m". In other processes nothing changes.
_is_module = sys.argv[:1] == ["-m"] and ("-m", "sparseopt") in itertools.pairwise(sys.orig_argv)
_name = os.path.basename(next(iter(sys.argv), ""))
if (_is_module or _name == "sparseopt") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)

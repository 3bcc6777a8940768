"""Ctrl-C while the `sparseopt` command is still importing, which takes seconds: it ends at once, without a traceback.

The package imports this file before anything else. In every other process it does nothing.
"""

import contextlib
import itertools
import os
import signal
import sys
from typing import Any, NoReturn

# The exit status after Ctrl-C, and what is said of a command that has not begun to write.
STOPPED, NOTHING = 130, "stopped; nothing was written"


def _end(*_: Any) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{NOTHING}\n".encode())
    os._exit(STOPPED)


_first = next(iter(sys.argv), "")
# While `python -m` imports a package, the first argument is "-m".
_is_module = _first == "-m" and ("-m", "sparseopt") in itertools.pairwise(sys.orig_argv)
_is_command = _is_module or os.path.basename(_first) == "sparseopt"
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)

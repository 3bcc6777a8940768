"""Consoles that take no output, or not all of its letters, end no command."""

import subprocess
import sys

import pytest

# How a shell starts a process whose output nobody takes, or not as it is.
CONSOLES = {
    "a full disk": "> /dev/full",
    "none from the start": ">&-",
    "none at all": ">&- 2>&- <&-",
    "a pager that was closed": "| true",
    "one of ASCII": "PYTHONIOENCODING=ascii",
}
SPEAKING = """
import os, sys
from sparseopt.shell import console
# The first file that is opened must not be what others print to.
with open(sys.argv[1], "wb") as stream:
    try:
        os.write(1, b"printed by a library")
    except OSError:
        pass
    console.say("error ‖X (V - W)ᵀ‖², na\\u00efve, \\udcff")
    console.console.print(console.comparison_table("title", ["a", "b"], [["1", "²"]]))
    console.errors.print("told")
    stream.write(b"whole")
"""


@pytest.mark.processes
@pytest.mark.parametrize(("console", "shell"), CONSOLES.items())
def test_no_console_ends_what_is_told_to_it(tmp_path, console, shell):
    environment, redirect = (shell, "") if "=" in shell else ("", shell)
    line = f'set -o pipefail; {environment} "$0" -c "$1" "$2" {redirect}'
    call = ["bash", "-c", line, sys.executable, SPEAKING, str(tmp_path / "file")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "" if console == "none at all" else "told\n")
    assert (tmp_path / "file").read_bytes() == b"whole"
    if console == "one of ASCII":
        assert "error ?X (V - W)??" in done.stdout
        assert "| 1" in done.stdout

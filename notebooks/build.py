"""The sources of the notebooks are the `.py` files in this folder; the `.ipynb` files contain their results.

A cell that draws says what its figures show, for who cannot see them: `# %% alt="Two maps, ..."`.

    python notebooks/build.py run [--output DIR] [NAME ...]   execute all notebooks, or those named
    python notebooks/build.py text                            copy changed text into the .ipynb files, without execution

`tests/test_notebooks.py` fails if a source and its `.ipynb` file differ. A notebook that needs a package which is not
installed is skipped, with a line that says so; if it was named, that is a failure.
"""

import argparse
import base64
import importlib.util
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from PIL import Image

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_SECONDS = 2400
# What some need besides the dependency group `notebooks`: the module, and how to get it.
NEEDS = {"11": ("torch", "pip install -e '.[torch]' --group notebooks")}
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


def sources(names: list[str] | None = None) -> list[Path]:
    """The sources in order: all, or those whose file name begins with one of the names.

    Raises:
        ValueError: for a name without a match.
    """
    found = sorted(FOLDER.glob("*_*.py"))
    for name in names or []:
        if not any(source.stem.startswith(Path(name).stem) for source in found):
            raise ValueError(f"no notebook begins with {name!r}; known are {', '.join(s.stem for s in found)}")
    return [s for s in found if not names or any(s.stem.startswith(Path(name).stem) for name in names)]


def lacking(name: str) -> str | None:
    """What the notebook of this name needs and is not installed; None if nothing."""
    number = name.partition("_")[0]
    module, how = NEEDS.get(number, (None, None))
    if module is None or importlib.util.find_spec(module):
        return None
    return f"SKIPPED: notebook {number} needs {module} ({how})"


def notebook(source: Path) -> Any:
    """A source as a notebook without outputs; cells have numbers instead of random ids."""
    made = jupytext.read(source, fmt="py:percent")
    for index, cell in enumerate(made.cells):
        cell["source"] = cell["source"].strip("\n")  # blank lines before a function
        cell["id"] = f"cell-{index:02d}"
        # The key of myst-nb, which makes the pages.
        alt = cell["metadata"].get("alt")
        cell["metadata"] = {"mystnb": {"image": {"alt": alt}}} if alt else {}
    return nbformat.from_dict({"cells": made.cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})


def stale(source: Path) -> str | None:
    """Why the `.ipynb` file of a source is out of date; None if it is not."""
    file = source.with_suffix(".ipynb")
    if not file.is_file():
        return f"{file.name} is missing"
    executed, made = _code(nbformat.read(file, as_version=4)), _code(notebook(source))
    if [cell.source for cell in executed] != [cell.source for cell in made]:
        return f"{file.name} was executed with other code than that of {source.name}"
    if any(cell.execution_count is None for cell in executed):
        return f"{file.name} has cells that were not executed"
    return None


def write(made: Any, target: Path) -> None:
    """Write an executed notebook, without progress bars and cell times."""
    for cell in made.cells:
        cell["metadata"].pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small_png(output.data["image/png"])
    nbformat.validate(made)
    target.write_text(nbformat.writes(made).rstrip("\n") + "\n", encoding="utf-8")


def small_png(encoded: str) -> str:
    """A picture in 256 colours, in base64 as notebooks have it: it looks the same and takes a third of the bytes."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        if picture.mode == "P":
            return encoded
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return min(encoded, base64.b64encode(small.getvalue()).decode(), key=len)


def take_over_text() -> int:
    """Copy the text of each source into its `.ipynb` file; returns the number of those that must be executed first."""
    failed = 0
    for source in sources():
        if reason := stale(source):
            print(f"{reason}: python notebooks/build.py run {source.stem}", file=sys.stderr)
            failed += 1
            continue
        made, target = notebook(source), source.with_suffix(".ipynb")
        done = nbformat.read(target, as_version=4)
        made["metadata"] = done.metadata
        for cell, executed in zip(_code(made), _code(done), strict=True):
            cell["outputs"], cell["execution_count"] = executed.outputs, executed.execution_count
        write(made, target)
    return failed


def _code(made: Any) -> list[Any]:
    return [cell for cell in made.cells if cell.cell_type == "code"]


def run(output: Path, names: list[str]) -> int:
    """Execute notebooks into a folder, each in an empty working directory; returns the number of failures."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    # Pictures belong in the notebook, whatever backend the shell sets.
    os.environ.pop("MPLBACKEND", None)
    output.mkdir(parents=True, exist_ok=True)
    failed, start = 0, time.perf_counter()
    for source in sources(names):
        if lacks := lacking(source.stem):
            print(lacks, file=sys.stderr, flush=True)
            failed += bool(names)
            continue
        made, began = notebook(source), time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sparseopt-notebook-") as empty:
            client = NotebookClient(
                made,
                timeout=CELL_SECONDS,
                kernel_name="python3",
                extra_arguments=["--log-level=ERROR"],
                resources={"metadata": {"path": empty}},
            )
            error = None
            try:
                client.execute()
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as raised:
                error, failed = raised, failed + 1
        target = output / f"{source.stem}.ipynb"
        write(made, target)
        print(f"{target}: {time.perf_counter() - began:.1f} s, {'FAILED' if error else 'ok'}", flush=True)
        if error:
            print(COLOUR_CODES.sub("", str(error)), file=sys.stderr, flush=True)
    print(f"all: {time.perf_counter() - start:.1f} s, {failed} failed")
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("text", help="copy changed text into the executed notebooks")
    runner = commands.add_parser("run", help="execute notebooks")
    runner.add_argument("--output", type=Path, default=FOLDER, help="folder for the executed notebooks; default: here")
    runner.add_argument("names", nargs="*", help="prefixes of notebook names, such as 02; default: all")
    given = parser.parse_args()
    if given.command == "text":
        return 1 if take_over_text() else 0
    try:
        return 1 if run(given.output, given.names) else 0
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())

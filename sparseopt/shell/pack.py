"""Floor 8: the commands `sparseopt pack` and `sparseopt unpack`."""

from pathlib import Path
from typing import Annotated

import typer


def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model, dense.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
) -> None:
    """Store a pruned model's zeros as a bitmask: smaller on disk, for sparseopt only until it is unpacked."""
    from sparseopt.models import pack_folder
    from sparseopt.shell import console

    with console.block_progress(f"packing {folder.name}") as progress:
        done = pack_folder(folder, output, observer=progress)
    console.say(console.packed_line(done.dense_bytes, done.stored_bytes))
    console.say(f"wrote {done.output}")


def unpack(
    folder: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
) -> None:
    """Write a packed model as the dense folder that transformers loads, identical to the one that was packed."""
    from sparseopt.models import unpack_folder
    from sparseopt.shell import console

    with console.block_progress(f"unpacking {folder.name}") as progress:
        done = unpack_folder(folder, output, observer=progress)
    console.say(f"{done.stored_bytes:,} bytes of tensors, dense")
    console.say(f"wrote {done.output}")

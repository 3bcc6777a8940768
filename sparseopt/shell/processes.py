"""Floor 8: options for several devices and several processes, shared by the commands."""

import contextlib
import os
from collections.abc import Iterator
from typing import Annotated, Literal, cast

import typer

ManyDevices = Annotated[str | None, typer.Option(help="Devices to use: a number, or all. Default: one.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Share the work with other processes that were started with the same command, on all their devices. In a "
        "SLURM or MPI job, on Kubernetes or a Cloud TPU they find each other; elsewhere give the three options below.",
    ),
]
Coordinator = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0, in all processes; or JAX_COORDINATOR_ADDRESS.")
]
Processes = Annotated[int | None, typer.Option(min=1, help="Number of processes; or JAX_NUM_PROCESSES.")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="Index of this process, from 0; or JAX_PROCESS_ID.")]


@contextlib.contextmanager
def cooperating(
    distributed: bool, coordinator: str | None, processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Run a command together with other processes, or alone; only the first process prints.

    Raises:
        ValueError: for options that need `--distributed` without it.
    """
    if not distributed:
        if (coordinator, processes, process_id) != (None, None, None):
            raise ValueError("--coordinator, --processes and --process-id belong to --distributed: add it")
        yield
        return
    from sparseopt.system import processes as joined

    joined.join(coordinator, processes, process_id)
    with joined.together(), contextlib.ExitStack() as silent:
        if not joined.is_first():
            nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silent.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def number_of_devices(text: str | None) -> int | Literal["all"] | None:
    """The value of `--devices`; None where it was left out.

    Raises:
        ValueError: for anything but a whole number from 1, or "all".
    """
    if text is None or text == "all":
        return cast(Literal["all"] | None, text)
    if not (text.isdecimal() and int(text) >= 1):
        raise ValueError(f"--devices must be a whole number from 1, or all, given {text!r}")
    return int(text)

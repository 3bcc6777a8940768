"""Floor 8: options for several devices and several processes, which commands share."""

import contextlib
import os
from collections.abc import Iterator
from typing import Annotated, Literal, cast

import typer

ManyDevices = Annotated[str | None, typer.Option(help="Devices to work on: a number, or all. Default: one.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Work together with other processes that were started with the same command, on all their devices. In a "
        "SLURM or MPI job, Kubernetes or a Cloud TPU they find each other; elsewhere give the three options below.",
    ),
]
Coordinator = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0, for all of them; or JAX_COORDINATOR_ADDRESS.")
]
Processes = Annotated[int | None, typer.Option(min=1, help="How many processes there are; or JAX_NUM_PROCESSES.")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="The number of this one, from 0; or JAX_PROCESS_ID.")]


@contextlib.contextmanager
def cooperating(
    distributed: bool, coordinator: str | None, processes: int | None, process_id: int | None
) -> Iterator[None]:
    """What a command does together with others, or alone; only the first process speaks.

    Raises:
        ValueError: if where the others are was given, and not that they are wanted.
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


def is_first() -> bool:
    """Whether this process speaks and writes; one alone does."""
    from sparseopt.system import processes

    return processes.is_first()


def number_of_devices(text: str | None) -> int | Literal["all"] | None:
    """What `--devices` says; None where it was left out.

    Raises:
        ValueError: for anything but a whole number from 1, or "all".
    """
    if text is None or text == "all":
        return cast(Literal["all"] | None, text)
    if not (text.isdecimal() and int(text) >= 1):
        raise ValueError(f"--devices must be a whole number from 1, or all, given {text!r}")
    return int(text)

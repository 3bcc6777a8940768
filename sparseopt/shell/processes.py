"""Floor 8: options for several devices and several processes, shared by the commands."""

import contextlib
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

import typer

MACHINE = "Machine"


def machine_option(text: str, *names: str, **details: Any) -> Any:
    """An option of a command, shown under the heading "Machine"."""
    return typer.Option(*names, help=text, rich_help_panel=MACHINE, **details)


ManyDevices = Annotated[str | None, machine_option("Devices to work on: a number, or all. Default: one.")]
Distributed = Annotated[
    bool,
    machine_option(
        "Work together with other processes that were started with the same command, on all their devices. In a "
        "SLURM or MPI job, Kubernetes or a Cloud TPU they find each other; elsewhere give the three options below.",
        "--distributed",
    ),
]
Coordinator = Annotated[
    str | None, machine_option("HOST:PORT of process 0, for all of them; or JAX_COORDINATOR_ADDRESS.")
]
Processes = Annotated[
    int | None, machine_option("How many processes there are; or JAX_NUM_PROCESSES.", min=1, metavar="<int>")
]
ProcessId = Annotated[
    int | None, machine_option("The number of this one, from 0; or JAX_PROCESS_ID.", min=0, metavar="<int>")
]


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

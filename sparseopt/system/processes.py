"""Several processes that run one program together, on one machine or on many, and end together.

JAX joins them (`jax.distributed`), exchanges their data, and notices when one stops answering.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# JAX ends all processes after this many seconds without a sign of life from one; the pages promise 30 s.
HEARTBEAT_SECONDS = 20
GRACE_SECONDS = 1.0
# How JAX's libraries say that another process has closed its connection.
LOST = ("Gloo", "NCCL", "UNAVAILABLE:", "CoordinationService")
# The usual names; JAX itself reads the first.
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def count() -> int:
    """The number of processes that work together."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is process 0, which prints and writes."""
    return jax.process_index() == 0


def join(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None, timeout: int = 300
) -> None:
    """Join the other processes; call this before any computation.

    Args:
        coordinator: "HOST:PORT" of process 0, reachable for the others; None uses `JAX_COORDINATOR_ADDRESS`.
        processes: the number of processes; None uses `JAX_NUM_PROCESSES`.
        index: the number of this process, from 0; None uses `JAX_PROCESS_ID`. JAX finds missing values itself in a
            SLURM or MPI job, in Kubernetes or on a Cloud TPU.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: if the values are missing or invalid.
        RuntimeError: if the others do not join.
    """
    address = os.environ.get(ENVIRONMENT[0]) or None if coordinator is None else coordinator
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"the coordinator's address must be HOST:PORT, as in node1:1234, given {address!r}")
    number, own = _number(processes, ENVIRONMENT[1]), _number(index, ENVIRONMENT[2])
    if number is not None and own is not None and not 0 <= own < number:
        raise ValueError(f"process ids run from 0 to {number - 1} for {number} processes, given {own}")
    try:
        jax.distributed.initialize(
            address, number, own, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError, TypeError) as error:
        if None in (address, number, own):
            raise ValueError(
                "--distributed needs --coordinator HOST:PORT, --processes N and --process-id I (or "
                f"{', '.join(ENVIRONMENT)}), or a SLURM, MPI, Kubernetes or Cloud TPU job to take them from ({error})"
            ) from error
        raise RuntimeError(
            f"process {own} of {number} did not meet the others at {address} within {timeout} s: {error}"
        ) from error


def _number(given: int | None, name: str) -> int | None:
    """`given`, else the number in the environment, else None."""
    value = os.environ.get(name) or None if given is None else given
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, given {value!r}") from None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context of joint work: if a process raises in it, or is lost, all end within half a minute.

    A process that raises says why and ends at once. The others get an error at their next exchange with it, and say
    that; one that computes alone or waits for a lost machine is ended by JAX. A single process just raises.
    """
    try:
        yield
        barrier("end")
    except BaseException as error:
        if count() > 1:
            _end(error)
        raise


def _end(error: BaseException) -> None:
    """Say why and exit. `os._exit`, since JAX would wait for the other processes at the end of the interpreter."""
    stopped = isinstance(error, KeyboardInterrupt)
    text = str(error) or ("stopped" if stopped else type(error).__name__)
    lost = any(word in text for word in LOST)  # a RuntimeError or, from `float`, a ValueError
    code = 130 if stopped else 2 if isinstance(error, ValueError) and not lost else 1
    if lost:
        text = (
            "another process has ended or was lost, and its own message, if any, says why. Finished work is kept: the "
            f"same command resumes from there ({text.partition(chr(10))[0]})"
        )
    if (given := getattr(error, "exit_code", None)) is None:  # `typer.Exit` comes after its message
        # Progress bars hide the cursor of a terminal.
        show = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        said = f"{show}{'' if stopped else 'error: '}process {jax.process_index()} of {count()}: {text}"
        print(said, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if is_first() and not stopped:
        # Here runs JAX's service, and without it JAX ends the others before they have said what they know.
        time.sleep(GRACE_SECONDS)
    os._exit(code if given is None else given)


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def told(value: Any) -> Any:
    """The `value` of process 0, in every process: anything that JSON can hold. The value of the others is ignored."""
    if count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    filled = np.zeros(size, np.uint8)
    filled[: content.size] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(filled)).tobytes())


def any_of(flag: bool) -> bool:
    """Whether the flag of any process is True."""
    return bool(np.any(_gathered(np.asarray([flag]))))


def agree(parts: Mapping[str, Any]) -> None:
    """Raise a ValueError in every process unless all have the same named, JSON-ready values."""
    texts = [json.dumps(value, sort_keys=True, default=str) for value in parts.values()]
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    found = _gathered(np.frombuffer(digests, np.uint8).reshape(len(texts), -1))
    same = np.all(found == found[0], axis=2)
    if same.all():
        return
    others = [int(i) for i in np.flatnonzero(~same.all(axis=1))]
    names = [name for name, fits in zip(parts, same.all(axis=0), strict=True) if not fits]
    raise ValueError(
        f"not all processes were given the same {', '.join(names)}: {_listed(others)} of {len(found)} and "
        "process 0 differ; start all with the same command, files and version"
    )


def _listed(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"


def _gathered(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, `[processes, ...]`."""
    if count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values)).reshape(-1, *values.shape)

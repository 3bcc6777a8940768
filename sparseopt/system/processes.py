"""Several processes that run one program together, on one machine or on many, and end together.

JAX joins them (`jax.distributed`) and exchanges their data. But if one process raises, the others wait forever, and if
one is killed, each prints an error of its network library. So every process holds a connection to process 0, which
closes when the process ends. Process 0 then tells the others why, prints the reason once, and all stop.
"""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Connections are idle for hours: the system probes them after this many seconds without an answer, this many times.
PROBE_AFTER, PROBES = 5, 3
# How long an error waits for news of a lost process, which may have caused it.
GRACE_SECONDS = 1.0
CONNECT_SECONDS = 10.0
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
        RuntimeError: if the others do not join, or process 0 cannot be reached.
    """
    address = os.environ.get(ENVIRONMENT[0]) or None if coordinator is None else coordinator
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"the coordinator's address must be HOST:PORT, as in node1:1234, given {address!r}")
    number, own = _number(processes, ENVIRONMENT[1]), _number(index, ENVIRONMENT[2])
    if number is not None and own is not None and not 0 <= own < number:
        raise ValueError(f"process ids run from 0 to {number - 1} for {number} processes, given {own}")
    try:
        jax.distributed.initialize(address, number, own, initialization_timeout=timeout)
    except (ValueError, RuntimeError, TypeError) as error:
        if None in (address, number, own):
            raise ValueError(
                "--distributed needs --coordinator HOST:PORT, --processes N and --process-id I (or "
                f"{', '.join(ENVIRONMENT)}), or a SLURM, MPI, Kubernetes or Cloud TPU job to take them from ({error})"
            ) from error
        raise RuntimeError(
            f"process {own} of {number} did not meet the others at {address} within {timeout} s: {error}"
        ) from error
    if count() > 1:
        _Bond.hold(host)


def _number(given: int | None, name: str) -> int | None:
    """`given`, else the number in the environment, else None."""
    value = os.environ.get(name) or None if given is None else given
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, given {value!r}") from None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context of joint work: if a process raises in it, or is lost, all end, with one message from process 0.

    A single process just raises.
    """
    if count() == 1:
        yield
        return
    bond = _Bond.held
    assert bond is not None, "join() comes first"
    try:
        yield
        barrier("end")
    except BaseException as error:
        bond.fail(error)
        raise
    bond.release()


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


class _Bond:
    """The connections of process 0 to all others, or of another process to it, and the threads that watch them."""

    held: "_Bond | None" = None

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers, self._lock = peers, threading.Lock()
        self._index, self._count = jax.process_index(), count()
        self._ended: set[int] = set()
        self._released = False
        for number, peer in peers.items():
            _probe(peer)
            threading.Thread(target=self._watch, args=(number, peer), daemon=True).start()

    @classmethod
    def hold(cls, host: str) -> None:
        """Connect all processes to process 0; `host` is its name, or "" if not known."""
        if is_first():
            with socket.create_server(("", 0), backlog=count()) as listener:
                own, secret = socket.gethostname(), secrets.token_hex(16)
                told([[host, own, socket.getfqdn(), *_addresses(own)], listener.getsockname()[1], secret])
                cls.held = cls(_accept(listener, secret))
        else:
            names, port, secret = told(None)
            cls.held = cls({0: _reach(list(dict.fromkeys(filter(None, names))), port, secret)})

    def fail(self, error: BaseException) -> None:
        """End all processes for an error in this one; returns only if it cannot be reported."""
        time.sleep(GRACE_SECONDS)
        code = 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ValueError) else 1
        code = getattr(error, "exit_code", code)  # `typer.Exit` has its own
        message = "stopped" if code == 130 else str(error) or type(error).__name__
        verdict = {"text": f"process {self._index} of {self._count}: {message}", "code": code}
        with contextlib.suppress(OSError):
            if self._index == 0:
                self._end(verdict)
            else:
                _send(self._peers[0], verdict)
            # Process 0 answers by telling all, also this one; or another of its threads is about to.
            time.sleep(CONNECT_SECONDS)

    def release(self) -> None:
        """The work is done: the end of another process is no longer a loss."""
        with self._lock:
            self._released = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"ended": True})

    def _watch(self, number: int, peer: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), peer.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                if not said.get("ended"):
                    self._end(said)
                    return
                self._ended.add(number)
        if not (self._released or number in self._ended):
            text = f"process {number} of {self._count} was lost: it was killed, or its machine or the network failed"
            verdict = {"text": f"{text}. Finished work is kept: the same command resumes from there", "code": 1}
            self._end(verdict, speak=True)

    def _end(self, verdict: dict[str, Any], *, speak: bool = False) -> None:
        """Tell the others and exit; process 0, or one that has to `speak` for it, prints why.

        `os._exit`, since the main thread may be waiting for another process.
        """
        with self._lock:
            if self._released:
                return
            self._released = True
        if self._index == 0:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    _send(peer, verdict)
        if self._index == 0 or speak:
            # Progress bars hide the cursor of a terminal.
            show = "\x1b[?25h\n" if sys.stderr.isatty() else ""
            os.write(2, f"{show}error: {verdict['text']}\n".encode())
        if self._index == 0:
            # Process 0 runs JAX's own service: it exits last.
            time.sleep(GRACE_SECONDS)
        os._exit(verdict["code"])


def _addresses(name: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    return []


def _reach(names: Sequence[str], port: int, secret: str) -> socket.socket:
    for name in names:
        with contextlib.suppress(OSError):
            found = socket.create_connection((name.strip("[]"), port), timeout=CONNECT_SECONDS)
            found.settimeout(None)
            _send(found, {"process": jax.process_index(), "secret": secret})
            return found
    raise RuntimeError(
        f"process {jax.process_index()} cannot reach process 0 at port {port} of {', '.join(names)}: "
        "open the ports between the machines"
    )


def _accept(listener: socket.socket, secret: str) -> dict[int, socket.socket]:
    listener.settimeout(CONNECT_SECONDS * 6)
    peers: dict[int, socket.socket] = {}
    while len(peers) < count() - 1:
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            missing = sorted(set(range(1, count())) - set(peers))
            raise RuntimeError(
                f"{_listed(missing)} of {count()} did not connect to process 0: open the ports between the machines"
            ) from None
        peer.settimeout(CONNECT_SECONDS)
        # Unbuffered: the bytes after the line are for another reader.
        with (
            contextlib.suppress(OSError, ValueError, KeyError, TypeError),
            peer.makefile("rb", buffering=0) as stream,
        ):
            hello = json.loads(stream.readline(1024))
            if secrets.compare_digest(str(hello["secret"]), secret):
                peer.settimeout(None)
                peers[int(hello["process"])] = peer
    return peers


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall((json.dumps(message) + "\n").encode())


def _probe(peer: socket.socket) -> None:
    """Have the system detect a machine that disappears silently."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", PROBE_AFTER), ("TCP_KEEPINTVL", PROBE_AFTER), ("TCP_KEEPCNT", PROBES)):
        # Not every system knows them.
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

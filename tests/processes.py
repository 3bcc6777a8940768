"""Several real processes on this machine, joined by gloo: starts them, waits, and returns the output of each."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, stdout and stderr."""

    status: int
    out: str
    err: str


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(commands: list[list[str]], folder: Path, port: int) -> list[subprocess.Popen]:
    """Start one process a command, each told its place by the usual variables; stdout and stderr go into `folder`."""
    processes = []
    for index, command in enumerate(commands):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(len(commands)),
            "JAX_PROCESS_ID": str(index),
            "JAX_PLATFORMS": "cpu",
            # One device and one thread each: the machine is shared by all of them.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false",
            "PYTHONPATH": str(ROOT),
        }
        with (folder / f"out-{index}").open("wb") as out, (folder / f"err-{index}").open("wb") as err:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err, cwd=folder))
    return processes


def wait(processes: list[subprocess.Popen], folder: Path, timeout: float = 300) -> list[Ended]:
    """Wait for all; those that do not end are killed, and the test fails."""
    until = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(until - time.monotonic(), 0.1))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [
        [(folder / f"{kind}-{i}").read_text(errors="replace") for kind in ("out", "err")] for i in range(len(processes))
    ]
    return [Ended(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def run_scripts(script: Path, count: int, folder: Path, *arguments: str, timeout: float = 300) -> list[Ended]:
    """Run a Python script in so many processes, to the end."""
    command = [sys.executable, str(script), *arguments]
    return wait(start([command] * count, folder, free_port()), folder, timeout)

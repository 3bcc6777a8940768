"""The script of the processes of `test_processes.py`: joins the others, compares, and ends as requested."""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.mesh import device_line, over, put, whole
from sparseopt.system import processes

how, who = sys.argv[1], int(sys.argv[2])
processes.join(timeout=120)
index = jax.process_index()
with processes.together():
    processes.agree({"config": 1})
    said = [processes.told({"from": index}), processes.any_of(index == who), processes.any_of(False)]
    mesh = device_line("all")
    values = put(np.arange(12, dtype=np.float32).reshape(6, 2), over(mesh))
    said.append(whole(values * 2).tolist())
    print(said, flush=True)
    total = jax.jit(lambda x: jnp.sum(x * x))
    until = time.monotonic() + (0 if how == "well" else 60)
    while time.monotonic() < until:
        # In the middle of exchanges, as a solve is; or each at work of its own.
        time.sleep(0.1) if how == "killed alone" else float(total(values))
        if index == who and how.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if index == who and how == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
        if index == who and how == "raises":
            raise OSError("the disk is full")
print("ended", flush=True)

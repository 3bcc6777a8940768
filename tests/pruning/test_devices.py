"""Pruning on several devices, and what processes tell each other of an earlier run."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sparseopt.pruning import LayerRecord
from sparseopt.pruning.base.records import AllocationRecord, BlockRecord, DistillationRecord, ShapeRecord
from sparseopt.pruning.run.resumption import Progress
from sparseopt.system import run_folder

HERE = Path(__file__).parent


@pytest.mark.processes
@pytest.mark.parametrize("file", ["on_devices.py", "modules/spread.py"])
def test_on_eight_devices(file):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_one_process_knows_of_an_earlier_run_is_what_it_tells_the_others():
    trained = BlockRecord(0.2, 0.1, None, None, 4, "FINISHED", 1.0, 0.5, 3, 96, block=0)
    layer = LayerRecord(0, "a.q_proj", (4, 8), 32, 16, 0.1, None, 20, "CONVERGED", 1.0, 0.5, 0, 64, output_blocks=2)
    shape = ShapeRecord(4, 1, None, (0, 2), (1,), (0.2,), (8, 2, 3, None), 80, 160, 640, 0.5)
    distilled = DistillationRecord(0.2, 0.1, 0.3, 0.2, 4, "FINISHED", 1.0, 0.5, 3, 96)
    allocation = AllocationRecord({"a.q_proj.weight": 0.1 + 0.2})
    known = Progress(1, ["outer", "block-0000"], [allocation, shape, layer, trained, distilled])
    assert Progress.from_dict(json.loads(json.dumps(known.as_dict()))) == known
    assert (known.layers, known.trained) == ([layer], [trained])
    assert (known.allocation, known.shape, known.distilled) == (allocation, shape, distilled)
    lost = replace(trained, first_loss=math.nan, last_loss=math.inf, status="NONFINITE")
    read = BlockRecord.from_dict(run_folder.plain(lost.as_dict()))
    assert math.isnan(read.first_loss)
    assert math.isnan(read.last_loss)
    assert replace(read, first_loss=0.2, last_loss=0.1, status="FINISHED") == trained

"""Which linears of a block are solved side by side on several devices, and which are cut."""

import pytest

from sparseopt.core.penalties.patterns import TopK
from sparseopt.layers.problem import LayerJob
from sparseopt.layers.side_by_side import LayerTask, quicker_side_by_side, share_out
from sparseopt.pruning import find_method

# Of a 7B model, and the experts of a mixture.
LLAMA = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
EXPERTS = {f"{i}.{name}": (768, 2048) for i in range(16) for name in ("gate", "up")}
EXPERTS |= {f"{i}.down": (2048, 768) for i in range(16)}
ATTENTION = [["q", "k", "v", "o"]]


def batches(shapes, devices):
    """The names of what is solved side by side, batch by batch."""
    tasks = [
        LayerTask(name, shape, shape, lambda: LayerJob(None, None, None, TopK(1))) for name, shape in shapes.items()
    ]
    return [[task.name for task in batch] for batch in share_out(tasks, find_method("maiht"), devices, "gpu")]


# So many devices save a small linear no time that their sums do not cost.
@pytest.mark.parametrize(
    ("devices", "beside"),
    [(2, [["q", "k"], ["v", "o"], ["gate", "up"]]), (4, ATTENTION), (8, ATTENTION), (512, ATTENTION)],
)
def test_whole_batches_of_one_shape_are_solved_side_by_side(devices, beside):
    assert batches(LLAMA, devices) == beside


def test_experts_fill_the_devices():
    found = batches(EXPERTS, 8)
    assert [len(batch) for batch in found] == [8] * 6
    assert {name for batch in found for name in batch} == set(EXPERTS)


def mine(layer, pattern):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("layers", "shape", "method", "devices", "platform", "beside"),
    [
        # Other devices rest where sums cost more than they gain.
        (1, (64, 64), find_method("maiht", "paper"), 2, "cpu", True),
        (1, (4096, 4096), find_method("maiht", "paper"), 2, "cpu", False),
        # SparseGPT inverts on every device, and sums once.
        (1, (4096, 1024), find_method("sparsegpt"), 8, "gpu", False),
        # A method that is not known fills all devices or is cut.
        (4, (64, 64), mine, 4, "gpu", True),
        (3, (64, 64), mine, 4, "gpu", False),
    ],
)
def test_what_is_quicker_depends_on_sums_and_method(layers, shape, method, devices, platform, beside):
    assert quicker_side_by_side(layers, shape, method, devices, platform) == beside

"""Which linears of a block are solved side by side on several devices, and which are cut."""

import pytest

from sparseopt.core.penalties.patterns import TopK
from sparseopt.layers.problem import LayerJob
from sparseopt.layers.side_by_side import LayerTask, quicker_side_by_side, share_out
from sparseopt.pruning import find_method

# Of a 7B model.
LLAMA = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}


def linears(shapes):
    def job():
        return LayerJob(None, None, None, TopK(1))

    return [LayerTask(name, shape, shape, job) for name, shape in shapes.items()]


def names(batches):
    return [[linear.name for linear in batch] for batch in batches]


@pytest.mark.parametrize(
    ("devices", "beside"),
    [
        (2, [["q", "k"], ["v", "o"], ["gate", "up"]]),
        (4, [["q", "k", "v", "o"]]),
        (8, [["q", "k", "v", "o"]]),
        # So many devices save a small linear no time that their sums do not cost.
        (512, [["q", "k", "v", "o"]]),
    ],
)
def test_whole_batches_of_one_shape_are_solved_side_by_side(devices, beside):
    assert names(share_out(linears(LLAMA), find_method("maiht"), devices, "gpu")) == beside


def test_experts_fill_the_devices():
    shapes = {f"expert {i} {name}": (768, 2048) for i in range(16) for name in ("gate", "up")}
    shapes |= {f"expert {i} down": (2048, 768) for i in range(16)}
    batches = names(share_out(linears(shapes), find_method("maiht"), 8, "gpu"))
    assert [len(batch) for batch in batches] == [8] * 6
    assert {name for batch in batches for name in batch} == set(shapes)


def test_other_devices_rest_where_sums_cost_more_than_they_gain():
    method = find_method("maiht", "paper")
    assert quicker_side_by_side(1, (64, 64), method, 2, "cpu")
    assert not quicker_side_by_side(1, (4096, 4096), method, 2, "cpu")
    # SparseGPT inverts on every device, and sums once.
    assert not quicker_side_by_side(1, (4096, 1024), find_method("sparsegpt"), 8, "gpu")


def test_a_method_that_is_not_known_fills_all_devices_or_is_cut():
    def mine(layer, pattern):
        raise NotImplementedError

    assert quicker_side_by_side(4, (64, 64), mine, 4, "gpu")
    assert not quicker_side_by_side(3, (64, 64), mine, 4, "gpu")

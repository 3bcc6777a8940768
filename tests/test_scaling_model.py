"""The cost model `docs/scaling_model.py` has the exchanges that are found in the compiled programs."""

import importlib.util
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parent.parent / "docs" / "scaling_model.py"


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("scaling_model", MODEL)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules["scaling_model"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling_model"]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_messages_and_bytes_of_a_step_on_a_grid(model, order):
    """As `tests.trend.over_devices` has them: one row for each factor of two products."""
    one = model.grid_iteration((40, 6, 5), order, 1)
    messages = 2 * (order + 1) * (model.CADENCE + 1)
    assert model.CADENCE * one.messages == pytest.approx(messages)
    assert model.CADENCE * one.sent == pytest.approx(messages * 4 * 6 * 5)


def test_bytes_of_an_iteration_of_maiht_and_of_a_block_s_grams(model):
    """As `tests.pruning.test_devices` has them."""
    assert model.layer_iteration(96, 64, 8).summed == 10 * 4 + 2 * 4
    assert model.calibration(64, 4096, 1, 8).summed == 4 * 64**2


def test_time_falls_with_the_devices_until_exchanges_take_over(model):
    machine = model.Machine(bandwidth=1e12, rate=1e13, latency=1e-5, link=1e10)
    seconds = [model.grid_iteration((4096, 4096), 0, d).seconds(machine, d) for d in (1, 2, 8, 512)]
    assert seconds[0] > seconds[1] > seconds[2]
    assert model.grid_iteration((4096, 4096), 0, 512).exchange_seconds(machine, 512) > seconds[3] / 2


def test_linears_of_a_block_share_the_devices(model):
    machine = model.Machine(1e12, 1e13, 1e-5, 1e10)
    shape = (64, 64)
    once = model.layer_iteration(*shape, 1).seconds(machine, 1)
    assert model.block_seconds({shape: 16}, machine, 1) == pytest.approx(16 * once)
    # As many devices as linears, or half: nothing is exchanged.
    assert model.block_seconds({shape: 16}, machine, 16) == pytest.approx(once)
    assert model.block_seconds({shape: 16}, machine, 8) == pytest.approx(2 * once)
    # One that is left over is cut where that pays.
    large = (8192, 8192)
    cut = model.layer_iteration(*large, 8).seconds(machine, 8)
    assert model.block_seconds({large: 9}, machine, 8) == pytest.approx(
        model.layer_iteration(*large, 1).seconds(machine, 1) + cut
    )

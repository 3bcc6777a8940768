"""Two and four real processes, joined by gloo, give the results of one device: mAIHT, ADMM, Doge-ADMM."""

from pathlib import Path

import numpy as np
import pytest

from tests.processes import run_scripts
from tests.solving_together import LAYERS, solved

SCRIPT = Path(__file__).parent / "solving_together.py"
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def alone():
    return solved(None)


@pytest.fixture(scope="module", params=[2, 4], ids=["two processes", "four processes"])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    ended = run_scripts(SCRIPT, request.param, folder, str(folder / "found.npz"))
    assert [process.status for process in ended] == [0] * request.param, ended[0].err
    with np.load(folder / "found.npz") as arrays:
        return {name: arrays[name] for name in arrays}


@pytest.mark.parametrize("method", LAYERS)
def test_layers_have_the_same_support_and_weights_to_rounding(together, alone, method):
    ours, theirs = together[method], alone[method]
    assert np.count_nonzero(ours) == ours.size // 2
    np.testing.assert_array_equal(ours != 0, theirs != 0)
    # Conjugate gradients, which refit after ADMM, let rounding grow with the condition of the Gram.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 if method == "admm" else 1e-5)
    assert together[f"{method} steps"] == alone[f"{method} steps"]


@pytest.mark.parametrize("name", ["grid", "graph"])
def test_fits_have_the_same_steps_certificates_and_values_to_rounding(together, alone, name):
    assert together[f"{name} gap"] <= 1e-8
    assert together[f"{name} steps"] == alone[f"{name} steps"]
    assert together[f"{name} objective"] == pytest.approx(float(alone[f"{name} objective"]), rel=1e-12)
    np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=1e-10)

"""Figures are closed after each test; one tiny model and text for all."""

import matplotlib
import pytest

from tests.experiments.inputs import WINDOWS, write_inputs

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """What tasks of models share; no test writes into its folders."""
    source, text = write_inputs(tmp_path_factory.mktemp("inputs"))
    return {"name": "tiny", "source": str(source), "calibration": text, "evaluation": text, **WINDOWS}

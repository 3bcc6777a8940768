"""One tiny model and text for all commands."""

import pytest

from tests.experiments.inputs import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """The folder of the model, and the text; no test writes into them."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))

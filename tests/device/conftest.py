"""Collected by `-m device` alone: these tests run on JAX's default device, whatever that is."""

import jax
import pytest


def pytest_addoption(parser):
    parser.addoption("--any", action="store_true", help="run on a CPU, too")


def pytest_ignore_collect(collection_path, config):
    return True if config.option.markexpr != "device" else None


@pytest.fixture(autouse=True)
def _on_an_accelerator(pytestconfig):
    if jax.default_backend() == "cpu" and not pytestconfig.getoption("--any"):
        pytest.skip("SKIPPED: needs a GPU or TPU, and JAX finds none (pip install 'jax[cuda13]' or 'jax[tpu]')")

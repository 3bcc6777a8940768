"""The rates of the machine are those of work that was done: flops and bytes over the time they took."""

import time

import jax
import pytest

from sparseopt.system import speed


def test_rates_are_those_of_the_calls(monkeypatch):
    """With calls that take a known time, the rate is the work over that time."""
    monkeypatch.setattr(jax, "jit", lambda function: lambda *arguments: time.sleep(0.02))
    size = 1024 if jax.default_backend() == "cpu" else 4096
    assert speed.measure_gflops(0.1) == pytest.approx(2 * size**3 / 0.02 / 1e9, rel=0.3)
    assert speed.measure_gigabytes(0.1) == pytest.approx(2 * 4 * 2**26 / 0.02 / 1e9, rel=0.3)

"""Shared by all tests: random arrays from one seeded generator, and the command as a person types it."""

import re
import sys

import jax
import numpy as np
import pytest

from sparseopt import cli


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251125)


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_module():
    """A compiled program holds maps of memory, of which a process has 65,530: the suite's programs need more."""
    yield
    jax.clear_caches()


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: exit status and what it printed, without its line breaks."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparseopt", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        shown = capsys.readouterr()
        return status, re.sub(r"\s+", " ", shown.out), re.sub(r"\s+", " ", shown.err)

    return run

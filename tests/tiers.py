"""Marks test cases that compile a lot for a fact that other cases check as well."""

from collections.abc import Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test: the kept ones for `make test` too, the others for `make test-thorough` alone."""
    cases = list(cases)
    assert all(case in cases for case in kept), "a kept case is none of the cases"
    marks = {True: (), False: (pytest.mark.thorough,)}
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=marks[c in kept]) for c in cases]

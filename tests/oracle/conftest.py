"""Records of the family tests for the table in the documentation: one JSON line for each passed test.

They are written to the file that SPARSEOPT_FAMILY_RECORDS names; `make families` sets it.
"""

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sparseopt.system.machine import environment


class Proof:
    """The facts that a test states last, after its assertions."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def record(self, family: str, fact: str, **details: Any) -> None:
        """Keep a fact about a family."""
        self.records.append({"family": family, "fact": fact, **details})


@pytest.fixture
def proof() -> Iterator[Proof]:
    """Facts are appended to the file of records when the test has ended; a failing test states none."""
    found = Proof()
    yield found
    file = os.environ.get("SPARSEOPT_FAMILY_RECORDS")
    if file:
        place = environment()
        place["versions"]["torch"] = version("torch")
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**fact, **place}) + "\n" for fact in found.records)

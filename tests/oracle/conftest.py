"""The reference, transformers in torch, and records of what the family tests prove, for the documentation.

The records are JSON lines, one for each passed test, in the file that SPARSEOPT_FAMILY_RECORDS names; `make families`
sets it.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseopt.system.machine import environment

# `proof(family, fact, **details)` keeps a fact that a test states last, after its assertions.
Proof = Callable[..., None]


@pytest.fixture
def proof() -> Iterator[Proof]:
    """Facts are appended to the file of records when the test has ended; a failing test states none."""
    found: list[dict[str, Any]] = []
    yield lambda family, fact, **details: found.append({"family": family, "fact": fact, **details})
    file = os.environ.get("SPARSEOPT_FAMILY_RECORDS")
    if file:
        place = environment()
        place["versions"]["torch"] = version("torch")
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**fact, **place}) + "\n" for fact in found)


def reference(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it; every tensor of it must come from the files, and every file be of it."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": "float32", "attn_implementation": "eager"} | options
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Of a folder, or of a model that is loaded."""
    import torch

    loaded = reference(model) if isinstance(model, Path) else model
    with torch.no_grad():
        return loaded(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


@pytest.fixture
def offline(monkeypatch):
    """A test that asks for the network fails."""

    def refuse(self, address):
        raise AssertionError(f"the test asked for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)

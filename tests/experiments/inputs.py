"""Tiny inputs of runs and commands: a model with a tokenizer, a text, and settings of which all compile the same."""

from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.tasks import model as model_task
from sparseopt.pruning import prune_model
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import SQUARE, TOKENIZER

TOY = "tests.experiments.toy.Toy"
TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60
# Windows of calibration and evaluation, as settings and as options.
WINDOWS = {
    "windows": 4, "seqlen": 32, "heldout_windows": 2, "evaluation_windows": 2, "evaluation_seqlen": 48,
}  # fmt: skip
CALIBRATED = ("--windows", 4, "--seqlen", 32, "--heldout-windows", 2)


def quiet(text, done, total):
    del done, total, text


def write_inputs(folder: Path, dtype: Any = np.float32, **changes: Any) -> tuple[Path, str]:
    """A model with a tokenizer in `folder/source`; the text `file:folder/text.txt`."""
    config = tiny_config(**SQUARE | {"dtype": np.dtype(dtype).name} | changes)
    source = write_folder(folder / "source", config, random_tensors(config, np.random.default_rng(3), dtype))
    (source / "tokenizer.json").write_text(TOKENIZER)
    (folder / "text.txt").write_text(TEXT)
    return source, f"file:{folder / 'text.txt'}"


def watch_runs(monkeypatch, error=None, where=bool):
    """The method and sparsity of the recipe of each run, in order; a run for whose recipe `where` holds raises."""
    runs = []

    def watched(source, output, recipe, **others):
        runs.append((recipe.method, recipe.sparsity))
        if error and where(recipe):
            raise error
        return prune_model(source, output, recipe, **others)

    monkeypatch.setattr(model_task, "prune_model", watched)
    return runs

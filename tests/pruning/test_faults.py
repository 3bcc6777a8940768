"""Faults of the machine during a run: it ends with one clear message or continues, and no work is lost.

`STRUCK` lists those that come inside a run; those of memory inside a solve are in `test_split`, SIGKILL in
`test_resumption`.
"""

import builtins
import errno
import io
import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import ModelError, open_model
from sparseopt.pruning import LayerRecord, PruningError, Recipe, prune_model
from sparseopt.pruning.base import activations
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner, nonfinite_windows
from sparseopt.pruning.run.card import CARD
from sparseopt.shell.prune import RESUMABLE
from sparseopt.shell.prune_progress import PruneProgress
from sparseopt.system.files import DiskError
from sparseopt.system.run_folder import RECORDS
from tests.pruning.whole_runs import model_bytes, tensors_of, write_model

FIELDS = {"method": "wanda", "windows": 4, "seqlen": 16, "heldout_windows": 0}


@pytest.fixture(scope="module")
def source(models):
    """All linears and Grams of one shape: one program each to compile."""
    return models("square")


@pytest.fixture(scope="module")
def recipe(text):
    return Recipe(**FIELDS, calibration=text)


@pytest.fixture(scope="module")
def whole(source, recipe, tmp_path_factory):
    """The files that an unbroken run makes, and how often it reads a tensor."""
    folder, reads = tmp_path_factory.mktemp("unbroken") / "out", itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "fromfile", failing(np.fromfile, -1, None, reads))
        prune_model(source, folder, recipe)
    return SimpleNamespace(files=model_bytes(folder), reads=next(reads))


@pytest.fixture
def arguments(source, text, tmp_path):
    """The same run from the shell."""
    given = (f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items())
    return ["prune", str(source), "--output", str(tmp_path / "out"), "--calibration", text, *given]


def failing(function, number, error, calls=None):
    """The function, whose call of this number fails."""
    calls = calls or itertools.count()

    def called(*given, **more):
        if next(calls) == number:
            raise error
        return function(*given, **more)

    return called


def full_disk(name, count):
    """An `open` for which the disk is full at this write to the file: half of it arrives."""
    usual, writes = open, itertools.count(1)

    class Full(io.FileIO):
        def write(self, content):
            if next(writes) < count:
                return super().write(content)
            super().write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode="r", *rest, **fields):
        named = Path(str(path)).name == name and "r" not in mode
        return Full(path, mode.replace("b", "")) if named else usual(path, mode, *rest, **fields)

    return opened


# The file that the disk does not take and the write at which it is full, or the number of the read that fails; then how
# the run ends: the error, its words, and the blocks that it has finished, where that is known.
FULL, BAD = "No space left on device", r"could not read \S+\.safetensors from byte [\d,]+ on: Input/output error"
STRUCK = {
    "fingerprint": ((".run.json.tmp", 1), DiskError, FULL),
    "tensors outside the blocks": ((".model-outer.safetensors.tmp", 2), DiskError, FULL),
    "record in the second block": (("records.jsonl", 11), DiskError, FULL, 1),
    "middle of a shard": ((".model-block-0001.safetensors.tmp", 4), DiskError, FULL),
    "last tensor of the last shard": ((".model-block-0002.safetensors.tmp", 10), DiskError, FULL),
    "index": ((".model.safetensors.index.json.tmp", 1), DiskError, FULL),
    "summary": ((".summary.json.tmp", 1), DiskError, FULL),
    # Each of 29 tensors is read once to check it, then outside the blocks, then block by block.
    "first look": (2, ModelError, BAD, 0),
    "second block": (59, ModelError, BAD, 1),
    "reading back": (-2, ModelError, BAD, 3),
    "source cut short": (None, ModelError, "became shorter while it was read; copy it again", 2),
    "source gone": (None, ModelError, "No such file", 2),
    "out of memory": (None, PruningError, "memory ran out .*RESOURCE_EXHAUSTED: 9 bytes", 2),
}


def strike(patch: pytest.MonkeyPatch, name: str, weights: Path, reads: int) -> Any:
    """Have the fault come; an observer where it comes with an event."""
    place = STRUCK[name][0]
    if isinstance(place, tuple):
        opened = full_disk(*place)
        for module in (io, builtins):  # that of `Path.open`, and the plain one
            patch.setattr(module, "open", opened)
    elif place is not None:
        error = OSError(errno.EIO, os.strerror(errno.EIO))
        patch.setattr(np, "fromfile", failing(np.fromfile, place % reads, error))
    elif name == "out of memory":
        error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes.\nmore")
        patch.setattr(BlockRunner, "forward", failing(BlockRunner.forward, 2, error))
    else:

        def lose(event, done, total):
            if isinstance(event, LayerRecord) and event.block == 1 and weights.exists():
                weights.unlink() if "gone" in name else os.truncate(weights, weights.stat().st_size // 2)

        return lose
    return None


@pytest.mark.parametrize("name", STRUCK)
def test_a_fault_ends_the_run_in_a_sentence_and_it_goes_on(tmp_path, source, recipe, whole, monkeypatch, name):
    place, error, words, *blocks = STRUCK[name]
    moved, folder = shutil.copytree(source, tmp_path / source.name), tmp_path / "out"
    observer = strike(monkeypatch, name, moved / "model.safetensors", whole.reads)
    with pytest.raises(error, match=words) as caught:
        prune_model(moved, folder, recipe, observer=observer)
    monkeypatch.undo()
    if error is DiskError:
        file = folder / place[0].removeprefix(".").removesuffix(".tmp")
        assert f"could not write {file}: {FULL}" in str(caught.value)
    if observer is not None:
        assert str(moved / "model.safetensors") in str(caught.value)
        shutil.copy(source / "model.safetensors", moved)
    # A run that had written nothing leaves no folder, and what is finished has the bytes of an unbroken run; only the
    # card is written once more.
    left = model_bytes(folder) if folder.exists() else {}
    assert {file: left[file] for file in left if file != CARD} == {f: whole.files[f] for f in left if f != CARD}
    if (folder / RECORDS).exists():
        assert all(json.loads(line) for line in (folder / RECORDS).read_text().splitlines())
    report = prune_model(moved, folder, recipe)
    assert blocks in ([], [report.resumed_blocks])
    assert model_bytes(folder) == whole.files
    assert model_bytes(moved) == model_bytes(source)


def test_a_limit_of_the_system_on_files_ends_the_command_with_status_1(tmp_path, whole, arguments, command):
    """RLIMIT_FSIZE: the kernel itself refuses, in the middle of the first block's shard."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = len(whole.files["model-block-0000.safetensors"]) - 4096
    assert len(whole.files["model-outer.safetensors"]) < least
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, limits[1]))
    try:
        status, _, err = command(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"error: could not write {tmp_path / 'out' / 'model-block-0000.safetensors'}: File too large" in err
    assert "finished and safe are: model-outer.safetensors; raise the limit" in err
    assert command(*arguments)[0] == 0
    assert model_bytes(tmp_path / "out") == whole.files


def test_a_command_that_gets_sigterm_finishes_its_block_and_ends_with_status_75(
    tmp_path, source, recipe, whole, arguments, command, monkeypatch
):
    def told(progress, event, done, total):
        if isinstance(event, LayerRecord) and event.block == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PruneProgress, "__call__", told)
    status, _, err = command(*arguments)
    assert status == RESUMABLE == 75
    assert "stopped after block 2 of 3; the same call resumes there" in err
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == whole.files


@pytest.mark.parametrize(("window", "tokens"), [(2, "calibration"), (4, "held-out")])
def test_one_token_that_overflows_cannot_get_lost_in_a_gram(tmp_path, monkeypatch, window, tokens):
    tensors = tensors_of("square")
    # The token 40 alone overflows, in front of the first block, in float32.
    tensors["model.embed_tokens.weight"][:, 5] = 0
    tensors["model.embed_tokens.weight"][40, 5] = 1
    tensors["model.layers.0.input_layernorm.weight"][5] = 1e25
    overflowing = write_model(tmp_path / "overflowing", "square", tensors)
    monkeypatch.setattr(activations, "BATCH_TOKENS", 32)
    windows = np.random.default_rng(8).integers(0, 40, (6, 16)).astype(np.int32)
    windows[window, 9] = 40
    found = f"in windows {window} of 4" if tokens == "calibration" else f"in windows {window - 4} of 2"
    with pytest.raises(PruningError, match=rf"in block 0, attention_input, on the {tokens} tokens, {found}: "):
        prune_model(overflowing, tmp_path / "out", Recipe(method="wanda", calibration=windows, heldout_windows=2))
    model = open_model(overflowing)
    batches = make_batches(model.embedding()(jnp.asarray(windows)))
    assert len(batches) == 3
    assert nonfinite_windows(model.block(0), batches, "attention_input") == [window]


def test_weights_that_overflow_in_a_later_block_leave_the_earlier_blocks_whole(tmp_path, recipe, whole):
    tensors = tensors_of("square")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e30
    bad = write_model(tmp_path / "bad", "square", tensors)
    with pytest.raises(PruningError, match="non-finite activations in block 2, mlp_hidden, on the calibration tokens"):
        prune_model(bad, tmp_path / "out", recipe)
    found = model_bytes(tmp_path / "out")
    for shard in ("model-block-0000.safetensors", "model-block-0001.safetensors"):
        assert found[shard] == whole.files[shard]

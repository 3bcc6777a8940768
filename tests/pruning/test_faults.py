"""Faults of the machine during a run: it ends with one clear message or continues, and no work is lost.

`STRUCK` lists those that come inside a run; those of memory inside a solve are in `test_split`, SIGKILL in
`test_resumption`.
"""

import builtins
import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
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
from sparseopt.system.files import DiskError
from sparseopt.system.run_folder import RECORDS, FolderError
from tests.pruning.whole_runs import model_bytes, tensors_of, write_model

# The file that the disk does not take, and the write to it at which it is full.
WRITES = {
    "lock": ("run.lock", 1),
    "fingerprint": (".run.json.tmp", 1),
    "tensors outside the blocks": (".model-outer.safetensors.tmp", 2),
    "first record": ("records.jsonl", 1),
    "record in the second block": ("records.jsonl", 11),
    "header of a shard": (".model-block-0001.safetensors.tmp", 1),
    "middle of a shard": (".model-block-0001.safetensors.tmp", 4),
    "last tensor of the last shard": (".model-block-0002.safetensors.tmp", 10),
    "tokenizer": (".tokenizer.json.tmp", 1),
    "configuration": (".config.json.tmp", 1),
    "index": (".model.safetensors.index.json.tmp", 1),
    "summary": (".summary.json.tmp", 1),
}
# Which read of a tensor fails: of 29 tensors read once to check them, then outside the blocks, then block by block; and
# how many blocks are then finished.
READS = {
    "first look": (3, 0),
    "outside the blocks": (30, 0),
    "first block": (35, 0),
    "second block": (60, 1),
    "last block": (80, 2),
    "reading back": (-2, 3),
}
# How a shell starts a process whose output nobody takes, or not as it is.
CONSOLES = {
    "a full disk": "> /dev/full",
    "none from the start": ">&-",
    "none at all": ">&- 2>&- <&-",
    "one of ASCII": "PYTHONIOENCODING=ascii",
}
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
    """What an unbroken run makes."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    prune_model(source, folder, recipe)
    return model_bytes(folder)


@pytest.fixture
def arguments(source, text, tmp_path):
    """The same run from the shell."""
    given = (f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items())
    return ["prune", str(source), "--output", str(tmp_path / "out"), "--calibration", text, *given]


class FullDisk:
    """Takes the place of `open`: at the given write to a file half of it arrives, then the disk is full."""

    def __init__(self, name, count):
        self.name, self.left, self._open = name, count, open

    def open(self, path, mode="r", *rest, **fields):
        stream = self._open(path, mode, *rest, **fields)
        named = isinstance(path, Path) and path.name == self.name
        return _Stream(stream, self) if named and "r" not in mode else stream


class _Stream:
    def __init__(self, stream, disk):
        self._stream, self._disk = stream, disk

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stream.close()

    def write(self, content):
        self._disk.left -= 1
        if self._disk.left == 0:
            self._stream.write(content[: len(content) // 2])
            self._stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._stream.write(content)


class BadSector:
    """Takes the place of `numpy.fromfile`: the given call fails."""

    def __init__(self, count):
        self.calls, self.count, self._read = 0, count, np.fromfile

    def __call__(self, *rest, **fields):
        self.calls += 1
        if self.calls == self.count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._read(*rest, **fields)


@pytest.fixture(scope="module")
def reads(source, recipe, tmp_path_factory):
    """How often an unbroken run reads a tensor."""
    counting = BadSector(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "fromfile", counting)
        prune_model(source, tmp_path_factory.mktemp("counted") / "out", recipe)
    return counting.calls


class ShortMemory:
    """Takes the place of `BlockRunner.forward`: the third call finds no memory."""

    def __init__(self):
        self.calls, self._forward = 0, BlockRunner.forward

    def forward(self, runner, block, batches):
        self.calls += 1
        if self.calls == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
        return self._forward(runner, block, batches)


@dataclass(frozen=True)
class Outcome:
    """How a run ends: the error, its words, and the blocks that it has finished, where that is known."""

    error: type
    words: str
    blocks: int | None = None


OUT_OF_MEMORY = (
    r"memory ran out \(RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\.\); finished blocks are stored: start"
)
BAD_READ = r"could not read \S+\.safetensors from byte [\d,]+ on: Input/output error; check"
STRUCK = {
    **{("full disk", name): Outcome(DiskError, "No space left on device") for name in WRITES},
    ("full disk", "lock"): Outcome(FolderError, "No space left on device"),
    **{("read error", name): Outcome(ModelError, BAD_READ, blocks) for name, (_, blocks) in READS.items()},
    ("read error", "source cut short under way"): Outcome(
        ModelError, "became shorter while it was read; copy it again and start the same", 2
    ),
    ("read error", "source gone under way"): Outcome(ModelError, "No such file", 2),
    ("out of memory", "between layers"): Outcome(PruningError, OUT_OF_MEMORY, 2),
}


def strike(patch: pytest.MonkeyPatch, kind: str, name: str, source: Path, reads: int) -> Any:
    """Have the fault come; an observer where it comes with an event."""
    if kind == "full disk":
        disk = FullDisk(*WRITES[name])
        for module in (io, builtins):  # that of `Path.open`, and the plain one
            patch.setattr(module, "open", disk.open)
    elif name in READS:
        count, _ = READS[name]
        patch.setattr(np, "fromfile", BadSector(count if count > 0 else reads + count))
    elif kind == "out of memory":
        memory = ShortMemory()
        patch.setattr(BlockRunner, "forward", lambda *given: memory.forward(*given))
    else:
        weights = source / "model.safetensors"

        def lose(event, done, total):
            if isinstance(event, LayerRecord) and event.block == 1 and weights.exists():
                if "gone" in name:
                    weights.unlink()
                else:
                    os.truncate(weights, weights.stat().st_size // 2)

        return lose
    return None


@pytest.mark.parametrize(("kind", "name"), STRUCK)
def test_a_fault_ends_the_run_in_a_sentence_and_it_goes_on(
    tmp_path, source, recipe, whole, reads, monkeypatch, kind, name
):
    moved, folder, outcome = tmp_path / source.name, tmp_path / "out", STRUCK[kind, name]
    shutil.copytree(source, moved)
    observer = strike(monkeypatch, kind, name, moved, reads)
    with pytest.raises(outcome.error, match=outcome.words) as caught:
        prune_model(moved, folder, recipe, observer=observer)
    monkeypatch.undo()
    said = str(caught.value)
    if outcome.error is DiskError:
        file = WRITES[name][0].removeprefix(".").removesuffix(".tmp")
        assert f"could not write {folder / file}: " in said
        assert re.search(r"\([\d,]+ bytes were to be written, [\d,]+ bytes are free there\)", said)
        assert said.endswith("make room on the disk and start the same command again")
    if observer is not None:
        assert str(moved / "model.safetensors") in said
        shutil.copy(source / "model.safetensors", moved)
    # A run that had written nothing leaves no folder, and what is finished has the bytes of an unbroken run; only the
    # card is written once more.
    left = model_bytes(folder) if folder.exists() else {}
    assert {file: left[file] for file in left if file != CARD} == {file: whole[file] for file in left if file != CARD}
    if (folder / RECORDS).exists():
        assert all(json.loads(line) for line in (folder / RECORDS).read_text().splitlines())
    report = prune_model(moved, folder, recipe)
    assert outcome.blocks in (None, report.resumed_blocks)
    assert model_bytes(folder) == whole
    assert model_bytes(moved) == model_bytes(source)


def test_a_limit_of_the_system_on_files_ends_the_command_with_status_1(tmp_path, whole, arguments, command):
    """RLIMIT_FSIZE: the kernel itself refuses, in the middle of the first block's shard."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    shard = len(whole["model-block-0000.safetensors"])
    assert len(whole["model-outer.safetensors"]) < shard - 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard - 4096, limits[1]))
    try:
        status, _, err = command(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"error: could not write {tmp_path / 'out' / 'model-block-0000.safetensors'}: File too large" in err
    assert "finished and safe are: model-outer.safetensors; raise the limit" in err
    assert "Traceback" not in err
    status, _, err = command(*arguments)
    assert status == 0, err
    assert model_bytes(tmp_path / "out") == whole


# In a name space of its own, where a user may mount.
FULL_FILE_SYSTEM = """
import os, shutil, subprocess, sys
from pathlib import Path
place = sys.argv.pop(1)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
from sparseopt.shell import app as cli
from sparseopt.shell.prune_progress import PruneProgress
from sparseopt.pruning import LayerRecord
ballast, show = Path(place) / "ballast", PruneProgress.__call__

def fill(progress, event, done, total):
    if isinstance(event, LayerRecord) and event.block == 1 and not ballast.exists():
        with ballast.open("wb", buffering=0) as stream:
            try:
                while stream.write(bytes(4096)):
                    pass
            except OSError:
                pass
    show(progress, event, done, total)

PruneProgress.__call__ = fill
status = 0
try:
    cli.main()
except SystemExit as stop:
    status = stop.code or 0
print("first", status, flush=True)
ballast.unlink()
PruneProgress.__call__ = show
try:
    cli.main()
finally:
    shutil.copytree(Path(place) / "out", Path(place).parent / "copied")
"""


@pytest.mark.processes
def test_a_full_file_system_is_outlived(tmp_path, whole, arguments):
    place = tmp_path / "small"
    place.mkdir()
    mounts = ["unshare", "-Urm"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*mounts, "mount", "-t", "tmpfs", "none", place], check=False).returncode
    ):
        pytest.skip("SKIPPED: this machine lets no user mount a file system (unshare -Urm)")
    arguments[arguments.index("--output") + 1] = str(place / "out")
    done = subprocess.run(
        [*mounts, sys.executable, "-c", FULL_FILE_SYSTEM, str(place), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "first 1\n" in done.stdout
    assert re.search(r"could not write \S+/(records.jsonl|model-block-0001.safetensors): No space left", done.stderr)
    assert "0 bytes are free there" in done.stderr
    assert "Traceback" not in done.stderr
    assert model_bytes(tmp_path / "copied") == whole


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model of which the token 40 alone overflows, in front of the first block, in float32."""
    tensors = tensors_of("square")
    tensors["model.embed_tokens.weight"][:, 5] = 0
    tensors["model.embed_tokens.weight"][40, 5] = 1
    tensors["model.layers.0.input_layernorm.weight"][5] = 1e25
    return write_model(tmp_path_factory.mktemp("overflowing"), "square", tensors)


@pytest.mark.parametrize(("window", "tokens"), [(2, "calibration"), (4, "held-out")])
def test_one_token_that_overflows_cannot_get_lost_in_a_gram(tmp_path, overflowing, monkeypatch, window, tokens):
    monkeypatch.setattr(activations, "BATCH_TOKENS", 32)
    windows = np.random.default_rng(8).integers(0, 40, (6, 16)).astype(np.int32)
    windows[window, 9] = 40
    recipe = Recipe(method="wanda", calibration=windows, heldout_windows=2)
    place = window if tokens == "calibration" else window - 4
    message = rf"in block 0, attention_input, on the {tokens} tokens, in windows {place} of {4 if place else 2}: "
    with pytest.raises(PruningError, match=message):
        prune_model(overflowing, tmp_path / "out", recipe)
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
    shards = {"model-block-0000.safetensors", "model-block-0001.safetensors"}
    found = model_bytes(tmp_path / "out")
    assert {name: found[name] for name in shards} == {name: whole[name] for name in shards}
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    worse = write_model(tmp_path / "worse", "square", tensors)
    with pytest.raises(ModelError, match=r"model.layers.2.mlp.up_proj.weight in .* holds 1 NaN or infinite values"):
        prune_model(worse, tmp_path / "refused", recipe)
    assert not (tmp_path / "refused").exists()


@pytest.mark.processes
def test_a_pruning_whose_pager_was_closed_goes_on_to_its_end(tmp_path, whole, arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "sparseopt", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "default --sparsity 0.5: that fraction of the weights of every linear layer\n"
    process.stdout.close()
    complaints = process.stderr.read()
    assert process.wait() == 0
    assert complaints == ""
    assert model_bytes(tmp_path / "out") == whole
    assert (tmp_path / "out" / "summary.json").is_file()


SPEAKING = """
import os, sys
from sparseopt.shell import console
# The first file that is opened must not be what others print to.
with open(sys.argv[1], "wb") as stream:
    try:
        os.write(1, b"printed by a library")
    except OSError:
        pass
    for _ in range(3):
        console.say("error ‖X (V - W)ᵀ‖², na\\u00efve, \\udcff")
        console.console.print(console.comparison_table("title", ["a", "b"], [["1", "²"]]))
        console.errors.print("told")
    stream.write(b"whole")
"""


@pytest.mark.processes
@pytest.mark.parametrize(("console", "shell"), CONSOLES.items())
def test_no_console_ends_what_is_told_to_it(tmp_path, console, shell):
    environment, redirect = (shell, "") if "=" in shell else ("", shell)
    line = f'{environment} "$0" -c "$1" "$2" {redirect}'
    call = ["bash", "-c", line, sys.executable, SPEAKING, str(tmp_path / "file")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "" if console == "none at all" else "told\n" * 3)
    assert (tmp_path / "file").read_bytes() == b"whole"
    if console == "one of ASCII":
        assert done.stdout.count("error ?X (V - W)??") == 3
        assert "| 1" in done.stdout


# The process gets SIGTERM from outside while its second block is under way.
SCHEDULED = """
import os, signal, subprocess, sys
from sparseopt.shell import app as cli
from sparseopt.shell.prune_progress import PruneProgress
from sparseopt.pruning import LayerRecord
show = PruneProgress.__call__

def told(progress, event, done, total):
    show(progress, event, done, total)
    if isinstance(event, LayerRecord) and event.layer == "model.layers.1.self_attn.k_proj":
        subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)

PruneProgress.__call__ = told
cli.main()
"""


@pytest.mark.processes
def test_a_process_that_gets_sigterm_finishes_its_block(tmp_path, source, recipe, whole, arguments):
    call = [sys.executable, "-c", SCHEDULED, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == RESUMABLE == 75, done.stderr
    assert "stopped after block 2 of 3; the same call resumes there" in done.stderr
    assert "Traceback" not in done.stderr
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == whole

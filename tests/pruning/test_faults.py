"""Faults of the machine during a run: it ends with one clear message or continues, and no work is lost.

`FAULTS` lists all faults by kind.
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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import ModelError, open_model
from sparseopt.pruning import LayerRecord, PruningError, Recipe, prune_model
from sparseopt.pruning.base import activations
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner, nonfinite_windows
from sparseopt.shell.prune import RESUMABLE
from sparseopt.system.files import DiskError
from sparseopt.system.run_folder import RECORDS, FolderError
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER
from tests.pruning.test_resumption import model_bytes

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
# Which read of a tensor fails: of 29 tensors read once to check them, then outside the blocks, then block by block.
READS = {
    "first look": 3,
    "outside the blocks": 30,
    "first block": 35,
    "second block": 60,
    "last block": 80,
    "reading back": -2,
}
# How a shell starts a process whose output nobody takes, or not as it is.
CONSOLES = {
    "a full disk": "> /dev/full",
    "none from the start": ">&-",
    "none at all": ">&- 2>&- <&-",
    "one of ASCII": "PYTHONIOENCODING=ascii",
}
FAULTS = [
    *(("full disk", name) for name in WRITES),
    ("full disk", "limit on the size of a file"),
    ("full disk", "a full file system"),
    *(("read error", name) for name in READS),
    ("read error", "source cut short under way"),
    ("read error", "source gone under way"),
    ("non-finite", "one token of one window overflows"),
    ("non-finite", "held-out window overflows"),
    ("non-finite", "weights of a later block overflow"),
    ("non-finite", "NaN in the weights"),
    ("console", "a pager that was closed"),
    *(("console", name) for name in CONSOLES),
    ("out of memory", "between layers"),
    # In `test_split`.
    *(("out of memory", name) for name in ("said by the device", "said by the host", "in every size", "a real limit")),
    # Here and in `test_resumption`.
    ("signal", "SIGTERM"),
    ("signal", "SIGKILL"),
]

# All linears and Grams of one shape: one program each to compile.
CONFIG = tiny_config(intermediate_size=32, num_key_value_heads=4)
SETTINGS = ["--method", "wanda", "--windows", "4", "--seqlen", "16", "--heldout-windows", "0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder / "source", CONFIG, random_tensors(CONFIG, np.random.default_rng(7)))
    (folder / "source" / "tokenizer.json").write_text(TOKENIZER)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and then the dog tells all.\n" * 20)
    return folder / "source"


@pytest.fixture(scope="module")
def recipe(source):
    return Recipe(
        method="wanda", windows=4, seqlen=16, heldout_windows=0, calibration=f"file:{source.parent / 'text.txt'}"
    )


@pytest.fixture(scope="module")
def whole(source, recipe, tmp_path_factory):
    """What an unbroken run makes."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    prune_model(source, folder, recipe)
    return model_bytes(folder)


@pytest.fixture
def arguments(source, tmp_path):
    """The same run from the shell."""
    text = f"file:{source.parent / 'text.txt'}"
    return ["prune", str(source), "--output", str(tmp_path / "out"), "--calibration", text, *SETTINGS]


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


@pytest.mark.parametrize("name", WRITES)
def test_a_disk_that_becomes_full_ends_the_run_in_a_sentence_and_it_goes_on(
    tmp_path, source, recipe, whole, monkeypatch, name
):
    file, count = WRITES[name]
    disk = FullDisk(file, count)
    for module in (io, builtins):  # that of `Path.open`, and the plain one
        monkeypatch.setattr(module, "open", disk.open)
    with pytest.raises(FolderError if name == "lock" else DiskError) as caught:
        prune_model(source, tmp_path / "out", recipe)
    monkeypatch.undo()
    text = str(caught.value)
    assert "No space left on device" in text
    if name != "lock":
        final = file.removeprefix(".").removesuffix(".tmp")
        assert f"could not write {tmp_path / 'out' / final}: " in text
        assert re.search(r"\([\d,]+ bytes were to be written, [\d,]+ bytes are free there\)", text)
        assert text.endswith("make room on the disk and start the same command again")
    # A run that had written nothing leaves no folder.
    left = [entry.name for entry in (tmp_path / "out").glob("*")]
    assert not [entry for entry in left if entry.endswith(".tmp")]
    if RECORDS in left:
        assert all(json.loads(line) for line in (tmp_path / "out" / RECORDS).read_text().splitlines())
    prune_model(source, tmp_path / "out", recipe)
    assert model_bytes(tmp_path / "out") == whole


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


class BadSector:
    """Takes the place of `numpy.fromfile`: the given call fails."""

    def __init__(self, count):
        self.calls, self.count, self._read = 0, count, np.fromfile

    def __call__(self, *rest, **fields):
        self.calls += 1
        if self.calls == self.count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._read(*rest, **fields)


@pytest.mark.parametrize("name", READS)
def test_a_read_error_names_the_file_and_the_run_goes_on(tmp_path, source, recipe, whole, monkeypatch, name):
    counting = BadSector(0)
    monkeypatch.setattr(np, "fromfile", counting)
    prune_model(source, tmp_path / "counted", recipe)
    count = READS[name] if READS[name] > 0 else counting.calls + READS[name]
    monkeypatch.setattr(np, "fromfile", BadSector(count))
    with pytest.raises(
        ModelError, match=r"could not read \S+\.safetensors from byte [\d,]+ on: Input/output error; check"
    ):
        prune_model(source, tmp_path / "out", recipe)
    monkeypatch.undo()
    report = prune_model(source, tmp_path / "out", recipe)
    assert report.resumed_blocks == {"second block": 1, "last block": 2, "reading back": 3}.get(name, 0)
    assert model_bytes(tmp_path / "out") == whole


@pytest.mark.parametrize("lost", ["cut short", "gone"])
def test_a_source_that_changes_under_way_is_named_and_the_run_goes_on(tmp_path, source, recipe, whole, lost):
    moved = shutil.copytree(source, tmp_path / "source")
    weights = moved / "model.safetensors"

    def lose(event, done, total):
        if isinstance(event, LayerRecord) and event.block == 1 and weights.exists():
            if lost == "gone":
                weights.unlink()
            else:
                os.truncate(weights, weights.stat().st_size // 2)

    message = "No such file" if lost == "gone" else "became shorter while it was read; copy it again and start the same"
    with pytest.raises(ModelError, match=rf"{re.escape(str(weights))}.*{message}"):
        prune_model(moved, tmp_path / "out", recipe, observer=lose)
    shutil.copy(source / "model.safetensors", weights)
    assert prune_model(moved, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == whole
    assert model_bytes(source)


@pytest.fixture
def overflowing(tmp_path):
    """A model of which the token 40 alone overflows, in front of the first block, in float32."""
    tensors = random_tensors(CONFIG, np.random.default_rng(7))
    tensors["model.embed_tokens.weight"][:, 5] = 0
    tensors["model.embed_tokens.weight"][40, 5] = 1
    tensors["model.layers.0.input_layernorm.weight"][5] = 1e25
    return write_folder(tmp_path / "overflowing", CONFIG, tensors)


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


def test_memory_that_runs_out_between_layers_ends_the_run_in_a_sentence_and_it_goes_on(
    tmp_path, source, recipe, whole, monkeypatch
):
    calls, forward = [], BlockRunner.forward

    def short(runner, block, batches):
        calls.append(1)
        if len(calls) == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
        return forward(runner, block, batches)

    monkeypatch.setattr(BlockRunner, "forward", short)
    said = (
        r"memory ran out \(RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\.\); finished blocks are stored: start"
    )
    with pytest.raises(PruningError, match=said):
        prune_model(source, tmp_path / "out", recipe)
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks > 0
    assert model_bytes(tmp_path / "out") == whole


def test_weights_that_overflow_in_a_later_block_leave_the_earlier_blocks_whole(tmp_path, source, recipe, whole):
    tensors = random_tensors(CONFIG, np.random.default_rng(7))
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e30
    bad = write_folder(tmp_path / "bad", CONFIG, tensors)
    shutil.copy(source / "tokenizer.json", bad)
    with pytest.raises(PruningError, match="non-finite activations in block 2, mlp_hidden, on the calibration tokens"):
        prune_model(bad, tmp_path / "out", recipe)
    shards = {"model-block-0000.safetensors", "model-block-0001.safetensors"}
    found = model_bytes(tmp_path / "out")
    assert {name: found[name] for name in shards} == {name: whole[name] for name in shards}
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    bad = write_folder(tmp_path / "worse", CONFIG, tensors)
    shutil.copy(source / "tokenizer.json", bad)
    with pytest.raises(ModelError, match=r"model.layers.2.mlp.up_proj.weight in .* holds 1 NaN or infinite values"):
        prune_model(bad, tmp_path / "refused", recipe)
    assert not (tmp_path / "refused").exists()


@pytest.mark.processes
def test_a_pruning_whose_pager_was_closed_goes_on_to_its_end(tmp_path, whole, arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "sparseopt", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "default --sparsity 0.5: that fraction of the weights of every linear\n"
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

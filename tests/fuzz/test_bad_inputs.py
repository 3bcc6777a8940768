"""Every bad input quickly ends in the documented error, with a message that says what is wrong."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest

from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.graph_files import read_signal
from sparseopt.models import ModelError, open_source
from sparseopt.models.files.gguf.header import read_header as read_gguf_header
from sparseopt.models.files.safetensors import read_header, write_tensors
from tests.fuzz.bad_inputs import BAD_INPUTS, SLOW
from tests.fuzz.targets import seed_gguf


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: f"{bad.kind}: {bad.name}")
def test_it_ends_in_a_clear_error(bad, tmp_path):
    use = bad.make(tmp_path)
    start = time.process_time()
    with pytest.raises(bad.error) as caught:
        use()
    said = str(caught.value)
    assert type(caught.value) is bad.error
    assert bad.text in said or re.search(bad.text, said)
    assert len(said) < 3000
    assert time.process_time() - start < SLOW


def test_names_are_unique():
    names = [(bad.kind, bad.name) for bad in BAD_INPUTS]
    assert len(set(names)) == len(names)


def test_every_cut_of_a_file_is_noticed(tmp_path):
    write_tensors(tmp_path / "a", {"a": np.eye(4), "b": np.ones(4, np.float32)})
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"truncated|corrupt"):
            read_header(tmp_path / "a")
    (tmp_path / "a").write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="too long"):
        read_header(tmp_path / "a")


def test_every_cut_of_a_gguf_file_is_noticed(tmp_path):
    file, whole = tmp_path / "a.gguf", seed_gguf()[-1]
    file.write_bytes(whole)
    # The file may end with padding after its last tensor; a cut in it loses nothing.
    end = max(tensor.start + tensor.nbytes for tensor in read_gguf_header(file).tensors.values())
    for length in (*range(200), *range(200, end, 997), end - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"truncated|no GGUF file"):
            open_source(file)


def test_archives_with_damaged_members(tmp_path):
    """zlib.error, EOFError, NotImplementedError, BadZipFile: bytes changed one by one."""
    np.savez_compressed(tmp_path / "whole.npz", signal=np.arange(6.0))
    whole, refused = (tmp_path / "whole.npz").read_bytes(), 0
    for place in range(len(whole)):
        (tmp_path / "a.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_signal(tmp_path / "a.npz")
        except FileError:
            refused += 1
    assert refused > len(whole) // 2


DAMAGE = """
import io, sys, pathlib, numpy, pyarrow, pyarrow.parquet
from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.graph_files import read_signal
stream, file, refused = io.BytesIO(), pathlib.Path(sys.argv[1]), 0
pyarrow.parquet.write_table(pyarrow.table({"u": [0, 1], "v": [1, 2]}), stream)
whole = stream.getvalue()
for place in range(4, len(whole)):
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    try:
        read_signal(file)
    except FileError:
        refused += 1
print(refused)
"""


@pytest.mark.processes
def test_a_parquet_file_whose_statistics_are_damaged_does_not_end_the_process(tmp_path):
    """std::terminate out of pyarrow: "Definition level histogram size mismatch"."""
    call = [sys.executable, "-c", DAMAGE, str(tmp_path / "a.parquet")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 100

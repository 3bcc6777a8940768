"""Pictures, arrays, tables and texts that are damaged, or are bombs."""

import contextlib
import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparseopt as so
from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.graph_files import read_edges, read_signal
from sparseopt.experiments.read.images import read_image, write_image
from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.documents import load_text
from tests.fuzz.damage import a_value_or, damaged, fuzzed, refused, written


def png(width, height, depth=8, colour=0, data=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bmp(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def npz(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def npz_with(header, data=b""):
    """An archive with one array whose header is this."""
    raw = header.encode().ljust(117) + b"\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("signal.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data)
    return stream.getvalue()


def header(shape):
    return f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"


def parquet(**columns):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


READ, NUMBERS, NODES = "as an image", "cannot read numbers", "node numbers are whole"
NO_ARCHIVE, PICKLED, PICKLE = "not an NPZ archive", "pickled objects", pickle.dumps([1.0])
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would run it
CUT_FRAME = b"GIF87a\x04\0\x05\0\x80\0\0" + bytes(6) + b",\xff\0\0\0\x04\0\x05\0\0\x02"
FILES = [
    *((read_image, "a.png", content, READ) for content in (b"", POSTSCRIPT, CUT_FRAME)),
    (read_image, "a.png", png(100, 100, data=bytes(10_100))[:60], READ),
    (read_image, "a.png", png(10_000, 10_000), "is too large to read"),
    (read_image, "a.png", png(100_000, 100_000), "bomb"),
    (read_image, "a.png", png(100_000, 100_000, 16, 2), "pixels, at most"),
    (read_image, "a.bmp", bmp(2**20, 2**20), "bomb"),
    (read_image, "a.png", png(0, 0, 16, 2), "give 8- or 16-bit"),
    (read_image, "a", b"P6\n4 \x01\x00255\n" + bytes(60), READ),
    *((read, name, PICKLE, PICKLED) for read in (read_image, read_signal) for name in ("a.pkl", "a.npy")),
    (read_signal, "a.pt", b"PK", PICKLED),
    (read_signal, "a.npz", npz(signal=np.array([{}], object)), "pickled and can run code"),
    (read_signal, "a.npz", npz(signal=np.zeros(2, [("a", "O")])), "pickled and can run code"),
    (read_signal, "a.npz", npz(signal=np.array(["a"])), "holds <U1"),
    (read_signal, "a.npz", npz(signal=np.array([1j])), "holds complex128"),
    *((read_signal, "a.npz", raw, NO_ARCHIVE) for raw in (b"", b"PK\x03\x04", PICKLE, b"\x93NUMPY")),
    (read_signal, "a.npz", npz(signal=np.zeros(9))[:-30], NO_ARCHIVE),
    (read_signal, "a.npz", npz_with(header("(1000000000000,)")), "claims the shape"),
    (read_signal, "a.npz", npz_with(header("(-1,)"), bytes(8)), NUMBERS),
    (read_signal, "a.npz", npz_with("__import__('os').getcwd()"), NUMBERS),
    (read_signal, "a.npz", npz(signal=np.zeros(2**26)), "would unpack to"),
    *((read_signal, "a.csv", content, "holds no rows") for content in (b"", b"u,v\n")),
    *((read_signal, "a.csv", content, NUMBERS) for content in (b"a,b\nc,d\n", b"1,2\n3\n", b"\xff\xfe1,2\n")),
    (read_edges, "a.csv", b"0,1,2,3\n", "an edge is two node numbers"),
    *((read_edges, "a.csv", content, NODES) for content in (b"0,1.5\n", b"0,nan\n", b"0,inf\n", b"0,1e300\n")),
    (read_signal, "a.parquet", b"PAR1" + bytes(20), NUMBERS),
    (read_signal, "a.parquet", b"PAR1\0\0\0\0\xff\xff\xff\xffPAR1", NUMBERS),
    (read_signal, "a.parquet", parquet(a=["x"]), NUMBERS),
    (read_signal, "a.parquet", parquet(a=[[1, 2], [3]]), NUMBERS),
    (read_signal, "a.parquet", parquet(a=np.zeros(2**26, np.int8)), "would unpack to"),
]


@pytest.mark.parametrize(
    ("read", "name", "content", "part"), FILES, ids=lambda value: getattr(value, "__name__", repr(value)[-30:])
)
def test_a_bad_file(tmp_path, read, name, content, part):
    refused(FileError, part, read, written(tmp_path, **{name: content}) / name)


# Beside what `tests.pruning.text.test_documents` refuses.
NO_COLUMN, ROWS = "cannot read a text column", "validation.parquet"
TEXTS = [
    *((f"file:{path}", "", b"", "cannot read the text file") for path in ("{folder}", "a\x00b")),
    ("file:{file}", "a.npz", npz(a=np.zeros(2)), "pickled objects"),
    *(("wikitext2:{folder}", ROWS, content, NO_COLUMN) for content in (b"PAR1", parquet(a=["x"]))),
    ("wikitext2:{folder}", ROWS, parquet(text=[1]), "row 1 holds int"),
    ("jsonl:{folder}", "a.json", b'["a"]', "line 1 is list"),
    ("jsonl:{folder}", "a.jsonl", b'{"messages": [1]}', "a message needs a role"),
    ("jsonl:{folder}", "a.json.gz", b"\x1f\x8b\x08x", NO_COLUMN),
    ("csv:{folder}", "a.csv.gz", b"{}", NO_COLUMN),
]


@pytest.mark.parametrize(("source", "name", "content", "part"), TEXTS, ids=lambda value: repr(value)[:30])
def test_a_bad_text(tmp_path, source, name, content, part):
    if name:
        written(tmp_path, **{name: content})
    refused(TextError, part, load_text, source.format(folder=tmp_path, file=tmp_path / name), "calibration")


@pytest.mark.parametrize(
    ("name", "whole", "flip", "every"),
    [("a.npz", npz(signal=np.arange(6.0)), 0xFF, 1), ("a.parquet", parquet(u=[0, 1], v=[1, 2]), 1, 3)],
    ids=["npz", "parquet"],
)
def test_a_file_with_any_one_byte_changed(tmp_path, name, whole, flip, every):
    """zlib.error, EOFError, BadZipFile, and std::terminate out of pyarrow for its statistics."""
    for place in range(0, len(whole), every):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        with a_value_or(FileError):
            read_signal(tmp_path / name)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    rng, folder = np.random.default_rng(4), tmp_path_factory.mktemp("pictures")
    for ending in ("png", "tif", "bmp", "jpg", "gif", "webp", "ppm"):
        shape = (8, 8) if ending in ("jpg", "gif") else (5, 4, 3)
        write_image(folder / f"8.{ending}", rng.integers(0, 255, shape).astype(np.uint8))
    for ending in ("png", "tif"):
        write_image(folder / f"16.{ending}", rng.integers(0, 255, (5, 4, 3)).astype(np.uint16))
    return [file.read_bytes() for file in sorted(folder.iterdir())]


@fuzzed
@given(data=st.data())
def test_a_damaged_picture(tmp_path, pictures, data):
    file = written(tmp_path, image=data.draw(damaged(*pictures))) / "image"
    with a_value_or(FileError):
        read_image(file)


TABLES = [("csv", b"u,v,w\n0,1,0.5\n1,2,2\n"), ("csv", b"0,1\n2,\n"), ("parquet", parquet(u=[0, 1], v=[1, 2]))]
TABLES += [("npz", npz(edges=values, signal=values)) for values in (np.arange(6).reshape(3, 2), np.zeros((2, 2), "f2"))]


@fuzzed
@given(data=st.data())
def test_a_damaged_table(tmp_path, data):
    ending, content = data.draw(st.sampled_from(TABLES))
    name = f"table.{ending}"
    file = written(tmp_path, **{name: data.draw(damaged(content))}) / name
    with contextlib.suppress(FileError):
        read_signal(file)
    # ValueError is that of the graph, which says which edge.
    with a_value_or(FileError, ValueError):
        edges, weights = read_edges(file)
        so.Graph.from_edges(edges, 10, weights)

"""Bad pictures, arrays, tables and texts."""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.read.graph_files import read_edges, read_signal
from sparseopt.experiments.read.images import read_image
from sparseopt.pruning.text.documents import load_text
from tests.fuzz.making import Make, reading, write

# Pictures ------------------------------------------------------------------------------


def _png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG file with this header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _image(content: bytes, name: str = "a.png") -> Make:
    return reading(read_image, name, content)


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


READ = "as an image"
PICTURES = (
    ("an empty file", _image(b""), READ),
    ("a text", _image(b"hello"), READ),
    ("a cut file", _image(_png(100, 100, data=bytes(10_100))[:60]), READ),
    ("fewer rows than said", _image(_png(100, 100, data=bytes(500))), READ),
    ("a bomb, where Pillow warns", _image(_png(10_000, 10_000)), "is too large to read"),
    ("a bomb, where Pillow raises", _image(_png(100_000, 100_000)), "bomb"),
    ("a bomb in 16-bit colour", _image(_png(100_000, 100_000, 16, 2)), "pixels, at most"),
    ("a bomb in another format", _image(_bmp(2**20, 2**20)), "bomb"),
    ("16-bit colour that is cut", _image(_png(50, 50, 16, 2, bytes(700))), READ),
    ("16-bit colour without a row", _image(_png(0, 0, 16, 2)), "give 8- or 16-bit"),
    ("PostScript, which Pillow would run", _image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), READ),
    ("a size that is no number", _image(b"P6\n4 \x01\x00255\n" + bytes(60), "a"), READ),
    (
        "a frame that is cut",
        _image(b"GIF87a\x04\0\x05\0\x80\0\0" + bytes(6) + b",\xff\0\0\0\x04\0\x05\0\0\x02", "a"),
        READ,
    ),
    ("a directory of nothing", _image(b"II*\x00\x08\x00\x00\x00\x01\x00" + bytes(20), "a"), READ),
    ("a pickle", _image(pickle.dumps([1]), "a.pkl"), "pickled objects"),
    ("an array file", _image(b"\x93NUMPY", "a.npy"), "pickled objects"),
)

# Arrays and tables ---------------------------------------------------------------------


def _table(content: bytes, name: str, read: Callable[[Path], Any] = read_signal) -> Make:
    return reading(read, name, content)


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _npz_with(header: str, data: bytes) -> bytes:
    """An archive with one array whose header is this."""
    raw = header.encode().ljust(117) + b"\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("signal.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data)
    return stream.getvalue()


def _header(shape: str, descr: str = "'<f8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


NUMPY = (
    ("Python objects", _table(_npz(signal=np.array([{}], object)), "a.npz"), "pickled and can run code"),
    ("Python objects in a record", _table(_npz(signal=np.zeros(2, [("a", "O")])), "a.npz"), "pickled and can run code"),
    ("text", _table(_npz(signal=np.array(["a"])), "a.npz"), "holds <U1"),
    ("complex numbers", _table(_npz(signal=np.array([1j])), "a.npz"), "holds complex128"),
    ("a pickle by its name", _table(pickle.dumps([1]), "a.pkl"), "pickled objects"),
    ("an array file", _table(b"\x93NUMPY", "a.npy"), "pickled objects"),
    ("a file of torch", _table(b"PK", "a.pt"), "pickled objects"),
    ("a pickle called an archive", _table(pickle.dumps([1.0]), "a.npz"), "not an NPZ archive"),
    ("an array called an archive", _table(b"\x93NUMPY\x01\x00" + bytes(100), "a.npz"), "not an NPZ archive"),
    ("nothing", _table(b"", "a.npz"), "not an NPZ archive"),
    ("four bytes", _table(b"PK\x03\x04", "a.npz"), "not an NPZ archive"),
    ("a terabyte claimed", _table(_npz_with(_header("(1000000000000,)"), b""), "a.npz"), "claims the shape"),
    ("a negative size", _table(_npz_with(_header("(-1,)"), bytes(8)), "a.npz"), "cannot read numbers"),
    ("a header that is code", _table(_npz_with("__import__('os').getcwd()", b""), "a.npz"), "cannot read numbers"),
    ("a zip bomb", _table(_npz(signal=np.zeros(2**26)), "a.npz"), "would unpack to"),
    ("no array of that name", _table(_npz(a=np.zeros(2), b=np.zeros(2)), "a.npz"), "it holds a, b, expected one of"),
    ("an archive that is cut", _table(_npz(signal=np.zeros(9))[:-30], "a.npz"), "not an NPZ archive"),
)  # fmt: skip


def _parquet(**columns: Any) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


TABLES = (
    ("no file", lambda folder: lambda: read_signal(folder / "a.csv"), "there is no file"),
    ("another kind", _table(b"1", "a.txt"), "must end in one of .csv"),
    ("nothing", _table(b"", "a.csv"), "holds no rows"),
    ("a heading alone", _table(b"u,v\n", "a.csv"), "holds no rows"),
    ("words", _table(b"a,b\nc,d\n", "a.csv"), "cannot read numbers"),
    ("rows of different lengths", _table(b"1,2\n3\n", "a.csv"), "cannot read numbers"),
    ("bytes that are no UTF-8", _table(b"\xff\xfe1,2\n", "a.csv"), "cannot read numbers"),
    ("edges of one column", _table(b"0\n1\n", "a.csv", read_edges), "an edge is two node numbers"),
    ("edges of four columns", _table(b"0,1,2,3\n", "a.csv", read_edges), "an edge is two node numbers"),
    ("half a node", _table(b"0,1.5\n", "a.csv", read_edges), "node numbers are whole"),
    ("a node that is no number", _table(b"0,nan\n", "a.csv", read_edges), "node numbers are whole"),
    ("an infinite node", _table(b"0,inf\n", "a.csv", read_edges), "node numbers are whole"),
    ("a node beyond 64 bits", _table(b"0,1e300\n", "a.csv", read_edges), "node numbers are whole"),
    ("a Parquet file that is none", _table(b"PAR1" + bytes(20), "a.parquet"), "cannot read numbers"),
    ("a Parquet file cut short", _table(b"PAR1\0\0\0\0\xff\xff\xff\xffPAR1", "a.parquet"), "cannot read numbers"),
    ("a Parquet file with text", _table(_parquet(a=["x"]), "a.parquet"), "cannot read numbers"),
    ("a Parquet file with lists", _table(_parquet(a=[[1, 2], [3]]), "a.parquet"), "cannot read numbers"),
    ("a Parquet bomb", _table(_parquet(a=np.zeros(2**26, np.int8)), "a.parquet"), "would unpack to"),
)  # fmt: skip

# Calibration text ----------------------------------------------------------------------


def _text_file(content: bytes | None, name: str = "a.txt", specification: str = "file:{}") -> Any:
    def make(folder: Path) -> Callable[[], Any]:
        if content is not None:
            write({name: content}, folder)
        path = folder / name if specification.startswith("file") else folder
        return lambda: load_text(specification.format(path), "calibration")

    return make


NO_COLUMN = "cannot read a text column"
TEXTS = (
    ("an unknown kind", _text_file(None, specification="x:{}"), "known are pydoc"),
    ("no name", _text_file(None, specification="file:"), "names no source"),
    ("no file", _text_file(None), "cannot read the text file"),
    ("a folder", _text_file(None, "", "file:{}"), "cannot read the text file"),
    ("a device", _text_file(None, specification="file:/dev/zero"), "a folder or a device"),
    ("a zero byte in the name", _text_file(None, specification="file:a\x00b"), "cannot read the text file"),
    ("bytes that are no UTF-8", _text_file(b"abc\xff"), "in UTF-8: .* position 3"),
    ("nothing", _text_file(b" \n"), "is empty"),
    ("a pickle", _text_file(pickle.dumps(["text"], 0), "a.pkl"), "pickled objects"),
    ("arrays", _text_file(_npz(a=np.zeros(2)), "a.npz"), "pickled objects"),
    ("no Parquet file", _text_file(b"", "other.csv", "wikitext2:{}"), "has no validation*.parquet"),
    ("a broken Parquet file", _text_file(b"PAR1", "validation.parquet", "wikitext2:{}"), NO_COLUMN),
    ("no column text", _text_file(_parquet(a=["x"]), "validation.parquet", "wikitext2:{}"), NO_COLUMN),
    ("rows that are no JSON", _text_file(b'{"text": "a"}\n{', "a.jsonl", "jsonl:{}"), "line 2 is no JSON"),
    ("rows that are no objects", _text_file(b'["a"]', "a.json", "jsonl:{}"), "line 1 is list"),
    ("deep JSON", _text_file(b"[" * 10**6, "a.json", "jsonl:{}"), "line 1 is no JSON"),
    ("a broken archive", _text_file(b"\x1f\x8b\x08x", "a.json.gz", "jsonl:{}"), NO_COLUMN),
    ("no archive", _text_file(b"{}", "a.csv.gz", "csv:{}"), NO_COLUMN),
    ("CSV without the column", _text_file(b"a,b\n1,2\n", "a.csv", "csv:{}"), "its columns are a, b"),
    ("no heading", _text_file(b"", "a.csv", "csv:{}"), "its columns are none"),
    ("a chat without roles", _text_file(b'{"messages": [1]}', "a.jsonl", "jsonl:{}"), "a message needs a role"),
    (
        "a column of numbers",
        _text_file(_parquet(text=[1]), "validation.parquet", "wikitext2:{}"),
        "row 1 holds int",
    ),
)

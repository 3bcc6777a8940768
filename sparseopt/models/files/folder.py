"""The files of a model's folder, which may be untrusted: names that stay in the folder, valid JSON.

A file may be a link within the folder, or one into the blobs of the same repository in the Hugging Face cache, which
keeps `snapshots/COMMIT/NAME` as links to `blobs/HASH`. Other links could lead anywhere and raise an error, unless links
are to be followed.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sparseopt.models.base.errors import JSON_OBJECT, ModelError, checked
from sparseopt.system.run_folder import RUN_FILES

# Pickled files of torch and others. Loading a pickle runs any code in it.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
TO_SAFETENSORS = (
    "pickled weights can run code when loaded and are not read; if you trust their author, convert them where torch is "
    "installed: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
)

# A folder in which version 0.3 stored zeros as a bitmask.
PACKED_INDEX = "model.packed.index.json"
TO_UNPACK = (
    "holds a packed model, which sparseopt 0.3 wrote and later versions do not read: unpack it with that version "
    "(sparseopt unpack PACKED --output FOLDER)"
)

# Endings of weights in any format, which an export does not copy.
WEIGHTS = frozenset(
    (*PICKLES, ".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".ot")
)

# Most bytes of a file beside the weights, such as a tokenizer; the largest published files have a tenth of that.
MAX_FILE = 500 * 2**20
# Most bytes of a configuration, and of an index with a line for every tensor. Real ones are a thousand times smaller.
MAX_CONFIG = 4 * 2**20
MAX_INDEX = 100 * 2**20
# Nested blocks in a configuration.
_MAX_DEPTH = 32


def is_plain_name(name: str) -> bool:
    """Whether a name is a plain file name in a folder, which cannot lead elsewhere."""
    apart = {"/", "\\"} & set(name) or name in ("", ".", "..")
    return not apart and name.isprintable() and len(name.encode()) <= 255


def file_in(folder: Path, name: str, follow_links: bool = False) -> Path:
    """The path of a file in a folder, which need not exist; a name or a link that leads out of the folder raises.

    `follow_links` follows all links.
    """
    if not is_plain_name(name):
        raise ModelError(f"{folder} asks for {name[:200]!r}, which is no file in the folder; do not trust it")
    file = folder / name
    if file.is_symlink() and not follow_links:
        _check_link(folder, file)
    return file


def is_carried(name: str) -> bool:
    """Whether an export copies a file of a model's folder, by its name.

    All are copied except weights and their indices, hidden files, the configuration, which is written anew, and the
    files of a pruning run. Folders inside the folder are left out.
    """
    own = name.startswith(".") or name == "config.json" or name in RUN_FILES
    # All endings, since `pytorch_model.bin.data` holds weights too.
    endings = {ending.lower() for ending in Path(name).suffixes}
    return is_plain_name(name) and not own and not name.endswith(".index.json") and not WEIGHTS & endings


def carried_files(folder: Path, follow_links: bool = False) -> list[Path]:
    """The files of a model's folder that an export copies, by name; links out of it and very large files raise."""
    names = [entry.name for entry in folder.iterdir() if is_carried(entry.name) and entry.is_file()]
    files = [file_in(folder, name, follow_links) for name in names]
    for file in files:
        size = file.stat().st_size
        if size > MAX_FILE:
            raise ModelError(
                f"{file} has {size:,} bytes; the files beside the weights are copied with the model, and none has more "
                f"than {MAX_FILE:,}: move it elsewhere"
            )
    return sorted(files)


def _check_link(folder: Path, link: Path) -> None:
    try:
        target, home = link.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{link} is a link that leads nowhere ({error}); copy the file itself") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        # Not resolved further: a folder of blobs that is itself a link must not lead out.
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{link} is a link to {target}, outside its folder, and is not followed: a folder from elsewhere could "
            "have any file read through it. Copy the file itself into the folder, or follow the links of a folder that "
            "you trust (--follow-links, open_source(..., follow_links=True))"
        )


def read_json(file: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """The object in a JSON file; a `ModelError` if it has more than `limit` bytes or is not a valid JSON object."""
    with file.open("rb") as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise ModelError(f"{file} has more than {limit:,} bytes, which no such file needs; download it again")
    try:
        value = parse_json(raw)
        if limit <= MAX_CONFIG:
            _check_depth(value, 0)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no valid JSON ({error}); download it again") from error
    return checked(JSON_OBJECT, value, f"{file} cannot be used")


def parse_json(raw: bytes) -> Any:
    """The value of a UTF-8 JSON text without duplicate keys, NaN and lone surrogates.

    Infinity is allowed: published configurations have it in fields that are not read here.

    Raises:
        ValueError: saying what is wrong; a `RecursionError` if values are nested too deeply.
    """
    text = raw.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    if "\\ud" in text.lower():
        # A lone surrogate could not be written back.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0][:80]!r} is given twice")
    return found


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not allowed in JSON")
    return float(text)


def _check_depth(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} nested blocks")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)

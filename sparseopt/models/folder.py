"""Floor 5: the files of a model's folder, which may come from a stranger: names that stay in it, JSON that is plain.

A file of the folder may be a link within it, or one into the blobs of the same repository in the Hugging Face cache,
which keeps `snapshots/COMMIT/NAME` as links to `blobs/HASH`. Other links could lead anywhere and are refused.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sparseopt.models.errors import ModelError

# What torch and others pickle. Loading a pickle runs whatever code is in it.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
TO_SAFETENSORS = (
    "pickled weights can run code when loaded and are not read; convert them where torch is installed and you trust "
    "who made them: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
)

# Endings of weights in any format. An export has its own, and the second copies of others stay where they are.
WEIGHTS = frozenset(
    (*PICKLES, ".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".ot")
)
# What a pruning run writes beside the model, see `pruning.run_folder`.
RUN_FILES = LOCK, RUN, RECORDS, SUMMARY = "run.lock", "run.json", "records.jsonl", "summary.json"

# Bytes: of a file beside the weights, such as a tokenizer; the largest published ones have a tenth of that.
MAX_FILE = 500 * 2**20
# Bytes: a configuration, and an index with a line for every tensor. Real ones have some thousandths of that.
MAX_CONFIG = 4 * 2**20
MAX_INDEX = 100 * 2**20
# Blocks inside each other in a configuration.
_MAX_DEPTH = 32


def is_plain_name(name: str) -> bool:
    """Whether this can be the name of a file in a folder, and of nothing elsewhere."""
    apart = {"/", "\\"} & set(name) or name in ("", ".", "..")
    return not apart and name.isprintable() and len(name.encode()) <= 255


def file_in(folder: Path, name: str) -> Path:
    """The path of a file in a folder; it need not exist.

    Raises:
        ModelError: for a name with a way out of the folder, or a link that leads out of it.
    """
    if not is_plain_name(name):
        raise ModelError(f"{folder} asks for {name[:200]!r}, which is no file in the folder; do not trust it")
    file = folder / name
    if file.is_symlink():
        _check_link(folder, file)
    return file


def is_carried(name: str) -> bool:
    """Whether an export takes a file of a model's folder along, by its name.

    All do but weights and their indices, hidden files, the configuration, which is written anew, and what a pruning run
    writes beside the model. Files in folders inside the folder stay.
    """
    own = name.startswith(".") or name == "config.json" or name in RUN_FILES
    return is_plain_name(name) and not own and not name.endswith(".index.json") and not WEIGHTS & _endings(name)


def _endings(name: str) -> set[str]:
    """All of them: `pytorch_model.bin.data` is one of weights as well."""
    return {ending.lower() for ending in Path(name).suffixes}


def carried_files(folder: Path) -> list[Path]:
    """The files of a model's folder that an export takes along, by name.

    Raises:
        ModelError: for a link out of the folder, or a file too large to be one of these.
    """
    files = [file_in(folder, entry.name) for entry in folder.iterdir() if is_carried(entry.name) and entry.is_file()]
    for file in files:
        size = file.stat().st_size
        if size > MAX_FILE:
            raise ModelError(
                f"{file} has {size:,} bytes; of the files beside the weights, which go along with the model, none has "
                f"more than {MAX_FILE:,}: move it elsewhere"
            )
    return sorted(files)


def _check_link(folder: Path, link: Path) -> None:
    try:
        target, home = link.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{link} is a link that leads nowhere ({error}); copy the file itself") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        # Resolved, so that blobs that are a link themselves are no way out.
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{link} is a link to {target}, outside its folder, and is not followed: a folder from elsewhere could "
            "have any file read through it. Copy the file itself into the folder"
        )


def read_json(file: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        file: to read.
        limit: in bytes.

    Raises:
        ModelError: if the file is larger, or no plain JSON object.
        OSError: if it cannot be read.
    """
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
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object; download it again")
    return value


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text in UTF-8, each key of an object given once, without NaN and half characters.

    An infinity is allowed: published configurations have some, in fields of other models.

    Raises:
        ValueError: saying what is wrong.
        RecursionError: for too many values inside each other.
    """
    text = raw.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    if "\\ud" in text.lower():
        # Half a character could not be written again.
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
        raise ValueError("NaN is no JSON")
    return float(text)


def _check_depth(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} blocks inside each other")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)

"""Floor 6: calibration and evaluation text by a short specification, and its split into token windows.

pydoc              English reference text that is part of CPython; two disjoint halves
wikitext2:PATH     a folder with WikiText-2 parquet files: calibration from validation, evaluation from test
file:PATH          your own UTF-8 text file: calibration from its first half, evaluation from the second
hf:NAME[/CONFIG]   a data set of the Hugging Face hub; needs a network

If the model's tokenizer begins texts with BOS, every window begins with it: `BOS, t_0, ..., t_{T-2}` of the T tokens of
the window. BOS is never predicted, and the prediction of `t_0`, which no text precedes, does not count: losses start
with `t_1`.
"""

import re
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from sparseopt.models import Bos, Source, encode_text, load_tokenizer, start_token
from sparseopt.models.folder import PICKLES

Split = Literal["calibration", "evaluation"]
TEXTS = "pydoc, wikitext2:PATH, file:PATH, hf:NAME or hf:NAME/CONFIG"
WindowChoice = Literal["first", "spread", "random"]

# The split of a data set for each purpose.
_HUB_SPLITS: dict[Split, str] = {"calibration": "validation", "evaluation": "test"}


class TextError(ValueError):
    """A text that cannot be read or is too short; the message says what to do."""


class Windows(NamedTuple):
    """Token windows of a text, int32, without BOS, and the id of the BOS that each should begin with; None for none."""

    ids: Int[np.ndarray, "count length"]
    bos: int | None


def text_windows(
    source: Source,
    specification: str,
    split: Split,
    count: int,
    length: int,
    *,
    bos: Bos = "auto",
    choice: WindowChoice = "first",
    seed: int = 0,
) -> Windows:
    """The windows of a text (`load_text`, `token_windows`), in a model's tokens, and its BOS (`models.start_token`).

    Raises:
        TextError: for a text that cannot be read or is too short.
        ModelError: for a tokenizer that cannot be used, or that has no BOS where `bos` is "yes".
    """
    tokenizer = load_tokenizer(source)
    start = start_token(source, tokenizer, bos)
    tokens = encode_text(tokenizer, load_text(specification, split))
    try:
        return Windows(token_windows(tokens, count, length, choice, seed=seed), start)
    except TextError as error:
        raise TextError(f"{part_of_text(specification, split)}: {error}") from error


def part_of_text(specification: str, split: Split) -> str:
    """The specification; for a file also which half of it is read."""
    half = {"calibration": "first", "evaluation": "second"}[split]
    return f"the {half} half of {specification}" if specification.startswith("file:") else specification


def begin_windows(ids: Int[np.ndarray, "count length"], bos: int | None) -> Int[np.ndarray, "count length"]:
    """The windows with BOS first and their last token left out; unchanged where `bos` is None."""
    return ids if bos is None else np.concatenate([np.full_like(ids[:, :1], bos), ids[:, :-1]], axis=1)


def load_text(specification: str, split: Split) -> str:
    """The text that `specification` names.

    Raises:
        TextError: for an unknown kind, a missing path or file, or a data set that cannot be fetched.
    """
    kind, _, rest = specification.partition(":")
    readers: dict[str, Callable[[str, Split], str]] = {
        "pydoc": _read_pydoc,
        "wikitext2": _read_parquet_folder,
        "file": _read_file,
        "hf": _read_hub,
    }
    if kind not in readers:
        raise TextError(f"unknown text {specification!r}; known are {TEXTS}")
    if kind != "pydoc" and not rest:
        raise TextError(f"text {specification!r} names no source; write {kind}:{'NAME' if kind == 'hf' else 'PATH'}")
    text = readers[kind](rest, split)
    if not text.strip():
        raise TextError(f"text {specification!r} is empty in its {split} part")
    return text


def _read_pydoc(_: str, split: Split) -> str:
    from pydoc_data.topics import topics

    # Topics alternate between the parts, so that both cover the whole language reference. Topics quote each other: a
    # paragraph is kept only where it occurs first, so that the parts share none.
    seen: set[str] = set()
    parts: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for index, name in enumerate(sorted(topics)):
        paragraphs = dict.fromkeys(p.strip("\n") for p in topics[name].split("\n\n"))
        parts["evaluation" if index % 2 else "calibration"] += [p for p in paragraphs if p not in seen]
        seen.update(paragraphs)
    return "\n\n".join(parts[split])


def _read_file(path: str, split: Split) -> str:
    file = Path(path).expanduser()
    if file.suffix.lower() in PICKLES:
        raise TextError(
            f"{path} can hold pickled objects, which can run code when loaded, and is not read; give a text file in "
            "UTF-8, or a folder of parquet files with a column text (wikitext2:PATH)"
        )
    if file.exists() and not file.is_file():
        raise TextError(f"cannot read the text file {path}: it is a folder or a device; give a text file in UTF-8")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"the text file {path} is not UTF-8 (byte {error.start}); convert it first") from error
    except ValueError as error:
        raise TextError(f"cannot read the text file {path!r}: {error}") from error
    # Halves, split at a line end.
    middle = text.find("\n", len(text) // 2) + 1 or len(text)
    return text[:middle] if split == "calibration" else text[middle:]


def _read_parquet_folder(path: str, split: Split) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise TextError(f"the data folder {folder} does not exist; it should hold validation and test parquet files")
    wanted = _HUB_SPLITS[split]
    files = sorted(folder.glob(f"{wanted}*.parquet"))
    if not files:
        present = ", ".join(sorted(f.name for f in folder.iterdir())) or "nothing"
        raise TextError(f"the data folder {folder} has no {wanted}*.parquet; it holds {present}")
    return _join_parquet(files)


def _join_parquet(files: Iterable[Path]) -> str:
    import pyarrow
    import pyarrow.parquet

    lines: list[str] = []
    for file in files:
        try:
            column = pyarrow.parquet.read_table(file, columns=["text"])["text"]
            if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                raise ValueError(f"the column text holds {column.type}")
            lines += [text or "" for text in column.to_pylist()]
        except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
            raise TextError(f"cannot read a text column from {file}: {error}") from error
    return "\n\n".join(lines)


def _read_hub(name: str, split: Split) -> str:
    from huggingface_hub import snapshot_download

    wanted = _HUB_SPLITS[split]
    repository, config = name, ""
    if name.count("/") == 2:
        repository, _, config = name.rpartition("/")
    places = [f"{escape(config)}/", f"*/{escape(config)}/"] if config else ["", "*/"]
    patterns = [f"{place}{wanted}*.parquet" for place in places]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # failures of the network and of the hub have many classes
        raise TextError(
            f"cannot fetch the data set {name!r} from the hub ({type(error).__name__}: {error}); "
            "without network use pydoc, wikitext2:PATH or file:PATH"
        ) from error
    # The cache may also hold other configurations, and splits whose names merely begin alike.
    held: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        if re.fullmatch(rf"{wanted}(-\d+(-of-\d+(-[0-9a-f]+)?)?)?", file.stem):
            held.setdefault(file.parent.relative_to(folder).as_posix(), []).append(file)
    found = [place for place in held if not config or place.split("/")[-1] == config]
    if len(found) != 1:
        there = ", ".join(sorted(found or held)) or "no such file"
        raise TextError(
            f"the data set {name!r} has {len(found)} folders with {wanted}.parquet files, and exactly one is read "
            f"({'the snapshot holds' if not found else 'these'}: {there}); name one configuration: hf:NAME/CONFIG"
        )
    return _join_parquet(held[found[0]])


def token_windows(
    tokens: np.ndarray, count: int, length: int, choice: WindowChoice = "first", *, seed: int = 0
) -> np.ndarray:
    """Cut `count` non-overlapping windows of `length` tokens, `[count, length]` int32.

    Args:
        tokens: all token ids of a text, `[n]`.
        count: windows wanted.
        length: tokens a window.
        choice: "first" cuts from the start of the text. "spread" takes windows at equal distances over the whole text,
            in an order in which any run of them covers it evenly: held-out windows, the last ones, lie between the
            calibration windows. "random" draws without replacement, by the `seed`.
        seed: see `choice`.

    Raises:
        TextError: if the text has fewer tokens than that, with the figures.
    """
    if count < 1 or length < 2:
        raise TextError(f"need at least 1 window of at least 2 tokens, given {count} windows of {length}")
    available = len(tokens) // length
    if available < count:
        raise TextError(
            f"{count} windows of {length} tokens need {count * length:,} tokens, the text has "
            f"{len(tokens):,} ({available} windows); use a longer text, fewer samples or a shorter seqlen"
        )
    windows = np.asarray(tokens[: available * length], np.int32).reshape(available, length)
    if choice == "random":
        return windows[np.random.default_rng(seed).permutation(available)[:count]]
    if choice == "spread":
        # Multiples of the golden ratio, modulo 1, fill the interval evenly from the first one on.
        ranks = np.argsort(np.argsort(np.arange(count) * (1 + 5**0.5) / 2 % 1))
        return windows[ranks * available // count]
    return windows[:count]


def check_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    """Raise a `TextError` for token ids outside a model's vocabulary."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise TextError(
            f"token ids must lie in 0..{vocab_size - 1}, given {ids.min()}..{ids.max()}; "
            "were they made with another tokenizer?"
        )

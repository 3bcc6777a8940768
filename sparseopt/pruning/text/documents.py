"""The documents of a text named by a short specification: texts, or chats as lists of messages.

    self             calibration only: text that the model draws, see `drawn`
    pydoc            English reference text that is part of CPython; two disjoint halves
    file:PATH        a UTF-8 text file, one document: calibration from its first half, evaluation from the second
    jsonl:PATH       a JSON object per line: a file, a folder of them or a glob such as data/*.json.gz; .gz and .zst are
                     unpacked
    csv:PATH         rows with a heading, in the same way
    parquet:PATH     rows of Parquet files, in the same way
    wikitext2:PATH   a folder with WikiText-2 parquet files: calibration from validation, evaluation from test
    hf:NAME          a data set of the Hugging Face hub, which needs a network: hf:OWNER/NAME, hf:OWNER/NAME/CONFIG
                     (these two need the extra `datasets`), or one of its files as hf:OWNER/NAME/FILE, perhaps with
                     @REVISION at the end; calibration from validation, evaluation from test

No document is read both for calibration and for evaluation. If no split separates rows (your own files, one file of the
hub, a split that you name), calibration reads the first, third, fifth, ... row, evaluation the others.
"""

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Literal, TextIO

from sparseopt.models.base.errors import listed
from sparseopt.models.files.folder import PICKLES
from sparseopt.pruning.text.chats import Document, TextError, is_chat, is_data_set, read_document

Part = Literal["calibration", "evaluation"]
SELF = "self"
TEXTS = "pydoc, file:PATH, jsonl:PATH, csv:PATH, parquet:PATH, wikitext2:PATH, hf:NAME, hf:NAME/CONFIG or hf:NAME/FILE"
# If no column is named, the first of these that exists is read.
COLUMNS = ("text", "messages", "conversations")

# The files of a folder that hold rows.
_ENDINGS = {
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "parquet": (".parquet",),
}
_ALL_ENDINGS = tuple(itertools.chain(*_ENDINGS.values()))
# The kinds of texts that are no specification.
_GIVEN, _DATA_SET = "a list of texts", "a Dataset"
KINDS = ("pydoc", "file", *_ENDINGS, "wikitext2", "hf")
_WITH_COLUMN = (*_ENDINGS, "hf")
_SPLITS: dict[Part, str] = {"calibration": "validation", "evaluation": "test"}
# Characters; a longer line would fill the memory before it could be rejected.
_LONGEST_LINE = 2**26


def check_text(text: Any, split: str | None = None, column: str | None = None) -> None:
    """Raise a `TextError` if the kind of a specification is unknown or does not have these options."""
    kind, rest = _kind_of(text)
    if text == SELF:
        raise TextError(f"text {SELF!r} is drawn by the model, to calibrate on it; known here are {TEXTS}")
    if kind == _GIVEN and (isinstance(text, Mapping) or type(text).__module__.startswith("datasets.")):
        what = f"a mapping of {listed(list(map(str, text)))}" if isinstance(text, Mapping) else type(text).__name__
        raise TextError(
            f"texts are a list or a Dataset, given {what}: give one of its values, such as a split of a DatasetDict or "
            "the input_ids of a tokenizer; of a stream, rows as datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    if kind not in (*KINDS, _GIVEN, _DATA_SET):
        raise TextError(f"unknown text {text!r}; known are {TEXTS}, and to calibrate on {SELF}")
    if kind not in ("pydoc", _GIVEN, _DATA_SET) and not rest:
        raise TextError(f"text {text!r} names no source; write {kind}:{'NAME' if kind == 'hf' else 'PATH'}")
    if kind == "pydoc" and rest:
        raise TextError(
            f"text {text!r} has no name: write pydoc. The number of its windows is another option, or a mix's"
        )
    if column is not None and kind not in (*_WITH_COLUMN, _DATA_SET):
        raise TextError(f"column {column!r} is for {', '.join(f'{k}:' for k in _WITH_COLUMN)}, not for {kind}: omit it")
    if split is not None and kind != "hf":
        raise TextError(f"split {split!r} is for data sets of the hub (hf:), not for {kind}: leave it out")


def _kind_of(text: Any) -> tuple[str, str]:
    """The parts before and after the colon of a specification."""
    if not isinstance(text, str):
        return _DATA_SET if is_data_set(text) else _GIVEN, ""
    kind, _, rest = text.partition(":")
    return kind, rest


def part_of_text(text: Any, part: Part, split: str | None = None) -> str:
    """The specification; if no split separates the parts, also which part of it is read; for a mix, of each text."""
    kind, _ = _kind_of(text)
    if isinstance(text, Mapping):
        return " and ".join(f"{part_of_text(name, part, split)} ({count})" for name, count in text.items())
    if kind in (_GIVEN, _DATA_SET):
        return f"{len(text)} documents"
    if text == SELF:
        return "text that the model drew itself"
    if kind == "file":
        return f"the {'first' if part == 'calibration' else 'second'} half of {text}"
    if _alternates(text, split):
        return f"documents {'1, 3, 5' if part == 'calibration' else '2, 4, 6'}, ... of {text}"
    return text if split is None else f"split {split} of {text}"


def load_documents(text: Any, part: Part, *, split: str | None = None, column: str | None = None) -> Iterator[Document]:
    """The documents of a part of a text, one after the other; files are read only as far as needed.

    Args:
        text: a specification, or a list or `Dataset` of texts or of chats, which is used whole.
        part: "calibration" or "evaluation".
        split: the split of a hub data set, instead of the part's own.
        column: the column of the rows; None for the first of `COLUMNS` that exists.

    Raises:
        TextError: if the kind is unknown; if a path, file or column is missing; if a row cannot be read (with its
            number); if a data set cannot be fetched; or if the text is empty.
    """
    check_text(text, split, column)
    kind, rest = _kind_of(text)
    found: Iterable[Document | None]
    match kind:
        case _ if kind == _GIVEN:
            found = (read_document(value, f"document {number}") for number, value in enumerate(text, 1))
        case _ if kind == _DATA_SET:
            found = _data_set_rows(text, column)
        case "pydoc":
            found = _read_pydoc(part)
        case "file":
            found = [_read_file(rest, part)]
        case "wikitext2":
            found = _rows("parquet", _wikitext_files(rest, _SPLITS[part]), "text")
        case "hf":
            found = _rows(None, _hub_files(rest, split or _SPLITS[part]), column)
        case _:
            found = _rows(kind, _row_files(kind, rest), column)
    if _alternates(text, split):
        found = itertools.islice(found, 0 if part == "calibration" else 1, None, 2)
    chats, filled = set[bool](), False
    for document in found:
        if document is None or document == []:
            continue
        chats.add(is_chat(document))
        if len(chats) > 1:
            raise TextError(f"{part_of_text(text, part, split)} has both texts and chats; give a column of one kind")
        filled = filled or is_chat(document) or bool(str(document).strip())
        yield document
    if not filled:
        given = repr(text) if isinstance(text, str) else part_of_text(text, part)
        raise TextError(f"text {given} is empty in its {part} part")


def load_text(text: str, part: Part, *, split: str | None = None, column: str | None = None) -> str:
    """The documents of a part of a text, joined with blank lines into one text; arguments as for `load_documents`.

    Raises:
        TextError: as there, and for chats, which only a model's template turns into text.
    """
    documents: list[Any] = []
    for document in load_documents(text, part, split=split, column=column):
        if is_chat(document):
            raise TextError(f"{text} has chats, which the chat template of a model makes text of; use `text_windows`")
        documents.append(document)
    return "\n\n".join(documents)


def _alternates(text: Any, split: str | None) -> bool:
    kind, rest = _kind_of(text)
    return kind in _ENDINGS or (kind == "hf" and (split is not None or _hub_name(rest)[1].endswith(_ALL_ENDINGS)))


def _read_pydoc(part: Part) -> Iterator[str]:
    from pydoc_data.topics import topics

    # Topics alternate between the parts, so that both cover the whole language reference. Topics quote each other, so a
    # paragraph is kept only at its first occurrence: the parts share none.
    seen: set[str] = set()
    for index, name in enumerate(sorted(topics)):
        paragraphs = dict.fromkeys(p.strip("\n") for p in topics[name].split("\n\n"))
        own = [p for p in paragraphs if p not in seen]
        seen.update(paragraphs)
        if own and (part == "evaluation") == bool(index % 2):
            yield "\n\n".join(own)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _read_file(path: str, part: Part) -> str:
    file = _path(path)
    if file.suffix.lower() in PICKLES:
        raise TextError(
            f"{path} can hold pickled objects, which can run code when loaded, and is not read; give a text file in "
            "UTF-8, or rows of texts (jsonl:PATH, csv:PATH or parquet:PATH)"
        )
    if file.exists() and not file.is_file():
        raise TextError(f"cannot read the text file {path}: it is a folder or a device; give a text file in UTF-8")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read the text file {path} in UTF-8: {error}") from error
    # Halves, split at a line end.
    middle = text.find("\n", len(text) // 2) + 1 or len(text)
    return text[:middle] if part == "calibration" else text[middle:]


def _row_files(kind: str, path: str) -> list[Path]:
    place, endings = _path(path), _ENDINGS[kind]
    if place.is_dir():
        found = [file for file in place.iterdir() if file.name.endswith(endings)]
        missing = f"the folder {path} has no files that end in {', '.join(endings)}"
    else:
        found = [place] if place.is_file() else list(map(Path, glob(str(place), recursive=True)))
        missing = f"there is no file {path}; {kind}:PATH takes a file, a folder or a glob such as data/*.json.gz"
    found = sorted(file for file in found if file.is_file())
    if not found:
        raise TextError(missing)
    # The documents of a file beside its unpacked version would be read twice.
    if twice := [file for file in found if file.suffix in (".gz", ".zst") and file.with_suffix("") in found]:
        raise TextError(f"{twice[0]} and {twice[0].with_suffix('')} hold the same documents; remove one of the two")
    return found


def _wikitext_files(path: str, wanted: str) -> list[Path]:
    folder = _path(path)
    files = sorted(folder.glob(f"{wanted}*.parquet"))
    if not files:
        present = listed(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise TextError(f"the data folder {folder} does not exist or has no {wanted}*.parquet; it holds {present}")
    return files


def _hub_name(name: str) -> tuple[str, str, str | None]:
    """The repository in a name, its configuration or file (empty if none), and its revision."""
    found = re.fullmatch(r"([^/@]+(?:/[^/@]+)?)(?:/([^@]+))?(?:@(.+))?", name)
    if found is None:
        raise TextError(
            f"hf:{name} names no data set; write hf:OWNER/NAME, and after it /CONFIG or /FILE, and @REVISION"
        )
    repository, inside, revision = found.groups()
    return repository, inside or "", revision


def _hub_files(name: str, split: str) -> Iterator[Path]:
    """The named file, or the files of a split, each fetched into the hub's cache when needed."""
    repository, inside, revision = _hub_name(name)
    is_file = inside.endswith(_ALL_ENDINGS)
    try:
        if is_file:
            from huggingface_hub import hf_hub_download

            yield Path(hf_hub_download(repository, inside, repo_type="dataset", revision=revision))
            return
        # Only for the layout. Its own streaming of Parquet, if left early, aborts the process at exit (arrow #45214).
        from datasets import DownloadManager, load_dataset_builder

        manager = DownloadManager(record_checksums=False)
        found = load_dataset_builder(repository, inside or None, revision=revision).config.data_files
        if split not in found:
            raise ValueError(f"its splits are {', '.join(found)}")
        yield from (Path(manager.download(str(place))) for place in found[split])
    except ModuleNotFoundError as error:
        raise TextError(
            f"the splits of hf:{repository} need {error.name}: pip install 'sparseopt[datasets]'"
        ) from error
    except Exception as error:  # failures of the network and of the hub have many classes
        why = " ".join(str(error).partition("Example of usage")[0].split())[:500]
        raise TextError(
            f"cannot fetch {inside if is_file else f'the split {split}'} of the data set {repository!r} from the hub "
            f"({type(error).__name__}: {why}); name one configuration, hf:NAME/CONFIG, another split, or one file, "
            "hf:NAME/FILE; without network use pydoc or files: file:PATH, jsonl:PATH, csv:PATH, parquet:PATH, "
            f"wikitext2:PATH, as `hf download {repository} --repo-type dataset --local-dir FOLDER` fetches them"
        ) from error


def _rows(kind: str | None, files: Iterable[Path], column: str | None) -> Iterator[Document | None]:
    """The documents in a column of some files, one after the other; without `kind`, the ending of each file decides."""
    for file in files:
        own = kind or next((each for each, endings in _ENDINGS.items() if file.name.endswith(endings)), None)
        if own is None:
            raise TextError(f"{file} must end in one of {', '.join(_ALL_ENDINGS)}")
        read = {"jsonl": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}[own]
        try:
            yield from (read_document(value, f"{file}, {place}") for place, value in read(file, column))
        except TextError:
            raise
        except (OSError, ValueError, csv.Error) as error:
            raise TextError(f"cannot read a text column from {file}: {error}") from error


def _column(names: Sequence[str], asked: str | None) -> str:
    """The column to read; a `ValueError` that lists the columns if it does not exist."""
    for name in COLUMNS if asked is None else (asked,):
        if name in names:
            return name
    wanted = " or ".join(map(repr, COLUMNS)) if asked is None else repr(asked)
    raise ValueError(f"it has no column {wanted}; its columns are {', '.join(map(str, names)) or 'none'}")


def _parquet_rows(file: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            name = _column(table.schema_arrow.names, column)
            # Few rows at a time: a batch may span row groups, and documents may be books.
            batches = (batch.column(name).to_pylist() for batch in table.iter_batches(256, columns=[name]))
            for number, value in enumerate(itertools.chain.from_iterable(batches), 1):
                yield f"row {number}", value
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _data_set_rows(data: Any, column: str | None) -> Iterator[Document | None]:
    try:
        name = _column(data.column_names, column)
    except ValueError as error:
        raise TextError(f"cannot read a text column from the Dataset: {error}") from error
    # Plain values, in whatever format the data set gives them.
    rows = data.select_columns([name]).with_format(None)
    return (read_document(row[name], f"row {number}") for number, row in enumerate(rows, 1))


def _json_rows(file: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    with _opened(file) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON ({error}); expected is one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"line {number} is {type(row).__name__} where an object with columns is expected, one a line; "
                    "`jq -c '.[]' FILE` makes such lines of an array"
                )
            try:
                yield f"line {number}", row[_column(list(row), column)]
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _csv_rows(file: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    # A setting of the whole module; its default is shorter than many documents.
    before = csv.field_size_limit(_LONGEST_LINE)
    try:
        with _opened(file) as stream:
            rows = csv.DictReader(_lines(stream))
            name = _column(list(rows.fieldnames or []), column)
            for row in rows:
                yield f"line {rows.line_num}", row[name]
    finally:
        csv.field_size_limit(before)


def _opened(file: Path) -> TextIO:
    import pyarrow

    # The name's ending decides how to unpack.
    stream: Any = pyarrow.input_stream(str(file), compression="detect")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _lines(stream: TextIO) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"line {number} has more than {_LONGEST_LINE:,} characters")
        yield line

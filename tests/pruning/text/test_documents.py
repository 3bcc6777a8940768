"""Calibration texts: sources, their two parts, and what is refused."""

import csv
import gzip
import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from sparseopt.pruning import TextError, load_text
from sparseopt.pruning.text.documents import load_documents, part_of_text

PARTS = ("calibration", "evaluation")
TEXTS = ['text 0, with "quotes"', "text 1\nof two lines", "text 2 ‖X‖²", "text 3", "text 4"]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]


def as_lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_table(file, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)


def write_rows(folder, kind):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(as_lines(rows[:3]) + "\n")
        (folder / "b.json.gz").write_bytes(gzip.compress(as_lines(rows[3:4]).encode()))
        with pyarrow.CompressedOutputStream(folder / "c.jsonl.zst", "zstd") as file:
            file.write(as_lines(rows[4:]).encode())
    elif kind == "csv":
        with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_table(folder / "a.parquet", id=list(range(5)), text=TEXTS)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_files_alternate_between_the_parts(tmp_path, kind):
    write_rows(tmp_path, kind)
    for path in (tmp_path, f"{tmp_path}/*"):
        assert [load_text(f"{kind}:{path}", part) for part in PARTS] == ["\n\n".join(TEXTS[i::2]) for i in (0, 1)]
    with pytest.raises(TextError, match="no column 'body'; its columns are id, text"):
        load_text(f"{kind}:{tmp_path}", "calibration", column="body")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="has no files that end in"):
        load_text(f"{kind}:{tmp_path}/empty", "calibration")


def test_the_two_parts_of_a_text_share_nothing(tmp_path):
    found = [load_text("pydoc", part) for part in PARTS]
    assert min(map(len, found)) > 100_000
    assert not set(found[0].split("\n\n")) & set(found[1].split("\n\n"))
    # A file is cut into halves at a line end; a byte order mark is no character.
    lines = "".join(f"line {i}\n" for i in range(101))
    text = f"file:{tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    first, second = (load_text(text, part) for part in PARTS)
    assert first + second == lines
    assert first.endswith("\n")
    assert abs(len(first) - len(second)) < 20
    assert [part_of_text(text, part) for part in PARTS] == [
        f"the {half} half of {text}" for half in ("first", "second")
    ]
    assert part_of_text("pydoc", "calibration") == "pydoc"
    # Rows of a split are joined by blank lines.
    for split, part in zip(("validation", "test"), PARTS, strict=True):
        rows = [f"{split} one", "", f"{split} two"]
        write_table(tmp_path / f"{split}.parquet", text=rows)
        assert load_text(f"wikitext2:{tmp_path}", part) == "\n\n".join(rows)


def test_a_long_row_of_a_table_is_read_and_the_limit_of_csv_stays(tmp_path):
    before, text = csv.field_size_limit(), "long " * 40_000
    (tmp_path / "a.txt").write_text(f'text\n"{text}"\n')
    assert load_text(f"csv:{tmp_path / 'a.txt'}", "calibration") == text
    assert csv.field_size_limit() == before


def test_a_missing_chat_is_passed_over(tmp_path):
    for missing in (0, 2):
        rows = [{"messages": None if i == missing else CHAT} for i in range(6)]
        (tmp_path / "a.jsonl").write_text(as_lines(rows))
        assert [len([*load_documents(f"jsonl:{tmp_path}", part)]) for part in PARTS] == [2, 3]


# A text, what lies in the file "a" of its folder, and the words of the refusal.
REFUSED = [
    ("wiki", None, "unknown text 'wiki'; known are pydoc"),
    ("file:", None, "names no source; write file:PATH"),
    ("file:{}/absent", None, "cannot read the text file .*absent"),
    ("file:{}/a", b"", "is empty"),
    ("file:{}/a", b"caf\xe9", "in UTF-8: .* position 3"),
    ("file:~nobody-of-this-name/a.txt", None, "cannot read the text file ~nobody"),
    ("wikitext2:{}", b"", r"no test\*.parquet; it holds a"),
    ("parquet:{}/a", b"PAR1 not really", "cannot read"),
    ("file:/dev/zero", None, "a folder or a device"),
    ("file:{}/a.pkl", None, "pickled objects"),
    ("jsonl:~nobody-of-this-name/a.jsonl", None, "there is no file ~nobody"),
    ("jsonl:{}/a", b"[" * 10**6, "line 1 is no JSON"),
    ("csv:{}/a", b"", "its columns are none"),
    ("jsonl:{}/a", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
    ("jsonl:{}/a", b'{"text": "a"}\n"b"\n', "line 2 is str"),
    ("jsonl:{}/a", b'{"text": "a"}\n{"body": "b"}\n', "line 2: it has no column 'text' or .*are body"),
    ("jsonl:{}/a", b'{"text": 3}\n', "line 1 holds int"),
    ("jsonl:{}/a", b'{"text": [{"role": "user"}]}\n', "line 1: a message needs a role and a content"),
    ("jsonl:{}/a", as_lines({"text": each} for each in ("a", "", "b", CHAT)).encode(), "both texts and chats"),
    ("jsonl:{}/a", b'{"text": null}\n', "is empty in its evaluation part"),
    ("jsonl:{}/a", b'{"text": "a\\ud83d"}\n', r"line 1: character 2 is '\\ud83d'"),
    ("jsonl:{}/a", as_lines([{"messages": CHAT}]).encode(), "is empty in its evaluation part"),
]


@pytest.mark.parametrize(("text", "content", "words"), REFUSED)
def test_a_text_that_cannot_be_read_is_refused_by_name(tmp_path, text, content, words):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(TextError, match=words):
        _ = [[*load_documents(text.format(tmp_path), part)] for part in PARTS[::-1]]


def test_a_file_beside_its_packed_copy_is_refused(tmp_path):
    """Its documents would be in both parts."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for path in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(TextError, match="hold the same documents"):
            [*load_documents(f"jsonl:{path}", "calibration")]


def test_a_data_set_of_the_hub_is_read_by_configuration_and_split(tmp_path, monkeypatch):
    """`lab/words` with two configurations is a folder here, which the library reads in place of the hub."""
    monkeypatch.chdir(tmp_path)
    card, folder = "---\nconfigs:\n", tmp_path / "lab" / "words"
    for config, splits in {"plain": ("validation", "test"), "chats": ("train_sft",)}.items():
        card += f"- config_name: {config}\n  data_files:\n"
        (folder / config).mkdir(parents=True)
        for split in splits:
            column = {"text": [f"{split} {i}" for i in range(3)]} if config == "plain" else {"messages": [CHAT] * 3}
            write_table(folder / config / f"{split}-0.parquet", id=[0] * 3, **column)
            card += f"  - split: {split}\n    path: {config}/{split}-*.parquet\n"
    (folder / "README.md").write_text(f"{card}---\n")
    assert load_text("hf:lab/words/plain", "calibration") == "validation 0\n\nvalidation 1\n\nvalidation 2"
    assert load_text("hf:lab/words/plain", "evaluation").startswith("test 0")
    assert list(load_documents("hf:lab/words/chats", "evaluation", split="train_sft")) == [CHAT]
    for name, words in {
        "lab/words": r"\['plain', 'chats'\]\); name one configuration",
        "lab/words/plian": "'plian' not found.*name one configuration",
        "lab/words/chats": "the split validation .* its splits are train_sft",
        "a/b/c@": "names no data set",
    }.items():
        with pytest.raises(TextError, match=words):
            load_text(f"hf:{name}", "calibration")


def test_files_of_the_hub_are_fetched_at_their_revision(tmp_path, monkeypatch):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(as_lines({"text": t} for t in TEXTS).encode()))
    asked, files = [], {"validation": ["d/a.json.gz", "d/b.tar"]}

    def download(*given, **named):
        asked.append((*given, *named.values()))
        return str(tmp_path / given[-1].split("/")[-1])

    def builder(*names, revision):
        asked.append((*names, revision))
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    monkeypatch.setattr("datasets.DownloadManager.download", lambda _, place: download(place))
    assert load_text("hf:a/b/d/a.json.gz@v1", "calibration") == "\n\n".join(TEXTS[::2])
    with pytest.raises(TextError, match=r"b.tar must end in one of .jsonl, .json"):
        [*load_documents("hf:a/b/c@refs/pr/1", "calibration")]
    assert asked[:2] == [("a/b", "d/a.json.gz", "dataset", "v1"), ("a/b", "c", "refs/pr/1")]


def test_without_network_or_the_package_the_way_out_is_named(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for name in ("a/b@v1", "a/b/config", "a/b/e.json.zst@0123", "words"):
        with pytest.raises(TextError, match=r"no route\);.*without network use pydoc or files: file:PATH"):
            load_text(f"hf:{name}", "calibration")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"hf:a/b need datasets: pip install"):
        load_text("hf:a/b", "calibration")

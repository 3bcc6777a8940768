"""Calibration texts: sources and their parts, chats, documents, windows of tokens, and what is refused."""

import csv
import gzip
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sparseopt.models import ModelError, encode_text, load_tokenizer, open_source
from sparseopt.pruning import Recipe, TextError, load_text, prune_model, text_windows, token_digest, token_windows
from sparseopt.pruning.text import windows as texts
from sparseopt.pruning.text.chats import is_text
from sparseopt.pruning.text.documents import load_documents, part_of_text
from sparseopt.pruning.text.windows import begin_windows
from tests.models.tiny import VOCAB, tiny_config, write_folder, write_gguf
from tests.pruning.whole_runs import TOKENIZER, tensors_of
from tests.tiers import often

PARTS = ("calibration", "evaluation")
TEXTS = [f"text {i}, and more of it" for i in range(5)]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|stop|>{% endfor %}"


def as_lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.fixture
def tokenized(tmp_path):
    """A source without weights, whose tokenizer knows the special tokens."""
    folder = write_folder(tmp_path / "m", tiny_config(), {})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": i, "content": token, "special": True, **flags} for i, token in enumerate(VOCAB[:3])]
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(TOKENIZER) | {"added_tokens": special}))
    return open_source(folder)


def settings(source, **values):
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", **values}
    (source.path / "tokenizer_config.json").write_text(json.dumps(values))


def encoded(source, text):
    return encode_text(load_tokenizer(source), text)


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
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_files_alternate_between_the_parts(tmp_path, kind):
    write_rows(tmp_path, kind)
    for path in (tmp_path, f"{tmp_path}/*"):
        assert load_text(f"{kind}:{path}", "calibration") == "\n\n".join(TEXTS[0::2])
        assert load_text(f"{kind}:{path}", "evaluation") == "\n\n".join(TEXTS[1::2])
    (tmp_path / "empty").mkdir()
    for path, how, words in [
        ("", {"column": "body"}, "it has no column 'body'; its columns are id, text"),
        ("absent", {}, f"there is no file .*; {kind}:PATH takes a file, a folder or a glob"),
        ("empty", {}, "has no files that end in"),
    ]:
        with pytest.raises(TextError, match=words):
            load_text(f"{kind}:{tmp_path / path}", "calibration", **how)


def test_the_two_parts_of_a_text_share_nothing(tmp_path):
    found = [load_text("pydoc", part) for part in PARTS]
    assert min(map(len, found)) > 100_000
    assert not set(found[0].split("\n\n")) & set(found[1].split("\n\n"))
    # A file is cut into halves at a line end.
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(101)))
    first, second = (load_text(f"file:{tmp_path / 'text.txt'}", part) for part in PARTS)
    assert first + second == (tmp_path / "text.txt").read_text()
    assert first.endswith("\n")
    # Rows of a split are joined by blank lines.
    for split, part in zip(("validation", "test"), PARTS, strict=True):
        rows = [f"{split} one", "", f"{split} two"]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"{split}.parquet")
        assert load_text(f"wikitext2:{tmp_path}", part) == "\n\n".join(rows)


def test_a_long_row_of_a_table_is_read_and_the_limit_of_csv_stays(tmp_path):
    before, text = csv.field_size_limit(), "long " * 40_000
    (tmp_path / "a.txt").write_text(f'text\n"{text}"\n')
    assert load_text(f"csv:{tmp_path / 'a.txt'}", "calibration") == text
    assert csv.field_size_limit() == before


def test_a_byte_order_mark_is_no_character_and_a_missing_chat_is_passed_over(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"some text\n" * 50)
    assert load_text(f"file:{tmp_path / 'a.txt'}", "calibration").startswith("some text")
    for missing in (0, 2):
        rows = [{"messages": None if i == missing else [{"role": "user", "content": "hi"}]} for i in range(6)]
        (tmp_path / "a.jsonl").write_text(as_lines(rows))
        found = [[*load_documents(f"jsonl:{tmp_path / 'a.jsonl'}", part)] for part in PARTS]
        assert [len(part) for part in found] == [2, 3]


# A text, what lies in the file "a" of its folder, and the words of the refusal.
REFUSED = [
    ("wiki", None, "unknown text 'wiki'; known are pydoc"),
    ("file:", None, "names no source; write file:PATH"),
    ("file:{}/absent", None, "cannot read the text file"),
    ("wikitext2:{}/absent", None, "does not exist"),
    ("wikitext2:{}", b"", r"no test\*.parquet; it holds a"),
    ("parquet:{}/a", b"PAR1 not really", "cannot read"),
    ("file:{}/a", b"", "is empty"),
    ("file:{}/a", b"caf\xe9", "in UTF-8: .* position 3"),
    ("file:~nobody-of-this-name/a.txt", None, "cannot read the text file ~nobody"),
    ("jsonl:~nobody-of-this-name/a.jsonl", None, "there is no file ~nobody"),
    ("jsonl:{}/a", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
    ("jsonl:{}/a", b'{"text": "a"}\n"b"\n', "line 2 is str where an object with columns is expected"),
    ("jsonl:{}/a", b'{"text": "a"}\n{"body": "b"}\n', "line 2: it has no column 'text' or .*; its columns are body"),
    ("jsonl:{}/a", b'{"text": 3}\n', "line 1 holds int where a text or a list of messages is expected"),
    ("jsonl:{}/a", b'{"text": [{"role": "user"}]}\n', "line 1: a message needs a role and a content"),
    (
        "jsonl:{}/a",
        b'{"text": "a"}\n\n{"text": "b"}\n{"text": [{"role": "user", "content": "c"}]}\n',
        "has both texts and chats",
    ),
    ("jsonl:{}/a", b'{"text": null}\n', "is empty in its evaluation part"),
    ("jsonl:{}/a", b'{"text": "a\\ud83d"}\n', r"line 1: character 2 is '\\ud83d', half of a surrogate pair"),
    ("jsonl:{}/a", as_lines([{"messages": CHAT}]).encode(), "is empty in its evaluation part"),
]


@pytest.mark.parametrize(("text", "content", "words"), REFUSED)
def test_a_text_that_cannot_be_read_is_refused_by_name(tmp_path, text, content, words):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(TextError, match=words):
        _ = [[*load_documents(text.format(tmp_path), part)] for part in PARTS[::-1]]


def test_what_would_be_read_twice_or_wrongly_is_refused(tmp_path):
    """A file beside its packed copy: its documents would be in both parts."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for path in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(TextError, match="hold the same documents; remove one of the two"):
            [*load_documents(f"jsonl:{path}", "calibration")]
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TextError, match="cannot read a text column"):
        load_text(f"wikitext2:{tmp_path}", "calibration")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set `lab/words` with two configurations, as a folder that the library reads in place of the hub."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lab" / "words"
    card = "---\nconfigs:\n"
    for config, splits in {"plain": ("validation", "test", "validation_hard"), "chats": ("train_sft",)}.items():
        (folder / config).mkdir(parents=True)
        card += f"- config_name: {config}\n  data_files:\n"
        for split in splits:
            column = {"text": [f"{split} {i}" for i in range(3)]} if config == "plain" else {"messages": [CHAT] * 5}
            table = pyarrow.table({"id": [0] * len(*column.values()), **column})
            pyarrow.parquet.write_table(table, folder / config / f"{split}-0.parquet")
            card += f"  - split: {split}\n    path: {config}/{split}-*.parquet\n"
    (folder / "README.md").write_text(f"{card}---\n")
    return folder


def test_a_data_set_of_the_hub_is_read_by_configuration_and_split(hub):
    assert load_text("hf:lab/words/plain", "calibration") == "validation 0\n\nvalidation 1\n\nvalidation 2"
    assert load_text("hf:lab/words/plain", "evaluation").startswith("test 0")
    assert list(load_documents("hf:lab/words/chats", "evaluation", split="train_sft")) == [CHAT] * 2
    for name, given, words in [
        ("lab/words", {}, r"the available configs: \['plain', 'chats'\]\); name one configuration, hf:NAME/CONFIG"),
        ("lab/words/plian", {}, "'plian' not found. Available: .*name one configuration"),
        ("lab/words/chats", {}, "the split validation .* its splits are train_sft.*another split"),
        ("lab/words/plain", {"column": "body"}, "it has no column 'body'; its columns are id, text"),
        ("a/b/c@", {}, "names no data set; write hf:OWNER/NAME, and after it /CONFIG or /FILE, and @REVISION"),
    ]:
        with pytest.raises(TextError, match=words):
            load_text(f"hf:{name}", "calibration", **given)


def test_files_of_a_revision_are_fetched_when_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(as_lines({"text": t} for t in TEXTS).encode()))
    (tmp_path / "b.tar").touch()
    asked, files = [], {"validation": [f"hf://datasets/a/b@{'0' * 40}/d/{name}" for name in ("a.json.gz", "b.tar")]}

    def builder(*names, **given):
        asked.append((*names, given["revision"]))
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    def download(repository, file, *, repo_type, revision):
        asked.append((repository, file, repo_type, revision))
        return tmp_path / file.split("/")[-1]

    def fetch(_, place):
        asked.append(place)
        return str(tmp_path / place.split("/")[-1])

    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.DownloadManager.download", fetch)
    assert load_text("hf:a/b/d/a.json.gz@v1", "calibration") == "\n\n".join(TEXTS[::2])
    assert asked == [("a/b", "d/a.json.gz", "dataset", "v1")]
    asked.clear()
    found = load_documents("hf:a/b/c@refs/pr/1", "calibration")
    assert [next(found) for _ in TEXTS] == TEXTS
    assert asked == [("a/b", "c", "refs/pr/1"), files["validation"][0]]
    with pytest.raises(TextError, match=r"b.tar must end in one of .jsonl, .json"):
        next(found)


def test_without_network_or_the_package_the_way_out_is_named(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    way_out = r"no route\);.*without network use pydoc or files: file:PATH.*`hf download"
    for name in ("a/b@v1", "a/b/config", "a/b/e.json.zst@0123", "words"):
        with pytest.raises(TextError, match=way_out):
            load_text(f"hf:{name}", "calibration")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"the splits of hf:a/b need datasets: pip install 'sparseopt\[datasets\]'"):
        load_text("hf:a/b", "calibration")


def test_chats_go_through_the_template_of_the_model(tmp_path, tokenized):
    settings(tokenized, chat_template=TEMPLATE)
    tokens = encoded(tokenized, "<|start|>user hello<|stop|><|start|>assistant there<|stop|>")
    assert [np.sum(tokens == i) for i in (1, 2)] == [2, 2]
    (tmp_path / "a.jsonl").write_text(as_lines([{"id": 1, "messages": CHAT}]))
    (tmp_path / "b.jsonl").write_text(as_lines([{"conversations": SHARED}]))
    lists = ([CHAT] * 4, [SHARED] * 4)
    for text in (f"jsonl:{tmp_path / 'a.jsonl'}", f"jsonl:{tmp_path / 'b.jsonl'}", *lists):
        ids, _ = text_windows(tokenized, text, "calibration", 1, len(tokens))
        np.testing.assert_array_equal(ids[0], tokens)
    ids, _ = text_windows(tokenized, lists[0], "calibration", 2, len(tokens))
    np.testing.assert_array_equal(ids, [tokens, tokens])
    # The BOS that the template writes is not doubled.
    ids, bos = text_windows(tokenized, lists[0], "calibration", 2, 5, bos="yes", documents="separate")
    np.testing.assert_array_equal(ids, [tokens[1:6]] * 2)
    assert bos == tokens[0]
    with pytest.raises(TextError, match="has chats, which the chat template of a model makes text of"):
        load_text(f"jsonl:{tmp_path / 'a.jsonl'}", "calibration")
    for template, words in ((None, "has no chat template"), ("{{ raise_exception('no system') }}", "no system")):
        settings(tokenized, chat_template=template)
        with pytest.raises(ModelError, match=words):
            text_windows(tokenized, [CHAT] * 9, "calibration", 1, 8)


def test_parts_and_tool_calls_reach_the_template(tmp_path, tokenized):
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }} "
        "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function']['name'] }}"
        "{% elif m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] if 'image' not in part %}{{ part['text'] }}{% endfor %}{% endif %}"
        "<|stop|>{% endfor %}"
    )
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "all"}]
    asked = {"role": "user", "content": parts}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "find"}}]}
    chats = [[asked, called | null, {"role": "tool", "content": "there"}] for null in ({}, {"content": None})]
    settings(tokenized, chat_template=template)
    opening = "<|start|>user hello all<|stop|>"
    tokens = encoded(tokenized, f"{opening}<|start|>assistant find<|stop|><|start|>tool there<|stop|>")
    (tmp_path / "a.jsonl").write_text(as_lines([{"messages": chat} for chat in chats]))
    # Rows of one type have a null wherever others have a value.
    rows = [{"messages": [asked]}, {"messages": [{"role": "user", "content": [{"image": "a"}]}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for text, wanted in (
        (f"jsonl:{tmp_path / 'a.jsonl'}", tokens),
        (chats, tokens),
        (f"parquet:{tmp_path / 'b.parquet'}", encoded(tokenized, opening)),
    ):
        ids, _ = text_windows(tokenized, text, "calibration", 1, len(wanted))
        np.testing.assert_array_equal(ids[0], wanted)
    settings(tokenized, chat_template=TEMPLATE)
    with pytest.raises(ModelError, match=r"chat template of .* writes a list of parts as it is given"):
        text_windows(tokenized, chats, "calibration", 1, 8)


def test_a_gguf_file_brings_its_template(tmp_path):
    file = open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), tensors_of()))
    written = encoded(file, "<|start|>hello<|stop|><|start|>there<|stop|>")
    ids, _ = text_windows(file, [CHAT], "calibration", 1, len(written))
    np.testing.assert_array_equal(ids[0], written)


def test_separate_documents_begin_their_windows(tokenized):
    given = ["short", "the first one is long enough", "no", "and here is the second one", "a third one, the last"]
    start = [encoded(tokenized, text)[:16] for text in given]
    ids, _ = text_windows(tokenized, given, "calibration", 3, 16, documents="separate")
    np.testing.assert_array_equal(ids, [start[1], start[3], start[4]])
    with pytest.raises(TextError, match=r"5 documents: 4 windows .* of 16 tokens or more, and 3 of 5 have that many"):
        text_windows(tokenized, given, "calibration", 4, 16, documents="separate")
    with pytest.raises(TextError, match="documents must be packed or separate, given 'apart'"):
        text_windows(tokenized, given, "calibration", 4, 16, documents="apart")
    packed, _ = text_windows(tokenized, given, "calibration", 2, 16)
    np.testing.assert_array_equal(packed.ravel(), encoded(tokenized, "\n\n".join(given))[:32])


def test_no_more_of_a_source_is_read_than_is_needed(tokenized, monkeypatch):
    monkeypatch.setattr(texts, "_LEAST_READ", 1000)
    read = itertools.count()

    class Endless(list):
        def __iter__(self):
            return (f"{number} and more" for number in read)

    text_windows(tokenized, Endless(["text"]), "calibration", 2, 16)
    assert next(read) < 100


def test_a_data_set_in_memory_is_the_list_of_its_column(tokenized):
    from datasets import Dataset, DatasetDict

    settings(tokenized, chat_template=TEMPLATE)
    given = {"body": TEXTS[::-1], "text": TEXTS, "messages": [CHAT] * 5, "number": range(5)}
    for columns, column, documents in [
        (("number", "messages", "text"), None, TEXTS),
        (("number", "messages"), None, [CHAT] * 5),
        (("number", "text", "body"), "body", TEXTS[::-1]),
    ]:
        data = Dataset.from_dict({name: given[name] for name in columns}).with_format("numpy")
        recipe = Recipe(calibration=data, column=column)
        assert recipe.as_dict()["calibration"] == "5 documents"
        found = text_windows(tokenized, recipe.calibration, "calibration", 4, 8, column=column)
        expected = text_windows(tokenized, documents, "calibration", 4, 8)
        np.testing.assert_array_equal(found.ids, expected.ids)
    stream = data.to_iterable_dataset()
    for refused, words in [
        ({"calibration": DatasetDict({"train": data})}, "given a mapping of train: give one of its values"),
        ({"calibration": {"input_ids": [[1, 2]]}}, "a mapping of input_ids: give one of its values"),
        ({"calibration": stream}, r"given IterableDataset: give .*Dataset.from_list\(list\(stream.take\(1000\)\)\)"),
        ({"calibration": data, "split": "train"}, "for data sets of the hub .*not for a Dataset"),
    ]:
        with pytest.raises(ValueError, match=words):
            Recipe(**refused)
    for column, words in ((None, "no column 'text' or .*; its columns are number"), ("number", "row 1 holds int")):
        with pytest.raises(TextError, match=words):
            list(load_documents(data.select_columns(["number"]), "calibration", column=column))
    with pytest.raises(TextError, match="text 5 documents is empty"):
        list(load_documents(Dataset.from_dict({"text": [None] * 5}), "calibration"))


def test_what_is_a_text():
    given = ("pydoc", ["a"], [CHAT], [[1, 2]], [], np.ones((2, 2)))
    assert [is_text(each) for each in given] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("repeats", "windows"), often([(30, 32), (10, 20)], (10, 20)))
def test_the_default_number_of_windows_follows_the_widest_linear_and_the_text(
    tmp_path, source, tokenized, repeats, windows
):
    """4 tokens for each of its 64 inputs are 32 windows of 8; of a shorter text all are taken."""
    given = ["and then the dog"] * repeats
    recipe = Recipe(method="magnitude", calibration=given, seqlen=8, heldout_windows=2)
    available = len(encoded(tokenized, "\n\n".join(given))) // 8 - 2
    report = prune_model(source, tmp_path / "out", recipe)
    found = report.calibration
    assert found.windows == report.recipe["windows"] == min(32, available) == windows
    why = "4 tokens for each of the 64 inputs of the widest layer, in 16 to 128 windows"
    assert found.why == why + ("; the text has no more" if windows < 32 else "")
    assert report.recipe["calibration"] == f"{repeats} documents"
    # The same run, with its windows counted.
    again = prune_model(source, tmp_path / "out", recipe.model_copy(update={"windows": windows}))
    assert (again.kept, again.calibration) == (True, found)


def test_fewer_tokens_than_inputs_are_warned_of(tmp_path, rng, source):
    tokens = rng.integers(0, 40, (7, 9)).astype(np.int32)
    report = prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens, heldout_windows=0))
    assert report.calibration.warning == (
        "calibration has 63 tokens and the widest layer 64 inputs: its Gram matrix is singular; "
        "8 windows of 9 or more would be enough"
    )
    assert report.calibration.digest == token_digest(tokens)


def test_windows_come_from_the_start_or_by_a_seed_without_repeats():
    np.testing.assert_array_equal(token_windows(np.arange(100), 3, 10), np.arange(30).reshape(3, 10))
    tokens = np.arange(200)
    drawn = token_windows(tokens, 15, 10, "random", seed=3)
    assert len(np.unique(drawn)) == 150
    np.testing.assert_array_equal(drawn, token_windows(tokens, 15, 10, "random", seed=3))
    for seed in (0, 4):
        assert not np.array_equal(drawn, token_windows(tokens, 15, 10, "random", seed=seed))
    assert not np.array_equal(token_windows(tokens, 15, 10, "random"), token_windows(tokens, 15, 10))


@pytest.mark.parametrize(("count", "heldout"), [(20, 4), (12, 3), (7, 0), (100, 20)])
def test_spread_windows_lie_at_equal_distances_and_so_do_the_heldout_ones(count, heldout):
    found = token_windows(np.arange(100 * 10), count, 10, "spread")
    places = found[:, 0] // 10
    np.testing.assert_array_equal(np.sort(places), np.arange(count) * 100 // count)
    for part in np.split(places, [count - heldout]):
        around = np.concatenate([part, part + 100])
        assert len(part) == 0 or np.diff(np.sort(around)).max() <= 2 * 100 / len(part)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((100, 4, 32), r"4 windows of 32 tokens need 128 tokens, the text has 100 \(3 windows\)"),
        ((10, 1, 32), r"the text has 10 \(0 windows\)"),
        ((100, 0, 32), "given 0 windows of 32"),
        ((100, 1, 32, "sprad"), "windows must be one of first, spread, random, given 'sprad'"),
    ],
)
def test_too_short_a_text_names_the_figures(given, words):
    with pytest.raises(TextError, match=words):
        token_windows(np.arange(given[0]), *given[1:])


def test_windows_begin_with_bos_in_place_of_their_last_token():
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_array_equal(begin_windows(ids, 99), [[99, 0, 1, 2], [99, 4, 5, 6], [99, 8, 9, 10]])
    assert begin_windows(ids, None) is ids


def test_it_is_said_which_half_of_a_file_is_read_and_too_short(tmp_path, tokenized):
    text = f"file:{tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text("hello there\n" * 4)
    assert part_of_text(text, "calibration") == f"the first half of {text}"
    assert part_of_text(text, "evaluation") == f"the second half of {text}"
    assert part_of_text("pydoc", "calibration") == "pydoc"
    ids, bos = text_windows(tokenized, text, "calibration", 2, 8, bos="yes")
    assert (ids.shape, bos) == ((2, 8), 1)
    assert text_windows(tokenized, text, "calibration", 2, 8, bos="no").bos is None
    with pytest.raises(TextError, match=r"the first half of file:.*: 9 windows of 8 tokens need 72 tokens"):
        text_windows(tokenized, text, "calibration", 9, 8)

"""Sources of calibration text: rows of files, chats, lists; what is read, for which part, and what is refused."""

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
from sparseopt.pruning import Recipe, TextError, load_text, prune_model, text_windows, token_digest
from sparseopt.pruning.text import windows as texts
from sparseopt.pruning.text.chats import is_text
from sparseopt.pruning.text.documents import load_documents
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.test_pipeline import TOKENIZER
from tests.tiers import often

TEXTS = [f"text {i}, and more of it" for i in range(5)]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|stop|>{% endfor %}"


def as_lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.fixture
def source(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_config(), {})
    special = [
        {"id": i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, token in enumerate(VOCAB[:3])
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(TOKENIZER) | {"added_tokens": special}))
    return open_source(folder)


def settings(source, **values):
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", **values}
    (source.path / "tokenizer_config.json").write_text(json.dumps(values))


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
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_files_alternate_between_the_parts(tmp_path, kind):
    folder = write_rows(tmp_path, kind)
    for path in (folder, f"{folder}/*"):
        assert load_text(f"{kind}:{path}", "calibration") == "\n\n".join(TEXTS[0::2])
        assert load_text(f"{kind}:{path}", "evaluation") == "\n\n".join(TEXTS[1::2])
    with pytest.raises(TextError, match="it has no column 'body'; its columns are id, text"):
        load_text(f"{kind}:{folder}", "calibration", column="body")
    with pytest.raises(TextError, match=f"there is no file .*; {kind}:PATH takes a file, a folder or a glob"):
        load_text(f"{kind}:{tmp_path / 'absent'}", "calibration")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="has no files that end in"):
        load_text(f"{kind}:{tmp_path / 'empty'}", "calibration")


def test_a_long_row_of_a_table_is_read_and_the_limit_of_csv_stays(tmp_path):
    before, text = csv.field_size_limit(), "long " * 40_000
    (tmp_path / "a.txt").write_text(f'text\n"{text}"\n')
    assert load_text(f"csv:{tmp_path / 'a.txt'}", "calibration") == text
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ('{"text": "a"}\n"b"\n', "line 2 is str where an object with columns is expected"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2: it has no column 'text' or .*; its columns are body"),
        ('{"text": 3}\n', "line 1 holds int where a text or a list of messages is expected"),
        ('{"text": [{"role": "user"}]}\n', "line 1: a message needs a role and a content"),
        ('{"text": "a"}\n\n{"text": "b"}\n{"text": [{"role": "user", "content": "c"}]}\n', "has both texts and chats"),
        ('{"text": null}\n', "is empty in its evaluation part"),
        ('{"text": "a\\ud83d"}\n', r"line 1: character 2 is '\\ud83d', half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(TextError, match=message):
        _ = [[*load_documents(f"jsonl:{tmp_path / 'a.jsonl'}", part)] for part in ("evaluation", "calibration")]


def test_a_missing_chat_is_passed_over(tmp_path):
    line = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    for missing in (0, 2):
        lines = [line] * 6
        lines[missing] = '{"messages": null}\n'
        (tmp_path / "a.jsonl").write_text("".join(lines))
        found = [[*load_documents(f"jsonl:{tmp_path / 'a.jsonl'}", part)] for part in ("calibration", "evaluation")]
        assert [len(part) for part in found] == [2, 3]


def test_a_file_beside_its_packed_copy_is_refused(tmp_path):
    """Its documents would be in both parts."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for path in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(TextError, match="hold the same documents; remove one of the two"):
            [*load_documents(f"jsonl:{path}", "calibration")]


def test_a_byte_order_mark_is_no_character_and_an_unknown_home_no_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"some text\n" * 50)
    assert load_text(f"file:{tmp_path / 'a.txt'}", "calibration").startswith("some text")
    for text in ("file:~nobody-of-this-name/a.txt", "jsonl:~nobody-of-this-name/a.jsonl"):
        with pytest.raises(TextError, match="cannot find ~nobody"):
            load_text(text, "calibration")


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
            pyarrow.parquet.write_table(
                pyarrow.table({"id": [0] * len(*column.values()), **column}), folder / config / f"{split}-0.parquet"
            )
            card += f"  - split: {split}\n    path: {config}/{split}-*.parquet\n"
    (folder / "README.md").write_text(f"{card}---\n")
    return folder


def test_a_data_set_of_the_hub_is_read_by_configuration_and_split(hub):
    assert load_text("hf:lab/words/plain", "calibration") == "validation 0\n\nvalidation 1\n\nvalidation 2"
    assert load_text("hf:lab/words/plain", "evaluation").startswith("test 0")
    assert list(load_documents("hf:lab/words/chats", "evaluation", split="train_sft")) == [CHAT] * 2


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lab/words", {}, r"the available configs: \['plain', 'chats'\]\); name one configuration, hf:NAME/CONFIG"),
        ("lab/words/plian", {}, "'plian' not found. Available: .*name one configuration"),
        ("lab/words/chats", {}, "the split validation .* its splits are train_sft.*another split"),
        ("lab/words/plain", {"column": "body"}, "it has no column 'body'; its columns are id, text"),
        ("a/b/c@", {}, "names no data set; write hf:OWNER/NAME, and after it /CONFIG or /FILE, and @REVISION"),
    ],
)
def test_what_a_data_set_of_the_hub_has_instead_is_named(hub, name, given, message):
    with pytest.raises(TextError, match=message):
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
    for name in ("a/b@v1", "a/b/config", "a/b/e.json.zst@0123", "words"):
        with pytest.raises(
            TextError, match=r"no route\);.*without network use pydoc or files: file:PATH.*`hf download"
        ):
            load_text(f"hf:{name}", "calibration")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"the splits of hf:a/b need datasets: pip install 'sparseopt\[datasets\]'"):
        load_text("hf:a/b", "calibration")


def test_chats_go_through_the_template_of_the_model(tmp_path, source):
    settings(source, chat_template=TEMPLATE)
    written = "<|start|>user hello<|stop|><|start|>assistant there<|stop|>"
    tokens = encode_text(load_tokenizer(source), written)
    assert [np.sum(tokens == i) for i in (1, 2)] == [2, 2]
    (tmp_path / "a.jsonl").write_text(as_lines([{"id": 1, "messages": CHAT}]))
    (tmp_path / "b.jsonl").write_text(as_lines([{"conversations": SHARED}]))
    lists = ([CHAT] * 4, [SHARED] * 4)
    for text in (f"jsonl:{tmp_path / 'a.jsonl'}", f"jsonl:{tmp_path / 'b.jsonl'}", *lists):
        ids, _ = text_windows(source, text, "calibration", 1, len(tokens))
        np.testing.assert_array_equal(ids[0], tokens)
    ids, _ = text_windows(source, lists[0], "calibration", 2, len(tokens))
    np.testing.assert_array_equal(ids, [tokens, tokens])
    # The BOS that the template writes is not doubled.
    ids, bos = text_windows(source, lists[0], "calibration", 2, 5, bos="yes", documents="separate")
    np.testing.assert_array_equal(ids, [tokens[1:6]] * 2)
    assert bos == tokens[0]


def test_parts_and_tool_calls_reach_the_template(tmp_path, source):
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
    settings(source, chat_template=template)
    written = "<|start|>user hello all<|stop|><|start|>assistant find<|stop|><|start|>tool there<|stop|>"
    tokens = encode_text(load_tokenizer(source), written)
    (tmp_path / "a.jsonl").write_text(as_lines([{"messages": chat} for chat in chats]))
    # Rows of one type have a null wherever others have a value.
    rows = [{"messages": [asked]}, {"messages": [{"role": "user", "content": [{"image": "a"}]}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for text in (f"jsonl:{tmp_path / 'a.jsonl'}", chats):
        ids, _ = text_windows(source, text, "calibration", 1, len(tokens))
        np.testing.assert_array_equal(ids[0], tokens)
    length = len(encode_text(load_tokenizer(source), "<|start|>user hello all<|stop|>"))
    ids, _ = text_windows(source, f"parquet:{tmp_path / 'b.parquet'}", "calibration", 1, length)
    np.testing.assert_array_equal(ids[0], tokens[:length])
    settings(source, chat_template=TEMPLATE)
    with pytest.raises(ModelError, match=r"chat template of .* writes a list of parts as it is given"):
        text_windows(source, chats, "calibration", 1, 8)


def test_a_missing_template_and_a_chat_that_it_refuses_end_before_any_work(tmp_path, source):
    recipe = Recipe(calibration=[CHAT] * 9, windows=1, seqlen=8, heldout_windows=0)
    for template, message in ((None, "has no chat template"), ("{{ raise_exception('no system') }}", "no system")):
        settings(source, chat_template=template)
        with pytest.raises(ModelError, match=message):
            text_windows(source, recipe.calibration, "calibration", 1, 8)
    (tmp_path / "a.jsonl").write_text(as_lines([{"messages": CHAT}]))
    with pytest.raises(TextError, match="has chats, which the chat template of a model makes text of"):
        load_text(f"jsonl:{tmp_path / 'a.jsonl'}", "calibration")


def test_a_gguf_file_brings_its_template(tmp_path, rng):
    file = open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config(), rng)))
    written = encode_text(load_tokenizer(file), "<|start|>hello<|stop|><|start|>there<|stop|>")
    ids, _ = text_windows(file, [CHAT], "calibration", 1, len(written))
    np.testing.assert_array_equal(ids[0], written)


def test_separate_documents_begin_their_windows(source):
    given = ["short", "the first one is long enough", "no", "and here is the second one", "a third one, the last"]
    start = [encode_text(load_tokenizer(source), text)[:16] for text in given]
    ids, _ = text_windows(source, given, "calibration", 3, 16, documents="separate")
    np.testing.assert_array_equal(ids, [start[1], start[3], start[4]])
    with pytest.raises(TextError, match=r"5 documents: 4 windows .* of 16 tokens or more, and 3 of 5 have that many"):
        text_windows(source, given, "calibration", 4, 16, documents="separate")
    with pytest.raises(TextError, match="documents must be packed or separate, given 'apart'"):
        text_windows(source, given, "calibration", 4, 16, documents="apart")
    packed, _ = text_windows(source, given, "calibration", 2, 16)
    np.testing.assert_array_equal(packed.ravel(), encode_text(load_tokenizer(source), "\n\n".join(given))[:32])


def test_no_more_of_a_source_is_read_than_is_needed(source, monkeypatch):
    monkeypatch.setattr(texts, "_LEAST_READ", 1000)
    read = itertools.count()

    class Endless(list):
        def __iter__(self):
            return (f"{number} and more" for number in read)

    text_windows(source, Endless(["text"]), "calibration", 2, 16)
    assert next(read) < 100


def test_options_that_a_text_does_not_have_are_refused():
    for fields, message in (
        ({"column": "body", "calibration": "pydoc"}, "column 'body' is for jsonl:, csv:, parquet:, hf:, not for pydoc"),
        (
            {"split": "train", "calibration": "pydoc"},
            r"split 'train' is for data sets of the hub .*not for pydoc",
        ),
        ({"split": "train", "calibration": ["a"]}, "not for a list of texts"),
        ({"documents": "apart"}, "unknown documents 'apart'; known are packed, separate"),
        ({"documents": "separate", "calibration": np.ones((9, 9), int)}, "taken as they are: leave documents out"),
        ({"calibration": "json:x"}, "unknown text 'json:x'; known are pydoc, file:PATH, jsonl:PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**fields)
    assert [is_text(given) for given in ("pydoc", ["a"], [CHAT], [[1, 2]], [], np.ones((2, 2)))] == [True] * 3 + [
        False
    ] * 3


@pytest.mark.parametrize(("repeats", "windows"), often([(30, 32), (10, 20)], (10, 20)))
def test_the_default_number_of_windows_follows_the_widest_linear_and_the_text(tmp_path, rng, source, repeats, windows):
    """4 tokens for each of its 64 inputs are 32 windows of 8; of a shorter text all are taken."""
    model = write_folder(source.path, tiny_config(), random_tensors(tiny_config(), rng))
    given = ["and then the dog"] * repeats
    recipe = Recipe(method="magnitude", calibration=given, seqlen=8, heldout_windows=2)
    available = len(encode_text(load_tokenizer(source), "\n\n".join(given))) // 8 - 2
    report = prune_model(model, tmp_path / "out", recipe)
    found = report.calibration
    assert found.windows == report.recipe["windows"] == min(32, available) == windows
    why = "4 tokens for each of the 64 inputs of the widest linear, in 16 to 128 windows"
    assert found.why == why + ("; the text has no more" if windows < 32 else "")
    assert report.recipe["calibration"] == f"{repeats} documents"
    # The same run, with its windows counted.
    again = prune_model(model, tmp_path / "out", recipe.model_copy(update={"windows": windows}))
    assert (again.kept, again.calibration) == (True, found)


def test_fewer_tokens_than_inputs_are_warned_of(tmp_path, rng, source):
    model = write_folder(source.path, tiny_config(), random_tensors(tiny_config(), rng))
    tokens = rng.integers(0, 40, (7, 9)).astype(np.int32)
    report = prune_model(model, tmp_path / "out", Recipe(method="magnitude", calibration=tokens, heldout_windows=0))
    assert report.calibration.warning == (
        "calibration has 63 tokens and the widest linear 64 inputs: its Gram matrix is singular; "
        "8 windows of 9 or more would do"
    )
    assert report.calibration.digest == token_digest(tokens)

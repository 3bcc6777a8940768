"""Windows of tokens: chats by the model's template, documents, data sets in memory, and where windows lie."""

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from sparseopt.models import ModelError, encode_text, load_tokenizer, open_source
from sparseopt.pruning import Recipe, TextError, dry_run, load_text, text_windows, token_digest, token_windows
from sparseopt.pruning.text import windows as texts
from sparseopt.pruning.text.chats import is_text
from sparseopt.pruning.text.documents import load_documents
from sparseopt.pruning.text.windows import begin_windows
from tests.models.tiny import VOCAB, tiny_config, write_folder, write_gguf
from tests.pruning.text.test_documents import CHAT, as_lines
from tests.pruning.whole_runs import TOKENIZER, tensors_of

TINY = "llama"
TEXTS = [f"text {i}, and more of it" for i in range(5)]
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
ASKED = {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "all"}]}
CALLED = {"role": "assistant", "tool_calls": [{"name": "find"}]}
TOOLS = [[ASKED, CALLED | null, {"role": "tool", "content": "there"}] for null in ({}, {"content": None})]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }} "
    "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['name'] }}{% elif m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] if 'image' not in part %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|stop|>{% endfor %}"
)
# Rows, and what the template makes of the first. Those of one type have a null wherever others have a value.
CHATS = {
    "a.jsonl": ([{"id": 1, "messages": CHAT}], "user hello<|stop|><|start|>assistant there"),
    "b.jsonl": ([{"conversations": SHARED}], "user hello<|stop|><|start|>assistant there"),
    "c.jsonl": ([{"messages": chat} for chat in TOOLS], "user hello all<|stop|><|start|>assistant find"),
    "d.parquet": ([{"messages": [ASKED]}, {"messages": [ASKED | {"content": [{"image": "a"}]}]}], "user hello all"),
}


@pytest.fixture
def tokenized(tmp_path):
    """A source without weights, whose tokenizer knows the special tokens."""
    folder = write_folder(tmp_path / "m", tiny_config(), {})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": i, "content": token, "special": True, **flags} for i, token in enumerate(VOCAB[:3])]
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(TOKENIZER) | {"added_tokens": special}))
    return open_source(folder)


def settings(source, template):
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>"}
    (source.path / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": template}))


def encoded(source, text):
    return encode_text(load_tokenizer(source), text)


def first_window(source, text, length, **how):
    return text_windows(source, text, "calibration", 1, length, **how).ids[0]


@pytest.mark.parametrize("name", CHATS)
def test_chats_go_through_the_template_of_the_model(tmp_path, tokenized, name):
    settings(tokenized, TEMPLATE)
    rows, words = CHATS[name]
    tokens = encoded(tokenized, f"<|start|>{words}<|stop|>")
    assert (tokens[0], tokens[-1]) == (1, 2)
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text(as_lines(rows))
        chats = [chat for row in rows * 2 for chat in row.values() if isinstance(chat, list)]
        np.testing.assert_array_equal(first_window(tokenized, chats, len(tokens)), tokens)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    text = f"{name.partition('.')[2]}:{tmp_path / name}"
    np.testing.assert_array_equal(first_window(tokenized, text, len(tokens)), tokens)
    with pytest.raises(TextError, match="has chats, which the chat template of a model makes text of"):
        load_text(text, "calibration")


def test_a_template_may_write_bos_and_must_be_there(tmp_path, tokenized):
    settings(tokenized, TEMPLATE)
    tokens = encoded(tokenized, "<|start|>user hello<|stop|><|start|>assistant there<|stop|>")
    ids, _ = text_windows(tokenized, [CHAT] * 4, "calibration", 2, len(tokens))
    np.testing.assert_array_equal(ids, [tokens, tokens])
    # It is not doubled.
    ids, bos = text_windows(tokenized, [CHAT] * 4, "calibration", 2, 5, bos="yes", documents="separate")
    np.testing.assert_array_equal(ids, [tokens[1:6]] * 2)
    assert bos == tokens[0]
    for template, chat, words in (
        (None, CHAT, "has no chat template"),
        ("{{ raise_exception('no system') }}", CHAT, "no system"),
        ("{{ messages[0]['content'] }}", [ASKED], "writes a list of parts as it is given"),
    ):
        settings(tokenized, template)
        with pytest.raises(ModelError, match=words):
            first_window(tokenized, [chat] * 9, 8)
    # A GGUF file brings its own.
    file = open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), tensors_of()))
    written = encoded(file, "<|start|>hello<|stop|><|start|>there<|stop|>")
    np.testing.assert_array_equal(first_window(file, [CHAT], len(written)), written)


def test_separate_documents_begin_their_windows(tokenized):
    given = ["short", "the first one is long enough", "no", "and here is the second one", "a third one, the last"]
    start = [encoded(tokenized, text)[:16] for text in given]
    ids, _ = text_windows(tokenized, given, "calibration", 3, 16, documents="separate")
    np.testing.assert_array_equal(ids, [start[1], start[3], start[4]])
    with pytest.raises(TextError, match=r"5 documents: 4 windows .* and 3 of 5 have that many"):
        text_windows(tokenized, given, "calibration", 4, 16, documents="separate")
    with pytest.raises(TextError, match="documents must be packed or separate, given 'apart'"):
        text_windows(tokenized, given, "calibration", 4, 16, documents="apart")
    packed, bos = text_windows(tokenized, given, "calibration", 2, 16, bos="yes")
    np.testing.assert_array_equal(packed.ravel(), encoded(tokenized, "\n\n".join(given))[:32])
    assert bos == 1
    assert text_windows(tokenized, given, "calibration", 2, 16, bos="no").bos is None


def test_no_more_of_a_source_is_read_than_is_needed(tokenized, monkeypatch):
    monkeypatch.setattr(texts, "LEAST_READ", 1000)
    read = itertools.count()

    class Endless(list):
        def __iter__(self):
            return (f"{number} and more" for number in read)

    text_windows(tokenized, Endless(["text"]), "calibration", 2, 16)
    assert next(read) < 100


def test_a_data_set_in_memory_is_the_list_of_its_column(tokenized):
    settings(tokenized, TEMPLATE)
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
        np.testing.assert_array_equal(found.ids, text_windows(tokenized, documents, "calibration", 4, 8).ids)
    for refused, words in [
        ({"calibration": DatasetDict({"train": data})}, "given a mapping of train"),
        ({"calibration": {"input_ids": [[1, 2]]}}, "a mapping of input_ids"),
        ({"calibration": data.to_iterable_dataset()}, r"given IterableDataset"),
        ({"calibration": data, "split": "train"}, "for data sets of the hub .*not for a Dataset"),
    ]:
        with pytest.raises(ValueError, match=words):
            Recipe(**refused)
    for refused, column, words in (
        (data.select_columns(["number"]), None, "no column 'text' or .*; its columns are number"),
        (data, "number", "row 1 holds int"),
        (Dataset.from_dict({"text": [None] * 5}), None, "text 5 documents is empty"),
    ):
        with pytest.raises(TextError, match=words):
            list(load_documents(refused, "calibration", column=column))


def test_what_is_a_text():
    given = ("pydoc", ["a"], [CHAT], [[1, 2]], [], np.ones((2, 2)))
    assert [is_text(each) for each in given] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("repeats", "windows"), [(30, 32), (10, 20)])
def test_the_default_number_of_windows_follows_the_widest_linear_and_the_text(tmp_path, source, repeats, windows):
    """4 tokens for each of its 64 inputs are 32 windows of 8; of a shorter text all are taken."""
    recipe = Recipe(calibration=["and then the dog"] * repeats, seqlen=8, heldout_windows=2)
    found = dry_run(source, tmp_path / "out", recipe)
    available = (18 * repeats - 2) // 8 - 2
    assert found.calibration.windows == found.recipe["windows"] == min(32, available) == windows
    why = "4 tokens for each of the 64 inputs of the widest layer, in 16 to 128 windows"
    assert found.calibration.why == why + ("; the text has no more" if windows < 32 else "")
    most = dry_run(source, tmp_path / "out", recipe.model_copy(update={"effort": "most"}))
    assert most.calibration.windows == min(128, available)
    assert most.recipe["train_epochs"] == most.recipe["distil_epochs"] == 64 // min(64, available)


def test_fewer_tokens_than_inputs_are_warned_of(tmp_path, rng, source):
    tokens = rng.integers(0, 40, (7, 9)).astype(np.int32)
    found = dry_run(source, tmp_path / "out", Recipe(calibration=tokens, heldout_windows=0)).calibration
    assert "63 tokens and the widest layer 64 inputs" in found.warning
    assert "; 8 windows of 9 or more would be enough" in found.warning
    assert found.digest == token_digest(tokens)


def test_windows_come_from_the_start_or_by_a_seed_without_repeats():
    tokens = np.arange(200)
    np.testing.assert_array_equal(token_windows(tokens, 3, 10), np.arange(30).reshape(3, 10))
    drawn = token_windows(tokens, 15, 10, "random", seed=3)
    assert len(np.unique(drawn)) == 150
    np.testing.assert_array_equal(drawn, token_windows(tokens, 15, 10, "random", seed=3))
    assert not np.array_equal(drawn, token_windows(tokens, 15, 10, "random", seed=4))
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_array_equal(begin_windows(ids, 99), [[99, 0, 1, 2], [99, 4, 5, 6], [99, 8, 9, 10]])
    assert begin_windows(ids, None) is ids


@pytest.mark.parametrize(("count", "heldout"), [(20, 4), (12, 3), (7, 0), (100, 20)])
def test_spread_windows_lie_at_equal_distances_and_so_do_the_heldout_ones(count, heldout):
    places = token_windows(np.arange(100 * 10), count, 10, "spread")[:, 0] // 10
    np.testing.assert_array_equal(np.sort(places), np.arange(count) * 100 // count)
    for part in np.split(places, [count - heldout]):
        around = np.concatenate([part, part + 100])
        assert len(part) == 0 or np.diff(np.sort(around)).max() <= 2 * 100 / len(part)


@pytest.mark.parametrize("given", [(4, 32), (0, 32), (1, 1), (1, 32, "sprad")])
def test_windows_that_a_text_of_100_tokens_does_not_have_are_refused_with_the_figures(given):
    words = "4 windows of 32 tokens need 128 tokens, the text has 100" if given == (4, 32) else rf"given .*{given[-1]}"
    with pytest.raises(TextError, match=words):
        token_windows(np.arange(100), *given)

"""Fewer tokens: which stay, that nothing changes on the text that they are chosen by, and files with new ids."""

import json
import string

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, Keys
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from sparseopt.models import ModelError, encode_text, load_decoder, load_tokenizer, open_model, open_source
from sparseopt.models.reshape.vocabulary import Vocabulary
from sparseopt.pruning import ShrinkRecipe, Stopped, dry_run, load_text, shrink_model
from tests.jitted import run
from tests.models.tiny import CONFIGS, random_tensors, tiny_config, write_architecture, write_folder

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "then"),
    *("they", "tell", "all", "others", "to", "go", "home", "for", "tea", "again"),
]
# Of other letters, and of control characters.
OTHER = [
    "Überraschung: 数学は楽しい 🎉",
    "x = {y: 3.14}\t# naïve\n\n\n",
    "".join(map(chr, range(1, 127))),
    "zebra Quizzes",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['role'] }} says {{ m['content'] }}</s>{% endfor %}"
KINDS = ("byte level", "byte fallback", "unigram")


def prose(seed, words, count=3000):
    chosen = np.random.default_rng(seed).choice(words, count, p=(p := 1 / np.arange(1, len(words) + 1)) / p.sum())
    return "\n".join(" ".join(line).capitalize() + "." for line in np.array_split(chosen, count // 9))


def trained(kind):
    """A tokenizer of 480 to 700 tokens, of which a text of half of the words needs a part."""
    compounds = [*WORDS, *(one + other for one in WORDS for other in WORDS)]
    texts, letters = [prose(1, compounds, 9000)], sorted({*string.printable, *"".join(OTHER)})
    special, size = SPECIAL, 480
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "byte fallback"))
    if kind == "byte level":
        words, letters = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    elif kind == "byte fallback":
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.Replace(" ", "▁"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder, letters = decoders.Sequence(steps), []
        special, size = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], 700
    how = {"vocab_size": size, "special_tokens": special, "initial_alphabet": letters, "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **how) if kind == "unigram" else trainers.BpeTrainer(**how)
    tokenizer.train_from_iterator(texts, trainer)
    stored = json.loads(tokenizer.to_str())
    # Bytes are no special tokens.
    stored["added_tokens"] = [each for each in stored["added_tokens"] if each["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def config_of(tokenizer, **changes):
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in {"bos": "<s>", "pad": "<pad>"}.items()}
    ends = [tokenizer.token_to_id(token) for token in ("</s>", "<|user|>")]
    # A few rows more than tokens, as published models have.
    return tiny_config(vocab_size=tokenizer.get_vocab_size() + 5, eos_token_id=ends, **ids | changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of tokenizer, with files that name ids."""
    place, made = tmp_path_factory.mktemp("vocabulary"), {}
    for kind in KINDS:
        tokenizer = trained(kind)
        config = config_of(tokenizer, tie_word_embeddings=kind != "unigram")
        folder = made[kind] = write_folder(place / kind, config, random_tensors(config, np.random.default_rng(3)))
        added = {str(tokenizer.token_to_id(token)): {"content": token, "special": True} for token in SPECIAL}
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        files = {
            "tokenizer_config.json": own | {"chat_template": TEMPLATE, "added_tokens_decoder": added},
            "generation_config.json": {"eos_token_id": config["eos_token_id"], "suppress_tokens": [300, -1]},
            "added_tokens.json": {token: tokenizer.token_to_id(token) for token in SPECIAL},
            "vocab.json": tokenizer.get_vocab(),
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        tokenizer.save(str(folder / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text of some of the words; the second half, which is not counted, has others."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(prose(5, WORDS[:10]) + "\n" + prose(6, WORDS[::-1]))
    return f"file:{file}"


@pytest.fixture
def shrunk(tmp_path, folders):
    def make(kind="byte level", output="out", **fields):
        return shrink_model(folders[kind], tmp_path / output, ShrinkRecipe(**fields))

    return make


def texts_of(tokenizer, ids):
    return [tokenizer.id_to_token(number) for number in np.asarray(ids).tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_keeps_its_tokens_and_logits_and_other_text_comes_back(tmp_path, folders, corpus, shrunk, kind):
    report = shrunk(kind, vocabulary=f"text:{corpus}")
    whole, small = (open_model(place) for place in (folders[kind], tmp_path / "out"))
    before, after = (load_tokenizer(model.source) for model in (whole, small))
    text = load_text(corpus, "calibration")
    ids, new = encode_text(before, text), encode_text(after, text)
    assert texts_of(before, ids) == texts_of(after, new)
    assert report.vocabulary.split == 0
    assert small.config.vocab_size == report.vocabulary.tokens < 0.9 * whole.config.vocab_size
    # Of the same tokens.
    kept = [before.token_to_id(after.id_to_token(number)) for number in range(small.config.vocab_size - 1)]
    logits = [np.asarray(run(load_decoder(m), i[None, :60])) for m, i in ((whole, ids), (small, new))]
    np.testing.assert_allclose(logits[1][..., :-1], logits[0][..., kept], rtol=1e-5, atol=1e-5)
    for other in [*OTHER, prose(6, WORDS[::-1])]:
        given, made = (
            each.decode(encode_text(each, other).tolist(), skip_special_tokens=False) for each in (before, after)
        )
        assert made == given
        assert kind == "unigram" or made == other
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto(text)["input_ids"] == after.encode(text).ids
    assert auto.apply_chat_template([{"role": "user", "content": "tea"}], tokenize=False) == "<|user|>user says tea</s>"


def test_ids_in_files_are_those_of_the_same_tokens(tmp_path, folders, corpus, shrunk):
    shrunk(vocabulary=f"text:{corpus}")
    places = folders["byte level"], tmp_path / "out"
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json")
    read = {name: [json.loads((place / name).read_text()) for place in places] for name in names}
    before, after = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in places)
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        old, new = (np.atleast_1d(each[name]) for each in read["config.json"])
        assert texts_of(before, old) == texts_of(after, new)
    old, new = (each["suppress_tokens"] for each in read["generation_config.json"])
    assert before.id_to_token(old[0]) == after.id_to_token(new[0])
    assert new[1] == -1
    decoder = read["tokenizer_config.json"][1]["added_tokens_decoder"]
    assert {each["content"]: int(number) for number, each in decoder.items()} == read["added_tokens.json"][1]
    assert read["added_tokens.json"][1] == {token: after.token_to_id(token) for token in SPECIAL}
    # Stale: transformers would not read it, other programs might.
    assert not (tmp_path / "out" / "vocab.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_is_the_rarest_token_that_no_other_is_made_of(folders, kind, rng):
    """One by one, found by trying; and every kept token is still reached by merges."""
    vocabulary = Vocabulary(open_model(folders[kind]))
    counts = rng.integers(0, 4, 800)
    held, stay = counts.copy(), {*vocabulary.tokens.values(), *vocabulary.fixed}
    size = len(stay)
    for gone in range(1, 60):
        used = {part for token, pair in vocabulary.parts.items() if token in stay for part in pair}
        token = min(stay - used - vocabulary.fixed, key=lambda number: (held[number], -number))
        stay.remove(token)
        for part in vocabulary.parts.get(token, ()):
            held[part] += held[token]
        if gone % 20 == 0:
            assert vocabulary.kept(counts, size - gone).tolist() == sorted(stay)
    if kind != "unigram":
        names = {number: token for token, number in vocabulary.tokens.items()}
        merges = {tuple(merge) for merge in vocabulary.stored["model"]["merges"]}
        for token in stay & vocabulary.parts.keys():
            left, right = (names[part] for part in vocabulary.parts[token])
            assert (left, right) in merges
            assert left + right == names[token]


def test_of_tokens_that_the_text_has_not_those_stay_that_the_model_expects(tmp_path, folders, corpus, shrunk):
    """Against the whole model's logits; a folder keeps the choice, which another machine might make differently."""
    report = shrunk(vocabulary=350, calibration=corpus)
    model, text = open_model(folders["byte level"]), load_text(corpus, "calibration")
    vocabulary = Vocabulary(model)
    ids = encode_text(vocabulary.tokenizer, text)
    length = min(512, model.config.max_positions)
    starts = np.linspace(0, len(ids) - length, min(64, len(ids) // length)).astype(int)
    windows = np.stack([np.append(vocabulary.tokens["<s>"], ids[start : start + length - 1]) for start in starts])
    assert report.vocabulary.predicted_tokens == windows.size
    logits = np.asarray(run(load_decoder(folders["byte level"]), windows), float)
    chances = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).sum((0, 1))
    counts = np.bincount(ids, minlength=model.config.vocab_size)
    template = encode_text(vocabulary.tokenizer, "<|user|>user says .</s>system assistant").tolist()
    expected = chances * len(ids) / windows.size
    kept = vocabulary.kept(np.where(counts, counts, expected / (1 + expected)), 350, template)
    after = load_tokenizer(open_source(tmp_path / "out"))
    stay = [vocabulary.tokenizer.token_to_id(after.id_to_token(number)) for number in range(350)]
    by_counts = vocabulary.kept(counts, 350, template)
    assert len(set(by_counts) - set(kept)) > 5
    assert len(set(stay) - set(kept)) <= 2  # sums in single precision
    stored = tmp_path / "out" / "kept_tokens.json"
    assert json.loads(stored.read_text())["tokens"] == stay
    # Fewer than the text uses are chosen by its counts.
    assert not shrunk(output="few", vocabulary=300, calibration=corpus).vocabulary.predicted_tokens


def test_the_report_says_what_other_text_costs(tmp_path, folders, corpus, shrunk, command):
    report = shrunk(vocabulary=350, calibration=corpus, effort="fast")
    before, after = (load_tokenizer(open_source(place)) for place in (folders["byte level"], tmp_path / "out"))
    other = load_text(corpus, "evaluation")
    found, tokens = report.vocabulary, [len(encode_text(each, other)) for each in (before, after)]
    nbytes = len(other.encode())
    assert (found.tokens, found.dense_tokens) == (350, before.get_vocab_size())
    assert found.other_bytes == nbytes
    assert [found.before, found.after] == [pytest.approx(each / nbytes) for each in tokens]
    assert tokens[1] > tokens[0]
    assert report.shape.parameters == report.shape.dense_parameters - 32 * (before.get_vocab_size() + 5 - 350)
    # Again, from the folder; and as the command shows it before a run by counts alone.
    assert shrunk(vocabulary=350, calibration=corpus, effort="fast").vocabulary == found
    options = ("--vocabulary", "350", "--calibration", corpus, "--dry-run", "--json")
    status, out, err = command("shrink", folders["byte level"], "--output", tmp_path / "new", *options)
    assert status == 0, err
    shown = json.loads(out)
    assert shown["vocabulary"] == json.loads(json.dumps(vars(found)))
    assert (shown["kept_parameters"], shown["parameters"]) == (report.shape.parameters, report.shape.dense_parameters)
    assert f"{found.after:.4f} tokens a byte, {found.before:.4f} before" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """GGUF files with 8 bits, one with words and merges, and Gemma's with scores."""
    place, tokenizer = tmp_path_factory.mktemp("files"), trained("byte level")
    inner, (config, gemma) = (
        json.loads(tokenizer.to_str())["model"],
        (config_of(tokenizer, head_dim=8), CONFIGS["gemma3"]),
    )
    names, number = tokenizer.get_vocab(with_added_tokens=True), tokenizer.get_vocab_size()
    tokens = sorted(names, key=names.get) + [f"[PAD{i}]" for i in range(number, number + 5)]
    changes = {
        Keys.Tokenizer.PRE: "gpt-2", Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.CHAT_TEMPLATE: TEMPLATE,
        Keys.Tokenizer.TOKEN_TYPE: [3] * len(SPECIAL) + [1] * (number - len(SPECIAL)) + [5] * 5,
        Keys.Tokenizer.MERGES: [" ".join(merge) for merge in inner["merges"]], Keys.Tokenizer.EOS_ID: 2,
        "llama.vocab_size": len(tokens), "general.size_label": "1K",
    }  # fmt: skip
    kind, rng = GGMLQuantizationType.Q8_0, np.random.default_rng(4)
    return {
        "llama": write_architecture(place / "a.gguf", "llama", config, random_tensors(config, rng), kind, changes),
        "gemma3": write_architecture(place / "b.gguf", "gemma3", gemma, random_tensors(gemma, rng), kind),
    }


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_gguf_file_stays_one_and_its_blocks_are_copied(tmp_path, files, name):
    texts = ["hello the hello, a hell of the lot." * 200, "the then they that"]
    fields = {"vocabulary": 300, "calibration": texts, "score": "none", "effort": "fast"}
    file = tmp_path / "small.gguf"
    report = shrink_model(files[name], file, ShrinkRecipe(**fields))
    folder = shrink_model(files[name], tmp_path / "folder", ShrinkRecipe(dtype="float32", **fields))
    whole, small, copy = open_model(files[name]), open_model(file), open_model(tmp_path / "folder")
    before, after = (load_tokenizer(each.source) for each in (whole, small))
    kept = [before.token_to_id(after.id_to_token(number)) for number in range(300)]
    assert kept == sorted(kept)
    for text in texts:
        ids = encode_text(after, text)
        assert texts_of(before, encode_text(before, text)) == texts_of(after, ids)
        np.testing.assert_array_equal(encode_text(load_tokenizer(copy.source), text), ids)
    read = {each: gguf.GGUFReader(path) for each, path in (("whole", files[name]), ("small", file))}
    stored = {each: {tensor.name: tensor.data for tensor in reader.tensors} for each, reader in read.items()}
    assert stored["small"].keys() == stored["whole"].keys()
    for tensor, data in stored["small"].items():
        rows = kept if tensor == "token_embd.weight" else slice(None)
        np.testing.assert_array_equal(data, stored["whole"][tensor][rows], err_msg=tensor)
    for key, value in small.source.values.items():
        given = whole.source.values.get(key)
        if key.endswith("token_id"):
            assert after.id_to_token(value.value) == before.id_to_token(given.value), key
        elif key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.tokens"):
            assert value.value == [given.value[number] for number in kept], key
    assert "general.size_label" not in small.source.values
    assert report.vocabulary == folder.vocabulary
    assert copy.source.config["bos_token_id"] == small.source.config["bos_token_id"]
    for key in small.exported_keys():
        np.testing.assert_array_equal(small.stored(key), copy.stored(key), err_msg=key)


def test_other_parts_go_too_within_a_budget_of_the_whole_model(tmp_path, folders, corpus, shrunk):
    common = {"calibration": corpus, "windows": 4, "heldout_windows": 2, "seqlen": 24, "train_epochs": 0, "multiple": 8}
    report = shrunk(output="out.gguf", vocabulary=0.8, channels=0.5, bits="q8_0", **common)
    small = open_model(tmp_path / "out.gguf")
    assert small.config.intermediate_size == 32
    assert small.config.vocab_size == report.vocabulary.tokens == round(0.8 * report.vocabulary.dense_tokens)
    assert len(report.grids) == 3 * 7
    assert report.scores[0].after < 2 * report.scores[0].before
    budget = shrunk(output="budget", vocabulary=0.8, parameters=0.75, **common).shape
    assert budget.dense_parameters == report.shape.dense_parameters
    assert 0.65 < budget.parameters / budget.dense_parameters <= 0.7505


def test_an_interrupted_run_resumes(tmp_path, folders, corpus):
    recipe, seen = ShrinkRecipe(vocabulary=350, calibration=corpus), []
    with pytest.raises(Stopped):
        shrink_model(folders["byte level"], tmp_path / "a", recipe, stop=lambda: True)
    report = shrink_model(folders["byte level"], tmp_path / "a", recipe, observer=lambda *event: seen.append(event))
    shrink_model(folders["byte level"], tmp_path / "b", recipe)
    assert (report.resumed_blocks, len(seen)) == (1, 2)
    for file in (tmp_path / "b").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocabulary": 5000}, "more than the 480 tokens"),
        ({"vocabulary": 40}, r"vocabulary 40 is too small: (\d+) tokens must stay.*chat template.*give \1 or more"),
        ({"vocabulary": 0.0}, r"fraction in \(0, 1\]"),
        ({"vocabulary": 1.5}, r"fraction in \(0, 1\]"),
        ({"vocabulary": "many"}, "given 'many'"),
        ({"vocabulary": "text:nothing:x"}, "unknown text"),
        ({"vocabulary": 400, "calibration": "self"}, "calibration 'self' has none: give calibration"),
        ({"vocabulary": "text:pydoc", "calibration": np.zeros((9, 9), int)}, "ids are those of the whole vocabulary"),
        ({"vocabulary": 400, "calibration": ["a short text"]}, "too few to choose the 400"),
        ({"vocabulary": 400, "train_epochs": 2}, "train_epochs could train"),
        ({"vocabulary": 400, "score": "file:missing"}, "missing"),
    ],
)
def test_bad_input_is_an_error_before_any_work(tmp_path, folders, corpus, shrunk, fields, said):
    with pytest.raises(ValueError, match=said):
        shrunk(**{"calibration": corpus} | fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "no tokenizer.json"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "the model WordLevel"),
        ({"model": {"dropout": 0.1}}, "dropout=0.1"),
    ],
)
def test_other_tokenizers_are_an_error(tmp_path, folders, corpus, change, said):
    stored = json.loads((folders["byte level"] / "tokenizer.json").read_text())
    config = config_of(trained("byte level"))
    folder = write_folder(tmp_path / "m", config, random_tensors(config, np.random.default_rng(3)))
    if change is not None:
        inner = change["model"] if "type" in change["model"] else stored["model"] | change["model"]
        (folder / "tokenizer.json").write_text(json.dumps(stored | {"model": inner}))
    with pytest.raises(ModelError, match=said):
        dry_run(folder, tmp_path / "out", ShrinkRecipe(vocabulary=300, calibration=corpus))

"""Zero-shot tasks: the adapter against the torch model class of lm-eval, and scores against counts by hand.

No network is used: tasks, data and models are files of the test.
"""

import json
from functools import partial

import numpy as np
import pytest
import yaml
from tokenizers import processors

from sparseopt.models import encode_text, load_tokenizer, open_model
from sparseopt.pruning import perplexity
from sparseopt.pruning.evaluate.scoring import Score
from tests.models.tiny import CONFIGS, VOCAB, copy_model, random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.whole_runs import TOKENIZER

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("offline")]

QUESTIONS = ["the hen lays", "a bell tells", "he fell in the", "hello there, tell"]
QUESTIONS += ["ten of the", "all", "seven", "what?"]
CHOICES = [[" hell", " the", " a", " e"], [" well.", " o", " time he", " b"]] * 4
TEXTS = ["hello there. the bell fell in the well", "all the hens tell the time.\nten of them", "he"]


@pytest.fixture
def model(tmp_path, rng):
    config = tiny_config()
    tensors = {name: 3 * tensor for name, tensor in random_tensors(config, rng).items()}
    copy_model(open_model(write_gguf(tmp_path / "model.gguf", config, tensors)), tmp_path / "model")
    return tmp_path / "model"


def write_task(folder, name, rows, **settings):
    """A task file and its data, as a user writes them."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings))


def write_choice_task(folder, model, wrong):
    """A task on which the model is right but for the first `wrong` questions; the accuracy by length, by hand."""
    opened = open_model(model)
    tokenizer = load_tokenizer(opened.source)

    def log_p(text):
        ids = encode_text(tokenizer, text)
        return -np.log(perplexity(opened, ids[None])) * (len(ids) - 1)

    # By the perplexity of whole texts, less that of the question.
    scores = np.array([[log_p(q + c) - log_p(q) for c in cs] for q, cs in zip(QUESTIONS, CHOICES, strict=True)])
    order = np.argsort(scores, axis=1)
    answers = np.where(np.arange(len(QUESTIONS)) < wrong, order[:, 0], order[:, -1])
    columns = zip(QUESTIONS, CHOICES, answers.tolist(), strict=True)
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in columns]
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    asked |= {"output_type": "multiple_choice", "target_delimiter": "", "metric_list": metrics}
    write_task(folder, "hens", rows, **asked)
    lengths = np.array([[len(c) for c in choices] for choices in CHOICES])
    return np.mean((scores / lengths).argmax(axis=1) == answers)


def requests_of(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_the_three_answers_are_those_of_lm_evals_own_model_class(model):
    from lm_eval.models.huggingface import HFLM

    from sparseopt.pruning.evaluate.zero_shot import DecoderLM

    sizes = {"max_length": 24}
    ours = DecoderLM(model, **sizes)
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=2, **sizes)
    pairs = [(q, c) for q, choices in zip(QUESTIONS, CHOICES, strict=True) for c in choices]
    pairs += [("", "hello"), ("a bell ", "tells"), ("the hens tell the time. " * 3, "ten"), ("the", "<|stop|>")]
    requests = requests_of("loglikelihood", pairs)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-4, atol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert ours.cut == 1

    requests = requests_of("loglikelihood_rolling", [(text,) for text in TEXTS])
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), rtol=1e-4)

    wanted = [{"until": ["\n"], "max_gen_toks": 9}, {"until": ["e", "l", " "], "max_gen_toks": 20}]
    requests = requests_of("generate_until", [(q, w) for q in ["hello", *TEXTS[:2]] for w in wanted])
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_accuracy_is_the_hand_count_in_the_shell_too(tmp_path, model, command):
    folder = tmp_path / "tasks"
    normalised = write_choice_task(folder, model, wrong=3)
    status, out, _ = command("zero-shot", model, "--tasks", "hens", "--include-path", folder, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["tasks"]["hens"] == {
        "version": 1.0,
        "examples": 8,
        "metrics": {
            "acc": 5 / 8,
            "acc_stderr": pytest.approx(np.std([0, 1, 1, 1, 1, 1, 0, 0], ddof=1) / np.sqrt(8)),
            "acc_norm": normalised,
            "acc_norm_stderr": pytest.approx(np.sqrt(normalised * (1 - normalised) / 7)),
        },
    }
    assert (found["limit"], found["shots"], found["cut"]) == (None, 0, 0)
    status, out, _ = command("zero-shot", model, "--tasks", "hens", "--include-path", folder, "--limit", 4)
    assert status == 0
    assert "│ hens │ 4 │ acc │ 0.2500 │" in out


def test_solved_examples_stand_before_the_question(tmp_path, model):
    from sparseopt.pruning.evaluate.zero_shot import DecoderLM, zero_shot

    folder = tmp_path / "tasks"
    write_choice_task(folder, model, wrong=0)
    plain = zero_shot(model, ["hens"], include_path=folder)
    seen = []
    watched = DecoderLM(model, observer=lambda *step: seen.append(step))
    with_shots = zero_shot(watched, ["hens"], include_path=folder, shots=2)
    assert plain["tasks"]["hens"]["metrics"]["acc"] == 1
    assert with_shots["tasks"]["hens"]["metrics"]["acc"] < 1  # two examples before it change what is likeliest
    assert seen[-1][1] == seen[-1][2]


def test_every_input_begins_with_bos_which_is_never_predicted(model, monkeypatch):
    from sparseopt.pruning.evaluate import zero_shot
    from sparseopt.pruning.evaluate.zero_shot import DecoderLM

    begin_with_bos(model)
    lm, opened = DecoderLM(model, max_length=24), open_model(model)
    bos, plain = 1, encode_text(lm.tokenizer, TEXTS[2]).tolist()
    assert lm.bos == lm.prefix_token_id == bos
    assert lm.tok_encode(TEXTS[2]) == lm.tok_encode("<|start|>" + TEXTS[2]) == [bos, *plain]
    assert lm.tok_encode(TEXTS[2], add_special_tokens=False) == DecoderLM(model, bos="no").tok_encode(TEXTS[2]) == plain
    (found,) = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(TEXTS[2],)]))
    assert found == pytest.approx(-np.log(perplexity(opened, np.array([[bos, *plain]]))) * len(plain), rel=1e-4)

    seen = []

    def score(_, pairs, **__):
        seen.extend(pairs)
        return [Score(0.0, False)] * len(pairs)

    monkeypatch.setattr(zero_shot, "score_continuations", score)
    lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(TEXTS[1],)]))
    lm.loglikelihood(requests_of("loglikelihood", [("the hens tell the time. " * 3, "ten"), ("", "he")]))
    assert len(seen) == 4  # two windows and two pairs
    assert all(context[0] == bos and bos not in [*context[1:], *text] for context, text in seen)
    assert max(len(context) + len(text) - 1 for context, text in seen) == 24
    assert [token for _, text in seen[:2] for token in text] == encode_text(lm.tokenizer, TEXTS[1]).tolist()
    assert lm.cut == 1


def begin_with_bos(folder):
    """Let the folder's tokenizer put its start token in front of every text, and its stop token behind."""
    tokenizer = load_tokenizer(open_model(folder).source)
    special = [("<|start|>", 1), ("<|stop|>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A <|stop|>", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))


GPT2 = {"model_type": "gpt2", "vocab_size": len(VOCAB), "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 77}
NESTED = {"model_type": "gemma3", "text_config": CONFIGS["gemma3"] | {"max_position_embeddings": 99}}


@pytest.mark.parametrize(("config", "longest"), [(GPT2, 77), (NESTED, 99)], ids=["gpt2", "nested"])
def test_the_longest_input_is_the_familys_own(tmp_path, rng, config, longest):
    from sparseopt.pruning.evaluate.zero_shot import DecoderLM

    write_folder(tmp_path, config, random_tensors(config, rng))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    assert DecoderLM(tmp_path).max_length == longest


def test_mistakes_are_named(tmp_path, model, command):
    from sparseopt.pruning.evaluate.zero_shot import DecoderLM, zero_shot

    folder, seen = tmp_path / "tasks", []
    write_choice_task(folder, model, wrong=0)
    drawn = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{text}}"}
    drawn |= {"generation_kwargs": {"do_sample": True, "max_gen_toks": 2, "until": ["."]}}
    write_task(folder, "drawn", [{"text": "he"}], **drawn, metric_list=[{"metric": "exact_match"}])
    lm = DecoderLM(model, max_length=16, observer=lambda *step: seen.append(step))

    def scored(tasks=("hens",), include_path=folder, **options):
        return partial(zero_shot, lm, list(tasks), include_path=include_path, **options)

    def asked(kind, request):
        return partial(getattr(lm, kind), requests_of(kind, [request]))

    refused = [
        *((scored(**wrong), "limit and shots are whole") for wrong in ({"limit": 0}, {"limit": 1.5}, {"shots": 1.5})),
        (scored(shots=1000), r"hens has examples for at most .* shots, given 1000"),
        (scored(("hens", "drawn")), "only greedy generation"),
        (scored(include_path=tmp_path / "nothing"), "include_path must be a folder"),
        (partial(DecoderLM, model, max_length=9999), r"at most the .* tokens that .* made for, given 9999"),
        (asked("generate_until", ("he", {"do_sample": True, "max_gen_toks": 4})), "only greedy generation"),
        (asked("generate_until", ("he", {"max_gen_toks": 16})), "asks for 16 new tokens; the model reads 16"),
        (asked("loglikelihood", ("he", "a" * 40)), "a continuation has 40 tokens, the model reads 16"),
        (asked("loglikelihood", ("he", "")), "empty continuation"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=words):
            call()
    assert not seen  # before any work
    (folder / "hens.jsonl").write_text("{no json\n")
    for tasks, code, words in (
        ("hans,hens,arc_eazy", 2, ("unknown task 'hans'; nearest are hens", "'arc_eazy'; nearest are arc_easy")),
        ("hens", 1, ("the tasks hens cannot be loaded",)),
    ):
        status, _, err = command("zero-shot", model, "--tasks", tasks, "--include-path", folder)
        assert status == code
        assert all(each in err for each in words), err
    (folder / "hens.jsonl").unlink()
    with pytest.raises(RuntimeError, match=r"(?s)cannot be loaded.*hens\.jsonl"):
        scored()()

"""Zero-shot tasks: the adapter against the torch model class of lm-eval, scores against counts by hand, files of rows.

No network is used: tasks, data and models are files of the test.
"""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from tokenizers import processors

from sparseopt.models import encode_text, load_tokenizer, open_model
from sparseopt.pruning import perplexity
from sparseopt.pruning.evaluate.scoring import Score
from tests.experiments.inputs import CALIBRATED, watch_runs, write_inputs
from tests.models.tiny import CONFIGS, VOCAB, copy_model, random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.whole_runs import TOKENIZER

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("offline")]

QUESTIONS = ["the hen lays", "a bell tells", "he fell in the", "hello there, tell"]
QUESTIONS += ["ten of the", "all", "seven", "what?"]
CHOICES = [[" hell", " the", " a", " e"], [" well.", " o", " time he", " b"]] * 4
TEXTS = ["hello there. the bell fell in the well", "all the hens tell the time.\nten of them", "he"]
ASKED = [
    ("How do hens fly? Tell: how", ["low", "high over it"], 1),
    ("What does the fox jump over", ["the lazy dog.", "it"], 0),
    ("Who tells _ all", ["the dog", "a fox: Option"], 0),
    ("Is it quick?", ["brown", "over and over it all"], 1),
    ("Where", ["over there", "here"], 1),
]
WORDS = {"piqa": "Solution", "winogrande": "Option"}


@pytest.fixture
def model(tmp_path, rng):
    config = tiny_config()
    tensors = {name: 3 * tensor for name, tensor in random_tensors(config, rng).items()}
    copy_model(open_model(write_gguf(tmp_path / "model.gguf", config, tensors)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def evaluate():
    """The module, which imports lm-eval."""
    from sparseopt.pruning.evaluate import zero_shot

    return zero_shot


def log_likelihood(model, context, continuation):
    """By the perplexity of the whole text, less that of the context, of which lm-eval moves blanks behind."""
    tokenizer = load_tokenizer(model.source)
    texts = [encode_text(tokenizer, text) for text in (context, context + continuation)]
    return float(np.diff([-np.log(perplexity(model, ids[None])) * (len(ids) - 1) for ids in texts])[0])


def error_of(right):
    """The standard error of a share of right answers."""
    return np.std(right, ddof=1) / np.sqrt(len(right))


def adapted(question, choices, answer, word="Answer"):
    """A row in the form of LLM-Adapters, whose separators differ between its files."""
    listed = " ".join(f"{word}{number}: {text}" for number, text in enumerate(choices, 1))
    names = [f"{word.lower()}{number}" for number in range(1, len(choices) + 1)]
    asked = f"Please choose the correct one: {question}\n\n{listed}\n\nAnswer format: {'/'.join(names)}"
    return {"instruction": asked, "input": "", "output": "", "answer": names[answer]}


def written(file, rows):
    file.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(json.dumps(rows, indent=1) if file.suffix == ".json" else lines)
    return file


def write_task(folder, name, rows, **settings):
    """A task file and its data, as a user writes them."""
    data = written(folder / f"{name}.jsonl", rows)
    given = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": given, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings | {"metadata": {"version": 1.0}}))


def write_choice_task(folder, model, wrong):
    """A task on which the model is right but for the first `wrong` questions."""
    opened, pairs = open_model(model), zip(QUESTIONS, CHOICES, strict=True)
    order = np.argsort([[log_likelihood(opened, q, choice) for choice in choices] for q, choices in pairs], axis=1)
    answers = np.where(np.arange(len(QUESTIONS)) < wrong, order[:, 0], order[:, -1])
    columns = zip(QUESTIONS, CHOICES, answers.tolist(), strict=True)
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in columns]
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    asked |= {"output_type": "multiple_choice", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    write_task(folder, "hens", rows, **asked)


def requests_of(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_the_three_answers_are_those_of_lm_evals_own_model_class(model, evaluate):
    from lm_eval.models.huggingface import HFLM

    sizes = {"max_length": 24}
    ours = evaluate.DecoderLM(model, **sizes)
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
    call = ("zero-shot", model, "--tasks", "hens", "--include-path", tmp_path / "tasks")
    write_choice_task(call[-1], model, wrong=3)
    status, out, _ = command(*call, "--json")
    found, metrics = json.loads(out), {"acc": 5 / 8, "acc_stderr": pytest.approx(error_of([0] * 3 + [1] * 5))}
    assert found["tasks"]["hens"] == {"version": 1.0, "examples": 8, "metrics": metrics}
    assert (status, found["limit"], found["shots"], found["cut"]) == (0, None, 0, 0)
    status, out, _ = command(*call, "--limit", 4)
    assert (status, "│ hens │ 4 │ acc │ 0.2500 │" in out) == (0, True)


def test_solved_examples_stand_before_the_question(tmp_path, model, evaluate):
    folder = tmp_path / "tasks"
    write_choice_task(folder, model, wrong=0)
    plain = evaluate.zero_shot(model, ["hens"], include_path=folder)
    seen = []
    watched = evaluate.DecoderLM(model, observer=lambda *step: seen.append(step))
    with_shots = evaluate.zero_shot(watched, ["hens"], include_path=folder, shots=2)
    assert plain["tasks"]["hens"]["metrics"]["acc"] == 1
    assert with_shots["tasks"]["hens"]["metrics"]["acc"] < 1  # two examples before it change what is likeliest
    assert seen[-1][1] == seen[-1][2]


def test_every_input_begins_with_bos_which_is_never_predicted(model, monkeypatch, evaluate):
    begin_with_bos(model)
    lm, opened = evaluate.DecoderLM(model, max_length=24), open_model(model)
    bos, plain = 1, encode_text(lm.tokenizer, TEXTS[2]).tolist()
    assert lm.bos == lm.prefix_token_id == bos
    assert lm.tok_encode(TEXTS[2]) == lm.tok_encode("<|start|>" + TEXTS[2]) == [bos, *plain]
    without = evaluate.DecoderLM(model, bos="no").tok_encode(TEXTS[2])
    assert lm.tok_encode(TEXTS[2], add_special_tokens=False) == without == plain
    (found,) = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(TEXTS[2],)]))
    assert found == pytest.approx(-np.log(perplexity(opened, np.array([[bos, *plain]]))) * len(plain), rel=1e-4)

    seen = []

    def score(_, pairs, **__):
        seen.extend(pairs)
        return [Score(0.0, False)] * len(pairs)

    monkeypatch.setattr(evaluate, "score_continuations", score)
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
def test_the_longest_input_is_the_familys_own(tmp_path, rng, config, longest, evaluate):
    write_folder(tmp_path, config, random_tensors(config, rng))
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    assert evaluate.DecoderLM(tmp_path).max_length == longest


def test_mistakes_are_named(tmp_path, model, command, evaluate):
    folder, seen = tmp_path / "tasks", []
    write_choice_task(folder, model, wrong=0)
    drawn = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{text}}"}
    drawn |= {"generation_kwargs": {"do_sample": True, "max_gen_toks": 2, "until": ["."]}}
    write_task(folder, "drawn", [{"text": "he"}], **drawn, metric_list=[{"metric": "exact_match"}])
    lm = evaluate.DecoderLM(model, max_length=16, observer=lambda *step: seen.append(step))

    def scored(tasks=("hens",), include_path=folder, **options):
        return partial(evaluate.zero_shot, lm, list(tasks), include_path=include_path, **options)

    def asked(kind, request):
        return partial(getattr(lm, kind), requests_of(kind, [request]))

    refused = [
        *((scored(**wrong), "limit and shots are whole") for wrong in ({"limit": 0}, {"limit": 1.5}, {"shots": 1.5})),
        (scored(shots=1000), r"hens has examples for at most .* shots, given 1000"),
        (scored(("hens", "drawn")), "only greedy generation"),
        (scored(include_path=tmp_path / "nothing"), "include_path must be a folder"),
        (partial(evaluate.DecoderLM, model, max_length=9999), r"at most the .* tokens that .* made for, given 9999"),
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


def test_accuracies_and_their_errors_are_those_by_hand(tmp_path, model, evaluate):
    opened = open_model(model)
    scores = [[log_likelihood(opened, f"Question: {q}\nAnswer:", f" {c}") for c in choices] for q, choices, _ in ASKED]
    best = np.argmax(scores, axis=1)
    by_length = np.argmax(np.divide(scores, [[len(c) for c in choices] for _, choices, _ in ASKED]), axis=1)
    gold = [answer for *_, answer in ASKED]
    file = written(tmp_path / "rows.json", [adapted(*row, "Solution") for row in ASKED])
    found = evaluate.zero_shot(model, [f"piqa={file}"])["tasks"]["piqa"]
    assert found["examples"] == len(ASKED)
    assert found["metrics"] == {
        "acc": np.mean(best == gold),
        "acc_stderr": pytest.approx(error_of(best == gold)),
        "acc_norm": np.mean(by_length == gold),
        "acc_norm_stderr": pytest.approx(error_of(by_length == gold)),
    }
    task = evaluate.load_tasks([f"piqa={file}"])["tasks"]["piqa"]
    task.set_fewshot_seed(1)
    for doc in task.eval_docs:  # solved examples are the other rows
        prompt = task.fewshot_context(doc, len(ASKED) - 1)
        assert [prompt.count(f"Question: {question}\n") for question, *_ in ASKED] == [1] * len(ASKED)
        assert prompt.endswith(f"Question: {doc['goal']}\nAnswer:")
    # All right and all wrong: the answers that the model prefers, and the others.
    for answers, expected in ((best, 1.0), (1 - best, 0.0)):
        rows = [adapted(*row[:2], answer, "Solution") for row, answer in zip(ASKED, answers, strict=True)]
        metrics = evaluate.zero_shot(model, [f"piqa={written(file, rows)}"], limit=3)["tasks"]["piqa"]["metrics"]
        assert (metrics["acc"], metrics["acc_stderr"]) == (expected, 0)


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "boolq"])
def test_a_file_gives_the_prompts_and_scores_of_the_hubs_columns(tmp_path, model, monkeypatch, name, evaluate):
    import datasets

    def lettered(key):
        return lambda q, c, a: {key: q, "choices": {"text": c, "label": ["A", "B"]}, "answerKey": "AB"[a]}

    hub = {
        "arc_easy": lettered("question"),
        "arc_challenge": lettered("question"),
        "openbookqa": lettered("question_stem"),
        "piqa": lambda q, c, a: {"goal": q, "sol1": c[0], "sol2": c[1], "label": a},
        "winogrande": lambda q, c, a: {"sentence": q, "option1": c[0], "option2": c[1], "answer": "12"[a]},
        "boolq": lambda q, c, a: {"passage": "", "question": q.removesuffix("?"), "label": 1 - a},
    }
    rows, asked = ASKED, [adapted(*row, WORDS.get(name, "Answer")) for row in ASKED]
    if name == "winogrande":
        rows = [(f"{q} _ is", c, a) for q, c, a in ASKED if "_" not in q]
        asked = [adapted(*row, "Option") for row in rows]
    if name == "boolq":
        text = "Please answer with true or false, question: {}\n\nAnswer format: true/false"
        asked = [{"instruction": text.format(q), "answer": ["true", "false"][a]} for q, _, a in ASKED]
    there = [hub[name](*row) for row in rows]
    loaded = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(there))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    plain = evaluate.load_tasks([name])["tasks"][name]
    for file in (written(tmp_path / "rows.json", asked), written(tmp_path / "rows.jsonl", there)):
        task = evaluate.load_tasks([f"{name}={file}"])["tasks"][name]
        for own, expected in zip(task.eval_docs, plain.eval_docs, strict=True):
            for part in ("doc_to_text", "doc_to_choice", "doc_to_target"):
                assert getattr(task, part)(own) == getattr(plain, part)(expected)
        assert evaluate.zero_shot(model, [f"{name}={file}"])["tasks"] == evaluate.zero_shot(model, [name])["tasks"]


def test_a_folder_has_the_files_of_a_group(tmp_path, model, command, done):
    import lm_eval

    folder, pair = tmp_path / "blimp", ["the quick fox", "it jumps over"]
    names = [file.stem for file in (Path(lm_eval.__file__).parent / "tasks/blimp").glob("[!_]*.yaml")]
    for index, name in enumerate(names):
        # A pair is right in one order only: of three, two are right or one is.
        orders = [pair, pair[::-1], pair if index % 2 else pair[::-1]]
        rows = [dict(zip(("sentence_good", "sentence_bad"), order, strict=True)) for order in orders]
        written(folder / (f"{name}.jsonl" if index % 3 else f"blimp_{name}.json"), rows)
    found = json.loads(done("zero-shot", model, "--tasks", f"blimp={folder}", "--json"))["tasks"]
    each = [found[f"blimp_{name}"]["metrics"] for name in names]
    assert sorted({scores["acc"] for scores in each}) == pytest.approx([1 / 3, 2 / 3])
    assert [scores["acc_stderr"] for scores in each] == pytest.approx([error_of([1, 1, 0])] * len(names))
    assert found["blimp"]["metrics"]["acc"] == pytest.approx(np.mean([scores["acc"] for scores in each]))
    # Pooled from those of the tasks, as they have as many pairs each.
    assert found["blimp"]["metrics"]["acc_stderr"] == pytest.approx(error_of([1, 1, 0]) / np.sqrt(len(names)))
    (folder / f"{names[1]}.jsonl").unlink()
    for given, words in (
        (folder, (f"blimp_{names[1]}: there is no file", f"{names[1]}.jsonl")),
        (folder / f"{names[2]}.jsonl", ("blimp is a group of tasks: give a folder",)),
    ):
        status, _, err = command("zero-shot", model, "--tasks", f"blimp={given}")
        assert status == 2
        assert all(word in err for word in words), err


def test_files_that_cannot_be_used_are_named_with_their_row(tmp_path, model, evaluate):
    seen, file = [], tmp_path / "rows.jsonl"
    lm = evaluate.DecoderLM(model, observer=lambda *step: seen.append(step))
    good = adapted(*ASKED[0], "Solution")
    hub = {"goal": "q", "sol1": "a", "sol2": "b", "label": 1}
    refused = [
        ("", r"rows\.jsonl.*expected a JSON array of rows, or one JSON object a line"),
        ("[]", r"rows\.jsonl: has no rows"),
        (json.dumps(good) + "\n{no json\n", r"row 2: .*expected a JSON array"),
        ('["a"]', "row 1: .*expected a JSON array"),
        ("[1]", "row 1: expected a JSON object"),
        (f"{json.dumps(hub)}\n{json.dumps(good)}", "row 2: expected a JSON object with the same columns"),
        (json.dumps(good | {"answer": "solution3"}), "row 1: .* answer of solution1/solution2, given 'solution3'"),
        (json.dumps([hub, hub | {"label": -1}]), "piqa, row 2: the right choice is number -1 of 2"),
        (json.dumps({"question": "q", "answer": 0}), "piqa=.*rows.jsonl: does not fit the task .*'goal' is undefined"),
        (json.dumps([good, adapted("q", ["a", "b", "c"], 2)]), "piqa, row 2: the right choice is number 2 of 2"),
    ]
    for text, words in refused:
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            evaluate.zero_shot(lm, [f"piqa={file}"])
    file.write_bytes(b"\xff\xfe\x00")
    for task, words in (
        (f"piqa={file}", "utf-8"),
        (f"piqa={tmp_path / 'absent.json'}", "piqa: there is no file"),
        (f"pica={file}", "unknown task 'pica'; nearest are .*piqa"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate.zero_shot(lm, [task])
    file.write_text(json.dumps([hub, hub | {"label": -1}]))
    assert not seen  # before any work
    assert evaluate.zero_shot(lm, [f"piqa={file}"], limit=1)["tasks"]["piqa"]["examples"] == 1


def test_a_comparison_shows_accuracies_beside_perplexity(tmp_path, command, done, monkeypatch, evaluate):
    source, text = write_inputs(tmp_path, num_hidden_layers=1)
    file, output = written(tmp_path / "rows.json", [adapted(*row, "Solution") for row in ASKED]), tmp_path / "out"
    call = (
        "compare", source, "--output", output, "--methods", "magnitude", "--calibration", text, *CALIBRATED,
        "--text", text, "--eval-windows", 2, "--eval-seqlen", 48, "--tasks", f"piqa={file}", "--limit", 4,
    )  # fmt: skip
    runs = watch_runs(monkeypatch)
    done(*call)
    with (output / "comparison.csv").open(newline="") as stream:
        dense, pruned = csv.DictReader(stream)
    expected = evaluate.zero_shot(source, [f"piqa={file}"], limit=4)["tasks"]["piqa"]["metrics"]
    assert {name: float(dense[f"piqa_{name}"]) for name in expected} == expected
    assert float(pruned["piqa_acc"]) in np.arange(5) / 4
    page = (output / "comparison.md").read_text()
    assert page.index("perplexity") < page.index("piqa acc") < page.index("piqa acc norm") < page.index("error")
    spread = f" ± {expected['acc_stderr']:.2g}" if expected["acc_stderr"] else ""
    assert f"| {expected['acc']:.4g}{spread} |" in page
    assert f"* tasks: the first 4 examples of piqa={file}, with standard errors\n" in page
    assert "piqa acc norm" in done("report", output)
    # Other rows make another comparison, and mistakes are found before any model is made.
    written(file, [adapted(*row, "Solution") for row in ASKED[::-1]])
    assert command(*call)[0] == 2
    file.write_text("[]")
    status, _, err = command(*call[:3], tmp_path / "new", *call[4:])
    assert (status, "rows.json: has no rows" in err) == (2, True), err
    assert runs == [("magnitude", 0.5)]

"""Task files: what lm-eval's tasks read from them, scores against counts by hand, and accuracies in comparisons."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from sparseopt.models import encode_text, load_tokenizer, open_model
from sparseopt.pruning import perplexity
from tests.experiments.inputs import CALIBRATED, watch_runs, write_inputs

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("offline")]

ASKED = [
    ("How do hens fly? Tell: how", ["low", "high over it"], 1),
    ("What does the fox jump over", ["the lazy dog.", "it"], 0),
    ("Who tells _ all", ["the dog", "a fox: Option"], 0),
    ("Is it quick?", ["brown", "over and over it all"], 1),
    ("Where", ["over there", "here"], 1),
]
WORDS = {"piqa": "Solution", "winogrande": "Option"}


@pytest.fixture
def model(tmp_path):
    return write_inputs(tmp_path, num_hidden_layers=1)[0]


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


def log_likelihood(model, context, continuation):
    """By the perplexity of the whole text, less that of the context, of which lm-eval moves blanks behind."""
    tokenizer = load_tokenizer(model.source)
    texts = [encode_text(tokenizer, text) for text in (context, context + continuation)]
    return float(np.diff([-np.log(perplexity(model, ids[None])) * (len(ids) - 1) for ids in texts])[0])


def error_of(right):
    return np.std(right, ddof=1) / np.sqrt(len(right))


def test_accuracies_and_their_errors_are_those_by_hand(tmp_path, model):
    from sparseopt.pruning.evaluate.zero_shot import load_tasks, zero_shot

    opened = open_model(model)
    scores = [[log_likelihood(opened, f"Question: {q}\nAnswer:", f" {c}") for c in choices] for q, choices, _ in ASKED]
    best = np.argmax(scores, axis=1)
    by_length = np.argmax(np.divide(scores, [[len(c) for c in choices] for _, choices, _ in ASKED]), axis=1)
    gold = [answer for *_, answer in ASKED]
    file = written(tmp_path / "rows.json", [adapted(*row, "Solution") for row in ASKED])
    found = zero_shot(model, [f"piqa={file}"])["tasks"]["piqa"]
    assert found["examples"] == len(ASKED)
    assert found["metrics"] == {
        "acc": np.mean(best == gold),
        "acc_stderr": pytest.approx(error_of(best == gold)),
        "acc_norm": np.mean(by_length == gold),
        "acc_norm_stderr": pytest.approx(error_of(by_length == gold)),
    }
    task = load_tasks([f"piqa={file}"])["tasks"]["piqa"]
    task.set_fewshot_seed(1)
    for doc in task.eval_docs:  # solved examples are the other rows
        prompt = task.fewshot_context(doc, len(ASKED) - 1)
        assert [prompt.count(f"Question: {question}\n") for question, *_ in ASKED] == [1] * len(ASKED)
        assert prompt.endswith(f"Question: {doc['goal']}\nAnswer:")
    # All right and all wrong: the answers that the model prefers, and the others.
    for answers, expected in ((best, 1.0), (1 - best, 0.0)):
        rows = [
            adapted(q, choices, int(answer), "Solution") for (q, choices, _), answer in zip(ASKED, answers, strict=True)
        ]
        metrics = zero_shot(model, [f"piqa={written(file, rows)}"], limit=3)["tasks"]["piqa"]["metrics"]
        assert (metrics["acc"], metrics["acc_stderr"]) == (expected, 0)


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "boolq"])
def test_a_file_gives_the_prompts_and_scores_of_the_hubs_columns(tmp_path, model, monkeypatch, name):
    import datasets

    from sparseopt.pruning.evaluate.zero_shot import load_tasks, zero_shot

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
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: dict.fromkeys(("train", "validation", "test"), Dataset.from_list(there)),
    )
    plain = load_tasks([name])["tasks"][name]
    for file in (written(tmp_path / "rows.json", asked), written(tmp_path / "rows.jsonl", there)):
        task = load_tasks([f"{name}={file}"])["tasks"][name]
        for own, expected in zip(task.eval_docs, plain.eval_docs, strict=True):
            for part in ("doc_to_text", "doc_to_choice", "doc_to_target"):
                assert getattr(task, part)(own) == getattr(plain, part)(expected)
        assert zero_shot(model, [f"{name}={file}"])["tasks"] == zero_shot(model, [name])["tasks"]


def test_a_folder_has_the_files_of_a_group(tmp_path, model, command):
    import lm_eval

    folder, pair = tmp_path / "blimp", ["the quick fox", "it jumps over"]
    names = [file.stem for file in (Path(lm_eval.__file__).parent / "tasks/blimp").glob("[!_]*.yaml")]
    for index, name in enumerate(names):
        # A pair is right in one order only: of three, two are right or one is.
        orders = [pair, pair[::-1], pair if index % 2 else pair[::-1]]
        rows = [dict(zip(("sentence_good", "sentence_bad"), order, strict=True)) for order in orders]
        written(folder / (f"{name}.jsonl" if index % 3 else f"blimp_{name}.json"), rows)
    status, out, err = command("zero-shot", model, "--tasks", f"blimp={folder}", "--json")
    assert status == 0, err
    found = json.loads(out)["tasks"]
    each = [found[f"blimp_{name}"]["metrics"] for name in names]
    assert sorted({scores["acc"] for scores in each}) == pytest.approx([1 / 3, 2 / 3])
    assert [scores["acc_stderr"] for scores in each] == pytest.approx([error_of([1, 1, 0])] * len(names))
    assert found["blimp"]["metrics"]["acc"] == pytest.approx(np.mean([scores["acc"] for scores in each]))
    # Pooled from those of the tasks, as they have as many pairs each.
    assert found["blimp"]["metrics"]["acc_stderr"] == pytest.approx(
        np.sqrt(3 * error_of([1, 1, 0]) ** 2 / (3 * len(names)))
    )
    (folder / f"{names[1]}.jsonl").unlink()
    for given, words in (
        (folder, (f"blimp_{names[1]}: there is no file", f"{names[1]}.jsonl")),
        (folder / f"{names[2]}.jsonl", ("blimp is a group of tasks: give a folder",)),
    ):
        status, _, err = command("zero-shot", model, "--tasks", f"blimp={given}")
        assert status == 2
        assert all(word in err for word in words), err


def test_files_that_cannot_be_used_are_named_with_their_row(tmp_path, model):
    from sparseopt.pruning.evaluate.zero_shot import DecoderLM, zero_shot

    seen, file = [], tmp_path / "rows.jsonl"
    lm = DecoderLM(model, observer=lambda *step: seen.append(step))
    good = adapted(*ASKED[0], "Solution")
    hub = {"goal": "q", "sol1": "a", "sol2": "b", "label": 1}
    refused = [
        ("", r"rows\.jsonl.*expected a JSON array of rows, or one JSON object a line"),
        ("[]", r"rows\.jsonl: has no rows"),
        (json.dumps(good) + "\n{no json\n", r"row 2: .*expected a JSON array"),
        ('["a"]', "row 1: .*expected a JSON array"),
        ("[1]", "row 1: expected a JSON object"),
        (f"{json.dumps(hub)}\n{json.dumps(good)}", "row 2: expected a JSON object with the same columns"),
        (
            json.dumps(good | {"answer": "solution3"}),
            "row 1: expected an answer of solution1/solution2, given 'solution3'",
        ),
        (json.dumps([hub, hub | {"label": -1}]), "piqa, row 2: the right choice is number -1 of 2"),
        (
            json.dumps({"question": "q", "answer": 0}),
            "piqa=.*rows.jsonl: does not fit the task .*'goal' is undefined",
        ),
        (json.dumps([good, adapted("q", ["a", "b", "c"], 2)]), "piqa, row 2: the right choice is number 2 of 2"),
    ]
    for text, words in refused:
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            zero_shot(lm, [f"piqa={file}"])
    file.write_bytes(b"\xff\xfe\x00")
    for task, words in (
        (f"piqa={file}", "utf-8"),
        (f"piqa={tmp_path / 'absent.json'}", "piqa: there is no file"),
        (f"pica={file}", "unknown task 'pica'; nearest are .*piqa"),
    ):
        with pytest.raises(ValueError, match=words):
            zero_shot(lm, [task])
    file.write_text(json.dumps([hub, hub | {"label": -1}]))
    assert not seen  # before any work
    assert zero_shot(lm, [f"piqa={file}"], limit=1)["tasks"]["piqa"]["examples"] == 1


def test_a_comparison_shows_accuracies_with_their_errors_beside_perplexity(tmp_path, command, monkeypatch):
    from sparseopt.pruning.evaluate.zero_shot import zero_shot

    source, text = write_inputs(tmp_path, num_hidden_layers=1)
    file, output = written(tmp_path / "rows.json", [adapted(*row, "Solution") for row in ASKED]), tmp_path / "out"
    call = (
        "compare", source, "--output", output, "--methods", "magnitude", "--calibration", text, *CALIBRATED,
        "--text", text, "--eval-windows", 2, "--eval-seqlen", 48, "--tasks", f"piqa={file}", "--limit", 4,
    )  # fmt: skip
    with monkeypatch.context() as patched:
        for name in [m for m in sys.modules if m.partition(".")[0] == "lm_eval" or m.endswith("evaluate.zero_shot")]:
            patched.delitem(sys.modules, name)
        patched.setitem(sys.modules, "lm_eval", None)
        status, _, err = command(*call)
        assert (status, "zero_shot needs lm-eval: pip install 'sparseopt[eval]'" in err) == (2, True), err
    runs = watch_runs(monkeypatch)
    status, _, err = command(*call)
    assert status == 0, err
    with (output / "comparison.csv").open(newline="") as stream:
        dense, pruned = csv.DictReader(stream)
    expected = zero_shot(source, [f"piqa={file}"], limit=4)["tasks"]["piqa"]["metrics"]
    assert {name: float(dense[f"piqa_{name}"]) for name in expected} == expected
    assert float(pruned["piqa_acc"]) in np.arange(5) / 4
    page = (output / "comparison.md").read_text()
    assert page.index("perplexity") < page.index("piqa acc") < page.index("piqa acc norm") < page.index("error")
    shown = (
        f"{expected['acc']:.4g} ± {expected['acc_stderr']:.2g}" if expected["acc_stderr"] else f"{expected['acc']:.4g}"
    )
    assert f"| {shown} |" in page
    assert f"* tasks: the first 4 examples of piqa={file}, with standard errors\n" in page
    assert "piqa acc norm" in command("report", output)[1]
    # Other rows make another comparison, and mistakes are found before any model is made.
    written(file, [adapted(*row, "Solution") for row in ASKED[::-1]])
    assert command(*call)[0] == 2
    file.write_text("[]")
    status, _, err = command(*call[:3], tmp_path / "new", *call[4:])
    assert (status, "rows.json: has no rows" in err) == (2, True), err
    assert runs == [("magnitude", 0.5)]

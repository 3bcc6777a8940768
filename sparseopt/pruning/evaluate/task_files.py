"""Task files that a user has, for `lm-eval`'s own tasks without the network.

    piqa=FILE       the rows of a task: a JSON array, or one JSON object a line
    blimp=FOLDER    a file for each task of a group, named after the task or its data: adjunct_island.jsonl

Rows have the columns that the task reads, as on the Hugging Face hub. For the tasks in `COLUMNS`, they may also have
the question, choices and answer in the `instruction` and `answer` of LLM-Adapters (Hu et al., 2023).
"""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NoReturn

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

Row = dict[str, Any]

_CHOICE = r"\b(?:Answer|Solution|Option)"
_INSTRUCTION = re.compile(
    rf"[^:]*: (?P<question>.*?)\s*(?P<choices>{_CHOICE}1:.*?)?\s*Answer format: (?P<words>\S+)\s*", re.DOTALL
)


def _lettered(asked: str, choices: list[str], answer: int, question: str = "question") -> Row:
    labels = list(ascii_uppercase[: len(choices)])
    return {question: asked, "choices": {"text": choices, "label": labels}, "answerKey": labels[answer]}


# A task's columns from a question, its choices and the index of the right one. LLM-Adapters' BoolQ has no passage.
COLUMNS: dict[str, Callable[[str, list[str], int], Row]] = {
    "arc_easy": _lettered,
    "arc_challenge": _lettered,
    "openbookqa": partial(_lettered, question="question_stem"),
    "piqa": lambda asked, pair, answer: {"goal": asked, "sol1": pair[0], "sol2": pair[1], "label": answer},
    "winogrande": lambda asked, pair, answer: {
        "sentence": asked, "option1": pair[0], "option2": pair[1], "answer": str(answer + 1),
    },
    "boolq": lambda asked, pair, answer: {
        "passage": "", "question": asked.removesuffix("?"), "label": int(pair[answer] == "true"),
    },
}  # fmt: skip


class TaskFileError(ValueError):
    """A task file that cannot be used."""


class FileTask(ConfigurableTask):
    """A task of `lm-eval` with the rows of the file, or of its file in the folder, `dataset_kwargs["path"]`.

    Of the first `dataset_kwargs["limit"]` rows, each must have what the task reads, and a right choice.
    """

    def __init__(self, config: Row) -> None:
        given = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
        where = f"{config['task']}={config['dataset_kwargs']['path']}"
        try:
            super().__init__(config={name: value for name, value in config.items() if name != "class"} | given)
            docs = self.eval_docs if self.config.doc_to_choice else ()
            for number, doc in enumerate(islice(docs, config["dataset_kwargs"]["limit"]), 1):
                where = f"{self.config.task}, row {number}"
                text, target, count = self.doc_to_text(doc), self.doc_to_target(doc), len(self.doc_to_choice(doc))
                gold = text if self.multiple_input else target
                if isinstance(gold, int) and gold not in range(count):
                    _refuse(where, f"the right choice is number {gold} of {count}, counted from 0")
        except TaskFileError:
            raise
        except Exception as error:  # of any class, from the task's templates and functions
            _refuse(where, f"does not fit the task ({error})")

    def download(self, dataset_kwargs: Row | None = None, **_: Any) -> None:
        """Read the file instead."""
        name, path = str(self.config.task), Path((dataset_kwargs or {})["path"])
        stems = dict.fromkeys((name, self.config.dataset_name or name))
        inside = [path / f"{stem}{ending}" for stem in stems for ending in (".jsonl", ".json")]
        file = next(filter(Path.is_file, inside if path.is_dir() else [path]), None)
        if file is None:
            _refuse(name, f"there is no file {' or '.join(map(str, inside if path.is_dir() else [path]))}")
        self.dataset = {"test": Dataset.from_list(_rows(file, name))}


def _refuse(where: str, why: str) -> NoReturn:
    raise TaskFileError(f"{where}: {why}")


def _rows(file: Path, name: str) -> list[Row]:
    """The rows of a file with the columns of a task."""
    where, rows, columns = str(file), list[Row](), None
    try:
        text = file.read_text(encoding="utf-8").strip()
        for number, item in enumerate(json.loads(text) if text.startswith("[") else text.split("\n"), 1):
            where = f"{file}, row {number}"
            row = json.loads(item) if isinstance(item, str) else item
            if not isinstance(row, dict) or row.keys() != (columns := columns or row.keys()):
                _refuse(where, f"expected a JSON object with the same columns as the first one, given {str(row)[:60]}")
            rows.append(_converted(where, row, name))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _refuse(where, f"{error}; expected a JSON array of rows, or one JSON object a line")
    return rows or _refuse(where, "has no rows")


def _converted(where: str, row: Row, name: str) -> Row:
    """A row of LLM-Adapters with the columns of its task; other rows unchanged."""
    match = _INSTRUCTION.fullmatch(str(row.get("instruction")))
    if match is None or name not in COLUMNS:
        return row
    words, parts = match["words"].split("/"), re.split(rf"\s*{_CHOICE}\d+:", match["choices"] or "")[1:]
    choices = [part.strip() for part in parts] or words
    if len(choices) != len(words) or row.get("answer") not in words:
        _refuse(where, f"expected an answer of {match['words']}, given {row.get('answer')!r}, and as many choices")
    return COLUMNS[name](match["question"], choices, words.index(row["answer"]))

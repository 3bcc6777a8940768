"""Zero-shot tasks of `lm-eval` (extra `eval`), run on our own decoder.

`lm-eval` makes the prompts and scores the answers. This file computes what it needs from a model: the log-likelihood of
a continuation or of a whole text, and a greedy continuation.
"""

import difflib
import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparseopt.core.base.types import Observer
from sparseopt.models import (
    Bos,
    ModelError,
    ModelSource,
    encode_text,
    load_tokenizer,
    open_model,
    start_token,
)
from sparseopt.models.decoder.cached_decoding import next_tokens
from sparseopt.pruning.evaluate.scoring import Score, score_continuations
from sparseopt.pruning.evaluate.task_files import FileTask, TaskFileError

FEWSHOT_SEED = 1234  # lm-eval's own default
_NEW_TOKENS = 256
# Tokens between two searches for a stop string.
_PIECE = 16


class DecoderLM(TemplateLM):
    """A model with the interface of `lm-eval`.

    Log-likelihoods stream the model block by block; `generate_until` loads it whole, as float32. If BOS is used, every
    input begins with it, even if the input's own beginning was cut off, and it is never predicted.

    Args:
        model: a model folder, a GGUF file, a name on the hub or an opened model.
        max_length: most tokens that the model reads; None uses the model's own limit.
        bos: whether inputs begin with the tokenizer's BOS, see `models.start_token`.
        observer: called with (what is running, steps done, steps in all).

    Attributes:
        max_length: most tokens that the model reads.
        bos: the id of the token that inputs begin with; None for none.
        cut: number of requests that were too long and lost the beginning of their context.
    """

    def __init__(
        self,
        model: ModelSource,
        *,
        max_length: int | None = None,
        bos: Bos = "auto",
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        self.model = open_model(model)
        self.tokenizer = load_tokenizer(self.model.source)
        self.bos = start_token(self.model.source, self.tokenizer, bos)
        most = self.model.config.max_positions
        longest = most if max_length is None else max_length
        if type(longest) is not int or longest < 2:
            where = "" if max_length is not None else "; the model's configuration has no longest window: give one"
            raise ValueError(f"max_length must be a whole number of 2 or more, given {longest!r}{where}")
        if most is not None and longest > most:
            raise ValueError(f"max_length is at most the {most} tokens that the model is made for, given {longest}")
        self.max_length: int = longest
        self.cut = 0
        self._observer = observer
        ends = self.model.source.config.get("eos_token_id")
        self._end_ids: list[int] = np.ravel([] if ends is None else ends).tolist()

    @property
    def eot_token_id(self) -> int:
        if not self._end_ids:
            raise ModelError(f"{self.model.source.path} names no eos_token_id in its configuration; add it there")
        return self._end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, used or not, else the end token."""
        found = self.model.source.config.get("bos_token_id") if self.bos is None else self.bos
        return self.eot_token_id if found is None else found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, after BOS if it is used, unless the text has it or `add_special_tokens` is False."""
        ids = encode_text(self.tokenizer, string).tolist()
        return ids if add_special_tokens is False else self._begun(ids)

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def _last(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        self.cut += 1
        return ids[-room:] if self.bos is None else [self.bos, *ids[len(ids) - room + 1 :]]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        pairs = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, the model reads {self.max_length} at most; "
                    "leave the task out or give a model with a longer context"
                )
            pairs.append((self._last(context, self.max_length + 1 - len(continuation)), continuation))
        return score_continuations(self.model, pairs, observer=self._observer)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text after the start token, in windows of `max_length` tokens."""
        del disable_tqdm
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            used = int(self.bos is not None)
            # Without BOS, which begins every window and is never predicted.
            tokens = self.tok_encode(request.args[0])[used:]
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - used, context_len=1)
            pairs += [(self._begun(context), text) for context, text in map(make_disjoint_window, windows)]
            owners += [owner] * (len(pairs) - len(owners))
        scores = score_continuations(self.model, pairs, observer=self._observer)
        return np.bincount(np.asarray(owners, int), [score.log_likelihood for score in scores], len(requests)).tolist()

    def checked_generation(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """How a task generates; a ValueError for sampling, or for more tokens than the model reads."""
        found = normalize_gen_kwargs(wanted, _NEW_TOKENS)
        if found["do_sample"] and found.get("temperature") != 0:
            raise ValueError("a task asks for sampling (do_sample, temperature), only greedy generation is possible")
        if not 0 < (limit := found["max_gen_toks"]) < self.max_length:
            raise ValueError(f"a task asks for {limit} new tokens; the model reads {self.max_length} at most")
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy continuation of each context up to a stop string, the end token, or `max_gen_toks` tokens.

        Raises:
            ValueError: if a task asks for sampling, or for more tokens than the model reads.
        """
        del disable_tqdm
        answers, decoder = list[str](), self.model.decoder()
        for context, given in (request.args for request in requests):
            wanted = self.checked_generation(given)
            limit, stops = wanted["max_gen_toks"], [stop for stop in wanted["until"] if stop]
            prompt = self._last(self.tok_encode(context) or [self.prefix_token_id], self.max_length - limit)
            new = list[int]()
            for token in next_tokens(decoder, np.asarray(prompt), limit):
                if token in self._end_ids:
                    break
                new.append(token)
                if len(new) % _PIECE == 0 and any(stop in self.tokenizer.decode(new) for stop in stops):
                    break
            text = self.tokenizer.decode(new)
            answers.append(text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))])
            if self._observer:
                self._observer("generation", len(answers), len(requests))
        return answers


def zero_shot(
    model: ModelSource | DecoderLM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    shots: int = 0,
) -> dict[str, Any]:
    """Score a model on `lm-eval` tasks.

    Args:
        model: a model folder, a GGUF file, a name on the hub, an opened model, or a `DecoderLM` with its settings.
        tasks: names of tasks, groups or tags of `lm-eval` or `include_path`; with `=PATH`, as in `piqa=FILE`, the rows
            come from this file or folder, see `task_files`.
        limit: largest number of examples per task, from the start; None uses all.
        include_path: a folder of your own task files, whose names take precedence over those of `lm-eval`.
        shots: solved examples in each prompt, except for tasks that never have any.

    Returns:
        `{"model", "lm_eval", "limit", "shots", "bos", "cut",
        "tasks": {name: {"version", "examples", "metrics": {...}}}}`, ready for JSON. `bos` is the id of the token that
        inputs began with, None for none. `cut` counts the requests that were too long for the model and lost the
        beginning of their context. Groups are listed with the tasks.

    Raises:
        ValueError: if a task is unknown, with the nearest known name, a number is out of range, or a file cannot be
            used, with its row.
        RuntimeError: if a task's data cannot be read, or a log-likelihood is not finite.
    """
    if (limit is not None and (type(limit) is not int or limit < 1)) or type(shots) is not int or shots < 0:
        raise ValueError(f"limit and shots are whole numbers, of 1 or more and of 0 or more; given {limit=}, {shots=}")
    loaded = load_tasks(tasks, limit, include_path)
    lm = model if isinstance(model, DecoderLM) else DecoderLM(model)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
        # One more is drawn, in case the question itself is among them.
        if task.get_config("num_fewshot") and (most := len(task.fewshot_docs()) - 1) < shots:
            raise ValueError(
                f"{task.get_config('task')} has examples for at most {most} shots, given {shots}: lower them, or "
                "leave the task out"
            )
        if task.get_config("output_type") == "generate_until":
            lm.checked_generation(dict(task.get_config("generation_kwargs") or {}))
    found = evaluate(lm, loaded, limit=limit, log_samples=False)
    return {
        "model": str(lm.model.source.path),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "shots": shots,
        "bos": lm.bos,
        "cut": lm.cut,
        "tasks": {
            name: {
                "version": found["versions"].get(name),
                "examples": found["n-samples"].get(name, {}).get("effective"),
                "metrics": _metrics(values),
            }
            for name, values in found["results"].items()
        },
    }


def load_tasks(
    tasks: Sequence[str], limit: int | None = None, include_path: str | Path | None = None
) -> dict[str, Any]:
    """The tasks as the evaluator of `lm-eval` takes them, checked; arguments and errors are those of `zero_shot`."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a list of one name or more, given {tasks!r}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path must be a folder of task files, given {include_path}")
    paths, built = {name: path for name, _, path in (task.partition("=") for task in tasks)}, list[Any]()
    manager = _find_tasks(list(paths), include_path)
    try:
        for name, path in paths.items():
            if path and name not in manager.all_subtasks and not Path(path).is_dir():
                raise TaskFileError(f"{name} is a group of tasks: give a folder with a file for each, given {path}")
            # The manager's own `load` does not change the tasks of a group.
            reads, index = {"class": FileTask, "dataset_kwargs": {"path": path, "limit": limit}}, manager.task_index
            found = TaskFactory().build(index[name], overrides=reads, registry=index) if path else name
            built += found if isinstance(found, list) else [found]
        return manager.load(built)
    except TaskFileError:
        raise
    except Exception as error:  # of any class, also from a task's own code
        raise RuntimeError(
            f"the tasks {', '.join(paths)} cannot be loaded ({type(error).__name__}: {error}). Tasks of lm-eval fetch "
            "their data from the Hugging Face hub once; without a network, give a file as NAME=FILE, or name a task "
            "whose file points at local data"
        ) from error


@functools.cache
def _lm_eval() -> TaskManager:
    return TaskManager()


def _find_tasks(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    # Reading lm-eval's own 15,000 task files takes seconds. Groups and tags may name some of them, single tasks do not.
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = _lm_eval() if include_path is None else TaskManager(include_path=include_path)
    near = {n: difflib.get_close_matches(n, manager.all_tasks) for n in names if n not in manager.all_tasks}
    if near:
        raise ValueError(
            "; ".join(
                f"unknown task {name!r}; nearest are {', '.join(found) or 'none'}" for name, found in near.items()
            )
            + " (`lm-eval ls tasks` lists its own tasks; a file in include_path counts only if it is a valid task file)"
        )
    return manager


def _metrics(values: dict[str, Any]) -> dict[str, float | None]:
    # `acc,none` becomes `acc`, and a standard error that was not computed becomes None.
    return {
        key.removesuffix(",none").replace("_stderr,none", "_stderr"): value if isinstance(value, int | float) else None
        for key, value in values.items()
        if "," in key
    }

"""Efforts: values of the options that a recipe leaves open, from one solve per layer to training the whole model.

    nothing named          the fields of effort good
    an effort              its fields, below
    a method               that method on every layer and nothing else; "best" adds its own fields
    a preset, a penalty    the same with maiht, whose settings these are
    effort and method      the fields of the effort, with that method

Fields given in a recipe take precedence over its effort.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sparseopt.layers.patterns import implied_sparsity

Effort = Literal["fast", "good", "most"]
Fields = dict[str, Any]

# Nothing beyond the method.
NOTHING: Fields = {"output_weights": "uniform", "propagate": 0.0, "train_epochs": 0, "distil_epochs": 0}
# What method "best" does besides its choice of weights, if it is named alone.
BEST: Fields = {"output_weights": "gradient", "propagate": 0.25, "train_epochs": 4}
PRUNE: dict[str, Fields] = {
    # Of single solvers with at most 1.2 times mAIHT's time, this one has the smallest perplexity on drawn text.
    "fast": {"method": "admm", "ridge": 0.1},
    "good": BEST | {"method": "best", "train_epochs": 0},
    "most": BEST | {"method": "best"},
}
# To prune, effort most reads this many times the usual number of windows, and each of its trainings reads this many in
# all: more text is better than more epochs. SmolLM2-135M at 2:4 on WikiText-2: perplexity 35.9 with 64 windows; in the
# same time, 40.5 with 16 windows, of each of which the model had drawn three variants.
MOST_FACTOR, MOST_TRAINED = 4, 64
SHRINK: dict[str, Fields] = {
    "fast": {"method": "best", "train_epochs": 0},
    "good": {"method": "best", "train_epochs": 4},
    "most": {"method": "best", "train_epochs": 4, "distil_epochs": 4},
}
# What each effort is, for help and cards.
PRUNES = {
    "fast": "one solve per layer",
    "good": "one solve per layer, with weights for output errors and a correction of upstream errors",
    "most": "also trains each block and then the whole model, and chooses where the zeros go",
}
SHRINKS = {
    "fast": "what stays is fitted again",
    "good": "each block is trained too",
    "most": "the whole model is trained at the end too",
}
# The time of a pruning run relative to effort fast. SmolLM2-135M at 50 % on two idle cores took 126 s, with good
# 204 s, both without drawing a text (55 s, once); most took 7 times the time of good on busy cores.
COSTS = {"fast": 1, "good": 1.6, "most": 11}
# Settings of one method.
_MAIHT = ("preset", "penalty")
# With these the order of the channels is fixed, or which layers have which zeros.
_FIXED = ("keep_zeros", "masks", "targets", "ignore")


def effort_help(summaries: Mapping[str, str]) -> str:
    """The help text of the option."""
    listed = "; ".join(f"{name}, {text}" for name, text in summaries.items())
    return (
        f"How much to do, unless other options say so: {{choices}} ({listed}). Default: good; with a method and no "
        "effort, that method alone."
    )


def effort_of(fields: Mapping[str, Any]) -> str | None:
    """The effort of a recipe with these fields; None if a method is named alone."""
    named = any(fields.get(name) is not None for name in ("method", *_MAIHT))
    return fields["effort"] or (None if named else "good")


def prune_defaults(fields: Mapping[str, Any], windows: int) -> Fields:
    """What `Recipe` uses for fields that are None, given its other fields and its number of calibration windows."""
    effort, implied = effort_of(fields), implied_sparsity(fields["pattern"])
    found = NOTHING | {"effort": effort, "allocation": "uniform", "permute": False}
    # With zeros of the model or of masks no further ones.
    given = fields["keep_zeros"] or fields["masks"] is not None
    found["sparsity"] = (0.0 if given else 0.5) if implied is None else implied
    if effort is None:
        return found | (BEST if fields["method"] == "best" else {"method": "maiht"})
    found |= PRUNE.get(effort, {})
    of_maiht = any(fields[name] is not None for name in _MAIHT)
    if of_maiht and effort == "fast":
        found["method"] = "maiht"
    if of_maiht or fields["method"] is not None:
        found.pop("ridge", None)  # it belongs to the effort's own method
    if effort == "most":
        epochs = max(1, min(BEST["train_epochs"], MOST_TRAINED // windows))
        found |= {"train_epochs": epochs, "distil_epochs": epochs}
    if effort == "most" and not any(fields[name] for name in _FIXED):
        found |= {"allocation": "curves"} if implied is None else {"permute": implied > 0}
    return found


def shrink_defaults(fields: Mapping[str, Any]) -> Fields:
    """The same for `ShrinkRecipe`."""
    effort = effort_of(fields)
    alone = {"train_epochs": BEST["train_epochs"]} if fields["method"] == "best" else {}
    return NOTHING | {"effort": effort} | (alone if effort is None else SHRINK.get(effort, {}))

"""Floor 6: what to do to a model: one frozen recipe, checked as a whole before any work."""

from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np

from sparseopt.core.penalties import Penalty
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import find_method
from sparseopt.pruning.patterns import parse_pattern

STORED_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How `prune_model` prunes.

    Attributes:
        sparsity: share of zeros in every linear, in [0, 1), exact to the weight.
        method: "maiht", "wanda", "magnitude", or a `LayerMethod` of your own.
        preset: "paper" or "best".
        penalty: chooses the support in place of L0, as in `prune_layer`; None for L0.
        calibration: a text as in `pruning.texts` ("pydoc", "wikitext2:PATH", ...), or token ids `[samples, seqlen]`.
        samples: calibration windows.
        seqlen: tokens a window.
        heldout_samples: windows after the calibration windows for the held-out error; 0 for none.
        seed: 0 takes calibration windows from the start of the text, another draws them at random.
        dtype: dtype to store, or None to keep the source's.
    """

    sparsity: float = 0.5
    method: str | LayerMethod = "maiht"
    preset: str = "best"
    penalty: Penalty | None = None
    calibration: Any = "pydoc"
    samples: int = 16
    seqlen: int = 512
    heldout_samples: int = 4
    seed: int = 0
    dtype: str | None = None

    def check(self) -> LayerMethod:
        """The method asked for, after every field was checked.

        Raises:
            ValueError: listing all that is wrong, one line each.
        """
        problems: list[str] = []
        method: LayerMethod | None = None
        try:
            method = find_method(self.method, self.preset, self.penalty)
        except ValueError as error:
            problems.append(str(error))
        try:
            parse_pattern("unstructured", self.sparsity, (1, 1))
        except ValueError as error:
            problems.append(str(error))
        if self.samples < 1:
            problems.append(f"samples must be at least 1, given {self.samples}")
        if self.seqlen < 2:
            problems.append(f"seqlen must be at least 2 tokens, given {self.seqlen}")
        if self.heldout_samples < 0:
            problems.append(f"heldout_samples must be 0 or more, given {self.heldout_samples}")
        if self.seed < 0:
            problems.append(f"seed must be 0 or more, given {self.seed}")
        if self.dtype is not None and self.dtype not in STORED_DTYPES:
            problems.append(f"dtype must be one of {', '.join(STORED_DTYPES)}, given {self.dtype!r}")
        if problems or method is None:
            raise ValueError("the recipe cannot be used:\n  " + "\n  ".join(problems))
        return method

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record; arrays of tokens appear by their shape, methods by their name."""
        fields = {f.name: getattr(self, f.name) for f in dataclass_fields(self)}
        if not isinstance(self.method, str):
            fields["method"] = repr(self.method)
        if self.penalty is not None:
            fields["penalty"] = repr(self.penalty)
        if isinstance(self.calibration, np.ndarray):
            fields["calibration"] = f"token ids of shape {list(self.calibration.shape)}"
        return fields

"""Floor 6: what to do to a model: one frozen recipe, checked as a whole before any work."""

import re
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np

from sparseopt.core.penalties import Penalty
from sparseopt.pruning.allocation import Allocation, check_allocation
from sparseopt.pruning.calibration import WEIGHTINGS, Weighting
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import best_for_models, find_method
from sparseopt.pruning.patterns import check_pattern
from sparseopt.pruning.reconstruction import Reconstruction
from sparseopt.pruning.sensitivity import OUTPUT_WEIGHTINGS, OutputWeighting

# What method "best" does unasked: epochs of reconstruction, and the share of earlier error that it makes up for.
BEST_EPOCHS = 4
BEST_PROPAGATE = 0.25
STORED_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How `prune_model` prunes.

    Attributes:
        sparsity: share of zeros in every linear, in [0, 1), exact to the weight; may be None with an n:m pattern.
        pattern: which weights may survive, as in `prune_layer`.
        method: a name in `METHODS`, or a `LayerMethod` of your own. "best" runs as `methods.best_for_models`, shorter
            than on one layer; `find_method("best")` is the long one.
        preset: "paper" or "best".
        penalty: chooses the support in place of L0, as in `prune_layer`; None for L0.
        ridge: added to the unit diagonal of every layer's scaled Gram, in place of the method's own. On few tokens a
            larger one overfits less: 0.1 is best, by held-out error, for 8,192 tokens of SmolLM2. None: the method's
            own.
        weighting: of the tokens in the Grams, "uniform" or "residual", see `calibration`; the relative errors are
            in the same weights.
        outputs: weights of the errors at a linear's outputs, "uniform" or "gradient", see `sensitivity`; the relative
            errors are without them. None: "gradient" for method "best", else "uniform".
        allocation: of the sparsity over the linears, "uniform", "owl" or "curves", see `allocation`; the total stays
            exact. Not with n:m patterns.
        bounds: least and most sparsity of a linear, for allocations but "uniform"; None: `default_bounds`.
        propagate: share, in [0, 1], of the error of the blocks before that a linear is to make up for, see
            `propagation`; the relative errors are then to the moved target. None: `BEST_PROPAGATE` for method "best",
            else 0.
        reconstruct: epochs of training for the kept weights of each block after its linears are pruned, 0 for none,
            or a whole `Reconstruction`. None: `BEST_EPOCHS` for method "best", else 0.
        calibration: a text as in `pruning.texts` ("pydoc", "wikitext2:PATH", ...), or token ids `[samples, seqlen]`.
        samples: calibration windows.
        seqlen: tokens a window.
        heldout_samples: windows after the calibration windows for the held-out error; 0 for none.
        seed: 0 takes calibration windows from the start of the text, another draws them at random.
        dtype: dtype to store, or None to keep the source's.
        pack: store the zeros as a bitmask, see `packed`; transformers loads the folder only once it is unpacked.
        min_expert_tokens: an expert that receives fewer calibration tokens than this is starved: it is pruned by the
            magnitude of its weights, and the report names it. An expert that receives none always is.
    """

    sparsity: float | None = 0.5
    pattern: str = "unstructured"
    method: str | LayerMethod = "maiht"
    preset: str = "best"
    penalty: Penalty | None = None
    ridge: float | None = None
    weighting: Weighting = "uniform"
    outputs: OutputWeighting | None = None
    allocation: Allocation = "uniform"
    bounds: tuple[float, float] | None = None
    propagate: float | None = None
    reconstruct: int | Reconstruction | None = None
    calibration: Any = "pydoc"
    samples: int = 16
    seqlen: int = 512
    heldout_samples: int = 4
    seed: int = 0
    dtype: str | None = None
    pack: bool = False
    min_expert_tokens: int = 64

    def check(self) -> LayerMethod:
        """The method asked for, after every field was checked.

        Raises:
            ValueError: listing all that is wrong, one line each.
        """
        problems: list[str] = []
        method: LayerMethod | None = None
        try:
            method = find_method(self.method, self.preset, self.penalty, self.ridge)
            if self.method == "best":
                method = find_method(best_for_models(), ridge=self.ridge)
        except ValueError as error:
            problems.append(str(error))
        try:
            check_pattern(self.pattern, self.sparsity)
        except ValueError as error:
            problems.append(str(error))
        try:
            check_allocation(self.allocation, self.pattern, self.sparsity, self.bounds)
        except ValueError as error:
            problems.append(str(error))
        try:
            if self.reconstruction is not None:
                self.reconstruction.check()
        except ValueError as error:
            problems.append(str(error))
        if not 0 <= self.propagated_share <= 1:
            problems.append(f"propagate must be a share in [0, 1], given {self.propagate}")
        if self.outputs not in (None, *OUTPUT_WEIGHTINGS):
            problems.append(f"outputs must be one of {', '.join(OUTPUT_WEIGHTINGS)}, given {self.outputs!r}")
        if self.penalty is not None and self.pattern != "unstructured":
            problems.append(f"a penalty chooses weights anywhere, which contradicts the pattern {self.pattern!r}")
        if self.samples < 1:
            problems.append(f"samples must be at least 1, given {self.samples}")
        if self.seqlen < 2:
            problems.append(f"seqlen must be at least 2 tokens, given {self.seqlen}")
        if self.heldout_samples < 0:
            problems.append(f"heldout_samples must be 0 or more, given {self.heldout_samples}")
        if self.min_expert_tokens < 0:
            problems.append(f"min_expert_tokens must be 0 or more, given {self.min_expert_tokens}")
        if self.seed < 0:
            problems.append(f"seed must be 0 or more, given {self.seed}")
        if self.weighting not in WEIGHTINGS:
            problems.append(f"weighting must be one of {', '.join(WEIGHTINGS)}, given {self.weighting!r}")
        if self.dtype is not None and self.dtype not in STORED_DTYPES:
            problems.append(f"dtype must be one of {', '.join(STORED_DTYPES)}, given {self.dtype!r}")
        if problems or method is None:
            raise ValueError("the recipe cannot be used:\n  " + "\n  ".join(problems))
        return method

    def output_weighting(self) -> OutputWeighting:
        """The weighting of outputs asked for, or the method's default."""
        return self.outputs or ("gradient" if self.method == "best" else "uniform")

    @property
    def propagated_share(self) -> float:
        """The share of earlier error asked for, or the method's default."""
        if self.propagate is None:
            return BEST_PROPAGATE if self.method == "best" else 0.0
        return self.propagate

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How blocks are reconstructed; None for not at all."""
        if isinstance(self.reconstruct, Reconstruction):
            return self.reconstruct
        default = BEST_EPOCHS if self.method == "best" else 0
        epochs = default if self.reconstruct is None else self.reconstruct
        return Reconstruction(epochs=epochs) if epochs else None

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's activations are carried beside the pruned model's."""
        return self.propagated_share > 0 or self.reconstruction is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record; arrays of tokens appear by their shape, methods by their name."""
        fields = {f.name: getattr(self, f.name) for f in dataclass_fields(self)}
        if not isinstance(self.method, str):
            fields["method"] = described(self.method)
        if self.penalty is not None:
            fields["penalty"] = described(self.penalty)
        if isinstance(self.reconstruct, Reconstruction):
            fields["reconstruct"] = self.reconstruct.as_dict()
        if not isinstance(self.calibration, str):
            fields["calibration"] = f"token ids of shape {list(np.shape(self.calibration))}"
        return fields


def described(value: Any) -> str:
    """An object as text, the same in every process: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))

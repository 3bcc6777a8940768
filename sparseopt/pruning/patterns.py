"""Floor 6: which weights may survive. A pattern is a core penalty that can also turn scores into a mask.

Patterns act on a layer in solver layout `[in, out]`: axis 0 runs along the inputs of one output.
"""

import re

from sparseopt.core.penalties import NM, TopK

Pattern = TopK | NM


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` weights survive: `round((1 - sparsity) * size)`, exact to the weight."""
    return round((1 - sparsity) * size)


def parse_pattern(text: str, sparsity: float | None, shape: tuple[int, int]) -> Pattern:
    """The pattern that `text` names, for a weight `[out, in]`.

    Args:
        text: "unstructured" (k weights of the whole layer) or "n:m" such as "2:4" (n of every m inputs).
        sparsity: share of zeros in [0, 1); with n:m it may be None and must otherwise be `1 - n/m`.
        shape: `(out, in)`.

    Raises:
        ValueError: naming what was given and what is possible; another pattern is never substituted.
    """
    outputs, inputs = shape
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), given {sparsity}; 0.5 keeps every second weight")
    if text == "unstructured":
        if sparsity is None:
            raise ValueError("pattern 'unstructured' needs a sparsity in [0, 1), given none")
        return TopK(kept_count(outputs * inputs, sparsity))
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise ValueError(f"unknown pattern {text!r}; known are 'unstructured' and 'n:m', such as '2:4'")
    n, m = int(match[1]), int(match[2])
    if not 0 < n <= m:
        raise ValueError(f"pattern {text!r} must keep between 1 and {m} of every {m} weights")
    if inputs % m:
        raise ValueError(
            f"pattern {text!r} needs a number of inputs divisible by {m}; a layer of shape "
            f"[out={outputs}, in={inputs}] leaves {inputs % m} over"
        )
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
        raise ValueError(
            f"pattern {text!r} has sparsity {1 - n / m:g}, which contradicts the sparsity {sparsity} given; "
            "leave one of the two out"
        )
    return NM(n, m, axis=0)

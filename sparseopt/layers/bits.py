"""Grids of few bits by name: whole multiples of a scale that a group of inputs shares, in half precision.

    weight [out, in] = scale [out, groups] * multiple [out, in],    low <= multiple <= high

A weight on a grid is held as float32, in which the product is exact; `multiples_of` splits it again.
"""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sparseopt.core.base.arguments import unknown

# The fraction of non-zero weights that a grid may make 0 because its scales are float16 numbers.
MOST_LOST = 1e-3
# The range of float16, in which scales are stored.
LEAST_SCALE, MOST_SCALE = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Bits:
    """A symmetric grid: 0 is on it, so zeros stay. Scales are stored in float16.

    Attributes:
        name: the user's name for it.
        low: the smallest multiple of the scale; high: the largest.
        group: the number of consecutive inputs that share a scale; None if all inputs of an output do.
        dtype: of the stored weights; one with fewer digits than float32 stores the nearest numbers to the grid's.
    """

    name: str
    low: int
    high: int
    group: int | None
    dtype: str = "float32"

    def check(self, inputs: int) -> None:
        """Raise a ValueError if the groups do not tile the inputs."""
        if self.group and inputs % self.group:
            raise ValueError(
                f"bits {self.name!r} have a scale for each {self.group} inputs, which do not tile {inputs}: "
                "use int8, or int4:group with a divisor"
            )

    def check_weight(self, weight: Float[np.ndarray, "out in"]) -> None:
        """Raise a ValueError if no scale of float16 holds the largest weight, or scales would make many weights 0."""
        self.check(weight.shape[1])
        sizes = np.abs(np.asarray(weight, np.float32))
        if (largest := float(np.max(sizes))) > MOST_SCALE * -self.low:
            raise ValueError(
                f"bits {self.name!r} hold weights up to {MOST_SCALE * -self.low:g}, given one of {largest:g}"
            )
        # At most half of a scale.
        groups = sizes.reshape(-1, self.group or weight.shape[1])
        lost = np.count_nonzero(groups[np.max(groups, axis=1) < LEAST_SCALE / 2])
        if lost > MOST_LOST * np.count_nonzero(sizes):
            raise ValueError(
                f"bits {self.name!r} make {lost:,} weights 0, which are below {LEAST_SCALE / 2:.2g}, half the smallest "
                "scale of float16: leave them in floats"
            )


# The grids of 32 inputs are GGUF's; int4 accepts the size of a group, as in int4:64.
BITS = {
    bits.name: bits
    for bits in (
        Bits("q8_0", -127, 127, 32),
        Bits("q5_0", -16, 15, 32),
        Bits("q4_0", -8, 7, 32),
        Bits("int8", -127, 127, None),
        Bits("int4", -8, 7, 128),
    )
}
# Of GGUF.
WITH_OFFSET = ("q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def parse_bits(text: str) -> Bits:
    """The grid with a name, one of BITS or int4:group.

    Raises:
        ValueError: for any other name, listing the known ones and saying that a grid must not move zeros.
    """
    known = [*BITS, "int4:group"]
    if not isinstance(text, str):
        raise ValueError(f"bits is one of {', '.join(known)}, given {text!r}")
    if text.startswith("int4:"):
        if not re.fullmatch(r"int4:0*[1-9][0-9]*", text):
            raise ValueError(f"bits {text!r} needs groups of at least 1 input, as in int4:64")
        return Bits(text, -8, 7, int(text.removeprefix("int4:")))
    if text.lower() in WITH_OFFSET:
        raise ValueError(f"bits {text!r} moves zeros, since its grid has an offset; known are {', '.join(known)}")
    if text not in BITS:
        raise ValueError(unknown("bits", text, known))
    return BITS[text]


def multiples_of(
    weight: Float[np.ndarray, "out in"], bits: Bits
) -> tuple[Int[np.ndarray, "out in"], Float[np.ndarray, "out groups"]]:
    """The multiples, int8, and the scales, float16, of a weight that lies on a grid.

    If several scales fit a group, one of them is used; their products are the same.

    Raises:
        ValueError: if a group lies on no such grid.
    """
    outputs, inputs = weight.shape
    groups = np.asarray(weight, np.float32).reshape(-1, bits.group or inputs)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    scale, open_ = np.zeros(len(groups), np.float32), largest != 0
    # The largest weight is some multiple, and then the scale is known; few of these scales are numbers of float16.
    for multiple in (*range(bits.low, 0), *range(bits.high, 0, -1)):
        if bits.low == -bits.high and multiple > 0:
            break
        (rows,) = np.nonzero(open_)
        with np.errstate(over="ignore"):
            tried = (largest[rows] / np.float32(multiple)).astype(np.float16).astype(np.float32)
        fits = (tried * np.float32(multiple) == largest[rows]) & (tried != 0)
        rows, tried = rows[fits], tried[fits]
        near = np.clip(np.rint(groups[rows] / tried[:, None]), bits.low, bits.high)
        whole = np.all(near * tried[:, None] == groups[rows], axis=1)
        scale[rows[whole]], open_[rows[whole]] = tried[whole], False
    if open_.any():
        raise ValueError(f"{np.count_nonzero(open_):,} of {len(groups):,} groups lie on no grid of {bits.name!r}")
    multiples = np.rint(groups / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
    return multiples.reshape(weight.shape), scale.astype(np.float16).reshape(outputs, -1)

"""A pruned layer in few bits: every weight a whole multiple of the scale of its group of inputs, zeros where they were.

    minimise over q, d    1/2 ||X (d q)ᵀ - X Wᵀ||²    q whole, low <= q <= high, zero off the mask;  d [groups, out]

Three steps, all outputs at once. The inputs are rounded as another method left them, group by group, the strongest
first: a scale is searched when its group is reached, and each error is passed on to the inputs after it; a pruned
weight is one whose grid is 0. Then sweeps of coordinate descent on the loss of the layer, each weight the best point of
its grid given all others, and after every group its best scale given the multiples. A sweep never raises the loss.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparseopt.core.base.arguments import unknown
from sparseopt.core.base.dense import product, spd_inverse_factor
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.patterns import Grid
from sparseopt.layers.methods.sparsegpt import pass_on
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import OnGrid, Pruned, ScaledLayer

# Inputs in a panel of the descent where all inputs of an output share a scale.
PANEL = 128
# Scales are searched at these shares of the one that just holds the group's largest weight, and their negatives; each
# is then fitted to its multiples.
SHARES = (0.5, 0.6, 0.7, 0.78, 0.86, 0.93, 1.0, 1.08)


@dataclass(frozen=True)
class Bits:
    """A symmetric grid: 0 is on it, so zeros stay. Scales are stored in float16.

    Attributes:
        low: the least multiple of the scale; high: the largest.
        group: the number of consecutive inputs that share a scale; None where all inputs of an output do.
    """

    low: int
    high: int
    group: int | None

    def check(self, inputs: int) -> None:
        """Raise a ValueError if the groups do not tile the inputs."""
        if self.group and inputs % self.group:
            raise ValueError(f"groups of {self.group} inputs with a scale each do not tile {inputs} inputs")


# Those of 32 inputs are GGUF's; int4 takes the size of a group, as in int4:64.
BITS = {
    "q8_0": Bits(-127, 127, 32),
    "q5_0": Bits(-16, 15, 32),
    "q4_0": Bits(-8, 7, 32),
    "int8": Bits(-127, 127, None),
    "int4": Bits(-8, 7, 128),
}


def parse_bits(text: str) -> Bits:
    """The grid that a name means, one of BITS or int4:group.

    Raises:
        ValueError: for any other, saying which are known and that a grid must not move zeros.
    """
    if match := re.fullmatch(r"int4:(\d+)", text):
        if not int(match[1]):
            raise ValueError(f"bits {text!r} needs groups of at least 1 input")
        return Bits(-8, 7, int(match[1]))
    if text in ("q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k"):
        raise ValueError(f"bits {text!r} moves zeros, since its grid has an offset; known are {', '.join(BITS)}")
    if text not in BITS:
        raise ValueError(unknown("bits", text, [*BITS, "int4:group"]))
    return BITS[text]


@pytree
class FewBits:
    """Another method's answer, put on a grid of few bits; its mask stays, and a kept weight may become 0.

    Attributes:
        first: the method that chooses the mask and the weights before they are rounded.
        bits: the grid.
        ridge: added to the unit diagonal of the scaled Hessian.
        sweeps: of coordinate descent.

    Source: the order of rounding and its compensation are those of Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ:
    accurate post-training quantization for generative pre-trained transformers", ICLR 2023; coordinate descent as in
    Behdin et al., "QuantEase", 2023.
    """

    first: Any
    bits: Bits = static()
    ridge: Any = 0.1
    sweeps: int = static(default=4)

    @property
    def reads_variances(self) -> bool:
        return getattr(self.first, "reads_variances", False)

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        inputs, _ = layer.center.shape
        self.bits.check(inputs)
        group = self.bits.group or inputs
        found = self.first(layer, pattern)
        start = jnp.where(found.mask, found.values, 0)
        # A weight's unit in scaled coordinates: 0 at dead inputs, whose weights do not matter.
        unit = layer.scale[:, None] * layer.output_scale
        hessian = layer.ridged(self.ridge).hessian
        values, scale = self._rounded(hessian, start, found.mask, unit)

        def sweep(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return self._sweep(hessian, layer.center, found.mask, unit, *carry)

        values, scale = jax.lax.fori_loop(0, self.sweeps, sweep, (values, scale))

        def stored(scaled: Array, scale: Array) -> Array:
            weights = jnp.where(unit == 0, layer.weight, _divide(scaled, unit))
            return self._landed(weights, jnp.repeat(scale, group, axis=0), found.mask)

        # As a user would round: to multiples of the scale that just holds the largest weight of the group.
        plain = jnp.where(unit == 0, layer.weight, _divide(start, unit)) * found.mask
        largest = _scale_of_largest(plain.reshape(-1, group, plain.shape[1]), self.bits)
        grid = OnGrid(stored(values, scale), start, stored(start, largest))
        return found._replace(values=jnp.where(found.mask, values, 0), grid=grid)

    def _landed(self, x: Array, step: Array, kept: Array) -> Array:
        """The nearest points of grids with these steps, 0 where nothing is kept."""
        return jnp.where(kept, Grid(step, self.bits.low, self.bits.high).nearest(x), 0)

    def _panel(self, inputs: int) -> int:
        """Inputs that are rounded one after the other before a product tells the others."""
        return self.bits.group or max(size for size in range(1, PANEL + 1) if inputs % size == 0)

    def _searched(self, values: Array, unit: Array, mask: Array) -> Float[Array, "1 out"]:
        """The scale of one group for every output: values, their unit and the mask, `[group, out]`.

        With the multiples q of a candidate the best scale is `<q, w> / <q, q>`, and it leaves `<w, w> - <q, w>² /
        <q, q>` of the squared error, all weighted by the squared unit.
        """
        weights = jnp.where(mask, _divide(values, unit), 0)
        widest = _scale_of_largest(weights[None], self.bits)
        shares = (*SHARES, *(-share for share in SHARES)) if self.bits.low != -self.bits.high else SHARES

        def better(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
            near = jnp.clip(jnp.round(_divide(weights, share * widest)), self.bits.low, self.bits.high)
            size = jnp.sum((near * unit) ** 2, axis=0, keepdims=True)
            along = jnp.sum(near * unit**2 * weights, axis=0, keepdims=True)
            gain = _divide(along**2, size)
            return (jnp.maximum(gain, best[0]), jnp.where(gain > best[0], _divide(along, size), best[1])), None

        (_, scale), _ = jax.lax.scan(better, (jnp.zeros_like(widest), widest), jnp.asarray(shares, jnp.float32))
        return _in_half(scale)

    def _rounded(
        self, hessian: Array, start: Array, mask: Bool[Array, "in out"], unit: Array
    ) -> tuple[Array, Float[Array, "groups out"]]:
        """The start on a grid, every error compensated by the inputs after it; and the scales.

        The steps of strong inputs are the coarsest, so these come first, while many others can still compensate.
        """
        size, group = self._panel(len(start)), self.bits.group or 1
        strength = jnp.sum(unit**2, axis=1).reshape(-1, group)
        groups = jnp.argsort(-jnp.sum(strength, axis=1))
        order = (group * groups[:, None] + jnp.argsort(-strength, axis=1)[groups]).reshape(-1)
        factor = spd_inverse_factor(hessian[order][:, order])
        common = None if self.bits.group else self._searched(start, unit, mask)
        start, mask, unit = start[order], mask[order], unit[order]

        def panel(values: Array, first: Array) -> tuple[Array, Array]:
            rows, upper, units, kept = (
                jax.lax.dynamic_slice_in_dim(whole, first, size) for whole in (values, factor, unit, mask)
            )
            square = jax.lax.dynamic_slice_in_dim(upper, first, size, axis=1)
            scale = self._searched(rows, units, kept) if common is None else common
            steps = scale * units

            def one_input(rows: Array, index: Array) -> tuple[Array, Array]:
                return pass_on(rows, square, index, self._landed(rows[index], steps[index], kept[index]))

            rows, errors = jax.lax.scan(one_input, rows, jnp.arange(size))
            beyond = jnp.arange(len(values)) >= first + size
            values = values - product(jnp.where(beyond[:, None], upper.T, 0), errors)
            return jax.lax.dynamic_update_slice_in_dim(values, rows, first, 0), scale[0]

        values, scales = jax.lax.scan(panel, start, jnp.arange(0, len(start), size))
        return values[jnp.argsort(order)], scales[jnp.argsort(groups)] if common is None else common

    def _sweep(
        self, hessian: Array, center: Array, mask: Array, unit: Array, values: Array, scale: Array
    ) -> tuple[Array, Array]:
        """Every weight in turn at the best point of its grid, and after each group its scale."""
        size = self._panel(len(center))

        def panel(change: Array, place: tuple[Array, Array]) -> tuple[Array, Array]:
            first, scale = place
            across, centers, changes, units, kept = (
                jax.lax.dynamic_slice_in_dim(whole, first, size) for whole in (hessian, center, change, unit, mask)
            )
            square = jax.lax.dynamic_slice_in_dim(across, first, size, axis=1)
            gradient, steps = product(across, change), scale * units

            def one_input(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                rows, gradient = carry
                best = rows[index] - gradient[index] / square[index, index]
                near = self._landed(best, steps[index], kept[index])
                gradient = gradient + square[:, index, None] * (near - rows[index])
                return rows.at[index].set(near), gradient

            rows, gradient = jax.lax.fori_loop(0, size, one_input, (changes + centers, gradient))
            if self.bits.group:
                # Given the multiples, the loss is a parabola in the scale; in half precision, its best may be worse.
                along = jnp.round(_divide(rows, steps)) * units
                slope, curvature = jnp.sum(along * gradient, axis=0), jnp.sum(along * product(square, along), axis=0)
                move = _in_half(scale - _divide(slope, curvature)) - scale
                move = jnp.where(move * (slope + move * curvature / 2) < 0, move, 0)
                rows, scale = rows + move * along, scale + move
            return jax.lax.dynamic_update_slice_in_dim(change, rows - centers, first, 0), scale

        firsts = jnp.arange(0, len(center), size)
        scales = scale if self.bits.group else jnp.broadcast_to(scale, (len(firsts), scale.shape[1]))
        change, found = jax.lax.scan(panel, values - center, (firsts, scales))
        return change + center, found if self.bits.group else scale


def _divide(a: Array, b: Array) -> Array:
    """`a / b`, 0 where b is."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _in_half(scale: Array) -> Array:
    """The scale as float16 stores it, at most its largest number."""
    limit = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(scale, -limit, limit).astype(jnp.float16).astype(jnp.float32)


def _scale_of_largest(weights: Float[Array, "groups group out"], bits: Bits) -> Float[Array, "groups out"]:
    """The scale at which each group's largest weight is the last multiple below 0."""
    place = jnp.argmax(jnp.abs(weights), axis=1, keepdims=True)
    return _in_half(jnp.take_along_axis(weights, place, axis=1)[:, 0] / bits.low)

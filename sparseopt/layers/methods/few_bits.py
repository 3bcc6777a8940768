"""A pruned layer in few bits: every weight a whole multiple of the scale of its group of inputs, zeros where they were.

    minimise over q, d    1/2 ||X (V - W)ᵀ||² + ridge/2 ||(V - V0) e||²,    V = d q,  q whole, low <= q <= high

with V zero off the mask, scales d `[groups, out]`, V0 the answer of another method, and e the norms of the inputs.
Three steps, all outputs at once. V0 is rounded group by group, strongest inputs first: a scale is searched when its
group is reached, and each error is passed on to the inputs after it; a pruned weight is one whose grid is 0. If plain
rounding has the smaller loss for an output, it is used. Then sweeps of coordinate descent: each weight moves to its
best grid point given the others, then each group's scale to its best. A sweep never raises the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product, spd_inverse_factor
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.patterns import Grid
from sparseopt.layers.bits import LEAST_SCALE, MOST_SCALE, Bits
from sparseopt.layers.methods.sparsegpt import pass_beyond, pass_on
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import OnGrid, Pruned, ScaledLayer

# Inputs in a panel of the descent if all inputs of an output share a scale.
PANEL = 128
# Scales are searched at these fractions of the scale that just holds the group's largest weight, and their negatives;
# each is then fitted to its multiples.
SHARES = (0.5, 0.6, 0.7, 0.78, 0.86, 0.93, 1.0, 1.08)
# The norm of a dead input, as a fraction of the root mean square: its weights count a little, for the tokens to come.
DEAD_NORM = 0.1


@pytree
class _Layer:
    """A layer and an answer V0 in coordinates in which no input has norm 0, all `[in, out]` but the hessian."""

    hessian: Any
    center: Any  # W
    start: Any  # V0
    mask: Any
    unit: Any  # of a weight
    ridge: Any

    def losses(self, values: Array) -> Float[Array, " out"]:
        """Twice the loss of every output."""
        change, moved = values - self.center, values - self.start
        return jnp.sum(change * product(self.hessian, change) + self.ridge * moved**2, axis=0)


@pytree
class FewBits:
    """Another method's answer, put on a grid of few bits; its mask stays, and a kept weight may become 0.

    Attributes:
        first: the method that chooses the mask and the weights before they are rounded.
        bits: the grid.
        ridge: see the loss above; relative to the inputs' own squares.
        sweeps: number of coordinate-descent sweeps.

    Source: the order of rounding and its compensation follow Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ:
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
        found, dead = self.first(layer, pattern), (layer.scale == 0)[:, None]
        mask = found.mask
        # In coordinates in which no input has norm 0; dead inputs keep the weights of the dense layer.
        typical = jnp.sqrt(jnp.mean(layer.scale**2))
        least = jnp.where(typical > 0, DEAD_NORM * typical, 1)
        unit = jnp.where(dead, least, layer.scale[:, None]) * layer.output_scale
        center = jnp.where(dead, layer.weight * unit, layer.center)
        start = jnp.where(mask, jnp.where(dead, center, found.values.astype(jnp.float32)), 0)
        hessian = layer.hessian + jnp.diag(dead[:, 0].astype(jnp.float32))
        problem = _Layer(hessian, center, start, mask, unit, jnp.float32(self.ridge))

        widest = self._scale_of_largest(start / unit)
        plain = self._landed(start, self._each(widest, inputs) * unit, mask)
        values, scale = self._rounded(problem, widest)
        worse = problem.losses(plain) < problem.losses(values)
        first = jnp.where(worse, plain, values), jnp.where(worse, widest, scale)
        values, scale = jax.lax.fori_loop(0, self.sweeps, lambda _, carry: self._sweep(problem, *carry), first)

        weights, rounded = (
            self._landed(scaled / unit, self._each(each, inputs), mask)
            for scaled, each in ((values, scale), (plain, widest))
        )
        if self.bits.dtype != "float32":
            # Without a barrier, XLA may leave the rounding out.
            held = jax.lax.optimization_barrier([each.astype(self.bits.dtype) for each in (weights, rounded)])
            weights, rounded = (each.astype(jnp.float32) for each in held)
        # What the method returned off its own mask is left for the check of its answer.
        values = jnp.where(mask, values, found.values)
        return found._replace(values=values, grid=OnGrid(weights, found.values, rounded))

    def _each(self, scale: Float[Array, "groups out"], inputs: int) -> Float[Array, "in out"]:
        """The scale of every input's group."""
        return jnp.repeat(scale, self.bits.group or inputs, axis=0)

    def _landed(self, x: Array, step: Array, kept: Array) -> Array:
        """The nearest points of grids with these steps, 0 where nothing is kept."""
        return jnp.where(kept, Grid(step, self.bits.low, self.bits.high).nearest(x), 0)

    def _panel(self, inputs: int) -> int:
        """Inputs that are rounded one after the other before a product updates the others."""
        return self.bits.group or max(size for size in range(1, PANEL + 1) if inputs % size == 0)

    def _scale_of_largest(self, weights: Float[Array, "in out"]) -> Float[Array, "groups out"]:
        """The scale at which each group's largest weight is the last multiple below 0."""
        groups = weights.reshape(-1, self.bits.group or len(weights), weights.shape[1])
        place = jnp.argmax(jnp.abs(groups), axis=1, keepdims=True)
        return _in_half(jnp.take_along_axis(groups, place, axis=1)[:, 0] / self.bits.low)

    def _searched(self, values: Array, unit: Array, kept: Array, widest: Array) -> Float[Array, "1 out"]:
        """The scale of one group for every output: values, their unit and mask `[group, out]`, and a first scale.

        With the multiples q of a candidate the best scale is `<q, w> / <q, q>`, and it leaves `<w, w> - <q, w>² /
        <q, q>` of the squared error, all weighted by the squared unit.
        """
        weights = jnp.where(kept, values / unit, 0)
        # Ratios alone count; squares of the units themselves could overflow.
        unit = unit / jnp.max(unit, axis=0)
        shares = (*SHARES, *(-share for share in SHARES)) if self.bits.low != -self.bits.high else SHARES

        def better(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
            near = jnp.clip(jnp.round(_divide(weights, share * widest)), self.bits.low, self.bits.high)
            size = jnp.sum((near * unit) ** 2, axis=0, keepdims=True)
            along = jnp.sum(near * unit**2 * weights, axis=0, keepdims=True)
            gain = along * _divide(along, size)
            return (jnp.maximum(gain, best[0]), jnp.where(gain > best[0], _divide(along, size), best[1])), None

        (_, scale), _ = jax.lax.scan(better, (jnp.zeros_like(widest), widest), jnp.asarray(shares, jnp.float32))
        return _in_half(scale)

    def _rounded(self, layer: _Layer, widest: Array) -> tuple[Array, Float[Array, "groups out"]]:
        """V0 on a grid, every error compensated by the inputs after it; and the scales.

        The steps of strong inputs are the coarsest, so these come first, while many others can still compensate.
        """
        inputs = len(layer.start)
        size, group = self._panel(inputs), self.bits.group or 1
        strength = jnp.sum(layer.unit**2, axis=1).reshape(-1, group)
        groups = jnp.argsort(-jnp.sum(strength, axis=1))
        order = (group * groups[:, None] + jnp.argsort(-strength, axis=1)[groups]).reshape(-1)
        hessian = layer.hessian + layer.ridge * jnp.eye(inputs, dtype=jnp.float32)
        factor = spd_inverse_factor(hessian[order][:, order])
        start, mask, unit = layer.start[order], layer.mask[order], layer.unit[order]
        common = None if self.bits.group else self._searched(start, unit, mask, widest)

        def panel(values: Array, place: tuple[Array, Array]) -> tuple[Array, Array]:
            first, widest = place
            rows, upper, units, kept = (
                jax.lax.dynamic_slice_in_dim(whole, first, size) for whole in (values, factor, unit, mask)
            )
            square = jax.lax.dynamic_slice_in_dim(upper, first, size, axis=1)
            scale = self._searched(rows, units, kept, widest[None]) if common is None else common
            steps = scale * units

            def one_input(rows: Array, index: Array) -> tuple[Array, Array]:
                return pass_on(rows, square, index, self._landed(rows[index], steps[index], kept[index]))

            rows, errors = jax.lax.scan(one_input, rows, jnp.arange(size))
            return pass_beyond(values, upper, first, rows, errors), scale[0]

        firsts = jnp.arange(0, inputs, size)
        # If all inputs share a scale, every panel gets it.
        widths = widest[groups] if self.bits.group else jnp.broadcast_to(widest, (len(firsts), widest.shape[1]))
        values, scales = jax.lax.scan(panel, start, (firsts, widths))
        return values[jnp.argsort(order)], scales[jnp.argsort(groups)] if common is None else common

    def _sweep(self, layer: _Layer, values: Array, scale: Array) -> tuple[Array, Array]:
        """Every weight in turn at the best point of its grid, and after each group its scale."""
        inputs, ridge = len(values), layer.ridge
        size = self._panel(inputs)

        def panel(change: Array, place: tuple[Array, Array]) -> tuple[Array, Array]:
            first, scale = place
            across, changes, centers, starts, kept, units = (
                jax.lax.dynamic_slice_in_dim(whole, first, size)
                for whole in (layer.hessian, change, layer.center, layer.start, layer.mask, layer.unit)
            )
            square = jax.lax.dynamic_slice_in_dim(across, first, size, axis=1)
            square = square + ridge * jnp.eye(size, dtype=jnp.float32)
            rows, steps = changes + centers, scale * units
            gradient = product(across, change) + ridge * (rows - starts)

            def one_input(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                rows, gradient = carry
                best = rows[index] - gradient[index] / square[index, index]
                near = self._landed(best, steps[index], kept[index])
                gradient = gradient + square[:, index, None] * (near - rows[index])
                return rows.at[index].set(near), gradient

            rows, gradient = jax.lax.fori_loop(0, size, one_input, (rows, gradient))
            if self.bits.group:
                # Given the multiples, the loss is a parabola in the scale; in half precision, its best may be worse.
                along = jnp.round(_divide(rows, steps)) * units
                slope, curvature = jnp.sum(along * gradient, axis=0), jnp.sum(along * product(square, along), axis=0)
                move = _in_half(scale - _divide(slope, curvature)) - scale
                move = jnp.where(move * (slope + move * curvature / 2) < 0, move, 0)
                rows, scale = rows + move * along, scale + move
            return jax.lax.dynamic_update_slice_in_dim(change, rows - centers, first, 0), scale

        firsts = jnp.arange(0, inputs, size)
        scales = scale if self.bits.group else jnp.broadcast_to(scale, (len(firsts), scale.shape[1]))
        change, found = jax.lax.scan(panel, values - layer.center, (firsts, scales))
        return change + layer.center, found if self.bits.group else scale


def _divide(a: Array, b: Array) -> Array:
    """`a / b`, 0 where b is."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _in_half(scale: Array) -> Array:
    """The scale as float16 stores it; one that is not 0 does not become 0, nor infinite."""
    size = jnp.clip(jnp.abs(scale), LEAST_SCALE, MOST_SCALE)
    return jnp.where(scale == 0, 0, jnp.copysign(size, scale)).astype(jnp.float16).astype(jnp.float32)

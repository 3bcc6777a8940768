"""Penalties on single entries: L0, L1, the elastic net, MCP, SCAD, the log sum and the half-power."""

from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import Limited
from sparseopt.core.base.thresholds import count_nonzero, hard_threshold, largest_ratio, soft_threshold
from sparseopt.core.base.types import FloatArray, Scalar, pytree


class _OnEntries(Limited):
    """A sum over entries of a function of `|x|` that is 0 at 0."""

    separable = True
    keeps_zeros = True
    even = True


@pytree
class L0(_OnEntries):
    """`weight * ||x||_0`, the number of non-zeros; prox: hard threshold at `sqrt(2 * step * weight)`.

    Example:
        >>> so.L0(0.5).prox(jnp.array([-3.0, 0.9, 1.0]), step=1.0)  # keeps |x| >= 1
        Array([-3.,  0.,  1.], dtype=float32)
    """

    weight: Any

    def refuses(self) -> str | None:
        shape = np.shape(self.weight)
        return super().refuses() or (f"the weight of L0 is one number, given the shape {shape}" if shape else None)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return self.weight * count_nonzero(x).astype(x.dtype)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return hard_threshold(x, jnp.sqrt(2 * jnp.asarray(step * self.weight, x.dtype)))


@pytree
class L1(_OnEntries):
    """`weight * ||x||_1`; prox: soft threshold at `step * weight`. The weight may be an array that broadcasts to x.

    Example:
        >>> so.L1(1.0).prox(jnp.array([-3.0, 0.5, 2.0]), step=1.0)
        Array([-2.,  0.,  1.], dtype=float32)
    """

    weight: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * jnp.abs(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return soft_threshold(x, jnp.asarray(step * self.weight, x.dtype))

    def project_dual(self, dual: FloatArray) -> FloatArray:
        weight = jnp.asarray(self.weight, dual.dtype)
        return jnp.clip(dual, -weight, weight)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        return jnp.asarray(self.weight, x.dtype) * jnp.abs(x) - dual * x

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return largest_ratio(jnp.abs(dual), self.weight)

    def entry_terms(self) -> tuple[Any, Any, Any, Any]:
        return self.weight, 0.0, -np.inf, np.inf


@pytree
class ElasticNet(_OnEntries):
    """`weight * ||x||_1 + ridge / 2 * ||x||²`; prox: soft threshold at `step * weight`, over `1 + step * ridge`.

    Weight and ridge may be arrays that broadcast to x. The conjugate is `||soft(u, weight)||² / (2 ridge)`, finite
    where the ridge is positive; where the ridge is 0, it is the conjugate of L1. Source: Zou and Hastie,
    "Regularization and variable selection via the elastic net", 2005.

    Example:
        >>> so.ElasticNet(1.0, ridge=1.0).prox(jnp.array([-3.0, 0.5, 2.0]), step=1.0)
        Array([-1. ,  0. ,  0.5], dtype=float32)
    """

    weight: Any
    ridge: Any
    least = ("weight", "ridge")

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * jnp.abs(x) + 0.5 * self.ridge * x * x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return soft_threshold(x, jnp.asarray(step * self.weight, x.dtype)) / jnp.asarray(1 + step * self.ridge, x.dtype)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight |x| - a x + ridge / 2 (x - b / ridge)²` with `a = clip(dual, ±weight)` and `b = dual - a`."""
        weight, ridge = jnp.asarray(self.weight, x.dtype), jnp.asarray(self.ridge, x.dtype)
        inside = jnp.clip(dual, -weight, weight)
        beyond = (dual - inside) / jnp.where(ridge > 0, ridge, 1)
        return weight * jnp.abs(x) - inside * x + 0.5 * ridge * (x - beyond) ** 2

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        """0 for positive ridges; the largest `|dual| / weight` of entries without one."""
        return largest_ratio(jnp.where(jnp.asarray(self.ridge) > 0, 0, jnp.abs(dual)), self.weight)

    def entry_terms(self) -> tuple[Any, Any, Any, Any]:
        return self.weight, self.ridge, -np.inf, np.inf


@pytree
class MCP(_OnEntries):
    """Minimax concave penalty: `weight |x| - x² / (2 gamma)` up to `|x| = gamma weight`, constant beyond.

    The prox is a global minimiser for every step, and continuous for `step < gamma`; as gamma grows it becomes L1's
    prox. Source: Zhang, "Nearly unbiased variable selection under minimax concave penalty", 2010, eq. 2.1.

    Example:
        >>> so.MCP(1.0, gamma=2.0).prox(jnp.array([0.5, 1.5, 4.0]), step=1.0)  # large entries are unchanged
        Array([0., 1., 4.], dtype=float32)
    """

    weight: Any
    gamma: Any = 3.0
    above = MappingProxyType({"gamma": 0})

    def value(self, x: FloatArray) -> Float[Array, ""]:
        size = jnp.minimum(jnp.abs(x), jnp.asarray(self.gamma * self.weight, x.dtype))
        return jnp.sum(self.weight * size - size * size / (2 * self.gamma))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """For `step < gamma` firm: 0, then `soft(x, step weight) / (1 - step / gamma)`, then x from `gamma weight` on.

        For larger steps the middle piece is concave, and the answer is the hard threshold at
        `weight sqrt(gamma step)`, where both ends cost the same.
        """
        weight, gamma, step = (jnp.asarray(number, x.dtype) for number in (self.weight, self.gamma, step))
        convex = step < gamma
        firm = soft_threshold(x, step * weight) / jnp.where(convex, 1 - step / gamma, 1)
        firm = jnp.where(jnp.abs(x) > gamma * weight, x, firm)
        return jnp.where(convex, firm, hard_threshold(x, weight * jnp.sqrt(gamma * step)))

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight - |x| / gamma`, 0 from `gamma weight` on."""
        return jnp.maximum(self.weight - jnp.abs(x) / self.gamma, 0)

    def with_concavity(self, factor: Scalar) -> "MCP":
        """The penalty of the same slope at 0 whose concavity there is `factor` times this one's."""
        return MCP(self.weight, self.gamma / factor)


@pytree
class SCAD(_OnEntries):
    """Smoothly clipped absolute deviation: slope `weight` to `|x| = weight`, falling to 0 at `a weight`.

    Needs `a > 2`. The prox is a global minimiser for every step, and continuous for `step < a - 1`. Source: Fan and Li,
    "Variable selection via nonconcave penalized likelihood", 2001, eq. 2.

    Example:
        >>> so.SCAD(1.0).prox(jnp.array([0.5, 2.0, 4.0]), step=1.0)  # large entries are unchanged
        Array([0., 1., 4.], dtype=float32)
    """

    weight: Any
    a: Any = 3.7
    above = MappingProxyType({"a": 2})

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(_scad_terms(x, self.weight, self.a))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The best of the minimisers on the three pieces, each on its own interval.

        A piece is concave at an end that it shares with a neighbour.
        """
        weight, a, step = (jnp.asarray(number, x.dtype) for number in (self.weight, self.a, step))
        size = jnp.abs(x)
        inner = jnp.clip(size - step * weight, 0, weight)
        bend = (a - 1) - step
        middle = ((a - 1) * size - step * a * weight) / jnp.where(bend > 0, bend, 1)
        middle = jnp.where(bend > 0, jnp.clip(middle, weight, a * weight), inner)
        outer = jnp.maximum(size, a * weight)
        best, cost = inner, 0.5 * (inner - size) ** 2 + step * _scad_terms(inner, weight, a)
        for other in (middle, outer):
            other_cost = 0.5 * (other - size) ** 2 + step * _scad_terms(other, weight, a)
            best, cost = jnp.where(other_cost < cost, other, best), jnp.minimum(cost, other_cost)
        # Far out the penalty is flat: x itself, without the rounding of the compared costs.
        return jnp.where(size > (a + step) * weight, x, jnp.sign(x) * best)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight`, falling from `|x| = weight` to 0 at `a weight`."""
        return jnp.clip((self.a * self.weight - jnp.abs(x)) / (self.a - 1), 0, self.weight)

    def with_concavity(self, factor: Scalar) -> "SCAD":
        """The penalty of the same slope at 0 whose concavity there is `factor` times this one's."""
        return SCAD(self.weight, 1 + (self.a - 1) / factor)


def _scad_terms(x: FloatArray, weight: Any, a: Any) -> FloatArray:
    """`weight |x|` to `weight`, a parabola to `a weight`, `(a + 1) weight² / 2` beyond."""
    size = jnp.minimum(jnp.abs(x), jnp.asarray(a * weight, x.dtype))
    over = jnp.maximum(size - weight, 0)
    return weight * size - over * over / (2 * (a - 1))


@pytree
class LogSum(_OnEntries):
    """`weight * sum of log(1 + |x| / eps)`, between L1 of weight `weight / eps` near zero and L0 far out.

    The prox is a global minimiser for every step, and continuous for `step * weight <= eps²`. Source: Candès, Wakin and
    Boyd, "Enhancing sparsity by reweighted l1 minimization", 2008, eq. 12.

    Example:
        >>> so.LogSum(1.0, eps=1.0).prox(jnp.array([0.5, 3.0, -99.0]), step=1.0).round(2)  # large entries hardly shrink
        Array([  0.  ,   2.73, -98.99], dtype=float32)
    """

    weight: Any
    eps: Any
    above = MappingProxyType({"eps": 0})

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * jnp.log1p(jnp.abs(x) / self.eps))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """Where u > 0, the larger root of `(u - |x|)(u + eps) + step weight` is the local minimum.

        For `step weight <= eps²` the cost is convex: the root wins from `|x| = step weight / eps` on, where it is 0.
        For larger steps it wins if it costs less than 0, and the prox jumps.
        """
        weight, eps = jnp.asarray(self.weight, x.dtype), jnp.asarray(self.eps, x.dtype)
        level, size = jnp.asarray(step, x.dtype) * weight, jnp.abs(x)
        # Of `(size + eps)² - 4 level`, which may overflow.
        share = 1 - 4 * level / (size + eps) / (size + eps)
        real = share > 0
        root = (size + eps) * jnp.sqrt(jnp.where(real, share, 1))
        # Each form is used where it does not cancel.
        small = size < eps
        u = jnp.where(
            small, 2 * (size * eps - level) / jnp.where(small, eps - size + root, 1), (size - eps) / 2 + root / 2
        )
        cheaper = 0.5 * u * (u - 2 * size) + level * jnp.log1p(jnp.abs(u) / eps) < 0
        wins = real & (u > 0) & jnp.where(level <= eps * eps, size * eps > level, cheaper)
        return jnp.where(wins, jnp.sign(x) * u, 0)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight / (eps + |x|)`."""
        return self.weight / (self.eps + jnp.abs(x))

    def with_concavity(self, factor: Scalar) -> "LogSum":
        """The penalty of the same slope at 0 whose concavity there is `factor` times this one's."""
        return LogSum(self.weight / factor, self.eps / factor)


@pytree
class LHalf(_OnEntries):
    """`weight * sum of sqrt(|x|)`, between L0 and L1; prox: the half threshold at `1.5 (step * weight)^(2/3)`.

    The prox is the global minimiser for every step, in closed form. The weight may be an array that broadcasts to x.
    Source: Xu, Chang, Xu and Zhang, "L1/2 regularization: a thresholding representation theory and a fast solver",
    IEEE Transactions on Neural Networks and Learning Systems 23 (2012), theorem 1.

    Example:
        >>> so.LHalf(1.0).prox(jnp.array([-9.0, 1.4, 2.0]), step=1.0).round(2)  # keeps |x| > 1.5
        Array([-8.83,  0.  ,  1.61], dtype=float32)
    """

    weight: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * jnp.sqrt(jnp.abs(x)))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The larger root of a cubic in `sqrt(u)`, by the cosine of a third of an angle."""
        size, weight = jnp.abs(x), jnp.asarray(step * self.weight, x.dtype)
        # The root has no finite derivative at 0.
        level = jnp.where(weight > 0, jnp.cbrt(jnp.where(weight > 0, weight, 1)) ** 2, 0)
        keeps = size > 1.5 * level
        share = 3 * level / jnp.where(keeps, size, 1)
        angle = jnp.arccos(jnp.where(keeps, share, 0) ** 1.5 / 4)
        return jnp.where(keeps, x * (2 / 3) * (1 + jnp.cos(2 / 3 * (jnp.pi - angle))), 0)

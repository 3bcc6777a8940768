"""Floor 2: penalties. A penalty is a frozen pytree with a `value` and a `prox`; nothing else is asked of it.

The contract: `prox(x, step)` returns the minimiser over u of

    1/2 ||u - x||² + step * value(u)

and `value(x)` is a scalar that includes the weight. This file has the contract and the penalties on single entries;
their sources are named at the scalar formulas in `thresholds.py`. Penalties on groups and matrices are in
`group_penalties.py`, indicators (value 0 on a set, +inf off it) in `constraints.py` and `patterns.py`.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.thresholds import (
    count_nonzero,
    hard_threshold,
    largest_ratio,
    log_sum_prox,
    log_sum_value,
    mcp_prox,
    mcp_value,
    scad_prox,
    scad_value,
    soft_threshold,
)
from sparseopt.core.types import FloatArray, Scalar, pytree


@runtime_checkable
class Penalty(Protocol):
    """What a solver needs of a penalty. Write your own as a frozen pytree with these two methods.

    A penalty whose value is a sum over entries may say so with a class attribute `separable = True`: it then promises
    that `prox` takes an array of steps, one per entry. `proximal_adam` needs it; without the attribute a penalty counts
    as coupled.
    """

    def value(self, x: FloatArray) -> Float[Array, ""]:
        """The penalty of `x`, its weight included: a scalar, 0 at x = 0 for a penalty on size."""

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """The minimiser over u of `1/2 ||u - x||² + step * value(u)`, of the shape and dtype of `x`."""


@runtime_checkable
class Norm(Penalty, Protocol):
    """A convex penalty with `value(t x) = |t| value(x)`: it has a dual ball, and so a duality gap.

    For every `dual` in the ball, `<dual, x> <= value(x)`. A class whose `project_dual` may not return the nearest point
    of the ball says so with a class attribute `nearest = False`.
    """

    def project_dual(self, dual: FloatArray) -> FloatArray:
        """The nearest point of the dual ball."""

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """Terms, none negative for a dual in the ball, that add up to `value(x) - <dual, x>`."""


@runtime_checkable
class Conjugate(Penalty, Protocol):
    """A convex penalty whose Fenchel conjugate `f*(u) = max over x of <u, x> - value(x)` is known.

    It has a duality gap. The conjugate of a norm is 0 in the dual ball and +inf outside, and its slack is that of
    `Norm`.
    """

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """Terms that add up to `value(x) + f*(dual) - <dual, x>`, none negative for a dual in the domain of `f*`."""

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        """The least `t >= 0` for which `dual / t` lies in the domain of `f*`; 0 where `f*` is finite everywhere.

        For a norm this is its dual norm, the weight included; 0 / 0 counts as 0, and a nonzero entry of weight 0 makes
        it +inf.
        """


@runtime_checkable
class IterativeProx(Penalty, Protocol):
    """A penalty whose prox is itself a solve, which ends sooner if it starts from the last one.

    `AcceleratedProximalGradient`, `ProximalGradient` and `proximal` carry the memory from one prox to the next, and so
    can any caller; `prox` starts cold.
    """

    def memory(self, x: FloatArray) -> Any:
        """What the first prox of an array like `x` starts from: a pytree."""

    def prox_from(self, x: FloatArray, step: Scalar, memory: Any) -> tuple[FloatArray, Any]:
        """The prox of `x`, and a memory of the same structure, shapes and dtypes for the next one."""


@runtime_checkable
class Composite(IterativeProx, Protocol):
    """`value(x) = inner(K x)`: a convex penalty whose prox also finds a subgradient of `inner`.

    With it `AcceleratedProximalGradient` has a duality gap, and a solution has derivatives that do not pass through the
    iterations of the prox: both are those of the problem with the operator K.
    """

    def parts(self, x: FloatArray) -> tuple[Any, Any]:
        """`inner`, which has a conjugate, and K as a linear map of arrays like `x`."""

    def dual(self, memory: Any) -> FloatArray:
        """The subgradient of `inner` at `K u` for the last prox u, in the domain of its conjugate."""


def cold_memory(penalty: Any, x: FloatArray) -> Any:
    """The memory for the first prox of an array like x; None for a penalty without one."""
    return penalty.memory(x) if isinstance(penalty, IterativeProx) else None


def prox_from(penalty: Any, x: FloatArray, step: Scalar, memory: Any) -> tuple[FloatArray, Any]:
    """The prox, and the memory for the next one."""
    return (penalty.prox(x, step), None) if memory is None else penalty.prox_from(x, step, memory)


@pytree
class L0:
    """`weight * ||x||_0`, the number of non-zeros; prox: hard threshold at `sqrt(2 * step * weight)`.

    Example:
        >>> so.L0(0.5).prox(jnp.array([-3.0, 0.9, 1.0]), step=1.0)  # keeps |x| >= 1
        Array([-3.,  0.,  1.], dtype=float32)
    """

    weight: Any
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return self.weight * count_nonzero(x).astype(x.dtype)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return hard_threshold(x, jnp.sqrt(2 * jnp.asarray(step * self.weight, x.dtype)))


@pytree
class L1:
    """`weight * ||x||_1`; prox: soft threshold at `step * weight`. The weight may be an array that broadcasts to x.

    Example:
        >>> so.L1(1.0).prox(jnp.array([-3.0, 0.5, 2.0]), step=1.0)
        Array([-2.,  0.,  1.], dtype=float32)
    """

    weight: Any
    separable = True

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


@pytree
class ElasticNet:
    """`weight * ||x||_1 + ridge / 2 * ||x||²`; prox: soft threshold at `step * weight`, over `1 + step * ridge`.

    Weight and ridge may be arrays that broadcast to x. The conjugate is `||soft(u, weight)||² / (2 ridge)`, finite
    everywhere: `slack` and `dual_norm` need a positive ridge. Source: Zou and Hastie, "Regularization and variable
    selection via the elastic net", 2005.

    Example:
        >>> so.ElasticNet(1.0, ridge=1.0).prox(jnp.array([-3.0, 0.5, 2.0]), step=1.0)
        Array([-1. ,  0. ,  0.5], dtype=float32)
    """

    weight: Any
    ridge: Any
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(self.weight * jnp.abs(x) + 0.5 * self.ridge * x * x)

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return soft_threshold(x, jnp.asarray(step * self.weight, x.dtype)) / jnp.asarray(1 + step * self.ridge, x.dtype)

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """`weight |x| - a x + ridge / 2 (x - b / ridge)²` with `a = clip(dual, ±weight)` and `b = dual - a`."""
        weight, ridge = jnp.asarray(self.weight, x.dtype), jnp.asarray(self.ridge, x.dtype)
        inside = jnp.clip(dual, -weight, weight)
        return weight * jnp.abs(x) - inside * x + 0.5 * ridge * (x - (dual - inside) / ridge) ** 2

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return jnp.zeros((), dual.dtype)


@pytree
class MCP:
    """Minimax concave penalty: `weight |x| - x² / (2 gamma)` up to `|x| = gamma weight`, constant beyond.

    Its prox is `mcp_prox`, continuous for `step < gamma`; as gamma grows it becomes L1.

    Example:
        >>> so.MCP(1.0, gamma=2.0).prox(jnp.array([0.5, 1.5, 4.0]), step=1.0)  # large entries stay as they are
        Array([0., 1., 4.], dtype=float32)
    """

    weight: Any
    gamma: Any = 3.0
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(mcp_value(x, self.weight, self.gamma))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return mcp_prox(x, self.weight, self.gamma, step)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight - |x| / gamma`, 0 from `gamma weight` on."""
        return jnp.maximum(self.weight - jnp.abs(x) / self.gamma, 0)


@pytree
class SCAD:
    """Smoothly clipped absolute deviation: slope `weight` to `|x| = weight`, falling to 0 at `a weight`.

    Needs `a > 2`; its prox is `scad_prox`, continuous for `step < a - 1`.

    Example:
        >>> so.SCAD(1.0).prox(jnp.array([0.5, 2.0, 4.0]), step=1.0)  # large entries stay as they are
        Array([0., 1., 4.], dtype=float32)
    """

    weight: Any
    a: Any = 3.7
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(scad_value(x, self.weight, self.a))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return scad_prox(x, self.weight, self.a, step)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight`, falling from `|x| = weight` to 0 at `a weight`."""
        return jnp.clip((self.a * self.weight - jnp.abs(x)) / (self.a - 1), 0, self.weight)


@pytree
class LogSum:
    """`weight * sum of log(1 + |x| / eps)`, between L1 of weight `weight / eps` near zero and L0 far out.

    Its prox is `log_sum_prox`, continuous for `step * weight <= eps²`. Source: Candès, Wakin and Boyd, "Enhancing
    sparsity by reweighted l1 minimization", 2008, eq. 12.

    Example:
        >>> so.LogSum(1.0, eps=1.0).prox(jnp.array([0.5, 3.0, -99.0]), step=1.0).round(2)  # large entries hardly shrink
        Array([  0.  ,   2.73, -98.99], dtype=float32)
    """

    weight: Any
    eps: Any
    separable = True

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(log_sum_value(x, self.weight, self.eps))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return log_sum_prox(x, self.weight, self.eps, step)

    def slope(self, x: FloatArray) -> FloatArray:
        """The derivative of the value in `|x|`: `weight / (eps + |x|)`."""
        return self.weight / (self.eps + jnp.abs(x))

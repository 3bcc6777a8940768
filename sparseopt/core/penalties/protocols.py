"""What a solver asks of a penalty. A penalty is a frozen pytree with a `value` and a `prox`; nothing else is required.
What else callers may ask, a penalty states about itself; see `Penalty`.

`prox(x, step)` returns the minimiser over u of

    1/2 ||u - x||² + step * value(u)

and `value(x)` is a scalar that includes the weight.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.types import FloatArray, Scalar


@runtime_checkable
class Penalty(Protocol):
    """What a solver needs of a penalty. Write your own as a frozen pytree with these two methods.

    What no class attribute states counts as false:

    - `separable = True`: the value is a sum over entries, and `prox` accepts an array of steps, one per entry.
      `proximal_adam` needs it.
    - `keeps_zeros = True`: separable, costs nothing at 0, and the prox of 0 is 0. Small problems of similar sizes then
      share a compiled program, see `sparseopt.core.problem.padding`.
    - `convex = True`, for a penalty without a conjugate: `solve` then chooses a method for convex problems.
    - `even = True`: unchanged if rows change their order or their sign, or if rows of zeros are added. With
      `keeps_zeros`, a field `weight` and no convexity least squares are then solved on working sets.
    - `excludes_zero = True`: the value at 0 is not 0.

    A method `refuses()` says on the host why the numbers of the penalty make no sense, or None.
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
        """The nearest point of the dual ball; certificates of problems with an operator use its `jax.jvp`."""

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """Terms, none negative for a dual in the ball, that add up to `value(x) - <dual, x>`."""


@runtime_checkable
class Conjugate(Penalty, Protocol):
    """A convex penalty whose Fenchel conjugate `f*(u) = max over x of <u, x> - value(x)` is known.

    It has a duality gap. The conjugate of a norm is 0 in the dual ball and +inf outside, and its slack is the one of
    `Norm`.
    """

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        """Terms that add up to `value(x) + f*(dual) - <dual, x>`, none negative for a dual in the domain of `f*`."""

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        """The smallest `t >= 0` for which `dual / t` lies in the domain of `f*`; 0 if `f*` is finite everywhere.

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
    iterations of the prox: both are computed for the problem with the operator K.
    """

    def parts(self, x: FloatArray) -> tuple[Any, Any]:
        """`inner`, which has a conjugate, and K as a linear map of arrays like `x`."""

    def dual(self, memory: Any) -> FloatArray:
        """The subgradient of `inner` at `K u` for the last prox u, in the domain of its conjugate."""


# The step at which the dual step is the projection on the domain of a conjugate, a power of two.
SHORT = 2.0**-60


def cold_memory(penalty: Any, x: FloatArray) -> Any:
    """The memory for the first prox of an array like x; None for a penalty without one."""
    return penalty.memory(x) if isinstance(penalty, IterativeProx) else None


def prox_from(penalty: Any, x: FloatArray, step: Scalar, memory: Any) -> tuple[FloatArray, Any]:
    """The prox, and the memory for the next one."""
    return (penalty.prox(x, step), None) if memory is None else penalty.prox_from(x, step, memory)


def dual_step(term: Any, v: FloatArray, step: Any) -> tuple[FloatArray, FloatArray]:
    """`v - step * u`, for a norm in its dual ball, and `u = prox(v / step, 1 / step)`; term is a penalty or a loss."""
    if is_norm(term) and getattr(term, "nearest", True):
        # With Moreau's identity, without the rounding error of a long step.
        dual = term.project_dual(v)
        return dual, (v - dual) / step
    u = term.prox(v / step, 1 / step)
    dual = v - step * u
    return term.project_dual(dual) if is_norm(term) else dual, u


def is_norm(penalty: Any) -> bool:
    """Whether a penalty has a dual ball."""
    return isinstance(penalty, Norm)


def is_composite(penalty: Any) -> bool:
    """Whether a penalty is another penalty of the image of an operator."""
    return isinstance(penalty, Composite)


def has_conjugate(penalty: Any) -> bool:
    """Whether a penalty has what a duality gap needs."""
    return is_norm(penalty) or isinstance(penalty, Conjugate)


def is_convex(penalty: Any) -> bool:
    """Whether a penalty is known to be convex, by what it has or because it says so."""
    return has_conjugate(penalty) or is_composite(penalty) or getattr(penalty, "convex", False)


def feasible(penalty: Any, dual: FloatArray) -> FloatArray:
    """The dual, projected on the domain of the penalty's conjugate."""
    return penalty.project_dual(dual) if is_norm(penalty) else dual_step(penalty, dual, SHORT)[0]


def gauge(penalty: Any, dual: FloatArray) -> Float[Array, ""]:
    """The smallest t >= 0 for which `dual / t` lies in the domain of the penalty's conjugate."""
    if isinstance(penalty, Conjugate):
        return jnp.asarray(penalty.dual_norm(dual), dual.dtype)
    # A user's norm without `dual_norm`: bisect for the largest multiple that the projection leaves unchanged.
    size = jnp.max(jnp.abs(dual))

    def inside(share: Array) -> Array:
        point = share * dual
        return jnp.all(jnp.abs(penalty.project_dual(point) - point) <= 4 * jnp.finfo(dual.dtype).eps * share * size)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low * high)
        return jnp.where(inside(middle), middle, low), jnp.where(inside(middle), high, middle)

    one = jnp.ones((), dual.dtype)
    low, _ = jax.lax.fori_loop(0, 50, halve, (1e-12 * one, one))
    return jnp.where(inside(one), 1, 1 / low)

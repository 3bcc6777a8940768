"""Penalties in an optax chain, so that training ends at exact zeros.

minimise over p    loss(p) + sum over leaves of penalty.value(leaf)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import fits
from sparseopt.core.base.types import FloatArray, Scalar, is_traced
from sparseopt.core.penalties.patterns import is_pattern
from sparseopt.core.penalties.protocols import Penalty, cold_memory, prox_from

if TYPE_CHECKING:
    import optax

Schedule = Callable[[Any], Any]
Mask = Any  # None, a pytree of bools that is a prefix of the parameters, or a function from parameters to one


class ProximalState(NamedTuple):
    """The state of `proximal`."""

    count: Any  # the number of updates so far, for the schedule of the step
    # A tree like the parameters with the memory of every leaf for an `IterativeProx`, and None for others.
    memories: Any


def proximal(penalty: Penalty, step: Scalar | Schedule, *, mask: Mask = None) -> "optax.GradientTransformation":
    """Move to the prox of the point that the chain proposes; the last member of an optax chain.

    For parameters p and an incoming update u, the outgoing update is `prox(p + u, step) - p`, leaf by leaf, so that
    `optax.apply_updates` lands on

        argmin over v    1/2 ||v - (p + u)||² + step * value(v)

    With `u = -step * gradient` this is the proximal gradient step for `loss + value`.

    `step` must be the factor that a constant gradient has in the update. For plain SGD it is the learning rate. For
    `optax.sgd(rate, momentum=b)` it is `rate / (1 - b)`, since optax sums the gradients without a factor `1 - b`. After
    Adam, where entry i has the factor `rate / (sqrt(v_i) + eps)` with v the second moment of the gradient, no step is
    right: the weights of the problem at the fixed points depend on the size of the gradient. Use `proximal_adam`.

    Zeros are exact: for a prox of 0 the update is -p, and `p + (-p)` is 0 in every floating-point format. A later
    member of the chain that changes updates undoes that. Leaves below float32 are computed in float32; their non-zero
    entries are rounded, and bfloat16, with 8 significant bits, drops a move below `|p| / 512`.

    Args:
        penalty: any penalty, including your own. It acts on every leaf separately: `TopK(k)` keeps k entries per leaf,
            `GroupL2(w, axis=-1)` groups by rows, which are the inputs of a Flax kernel `[in, out]`. For several
            penalties use `optax.partition` (`optax.multi_transform` in older versions) with one `proximal` per label.
            Its arrays may be traced: make the chain inside the jitted or vmapped function.
        step: the step size, or an optax schedule of the number of updates, such as the schedule of the learning rate.
        mask: which leaves get the prox; None for all. A pytree of bools like the parameters or a prefix of it, or a
            function from the parameters to one. Updates of other leaves pass unchanged.

    Returns:
        A transformation whose `update(updates, state, params)` needs `params`. Updates keep the wider of their own
        dtype and the parameter's.

    Raises:
        ValueError: for a penalty without `value` and `prox`, a negative step, or a mask that is not made of bools; in
            `update`, without params.

    Source: Parikh and Boyd, "Proximal algorithms", 2014, section 4.2; for stochastic gradients Duchi and Singer,
    "Efficient online and batch learning using forward backward splitting", 2009.

    Example:
        >>> import optax
        >>> tx = optax.chain(optax.sgd(0.5), so.proximal(so.L1(1.0), 0.5))
        >>> params, gradient = jnp.array([2.0, 0.5]), jnp.array([1.0, 0.0])
        >>> updates, _ = tx.update(gradient, tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([1., 0.], dtype=float32)
    """
    import optax  # a tenth of the time of `import sparseopt`

    schedule = _schedule(penalty, step, "proximal", "step")

    def init(params: Any) -> ProximalState:
        def memory(p: Array, chosen: bool) -> Any:
            return cold_memory(penalty, _wide(p)) if chosen else None

        return ProximalState(
            jnp.zeros((), jnp.int32), jax.tree.map(memory, params, _choose_leaves(mask, params, "proximal"))
        )

    def update(updates: Any, state: ProximalState, params: Any = None) -> tuple[Any, ProximalState]:
        chosen, now = _choose_leaves(mask, params, "proximal"), schedule(state.count)

        def land(u: Array, p: Array, chosen: bool, memory: Any) -> tuple[Array, Any]:
            if not chosen:
                return u, None
            x = _wide(p) + _wide(u)
            landing, memory = prox_from(penalty, x, jnp.asarray(now, x.dtype), memory)
            return _difference(landing, p, u), memory

        landed = jax.tree.map(land, updates, params, chosen, state.memories)
        updates, memories = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, landed) for i in range(2))
        return updates, ProximalState(optax.safe_increment(state.count), memories)

    return optax.GradientTransformation(init, update)


def proximal_adam(
    penalty: Penalty,
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    mask: Mask = None,
) -> "optax.GradientTransformation":
    """Adam for `loss + penalty`, with the prox in Adam's own metric; expects gradients, last in a chain.

    With the corrected moments m and v of the gradient, entry by entry, `d = (sqrt(v) + eps) / learning_rate` and
    `z = p - m / d`, which is Adam's point, the new parameters are

        argmin over u    1/2 sum_i d_i (u_i - z_i)² + value(u)

    The optimality condition at a fixed point, where m is the gradient, is `0 in gradient + subgradient of value`, the
    problem's own condition, whatever d is. (The prox with one step for all entries leaves d in it; see `proximal`.)

    For a separable penalty the minimiser is the prox with the array of steps `1 / d`. For a pattern (`TopK`,
    `RowTopK`, `NM`, `BlockTopK`, `GroupTopK`) it keeps the largest `d_i z_i²`. Other coupled penalties raise an error.

    The step `1 / d` of an entry grows to `learning_rate / eps` as its gradients vanish. This is harmless for convex
    penalties. For a non-convex penalty (L0, MCP, SCAD) the prox is the global minimiser, which for a long step is zero
    for entries of every size: without noise in the gradients (full batches), a fitted entry loses its gradient and may
    then be set to zero. Choose eps large enough for the penalty: `learning_rate / eps` below gamma for MCP, below
    `a - 1` for SCAD; for L0, entries below `sqrt(2 weight learning_rate / eps)` are at risk. Start L0 from trained
    parameters: an entry at zero stays there unless one step of Adam passes the threshold.

    Args:
        penalty: `L0`, `L1`, `MCP`, `SCAD`, `Support`, a pattern such as `TopK`, or your own with `separable = True`
            on the class: its value is then a sum over entries, and `prox(x, step)` accepts a step of the shape of x. As
            in `proximal`, it acts on every leaf separately, and its arrays may be traced.
        learning_rate: a number, or an optax schedule of the number of updates.
        b1: decay of the mean of the gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the second moment.
        mask: which leaves get the prox, as in `proximal`; the others get plain Adam.

    Returns:
        A transformation; its state is `optax.ScaleByAdamState`, in float32 even for leaves of lower precision.

    Raises:
        ValueError: for a penalty that is coupled or does not say that it is separable, a negative learning rate, or a
            mask that is not made of bools; in `update`, without params.

    Source: Yun, Lozano and Yang, "Adaptive proximal gradient methods for structured neural networks", NeurIPS 2021,
    for the prox in the metric of a preconditioner; Kingma and Ba, "Adam: a method for stochastic optimization", 2015,
    for m and v.

    Example:
        >>> target = jnp.array([2.0, 0.3])  # 1/2 ||p - target||² + 1/2 ||p||_1 is least at [1.5, 0]
        >>> tx = so.proximal_adam(so.L1(0.5), learning_rate=0.01)
        >>> params = jnp.zeros(2)
        >>> state, update = tx.init(params), jax.jit(tx.update)
        >>> for _ in range(1000):
        ...     updates, state = update(params - target, state, params)
        ...     params = params + updates
        >>> [round(float(p), 3) for p in params]
        [1.5, 0.0]
    """
    import optax

    schedule = _schedule(penalty, learning_rate, "proximal_adam", "learning_rate")
    # The class must say so: a probe on some array can miss a coupling, and needs concrete numbers, but the weight may
    # be a tracer. Without the attribute a penalty counts as coupled, which is safe.
    if not (is_pattern(penalty) or getattr(penalty, "separable", False)):
        name = type(penalty).__name__
        raise ValueError(
            f"proximal_adam needs a penalty whose prox accepts one step per entry, given {name}, which does "
            f"not say that it is separable. If {name}.value is a sum over entries and its prox accepts an array of "
            "steps, write `separable = True` in the class; if not, as for groups, use "
            "optax.chain(optax.sgd(rate), sparseopt.proximal(penalty, rate))"
        )
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> optax.ScaleByAdamState:
        # In bfloat16 a second moment with b2 = 0.999 would not change: its steps are below the rounding.
        return adam.init(jax.tree.map(_wide, params))

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        chosen, rate = _choose_leaves(mask, params, "proximal_adam"), schedule(state.count)
        direction, state = adam.update(jax.tree.map(_wide, updates), state)
        correction = 1 - b2**state.count

        def land(g: Array, move: Array, nu: Array, p: Array, chosen: bool) -> Array:
            here = jnp.asarray(rate, move.dtype)
            if not chosen:
                return (-here * move).astype(jnp.result_type(p, g))
            x = _wide(p) - here * move
            return _difference(_scaled_prox(penalty, x, here, jnp.sqrt(nu / correction) + eps), p, g)

        return jax.tree.map(land, updates, direction, state.nu, params, chosen), state

    return optax.GradientTransformation(init, update)


def _scaled_prox(penalty: Any, x: FloatArray, rate: Float[Array, ""], curvature: FloatArray) -> FloatArray:
    """`argmin_u 1/2 sum_i curvature_i (u_i - x_i)² / rate + value(u)`, of the shape and dtype of x."""
    if is_pattern(penalty):
        # Dropping an entry costs curvature x² / 2; its root has the same order and does not underflow.
        return jnp.where(penalty.mask(jnp.abs(x) * jnp.sqrt(curvature)), x, 0)
    return penalty.prox(x, (rate / curvature).astype(x.dtype))


def _wide(x: Array) -> Array:
    """`x` in float32, or in its own dtype if that is wider."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _difference(landing: Array, p: Array, u: Array) -> Array:
    """`landing - p`, in a dtype that holds -p exactly, so that a landing at 0 is exact."""
    return (landing - _wide(p)).astype(jnp.result_type(p, u))


def _choose_leaves(mask: Mask, params: Any, name: str) -> Any:
    """The mask as one Python bool per leaf of `params`."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")
    if mask is None:
        mask = True
    elif callable(mask) and jax.tree_util.all_leaves([mask]):  # some modules are trees and callable
        mask = mask(params)
    for leaf in jax.tree.leaves(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(
                f"mask needs one bool for every leaf (or subtree) of the parameters, given a {type(leaf).__name__} of "
                f"shape {np.shape(leaf)}; to choose entries inside a leaf, use a penalty with an array of weights"
            )
    return jax.tree.map(lambda chosen, below: jax.tree.map(lambda _: bool(chosen), below), mask, params)


def _schedule(penalty: Any, step: Scalar | Schedule, name: str, step_name: str) -> Schedule:
    """The step as a schedule, once penalty and step are checked."""
    if not fits(penalty, Penalty):
        raise ValueError(
            f"{name} needs a penalty with the methods value(x) and prox(x, step) as its first argument, such as "
            f"sparseopt.L1(0.01), given {type(penalty).__name__}"
        )
    if callable(step):
        return step
    number = isinstance(step, int | float | np.number | np.ndarray | jax.Array) and np.ndim(step) == 0
    if not is_traced(step) and not (number and np.asarray(step) >= 0):
        raise ValueError(f"{name}(penalty, {step_name}) needs a step size of 0 or more, or a schedule, given {step}")
    return lambda count: step

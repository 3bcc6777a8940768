"""One layer. Job in, report out, pure and jitted; one compilation for each shape and method.

    minimise over V    1/2 ||X Vᵀ - X Wᵀ||²    subject to V in the pattern          W, V [out, in],  Gram = XᵀX

A layer is solved in scaled coordinates: `e = sqrt(diag Gram)`, hessian `Gram_ij / (e_i e_j)` with unit diagonal, center
`(W e)ᵀ [in, out]`. There the magnitude of an entry is Wanda's score. If outputs have weights s, [out], the norm is of
`X (V - W)ᵀ sqrt(s)`, and the center is `(sqrt(s) W e)ᵀ`: the weights move with the outputs' scale, the hessian stays.

An input that is zero on every calibration token is dead: `e = 0`, and nothing says which of its weights matter. Dead
inputs' weights are ranked by size below all others: their centers are the weights at the tiny scale of `ranking_scale`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.dense import HIGHEST
from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.penalties.patterns import TopK, Within
from sparseopt.core.penalties.sets import Support
from sparseopt.core.problem.iterate import iterate
from sparseopt.core.problem.problem import Problem, Status
from sparseopt.core.solvers.refit import Refit
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.patterns import Pattern, count_groups, pattern_count

# Scale of a dead input's weights relative to the smallest other scale: they rank last, and their squares are still
# normal float32 numbers.
DEAD_SCALE = 1e-9
# Smallest variance of a scaled input that is not dead: a constant one still ranks above dead ones.
LEAST_VARIANCE = 1e-12
KINDS: dict[str, Any] = {"float": jnp.floating, "bool": jnp.bool_, "int": jnp.integer}


@pytree
class LayerJob:
    """What to prune.

    A weight off the support is zero in the answer, whatever it is in `weight`, which may be a target that is not zero
    there. The pattern chooses among the others: if fewer are left than it asks for, all of them stay.

    Attributes:
        weight: dense weight, `[out, in]`, any float dtype; the answer keeps that dtype.
        gram: calibration Gram `XᵀX`, `[in, in]`, float32.
        test_gram: Gram matrix of held-out inputs for the second error, `[in, in]`, or None.
        pattern: which weights may survive.
        output_weights: weight of the squared error at each output, `[out]`, above 0; None for equal ones.
        input_variances: over the calibration tokens, `[in]`, in any common unit; None if unknown.
        support: the weights that may be non-zero, `[out, in]` bool; None for all.
    """

    weight: Any
    gram: Any
    test_gram: Any
    pattern: Pattern
    output_weights: Any = None
    input_variances: Any = None
    support: Any = None

    def by_output(self, change: Callable[[Any], Any]) -> "LayerJob":
        """The job with `change` applied to what has an entry per output: weight, output weights and support."""
        found = jax.tree.map(change, (self.weight, self.output_weights, self.support))
        return dataclasses.replace(self, weight=found[0], output_weights=found[1], support=found[2])


@pytree
class ScaledLayer:
    """A layer in scaled coordinates, as a method sees it.

    Attributes:
        hessian: `[in, in]`, unit diagonal except at dead inputs, where row and column are zero.
        weight: the dense weight, `[in, out]`.
        center: the scaled dense weight, `[in, out]`; at dead inputs scaled by `ranking_scale`.
        scale: `e`, `[in]`, the norm of each input over the calibration tokens; 0 at dead inputs.
        output_scale: `[out]`, above 0, the root of the outputs' weights over its geometric mean; ones without weights.
        variances: of the scaled inputs, `[in]`, in any common unit, 1 at dead ones; None if unknown.
    """

    hessian: Any
    weight: Any
    center: Any
    scale: Any
    output_scale: Any
    variances: Any = None

    def ridged(self, ridge: float | Array) -> Quadratic:
        """The layer's loss with `ridge * I` added to the hessian."""
        return Quadratic(self.hessian + ridge * jnp.eye(self.hessian.shape[0], dtype=jnp.float32), self.center)


class OnGrid(NamedTuple):
    """What a method of few bits also returns: weights `[in, out]`, stored exactly as they are.

    With the scaled values before they were rounded, and the weights that plain rounding gives.
    """

    weights: Array
    before: Array
    rounded: Array


class Pruned(NamedTuple):
    """A method's answer in scaled coordinates: values `[in, out]`, which entries are kept, and how it went."""

    values: Array
    mask: Array
    steps: Array | int
    status: Array | int
    grid: OnGrid | None = None


class LayerMethod(Protocol):
    """A pruning method: a frozen pytree that solves a scaled layer. Pure, traced once per shape.

    A pass over a model gives the layer its `variances` if the method has an attribute `reads_variances = True`.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Values that vanish off a mask with exactly the pattern's count.

        If some weights must stay zero, the pattern is `Within` another, and the mask may keep fewer.
        """


class Energies(NamedTuple):
    """What a pruned layer's outputs lost on one Gram, `||X (V - W)ᵀ||²`, and what was present, `||X Wᵀ||²`.

    Both add up over the outputs.
    """

    lost: Any
    present: Any

    @property
    def ratio(self) -> Float[Array, ""]:
        """The relative error: 0 when nothing changed, +inf from a silent layer."""
        return jnp.where(self.lost == 0, 0.0, jnp.divide(self.lost, self.present))


@pytree
class LayerReport:
    """What `solve_layer` returns; all but the weight are scalars.

    Attributes:
        weight: pruned weight `[out, in]` in the job's dtype, or in float32 on a grid; pruned entries exactly zero.
        energies: of the stored weight on the calibration Gram, no ridge; their ratio is the relative error.
        test_energies: the same on the held-out Gram, NaN without one.
        zeros: number of zero entries of `weight`.
        kept: number of entries that the method's mask keeps.
        fits: whether that mask lies in the pattern.
        stray: number of non-zero values that the method gave off its mask; they are not stored.
        supported: number of weights that may be non-zero; all of them without a support.
        dead_inputs: number of inputs that were zero on every calibration token.
        steps: iterations of the method.
        status: a `Status`.
        grid_energies: on the calibration Gram, of the weights before they were put on a grid of few bits, and of
            plainly rounded weights; None without a grid.
        output_blocks: into how many blocks of outputs the solve was split to fit in memory; 1 when it fitted whole.
    """

    weight: Any
    energies: Energies
    test_energies: Energies
    zeros: Any
    kept: Any
    fits: Any
    stray: Any
    supported: Any
    dead_inputs: Any
    steps: Any
    status: Any
    grid_energies: tuple[Energies, Energies] | None = None
    output_blocks: int = static(default=1)

    @property
    def relative_error(self) -> Float[Array, ""]:
        return self.energies.ratio

    @property
    def test_error(self) -> Float[Array, ""]:
        return self.test_energies.ratio


def scale_layer(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    output_weights: Float[Array, "out"] | None = None,
    input_variances: Float[Array, "in"] | None = None,
) -> ScaledLayer:
    """Scaled coordinates of a layer; an all-zero input has scale 0 and never causes a division by zero."""
    hessian, scale, inverse = scaled_gram(gram)
    output_scale = jnp.ones(weight.shape[0], jnp.float32) if output_weights is None else relative_scale(output_weights)
    dense = weight.astype(jnp.float32).T
    center = dense * ranking_scale(scale)[:, None] * output_scale
    variances = None
    if input_variances is not None:
        variances = jnp.where(scale > 0, jnp.maximum(input_variances * inverse**2, LEAST_VARIANCE), 1)
    return ScaledLayer(hessian, dense, center, scale, output_scale, variances)


def refitted(
    loss: Quadratic, start: Array, mask: Array, steps: int, *, done: Array | int, status: Array, solver: Any = None
) -> Pruned:
    """The last stage of a method: the loss minimised on the mask, with conjugate gradients if no solver is given.

    The support was found in `done` iterations that ended with `status`; using up a fixed number of steps counts as
    converged.
    """
    solver = Refit() if solver is None else solver
    kept = iterate(Problem(loss, Support(mask)), solver, jnp.where(mask, start, 0), tol=-1.0, max_steps=steps)
    bad = (status == Status.NONFINITE) | (kept.status == Status.NONFINITE)
    ended = jnp.where(bad, jnp.int32(Status.NONFINITE), jnp.int32(Status.CONVERGED))
    return Pruned(kept.value, mask, done, ended)


def scaled_gram(
    gram: Float[Array, "in in"],
) -> tuple[Float[Array, "in in"], Float[Array, "in"], Float[Array, "in"]]:
    """`Gram_ij / (e_i e_j)`, e and 1 / e; where e is 0, so are the others."""
    scale = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return gram * inverse[:, None] * inverse[None, :], scale, inverse


def relative_scale(output_weights: Float[Array, "out"]) -> Float[Array, "out"]:
    """The root of the outputs' weights over its geometric mean."""
    # Relative to the first: equal weights then count as none at all, in whatever order they are summed.
    logs = 0.5 * jnp.log((output_weights / output_weights[0]).astype(jnp.float32))
    return jnp.exp(logs - jnp.mean(logs))


def ranking_scale(scale: Float[Array, "in"]) -> Float[Array, "in"]:
    """The scale by which weights are compared: `DEAD_SCALE` of the smallest, or of 1, if it is 0."""
    alive = scale > 0
    smallest = jnp.min(jnp.where(alive, scale, jnp.inf))
    return jnp.where(alive, scale, DEAD_SCALE * jnp.where(jnp.any(alive), smallest, 1))


def energies_of(
    change: Float[Array, "out in"], weight: Float[Array, "out in"], gram: Float[Array, "in in"]
) -> Energies:
    """`||X changeᵀ||²` and `||X weightᵀ||²` through the Gram."""

    def energy(v: Array) -> Array:
        return jnp.sum(jnp.matmul(v, gram, precision=HIGHEST) * v)

    # Rounding may leave a tiny negative energy where the change lies in the Gram's null space.
    return Energies(jnp.maximum(energy(change), 0), energy(weight))


def solve_layer(job: LayerJob, method: LayerMethod) -> LayerReport:
    """Scale, solve, undo the scaling, store, measure what was stored."""
    layer = scale_layer(job.weight, job.gram, job.output_weights, job.input_variances)
    pattern = job.pattern if job.support is None else Within(job.pattern, job.support.T)
    pruned = method(layer, pattern)
    dead = (layer.scale == 0)[:, None]
    inverse = jnp.where(dead, 0, 1 / jnp.where(dead, 1, layer.scale[:, None]))
    dense = job.weight.astype(jnp.float32)

    def unscaled(values: Array) -> Array:
        # What a method left unchanged keeps its exact weight, and so does a weight on a dead input that the count
        # forces us to keep; where only zeros are pruned, a refit has nothing to correct.
        untouched = (values == layer.center) | dead | jnp.all(pruned.mask | (dense.T == 0))
        values = jnp.where(untouched, dense.T, values * inverse / layer.output_scale)
        return jnp.where(pruned.mask, values, 0).T

    grid = pruned.grid
    stored = unscaled(pruned.values).astype(job.weight.dtype) if grid is None else grid.weights.T
    change = stored.astype(jnp.float32) - dense
    energies = energies_of(change, dense, job.gram)
    others = None
    if grid is not None:
        before, rounded = unscaled(grid.before), grid.rounded.T
        others = (energies_of(before - dense, dense, job.gram), energies_of(rounded - dense, dense, job.gram))
    nothing = Energies(jnp.float32(jnp.nan), jnp.float32(jnp.nan))
    test_energies = nothing if job.test_gram is None else energies_of(change, dense, job.test_gram)
    # Scores of NaN keep every weight, which would then be returned unchanged.
    solved = jnp.where(pruned.mask, pruned.values, 0)
    finite = jnp.isfinite(energies.ratio) & jnp.all(jnp.isfinite(stored)) & jnp.all(jnp.isfinite(solved))
    return LayerReport(
        weight=stored,
        energies=energies,
        test_energies=test_energies,
        zeros=jnp.sum(stored == 0, dtype=jnp.int32),
        kept=jnp.sum(pruned.mask, dtype=jnp.int32),
        fits=pattern.value(pruned.mask.astype(jnp.float32)) == 0,
        stray=jnp.sum((pruned.values != 0) & ~pruned.mask, dtype=jnp.int32),
        supported=jnp.int32(stored.size) if job.support is None else jnp.sum(job.support, dtype=jnp.int32),
        dead_inputs=jnp.sum(dead, dtype=jnp.int32),
        steps=jnp.asarray(pruned.steps, jnp.int32),
        status=jnp.where(finite, pruned.status, Status.NONFINITE).astype(jnp.int32),
        grid_energies=others,
    )


def reads_variances(method: LayerMethod) -> bool:
    """Whether a pass must measure the variances of a layer's inputs for the method."""
    return getattr(method, "reads_variances", False)


def _answer(method: LayerMethod, layer: ScaledLayer, pattern: Pattern) -> Pruned:
    # JAX remembers the trace, so a method is traced once per shape.
    answer = method(layer, pattern)
    if not isinstance(answer, Pruned):
        raise ValueError(
            f"{type(method).__name__} must return sparseopt.pruning.Pruned(values, mask, steps, status), given "
            f"a {type(answer).__name__}"
        )
    return jax.tree.map(jnp.asarray, answer)


def check_method(
    method: LayerMethod, pattern: Pattern, shape: tuple[int, ...], variances: bool = False, support: bool = False
) -> None:
    """Trace a method on a layer of shape `(out, in)` without running it.

    The variances of its inputs are known or not, and it has a support or not.

    Raises:
        ValueError: if the method refuses the pattern, or would not return a `Pruned` of that shape.
    """
    outputs, inputs = shape
    name = type(method).__name__
    shapes = ((inputs, inputs), *[(inputs, outputs)] * 2, (inputs,), (outputs,), *[(inputs,)] * variances)
    layer = ScaledLayer(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    if support:
        pattern = Within(pattern, jax.ShapeDtypeStruct((inputs, outputs), jnp.bool_))
    answer = jax.eval_shape(_answer, method, layer, pattern)
    kinds, expected = ("float", "bool", "int", "int"), ((inputs, outputs), (inputs, outputs), (), ())
    wrong = [
        f"{field} of {found.dtype} {list(found.shape)}, expected {kind} {list(size)}"
        for field, found, kind, size in zip(Pruned._fields[:-1], answer[:-1], kinds, expected, strict=True)
        if found.shape != size or not jnp.issubdtype(found.dtype, KINDS[kind])
    ]
    if wrong:
        raise ValueError(
            f"{name} returns, for a layer in solver layout [in, out] = [{inputs}, {outputs}], " + "; ".join(wrong)
        )


def check_answer(report: LayerReport, method: LayerMethod, pattern: Pattern) -> Status:
    """The status of a finished report, after checks on the host.

    Raises:
        RuntimeError: if the solve became non-finite, or the method did not keep what the pattern asks for.
    """
    status = Status(int(report.status))
    if status is Status.NONFINITE:
        raise RuntimeError(
            f"the solve became non-finite: {status.advice}; if inputs are linearly dependent, give a larger ridge"
        )
    name, expected = type(method).__name__, pattern_count(pattern, report.weight.shape)
    exact = int(report.supported) == report.weight.size
    if isinstance(pattern, TopK):
        expected, exact = min(expected, int(report.supported)), True
    if int(report.kept) != expected and exact:
        raise RuntimeError(
            f"{name} kept {int(report.kept):,} of {report.weight.size:,} weights, the pattern {pattern} asks for "
            f"{expected:,}; its mask must have exactly the pattern's count, as `pattern.mask(score)` has"
        )
    if not bool(report.fits):
        if int(report.kept) <= expected and int(report.supported) < report.weight.size:
            raise RuntimeError(
                f"{name} does not keep the zeros that must stay; `pattern.mask(score)` gives a mask that does"
            )
        counts = count_groups(np.asarray(report.weight), pattern)
        raise RuntimeError(
            f"{name} kept up to {counts.each.max()} {counts.unit}, the pattern {pattern} allows {counts.allowed}; "
            "`pattern.mask(score)` gives a mask that fits"
        )
    if int(report.stray):
        raise RuntimeError(
            f"{name} returned {int(report.stray):,} non-zero values off its own mask; set them to zero, as in "
            "`jnp.where(mask, values, 0)`"
        )
    return status


# One for the process: jobs of the same shape, dtype, pattern and method share a compiled program.
layer_solver = Compiled(solve_layer)

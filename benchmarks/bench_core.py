"""The core against public solvers: total variation, and derivatives of a lasso. JSON lines.

    python benchmarks/bench_core.py [--only tv-deblurring,lasso-derivative] [--small] [--limit 60]

Isotropic total variation of a phantom, blurred or seen in projections:

    minimise over x    1/2 ||A x - b||² + weight sum_ij ||(grad x)_ij||_2

The record has seconds and iterations until the objective is within 1e-4 and 1e-6 of the best one known, from a run of
20,000 steps; it is evaluated in NumPy during a peer's iterations. The derivatives are those of a validation loss in the
weight and the target of a lasso: implicit, unrolled, and by differences. Every part runs in its own process, on one
core. Regressions are compared by `bench_benchopt.py`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import emit, installed, median_of, options, run_parts, say, selection, timed, warmed
from scipy import sparse

import sparseopt as so

TARGETS = (1e-4, 1e-6)
REFERENCE_TOL, REFERENCE_STEPS = 1e-8, 20_000
# Ratios of the primal to the dual step size for the peers; the best one counts.
RATIOS = (1.0, 10.0, 100.0)
# Of peers: conjugate-gradient iterations for the prox of the whole data term, and of all.
INNER, MOST_ITERATIONS = 5, 1_000_000
# Of the lasso: fractions of the smallest weight at which the answer is 0, the requested gap, and most steps.
SHARES, TOL, MANY = (0.1, 0.02), 1e-6, 100_000
# Relative step of the central differences in the weight and in the target.
MOVE = 1e-6


@so.pytree
class Blur:
    """`B X Bᵀ` of a picture X, given as a vector; B is symmetric."""

    factor: Any

    def mv(self, x: Any) -> Any:
        side = self.factor.shape[0]
        return (self.factor @ x.reshape(side, side) @ self.factor).reshape(-1)

    rmv = mv


@so.pytree
class Gradient:
    """Forward differences of a picture, given as a vector, along both axes: `[2, side, side]`, 0 at the border."""

    side: int = so.static()

    def mv(self, x: Any) -> Any:
        x = x.reshape(self.side, self.side)
        return jnp.stack([jnp.diff(x, axis=0, append=x[-1:]), jnp.diff(x, axis=1, append=x[:, -1:])])

    def rmv(self, e: Any) -> Any:
        down, right = e[0, :-1], e[1, :, :-1]
        down = jnp.pad(down, ((1, 0), (0, 0))) - jnp.pad(down, ((0, 1), (0, 0)))
        right = jnp.pad(right, ((0, 0), (1, 0))) - jnp.pad(right, ((0, 0), (0, 1)))
        return (down + right).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A problem of total variation: A, of norm 1, is a `Blur` or a SciPy sparse matrix."""

    name: str
    side: int
    map: Any
    target: np.ndarray
    weight: float = 1e-3

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.map.mv(x) if isinstance(self.map, Blur) else self.map @ x

    def backward(self, e: np.ndarray) -> np.ndarray:
        return self.map.rmv(e) if isinstance(self.map, Blur) else self.map.T @ e

    def objective(self, x: np.ndarray) -> float:
        apart = self.forward(x) - self.target
        x = x.reshape(self.side, self.side)
        squares = np.zeros_like(x)
        squares[:-1] += np.diff(x, axis=0) ** 2
        squares[:, :-1] += np.diff(x, axis=1) ** 2
        return float(apart @ apart / 2 + self.weight * np.sqrt(squares).sum())


def phantom(side: int) -> np.ndarray:
    """The Shepp-Logan phantom of scikit-image, scaled down."""
    from skimage.data import shepp_logan_phantom
    from skimage.transform import resize

    return resize(shepp_logan_phantom(), (side, side), anti_aliasing=True).astype(np.float64)


def blurred(side: int) -> Picture:
    """A Gaussian blur of two pixels and noise of 0.01."""
    places = np.arange(side)
    factor = np.exp(-((places[:, None] - places) ** 2) / (2 * 2.0**2))
    # Symmetric, with a norm of 1.
    factor /= np.linalg.norm(factor, 2)
    blur = Blur(factor)
    target = blur.mv(phantom(side).reshape(-1))
    target = target + 0.01 * np.random.default_rng(4).standard_normal(target.size)
    return Picture(f"blurred, {side} x {side}", side, blur, target)


def projections(side: int, angles: int) -> sparse.csr_array:
    """Parallel projections: each pixel is distributed over the two nearest detectors; scaled to a norm of 1."""
    middle = (side - 1) / 2
    down, right = (place.reshape(-1) - middle for place in np.mgrid[:side, :side])
    detectors, pixels = int(np.ceil(2**0.5 * side)) + 2, np.arange(side * side)
    blocks = []
    for angle in np.arange(angles) * np.pi / angles:
        place = right * np.cos(angle) + down * np.sin(angle) + (detectors - 1) / 2
        first = np.floor(place).astype(int)
        share = place - first
        entries = (np.r_[1 - share, share], (np.r_[first, first + 1], np.r_[pixels, pixels]))
        blocks.append(sparse.coo_array(entries, (detectors, side * side)))
    matrix = sparse.csr_array(sparse.vstack(blocks))
    return matrix / sparse.linalg.svds(matrix, 1, return_singular_vectors=False, random_state=0)[0]


def projected(side: int) -> Picture:
    """Sixty angles and noise of a hundredth of the largest measurement."""
    matrix = projections(side, 60)
    target = matrix @ phantom(side).reshape(-1)
    target = target + 0.01 * target.max() * np.random.default_rng(5).standard_normal(target.size)
    return Picture(f"60 projections, {side} x {side}", side, matrix, target)


class Reached(Exception):
    """Ends a peer's run."""


@dataclasses.dataclass
class Watch:
    """Callback for the iterations of a peer: its time, without that of the callback, and when it reached a target."""

    picture: Picture
    best: float
    limit: float
    seconds: float = 0.0
    iterations: int = 0
    objective: float = np.inf
    reached: dict[float, tuple[float, int]] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __call__(self, x: np.ndarray) -> None:
        self.seconds += time.perf_counter() - self.started
        self.iterations += 1
        self.objective = self.picture.objective(x)
        for target in TARGETS:
            if target not in self.reached and self.objective <= self.best * (1 + target):
                self.reached[target] = (self.seconds, self.iterations)
        if len(self.reached) == len(TARGETS) or self.seconds > self.limit:
            raise Reached
        self.started = time.perf_counter()


def peers(picture: Picture) -> dict[str, Callable[[float, Callable], Any]]:
    """By name, a run of pyproximal with a ratio of step sizes and a callback.

    "stacked" dualises both terms, as sparseopt does; "inner" computes the prox of the data term by conjugate gradients.
    """
    import pylops
    import pyproximal
    from pyproximal.optimization.primal import LinearizedADMM
    from pyproximal.optimization.primaldual import AdaptivePrimalDual, PrimalDual

    side, size, rows = picture.side, picture.side**2, picture.target.size
    data = pylops.FunctionOperator(picture.forward, picture.backward, rows, size, dtype="float64")
    gradient = pylops.Gradient((side, side), edge=False, kind="forward", dtype="float64")
    lengths, nothing = pyproximal.L21(ndim=2, sigma=picture.weight), pyproximal.L2(sigma=0.0)
    stack = pylops.VStack([data, gradient])
    both = pyproximal.VStack([pyproximal.L2(b=picture.target), lengths], nn=[rows, 2 * size])
    # ||A||² = 1 and ||grad||² < 8.
    of_stack, of_gradient = 9.0, 8.0

    def stacked(method: Callable, ratio: float, watch: Callable) -> Any:
        tau, mu = 0.99 * ratio / of_stack**0.5, 0.99 / ratio / of_stack**0.5
        return method(nothing, both, stack, np.zeros(size), tau, mu, niter=MOST_ITERATIONS, callback=watch)

    def inner(ratio: float, watch: Callable) -> Any:
        term = pyproximal.L2(Op=data, b=picture.target, niter=INNER, warm=True, solver="cg", x0=np.zeros(size))
        tau, mu = 0.99 * ratio / of_gradient**0.5, 0.99 / ratio / of_gradient**0.5
        return PrimalDual(term, lengths, gradient, np.zeros(size), tau, mu, niter=MOST_ITERATIONS, callback=watch)

    def linearized(ratio: float, watch: Callable) -> Any:
        # It needs mu ||K||² <= tau, where tau is the step of the penalty's prox.
        mu = 0.99 * ratio / of_stack
        return LinearizedADMM(nothing, both, stack, np.zeros(size), ratio, mu, niter=MOST_ITERATIONS, callback=watch)

    return {
        "pyproximal PrimalDual, stacked": partial(stacked, PrimalDual),
        "pyproximal PrimalDual, inner": inner,
        "pyproximal AdaptivePrimalDual": partial(stacked, AdaptivePrimalDual),
        "pyproximal LinearizedADMM": linearized,
    }


def variation(part: str, make: Callable[[int], Picture], small: bool, limit: float) -> None:
    """The time at which the objective of each solver reaches the targets."""
    given = make(32 if small else 128)
    loss, penalty = so.LeastSquares(given.map, given.target), so.GroupL2(given.weight, axis=0)
    problem, method = jax.tree.map(jnp.asarray, so.Problem(loss, penalty, Gradient(given.side))), so.PrimalDual()
    reference = so.solve(problem, method, tol=REFERENCE_TOL, max_steps=REFERENCE_STEPS, history=True)
    best = given.objective(np.asarray(reference.value))
    about = {"part": part, "problem": given.name, "reduced": small, "reference_gap": float(reference.gap)}
    say(f"{part}: reference solution with a gap of {about['reference_gap']:.1e} after {int(reference.steps)} steps")
    course = np.asarray(reference.history.objective)
    rows: dict[str, dict[float, dict[str, Any]]] = {"sparseopt": {}}
    for target in TARGETS:
        steps = int(np.argmax(course <= best * (1 + target))) + 1
        until = partial(so.solve, problem, method, tol=-1.0, max_steps=steps)
        certified = partial(so.solve, problem, method, tol=target, max_steps=REFERENCE_STEPS)
        objective = given.objective(np.asarray(until().value))
        known = timed(certified)
        again = median_of(certified, [known.seconds])
        rows["sparseopt"][target] = {
            "iterations": steps,
            "suboptimality": objective / best - 1,
            **warmed(until),
            # A gap needs a good dual point as well, which may take many more steps.
            "certified_seconds": again["seconds"] if known.result.gap <= target else None,
        }
    if installed("pyproximal"):
        rows |= {name: watched(run, given, best, limit) for name, run in peers(given).items()}
    else:
        emit("SKIPPED", **about, solver="pyproximal", reason="not installed")
    for name, found in rows.items():
        number = installed(name.split()[0])
        for target in TARGETS:
            emit("seconds to the objective", **about, target=target, solver=name, version=number, **found[target])


def watched(run: Callable, given: Picture, best: float, limit: float) -> dict[float, dict[str, Any]]:
    """The record of a peer for every target; the best ratio of its steps counts, which a user would have to find."""
    runs = {ratio: Watch(given, best, limit) for ratio in RATIOS}
    for ratio, watch in runs.items():
        with contextlib.suppress(Reached):
            run(ratio, watch)
    closest = min(watch.objective for watch in runs.values())
    found: dict[float, dict[str, Any]] = {}
    for target in TARGETS:
        ratio = min(runs, key=lambda ratio: runs[ratio].reached.get(target, (np.inf, 0)))
        seconds, steps = runs[ratio].reached.get(target, (None, None))
        found[target] = {"seconds": seconds, "iterations": steps, "ratio_of_steps": ratio}
        if seconds is None:
            found[target] |= {"suboptimality": closest / best - 1, "trouble": "time limit"}
    return found


class Lasso:
    """A lasso, validation rows, and the validation loss `1/2 ||V x(weight, target) - v||²`.

    The weight is a fraction of the smallest one at which the answer is 0.
    """

    def __init__(self, small: bool, share: float) -> None:
        rows, columns = (100, 200) if small else (500, 1000)
        rng = np.random.default_rng(6)
        # Each column is correlated by 0.5 with the previous one.
        matrix = rng.standard_normal((2 * rows, columns))
        for j in range(1, columns):
            matrix[:, j] = 0.5 * matrix[:, j - 1] + (1 - 0.5**2) ** 0.5 * matrix[:, j]
        # The image of a vector with 2 % nonzero entries, and noise of a third of its standard deviation.
        truth = np.zeros(columns)
        chosen = rng.choice(columns, columns // 50, replace=False)
        truth[chosen] = rng.standard_normal(chosen.size)
        image = matrix @ truth
        target = image + image.std() / 3 * rng.standard_normal(image.size)
        self.name = f"{rows:,} x {columns:,}, weight {share:g}"
        self.target = target[:rows]
        self.weight = share * float(np.abs(matrix[:rows].T @ self.target).max())
        self.matrix, self.held = jnp.asarray(matrix[:rows]), jnp.asarray(matrix[rows:])
        self.held_target = jnp.asarray(target[rows:])
        self.curvature = np.linalg.norm(matrix[:rows], 2) ** 2
        self.direction = rng.standard_normal(rows)
        self.direction *= np.linalg.norm(self.target) / np.linalg.norm(self.direction)

    def judged(self, x: Any) -> Any:
        return jnp.sum((self.held @ x - self.held_target) ** 2) / 2

    def solved(self, weight: Any, target: Any, tol: float = TOL) -> so.Solution:
        problem = so.Problem(so.LeastSquares(self.matrix, target), so.L1(weight))
        return so.solve(problem, tol=tol, max_steps=MANY)

    def unrolled(self, weight: Any, target: Any, steps: int) -> Any:
        """The textbook FISTA from zeros, for a number of steps."""
        size = 1 / self.curvature

        def step(state: tuple, _: None) -> tuple[tuple, None]:
            x, y, t = state
            z = y - size * (self.matrix.T @ (self.matrix @ y - target))
            z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - size * weight, 0)
            t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
            return (z, z + (t - 1) / t_next * (z - x), t_next), None

        zeros = jnp.zeros(self.matrix.shape[1])
        return jax.lax.scan(step, (zeros, zeros, 1.0), None, length=steps)[0][0]

    def differences(self) -> np.ndarray:
        """Central differences in the weight and along the direction of the target.

        Each solution is made exact by the normal equations on its support and signs.
        """
        matrix = np.asarray(self.matrix)
        solve = jax.jit(lambda weight, target: self.solved(weight, target, tol=1e-10).value)

        def value(weight: float, target: np.ndarray) -> float:
            x = np.array(solve(weight, target))
            kept = x != 0
            part = matrix[:, kept]
            x[kept] = np.linalg.solve(part.T @ part, part.T @ target - weight * np.sign(x[kept]))
            return float(self.judged(x))

        weight, target = self.weight, self.target
        moved = MOVE * weight, MOVE * self.direction
        across = value(weight + moved[0], target) - value(weight - moved[0], target)
        along = value(weight, target + moved[1]) - value(weight, target - moved[1])
        return np.array([across / (2 * moved[0]), along / (2 * MOVE)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """A record for every method, and for the solve alone."""
        point, known = (jnp.asarray(self.weight), jnp.asarray(self.target)), self.differences()
        forward = jax.jit(self.solved)
        spent, found = warmed(partial(forward, *point)), forward(*point)
        steps = int(found.steps)
        about = {"problem": self.name, "tol": TOL, "steps": steps}
        yield {"way": "the solve alone", **about, **spent, "gap": float(found.gap)}
        ways: dict[str, Callable] = {
            "implicit": lambda weight, target: self.judged(self.solved(weight, target).value),
            "unrolled FISTA": lambda weight, target: self.judged(self.unrolled(weight, target, steps)),
        }
        for way, loss in ways.items():
            slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))
            spent = warmed(partial(slopes, *point))
            of_weight, of_target = slopes(*point)
            errors = np.abs(np.array([of_weight, of_target @ self.direction]) / known - 1)
            of = {"error_in_weight": float(errors[0]), "error_in_target": float(errors[1])}
            yield {"way": way, **about, **spent, **of}


def derivative(small: bool, _: float) -> None:
    for share in SHARES:
        for record in Lasso(small, share).rows():
            emit("derivative", part="lasso-derivative", **record, reduced=small)


PARTS: dict[str, Callable[[bool, float], None]] = {
    "tv-deblurring": partial(variation, "tv-deblurring", blurred),
    "tv-tomography": partial(variation, "tv-tomography", projected),
    "lasso-derivative": derivative,
}


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", PARTS)
    parser.add_argument("--limit", type=float, default=60.0, help="time limit of a solver in seconds")
    parser.add_argument("--small", action="store_true", help="small problems, for a trial")
    arguments = parser.parse_args()
    run_parts(PARTS, arguments.only, arguments.small, arguments.limit)


if __name__ == "__main__":
    main()

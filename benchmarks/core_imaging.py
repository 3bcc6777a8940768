"""Isotropic total variation of a phantom, deblurring and tomography: sparseopt against pyproximal.

    minimise over x    1/2 ||A x - b||² + weight sum_ij ||(grad x)_ij||_2

Both libraries minimise the same objective, which is evaluated here in NumPy during their iterations.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

import sparseopt as so

TARGETS = (1e-4, 1e-6)
# Ratios of the primal to the dual step size for the peers; the best one counts.
RATIOS = (1.0, 10.0, 100.0)
# Conjugate-gradient iterations for the prox of the whole data term.
INNER = 5
MOST_ITERATIONS = 1_000_000


@so.pytree
class Blur:
    """`B X Bᵀ` of a picture X, given as a vector; B is symmetric."""

    factor: Any

    def mv(self, x: Any) -> Any:
        """The blurred picture."""
        side = self.factor.shape[0]
        return (self.factor @ x.reshape(side, side) @ self.factor).reshape(-1)

    def rmv(self, e: Any) -> Any:
        """The same as `mv`, since B is symmetric."""
        return self.mv(e)


@so.pytree
class Gradient:
    """Forward differences of a picture, given as a vector, along both axes: `[2, side, side]`, 0 at the border."""

    side: int = so.static()

    def mv(self, x: Any) -> Any:
        """The gradient."""
        x = x.reshape(self.side, self.side)
        return jnp.stack([jnp.diff(x, axis=0, append=x[-1:]), jnp.diff(x, axis=1, append=x[:, -1:])])

    def rmv(self, e: Any) -> Any:
        """Minus the divergence."""
        down, right = e[0, :-1], e[1, :, :-1]
        down = jnp.pad(down, ((1, 0), (0, 0))) - jnp.pad(down, ((0, 1), (0, 0)))
        right = jnp.pad(right, ((0, 0), (1, 0))) - jnp.pad(right, ((0, 0), (0, 1)))
        return (down + right).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One problem; the norm of A is 1.

    Attributes:
        name: in records.
        side: of the picture.
        map: A: a `Blur` or a SciPy sparse matrix.
        target: b.
        weight: of the penalty.
    """

    name: str
    side: int
    map: Any
    target: np.ndarray
    weight: float

    def forward(self, x: np.ndarray) -> np.ndarray:
        """`A x`."""
        return self.map.mv(x) if isinstance(self.map, Blur) else self.map @ x

    def backward(self, e: np.ndarray) -> np.ndarray:
        """`Aᵀ e`."""
        return self.map.rmv(e) if isinstance(self.map, Blur) else self.map.T @ e

    def objective(self, x: np.ndarray) -> float:
        """The objective."""
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
    return Picture(f"blurred, {side} x {side}", side, blur, target, 1e-3)


def projections(side: int, angles: int) -> sparse.csr_array:
    """Parallel projections: each pixel is distributed over the two nearest detectors; scaled to a norm of 1."""
    middle = (side - 1) / 2
    down, right = (place.reshape(-1) - middle for place in np.mgrid[:side, :side])
    detectors = int(np.ceil(2**0.5 * side)) + 2
    blocks = []
    for angle in np.arange(angles) * np.pi / angles:
        place = right * np.cos(angle) + down * np.sin(angle) + (detectors - 1) / 2
        first = np.floor(place).astype(int)
        share = place - first
        pixels = np.arange(side * side)
        entries = (np.r_[1 - share, share], (np.r_[first, first + 1], np.r_[pixels, pixels]))
        blocks.append(sparse.coo_array(entries, (detectors, side * side)))
    matrix = sparse.csr_array(sparse.vstack(blocks))
    return matrix / sparse.linalg.svds(matrix, 1, return_singular_vectors=False, random_state=0)[0]


def projected(side: int) -> Picture:
    """Sixty angles and noise of a hundredth of the largest measurement."""
    matrix = projections(side, 60)
    target = matrix @ phantom(side).reshape(-1)
    target = target + 0.01 * target.max() * np.random.default_rng(5).standard_normal(target.size)
    return Picture(f"60 projections, {side} x {side}", side, matrix, target, 1e-3)


PICTURES: dict[str, Callable[[int], Picture]] = {"tv-deblurring": blurred, "tv-tomography": projected}


def core_problem(picture: Picture) -> so.Problem:
    """The problem for sparseopt, with its arrays on the device."""
    loss = so.LeastSquares(picture.map, picture.target)
    penalty = so.GroupL2(picture.weight, axis=0)
    return jax.tree.map(jnp.asarray, so.Problem(loss, penalty, Gradient(picture.side)))


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
    _started: float = dataclasses.field(default_factory=time.perf_counter)

    def __call__(self, x: np.ndarray) -> None:
        """Evaluate an iterate.

        Raises:
            Reached: at the last target, or at the time limit.
        """
        self.seconds += time.perf_counter() - self._started
        self.iterations += 1
        self.objective = self.picture.objective(x)
        for target in TARGETS:
            if target not in self.reached and self.objective <= self.best * (1 + target):
                self.reached[target] = (self.seconds, self.iterations)
        if len(self.reached) == len(TARGETS) or self.seconds > self.limit:
            raise Reached
        self._started = time.perf_counter()


def peers(picture: Picture) -> dict[str, Callable[[float, Callable], Any]]:
    """By name, a run of pyproximal with a ratio of step sizes and a callback.

    "stacked" dualises both terms, as sparseopt does; "inner" computes the prox of the data term by conjugate gradients.
    """
    import pylops
    import pyproximal
    from pyproximal.optimization.primal import LinearizedADMM
    from pyproximal.optimization.primaldual import AdaptivePrimalDual, PrimalDual

    side, size = picture.side, picture.side**2
    data = pylops.FunctionOperator(picture.forward, picture.backward, picture.target.size, size, dtype="float64")
    gradient = pylops.Gradient((side, side), edge=False, kind="forward", dtype="float64")
    lengths = pyproximal.L21(ndim=2, sigma=picture.weight)
    stack = pylops.VStack([data, gradient])
    both = pyproximal.VStack([pyproximal.L2(b=picture.target), lengths], nn=[picture.target.size, 2 * size])
    # ||A||² = 1 and ||grad||² < 8.
    of_stack, of_gradient = 9.0, 8.0
    nothing = pyproximal.L2(sigma=0.0)

    def start() -> np.ndarray:
        return np.zeros(size)

    def stacked(method: Callable) -> Callable:
        def run(ratio: float, watch: Callable) -> Any:
            tau, mu = 0.99 * ratio / of_stack**0.5, 0.99 / ratio / of_stack**0.5
            return method(nothing, both, stack, start(), tau, mu, niter=MOST_ITERATIONS, callback=watch)

        return run

    def inner(ratio: float, watch: Callable) -> Any:
        term = pyproximal.L2(Op=data, b=picture.target, niter=INNER, warm=True, solver="cg", x0=start())
        tau, mu = 0.99 * ratio / of_gradient**0.5, 0.99 / ratio / of_gradient**0.5
        return PrimalDual(term, lengths, gradient, start(), tau, mu, niter=MOST_ITERATIONS, callback=watch)

    def linearized(ratio: float, watch: Callable) -> Any:
        # It needs mu ||K||² <= tau, where tau is the step of the penalty's prox.
        mu = 0.99 * ratio / of_stack
        return LinearizedADMM(nothing, both, stack, start(), ratio, mu, niter=MOST_ITERATIONS, callback=watch)

    return {
        "pyproximal PrimalDual, stacked": stacked(PrimalDual),
        "pyproximal PrimalDual, inner": inner,
        "pyproximal AdaptivePrimalDual": stacked(AdaptivePrimalDual),
        "pyproximal LinearizedADMM": linearized,
    }

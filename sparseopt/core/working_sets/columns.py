"""The columns of a matrix on the host: products with all of them, and copies of a few.

A column of ones, which an intercept multiplies, may stand behind the last one; it is not stored.
"""

from typing import Any

import numpy as np
from scipy import sparse

from sparseopt.core.operators.matrices import SparseMatrix, WithOnes

# See `Columns.lazy`; and how far the bound of a product is widened for rounding.
LAZY, LOOSE = 0.15, 1e-6
# The smallest size of a Gram matrix, which is filled up with zeros.
SMALLEST = 128


class Columns:
    """A dense or SciPy sparse (CSC) matrix `[rows, columns]`, with or without a last column of ones."""

    def __init__(self, matrix: Any, ones: bool = False) -> None:
        if matrix.dtype not in (np.float32, np.float64):
            matrix = matrix.astype(np.float64)
        self.matrix, self.ones = matrix, ones
        self.eps = float(np.finfo(matrix.dtype).eps)
        self.sparse = sparse.issparse(matrix)
        self.count = matrix.shape[1] + ones
        self._sums: Any = None
        # Up to this share of the columns their copy and its product are cheaper than the product with all.
        self.lazy = LAZY if self.sparse or matrix.flags.f_contiguous else LAZY / 4

    def pull(self, e: np.ndarray) -> np.ndarray:
        """`Aᵀ e` in float64."""
        narrow = e.astype(self.matrix.dtype, copy=False)
        product = self.matrix.T @ narrow if self.sparse else narrow @ self.matrix
        return np.append(product, e.sum()) if self.ones else product.astype(np.float64, copy=False)

    def sums(self, weights: Any) -> np.ndarray:
        """The weighted sums of all columns; kept, since the weights of one solve do not change."""
        if self._sums is None:
            self._sums = self.pull(np.broadcast_to(weights, self.matrix.shape[:1]).astype(np.float64))
        return self._sums

    def pull_some(self, e: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Some entries of `Aᵀ e`."""
        main = places[places < self.matrix.shape[1]]
        narrow = e.astype(self.matrix.dtype, copy=False)
        product = self.matrix[:, main].T @ narrow if self.sparse else self.matrix.T[main] @ narrow
        return np.append(product, np.full(places.size - main.size, e.sum()))

    def image(self, x: np.ndarray) -> np.ndarray:
        """`A x` in float64, reading only the columns of entries that are not 0."""
        main = x[:-1] if self.ones else x
        seen = np.flatnonzero(main)
        if not seen.size:
            z = np.zeros(self.matrix.shape[0])
        elif 4 * seen.size > main.size:
            z = self.matrix @ main
        else:
            z = self.matrix[:, seen] @ main[seen]
        return z + x[-1] if self.ones else z

    def lengths(self, places: np.ndarray | None = None) -> np.ndarray:
        """The norms of all columns, or of some."""
        part = self.matrix if places is None else self.matrix[:, places[places < self.matrix.shape[1]]]
        squares = (
            part.multiply(part).sum(axis=0) if self.sparse else np.einsum("ij,ij->j", part, part, dtype=np.float64)
        )
        count = self.count if places is None else places.size
        more = np.full(count - part.shape[1], float(part.shape[0]))
        return np.sqrt(np.append(np.asarray(squares, np.float64).reshape(-1), more))

    def gram(self, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The weighted inner products of some columns."""
        rows = Chosen(self, None, False).read(places)[0]
        return inner(rows, rows, weights)

    def take(self, places: np.ndarray) -> "Columns":
        """A copy of some columns, in the order given; the ones, if they are among them, are the last."""
        main = places[places < self.matrix.shape[1]]
        ones = main.size < places.size
        if self.sparse:
            return Columns(self.matrix[:, main], ones)
        # Rows of the transpose are read in memory order if they can be.
        part = self.matrix.T[main].T if self.matrix.flags.f_contiguous else self.matrix[:, main]
        return Columns(part, ones)


def round_up(count: int) -> int:
    """The next power of two, at least SMALLEST, so that few programs are compiled."""
    return max(SMALLEST, 1 << (count - 1).bit_length())


def columns_of(given: Any) -> Columns:
    """The columns of a `Dense`, `SparseMatrix` or `WithOnes`, whose entries are known."""
    ones = isinstance(given, WithOnes)
    inner = given.matrix if ones else given
    return Columns(inner.on_host() if isinstance(inner, SparseMatrix) else np.asarray(inner.matrix), ones)


class LazyPull:
    """`Aᵀ e` for a sequence of e that change little, exact where it may be above the weight of an entry.

    With a product `Aᵀ s` that is known, `|Aᵀ e| <= |a Aᵀ s| + |e - a s|` times the lengths of the columns, for every
    number a. An entry that is 0 and below its weight by this bound adds nothing to a gap; it gets a value below it.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns, self.lengths = columns, np.zeros(0)
        self.known: Any = None  # s, its product, its square
        self.last: Any = (None, None, None)  # the last e, its product, and where that is exact

    def __call__(self, e: np.ndarray, terms: Any, x: np.ndarray) -> np.ndarray:
        columns, (old, found, exact) = self.columns, self.last
        if self.known is None:
            self.lengths = columns.lengths() * (1 + LOOSE)
            return self._all(e)
        s, product, square = self.known
        share = float(e @ s) / square if square else 0.0
        reach = np.linalg.norm(e - share * s) + LOOSE * np.linalg.norm(e)
        guess = share * product
        needed = np.abs(guess) + reach * self.lengths >= terms.weight
        needed[x.nonzero()] = True
        if e is old:
            places = (needed & ~exact).nonzero()[0]
            guess[exact] = found[exact]
            needed |= exact
        else:
            places = needed.nonzero()[0]
        if places.size > columns.lazy * columns.count:
            return self._all(e)
        guess[places] = columns.pull_some(e, places)
        rest = ~needed
        guess[rest] = np.clip(guess, -terms.weight, terms.weight)[rest]
        self.last = e, guess, needed
        return guess

    def _all(self, e: np.ndarray) -> np.ndarray:
        found = self.columns.pull(e)
        self.known = e, found, float(e @ e)
        self.last = e, found, np.ones(found.size, bool)
        return found


class Chosen:
    """Columns that were chosen so far, as rows `[k, rows]`, maybe centred, and their Gram matrix.

    It is filled up with zeros to the size `round_up(k)`.

    What is known stays when more are chosen, so a solve computes every inner product once.
    """

    def __init__(self, columns: Columns, weights: Any, centred: bool) -> None:
        self.columns, self.weights = columns, weights  # weights: of the rows in the Gram matrix; None for no matrix
        self.centred = centred
        self.place = np.full(columns.count, -1)  # of every column among the chosen
        self.ids = np.zeros(0, np.int64)
        self.gram = np.zeros((0, 0))
        self.means = np.zeros(0)
        self.rows: Any = None

    def choose(self, wanted: np.ndarray) -> np.ndarray:
        """Hold these columns, sorted; return them in the order in which they are held."""
        places = self.place[wanted]
        new, old = wanted[places < 0], places[places >= 0]
        kept, total = old.size, wanted.size
        if not new.size and kept == self.ids.size:
            return self.ids
        fresh, means = self.read(new)
        if not kept:
            rows = fresh
        elif self.columns.sparse:
            rows = sparse.vstack([self.rows[old], fresh]).tocsr()
        else:
            rows = np.empty((total, fresh.shape[1]))
            np.take(self.rows, old, axis=0, out=rows[:kept])
            rows[kept:] = fresh
        self.place[self.ids] = -1
        self.ids = np.concatenate([self.ids[old], new])
        self.place[self.ids] = np.arange(total)
        self.means, self.rows = np.concatenate([self.means[old], means]), rows
        if self.weights is not None:
            size = round_up(total)
            gram = np.zeros((size, size))
            gram[:kept, :kept] = self.gram[np.ix_(old, old)]
            gram[kept:total, :total] = inner(fresh, rows, self.weights)
            gram[:kept, kept:total] = gram[kept:total, :kept].T
            self.gram = gram
        return self.ids

    def read(self, places: np.ndarray) -> tuple[Any, np.ndarray]:
        columns, means = self.columns, np.zeros(places.size)
        ends = columns.ones and places.size > 0 and places[-1] == columns.count - 1
        main = places[:-1] if ends else places
        if columns.sparse:
            rows = columns.matrix[:, main].T.tocsr()
            if ends:
                rows = sparse.vstack([rows, np.ones((1, rows.shape[1]))]).tocsr()
            return rows, means
        if main.size == columns.matrix.shape[1] and not columns.ones:
            rows = columns.matrix.T
            return rows if rows.dtype == np.float64 else rows.astype(np.float64), means
        rows = np.ones((places.size, columns.matrix.shape[0]))
        rows[: main.size] = columns.matrix.T[main]
        if self.centred:
            means[: main.size] = rows[: main.size].mean(axis=1)
            rows[: main.size] -= means[: main.size, None]
        return rows, means


def inner(some: Any, others: Any, weights: Any) -> np.ndarray:
    """The inner products of rows `[k, n]` with rows `[m, n]`, weighted."""
    if sparse.issparse(some):
        left = some if weights is None or np.ndim(weights) == 0 else some.multiply(weights).tocsr()
        product = (left @ others.T).toarray()
    elif some is others and np.ndim(weights) == 0:
        product = some @ some.T  # one call that computes half of it
    elif some is others:
        half = some * np.sqrt(weights)
        return half @ half.T
    else:
        left = some if np.ndim(weights) == 0 else some * weights
        product = left @ others.T
    return product if weights is None or np.ndim(weights) else product * float(weights)

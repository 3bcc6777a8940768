"""The columns of a matrix on the host: products with all of them, and copies of a few.

A column of ones, which an intercept multiplies, may stand behind the last one; it is not stored.
"""

from collections.abc import Callable
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
        self.eps, self.narrow = float(np.finfo(matrix.dtype).eps), matrix.dtype == np.float32
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

    def squares(self, weights: Any) -> np.ndarray:
        """The weighted sums of squares of all columns."""
        if not np.ndim(weights):
            return float(weights) * self.lengths() ** 2
        matrix = self.matrix
        products = (
            matrix.multiply(matrix).T @ weights if self.sparse else np.einsum("ij,ij,i->j", matrix, matrix, weights)
        )
        return np.append(products, np.full(int(self.ones), weights.sum()))

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


def aligned(size: int) -> np.ndarray:
    """A square matrix of zeros that JAX takes without a copy: its address is a multiple of 64."""
    memory = np.zeros(size * size + 8)
    first = -memory.ctypes.data % 64 // 8
    return memory[first : first + size * size].reshape(size, size)


def in_size(gram: np.ndarray, count: int) -> np.ndarray:
    """A Gram matrix of `count` columns with room for `round_up(count)`: itself, if it has that, or a copy."""
    size = round_up(count)
    if len(gram) == size:
        return gram
    padded = aligned(size)
    padded[:count, :count] = gram
    return padded


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
        if not terms.by_entry:
            return columns.pull(e)
        if self.known is None:
            self.lengths = columns.lengths() * (1 + LOOSE)
            return self._all(e)
        s, product, square = self.known
        share = float(e @ s) / square if square else 0.0
        reach = np.linalg.norm(e - share * s) + LOOSE * np.linalg.norm(e)
        guess = share * product
        needed = np.abs(guess) + reach * self.lengths >= terms.weight
        needed[x.nonzero()[0]] = True
        guess = np.clip(guess, -terms.weight, terms.weight)
        if e is old:
            needed[exact] = False
            guess[exact] = found[exact]
        places = needed.nonzero()[0]
        if places.size > columns.lazy * columns.count:
            return self._all(e)
        guess[places] = columns.pull_some(e, places)
        self.last = e, guess, np.append(exact, places) if e is old else places
        return guess

    def _all(self, e: np.ndarray) -> np.ndarray:
        found = self.columns.pull(e)
        self.known = e, found, float(e @ e)
        self.last = e, found, np.arange(found.size)
        return found


class Chosen:
    """Columns that were chosen so far, as rows `[k, rows]`, maybe centred, and their Gram matrix.

    The matrix has room for `round_up(k)`; what is behind k is of no meaning. Every column has a slot. What stays keeps
    it, and new columns take the slots of those that leave, so a solve computes every inner product once.
    """

    def __init__(self, columns: Columns, weights: Any, centred: bool) -> None:
        self.columns, self.weights = columns, weights  # weights: of the rows in the Gram matrix; None for no matrix
        self.centred = centred
        self.place = np.full(columns.count, -1)  # of every column among the chosen
        self.ids = np.zeros(0, np.int64)
        self.gram = np.zeros((0, 0))
        self.means = np.zeros(0)
        self.room: Any = None  # the rows, and maybe more

    @property
    def rows(self) -> Any:
        return self.room[: self.ids.size]

    def choose(self, wanted: np.ndarray) -> np.ndarray:
        """Hold these columns, sorted; return them in the order in which they are held."""
        held, old, total = self.place[wanted], self.ids.size, wanted.size
        new, stays = wanted[held < 0], held[held >= 0]
        if not new.size and stays.size == old:
            return self.ids
        empty = np.ones(total, bool)
        empty[stays[stays < total]] = False
        slots, moving = empty.nonzero()[0], stays[stays >= total]
        moved, slots = slots[: moving.size], slots[moving.size :]
        fresh, means = self.read(new)
        kept = min(old, total)
        self.place[self.ids] = -1
        self.ids = _in_slots(self.ids, kept, total, (moved, self.ids[moving]), (slots, new))
        self.means = _in_slots(self.means, kept, total, (moved, self.means[moving]), (slots, means))
        self.place[self.ids] = np.arange(total)
        if not old:
            self.room = fresh
        elif self.columns.sparse:
            order = np.arange(total)
            order[moved], order[slots] = moving, old + np.arange(new.size)
            self.room = sparse.vstack([self.room, fresh]).tocsr()[order]
        else:
            if len(self.room) < total or not self.room.flags.owndata:
                room = np.empty((round_up(total), fresh.shape[1]))
                room[:old] = self.room[:old]
                self.room = room
            self.room[moved], self.room[slots] = self.room[moving], fresh
        if self.weights is not None:
            self.gram[moved] = self.gram[moving]
            self.gram[:, moved] = self.gram[:, moving]
            if len(self.gram) != round_up(total):
                gram = aligned(round_up(total))
                gram[:kept, :kept] = self.gram[:kept, :kept]
                self.gram = gram
            products = inner(fresh, self.rows, self.weights)
            self.gram[slots, :total] = products
            self.gram[:total, slots] = products.T
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


def _in_slots(old: np.ndarray, kept: int, total: int, *given: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The first entries, with others in some slots."""
    new = np.empty(total, old.dtype)
    new[:kept] = old[:kept]
    for slots, values in given:
        new[slots] = values
    return new


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


# A matrix times a vector.
Product = Callable[[np.ndarray], np.ndarray]


def times(rows: Any, weights: Any) -> Product | None:
    """The product of `inner(rows, rows, weights)` with a vector, of sparse rows; None if they are dense."""
    return (lambda v: rows @ (weights * (rows.T @ v))) if sparse.issparse(rows) else None

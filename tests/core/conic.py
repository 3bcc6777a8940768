"""The problems of `sparseopt.solve` in conic form, for Clarabel: an independent answer, by an interior point method.

    minimise over z    1/2 <z, diag(p) z> + <q, z> + constant    subject to every constraint `M z + m` in its cone

The first variables are the entries of x, in memory order. A term of the objective adds variables that bound it from
above.
"""

import clarabel
import numpy as np
from scipy import sparse

CONES = {
    "zero": lambda size: [clarabel.ZeroConeT(size)],
    "positive": lambda size: [clarabel.NonnegativeConeT(size)],
    "second order": lambda size: [clarabel.SecondOrderConeT(size)],
    "exponential": lambda size: [clarabel.ExponentialConeT()] * (size // 3),
}


class Conic:
    """A program that grows; expressions are affine, `(matrix over x or over one block of variables, block)`."""

    def __init__(self, size):
        self.x, self.count, self.constant = np.arange(size), size, 0.0
        self.costs, self.rows, self.offsets, self.cones = [], [], [], []

    def new(self, size):
        self.count += size
        return np.arange(self.count - size, self.count)

    def cost(self, variables, linear=0.0, squares=0.0):
        """Add `sum of linear v + squares v² / 2`."""
        self.costs.append((variables, linear, squares))

    def inside(self, cone, offset, *parts):
        """Ask for `offset + sum of matrix @ variables` in a cone; a number as a matrix is that many identities."""
        offset = np.atleast_1d(np.asarray(offset, float))
        rows = sparse.csc_array((offset.size, self.count))
        for matrix, variables in parts:
            part = sparse.coo_array(matrix * sparse.eye_array(variables.size) if np.isscalar(matrix) else matrix)
            rows += sparse.csc_array((part.data, (part.row, variables[part.col])), rows.shape)
        self.rows.append(rows)
        self.offsets.append(offset)
        self.cones += CONES[cone](offset.size)

    def least(self):
        """The optimal objective; `answer` is then the x that has it."""
        hessian, linear = np.zeros((2, self.count))
        for variables, slopes, squares in self.costs:
            np.add.at(linear, variables, slopes)
            np.add.at(hessian, variables, squares)
        for rows in self.rows:
            rows.resize(rows.shape[0], self.count)
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
        solver = clarabel.DefaultSolver(
            sparse.csc_matrix(sparse.diags(hessian)),
            linear,
            sparse.csc_matrix(-sparse.vstack(self.rows)),
            np.concatenate(self.offsets),
            self.cones,
            settings,
        )
        answer = solver.solve()
        assert str(answer.status) == "Solved", answer.status
        self.answer = np.asarray(answer.x)[self.x]
        return answer.obj_val + self.constant

    def exponentials(self, bound, *exponent):
        """Ask for `exp(exponent) <= bound` entry by entry, the exponent a sum of matrices times variables."""
        first, _, last = np.eye(3)[:, :, None]
        parts = [(sparse.kron(matrix, first), variables) for matrix, variables in exponent]
        of_bound = sparse.kron(sparse.eye_array(bound.size), last)
        self.inside("exponential", np.tile([0.0, 1.0, 0.0], bound.size), *parts, (of_bound, bound))


def squares(conic, matrix, target, weights):
    residual = conic.new(target.size)
    conic.inside("zero", -target, (matrix, conic.x), (-1.0, residual))
    conic.cost(residual, squares=weights)


def logistic(conic, matrix, target, weights):
    """`exp(z - t) + exp(-t) <= 1`, t the bound on log(1 + e^z)."""
    size = target.size
    bound, up, down = conic.new(size), conic.new(size), conic.new(size)
    conic.exponentials(up, (matrix, conic.x), (-sparse.eye_array(size), bound))
    conic.exponentials(down, (-sparse.eye_array(size), bound))
    conic.inside("positive", np.ones(size), (-1.0, up), (-1.0, down))
    conic.cost(bound, weights)
    conic.cost(conic.x, -(matrix.T @ (weights * target)))


def poisson(conic, matrix, target, weights):
    bound = conic.new(target.size)
    conic.exponentials(bound, (matrix, conic.x))
    conic.cost(bound, weights)
    conic.cost(conic.x, -(matrix.T @ (weights * target)))
    positive = np.where(target > 0, target, 1)
    conic.constant += np.sum(weights * (target * np.log(positive) - target))


def huber(delta):
    """The least `u² / 2 + delta |r - u|` over u."""

    def term(conic, matrix, target, weights):
        near, far = conic.new(target.size), conic.new(target.size)
        for sign in (1.0, -1.0):
            conic.inside("positive", sign * target, (-sign * matrix, conic.x), (sign, near), (1.0, far))
        conic.cost(near, squares=weights)
        conic.cost(far, weights * delta)

    return term


def slopes(below, above):
    """`max(below r, above r)` of `r = z - y`: absolute and quantile losses."""

    def term(conic, matrix, target, weights):
        bound = conic.new(target.size)
        for slope in (below, above):
            conic.inside("positive", slope * target, (-slope * matrix, conic.x), (1.0, bound))
        conic.cost(bound, weights)

    return term


def squared_hinge(conic, matrix, target, weights):
    lack = conic.new(target.size)
    conic.inside("positive", -np.ones(target.size), (sparse.diags_array(target) @ matrix, conic.x), (1.0, lack))
    conic.inside("positive", np.zeros(target.size), (1.0, lack))
    conic.cost(lack, squares=weights)


def absolute(conic, rows, weight):
    """`sum of weight |v|` for `v = rows x`."""
    bound = conic.new(rows.shape[0])
    for sign in (1.0, -1.0):
        conic.inside("positive", np.zeros(bound.size), (sign * rows, conic.x), (1.0, bound))
    conic.cost(bound, weight)


def lengths(conic, rows, weight, groups):
    """`sum of weight_g ||v_g||`; `groups` lists the entries of each."""
    weight = np.broadcast_to(weight, (len(groups),))
    for number, entries in zip(weight, groups, strict=True):
        bound = conic.new(1)
        size = len(entries)
        first = sparse.coo_array(([1.0], ([0], [0])), shape=(size + 1, 1))
        below = sparse.vstack([sparse.csr_array((1, rows.shape[1])), sparse.csr_array(rows)[entries]])
        conic.inside("second order", np.zeros(size + 1), (first, bound), (below, conic.x))
        conic.cost(bound, number)


def ridge(conic, rows, weight):
    """`sum of weight / 2 v²`."""
    values = conic.new(rows.shape[0])
    conic.inside("zero", np.zeros(values.size), (rows, conic.x), (-1.0, values))
    conic.cost(values, squares=weight)


def between(conic, rows, low, high):
    """`low <= rows x <= high`, of which some bounds may be infinite."""
    for sign, bound in ((1.0, low), (-1.0, high)):
        bound = np.broadcast_to(bound, rows.shape[:1])
        if (ends := np.isfinite(bound)).any():
            conic.inside("positive", -sign * bound[ends], (sign * sparse.csr_array(rows)[ends], conic.x))

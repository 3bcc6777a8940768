"""Results of eight devices and of one, as JSON; run by `test_devices.py` in a separate process.

The number of devices is fixed per process. Eight in every process of the suite would split its threads.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt as so
from sparseopt.core.base.mesh import at_work, device_line, whole
from sparseopt.core.operators.parts import SlabBase
from sparseopt.core.problem.iterate import _iterate
from sparseopt.core.problem.problem import Problem
from sparseopt.trend.base.ground import data_of
from sparseopt.trend.base.layout import layout_of
from sparseopt.trend.filter import check_job
from sparseopt.trend.methods.choice import choose
from tests.collectives import collectives, times, total_bytes

rng = np.random.default_rng(20251125)


def picture(shape):
    steps = np.kron(rng.normal(size=[-(-n // 8) for n in shape]), np.ones([8] * len(shape)))
    return steps[tuple(slice(0, n) for n in shape)] + 0.1 * rng.normal(size=shape)


def uneven_graph():
    """A hub, weights, several components and isolated nodes."""
    pairs = rng.integers(0, 55, (110, 2))
    pairs = np.concatenate([pairs[pairs[:, 0] != pairs[:, 1]], [(0, i) for i in range(1, 20)], [(55, 56), (56, 57)]])
    edges = so.Graph.from_edges(pairs, 60, merge=True).edges
    return so.Graph.from_edges(edges, 60, rng.uniform(0.5, 2.0, len(edges)))


GRID, CHAIN, UNEVEN = so.Graph.grid((37, 23)), so.Graph.chain(50, ends="graph"), uneven_graph()
CUBE, SPACED = so.Graph.grid((4, 5, 11)), so.Graph.grid((4, 5, 11), (1, 2, 0.5))


def products(graph, devices, order):
    """Both products with `Δ^(order)`: how far from those of one device, and whether one is the other's transpose."""
    here, over = layout_of(graph), layout_of(graph, device_line(devices))
    one, several = (so.core.operators.differences.Difference(layout.base(np.float64), order) for layout in (here, over))
    rows = here.rows(rng.normal(size=here.count(order)), order)
    nodes = rng.normal(size=(graph.num_nodes, 2))
    rows = np.stack([rows, 2 * rows], -1)
    x, e = here.rows(nodes, 0), over.put(over.pad(rows, order), order)
    image = jax.jit(type(several).mv)(several, over.put(over.rows(nodes, 0)))
    back = jax.jit(type(several).rmv)(several, e)
    wanted = over.pad(np.asarray(one.mv(jnp.asarray(x))), order)
    wanted_back = over.pad(np.asarray(one.rmv(jnp.asarray(rows))), 0)
    return {
        "apart": float(np.abs(whole(image) - wanted).max()),
        "apart_back": float(np.abs(whole(back) - wanted_back).max()),
        "adjoint": float(jnp.vdot(e, image) - np.vdot(whole(back), over.rows(nodes, 0))),
        "size": float(np.abs(wanted).max() * np.abs(wanted_back).max()),
    }


def loop(y, graph, penalty, devices, order, missing="error", dtype=None, **options):
    """The program of the solver's loop over several devices."""
    options = {name: options[name] for name in ("tol", "max_steps", "history") if name in options}
    job = check_job(y, graph, penalty, order, None, missing, dtype, devices, **options)
    with at_work(job.layout.mesh):
        plan = choose(job).plan(job)
        data = jax.jit(data_of)(plan.ground, *job.arrays)
        start = jax.jit(plan.start)(job.rows, data, job.arrays[1])
        problem = Problem(data.centred, job.rows, plan.split)
        solver = plan.solver(jnp.ones((), job.dtype))
        limit = job.max_steps if job.history else 0
        return _iterate.usual.lower(problem, solver, start, job.tol, job.max_steps, limit).compile().as_text()


def told(solution):
    return {name: float(getattr(solution, name)) for name in ("status", "steps", "objective", "gap")}


def sent(graph, devices, channels, dtype):
    """Messages and bytes that a device with two neighbours sends for one factor, D or Dᵀ."""
    base = layout_of(graph, device_line(devices)).base(dtype)
    if isinstance(base, SlabBase):
        sizes = [np.prod(np.delete(base.shape, base.axis), dtype=int)]
    else:
        sizes = [table.shape[0] // devices for table in base.sent]
    return len(sizes), int(sum(sizes)) * channels * dtype.itemsize


def fit(y, graph, penalty, devices, **options):
    """One device and several on the same problem, and what the several exchanged."""
    order, values = options.get("order", 0), np.asarray(y)
    one = so.trend_filter(y, graph, penalty, method="doge", **options)
    several = so.trend_filter(y, graph, penalty, devices=devices, **options)
    program = loop(y, graph, penalty, devices, **{"order": 0, **options})
    found = [found for found in collectives(program) if found.loops]
    permuted = [found for found in found if found.kind == "collective-permute"]
    channels = values.size // graph.num_nodes
    messages, nbytes = sent(graph, devices, channels, values.dtype)
    # Ten iterations and the check after them have a product with Ψ and one with Ψᵀ each, of k + 1 factors.
    factors = 2 * (order + 1) * (10 + 1)
    return {
        "one": told(one),
        "several": told(several),
        "apart": float(np.abs(np.asarray(one.value) - several.value).max()),
        "shape": several.value.shape == values.shape and several.value.dtype == values.dtype,
        "eps": float(np.finfo(values.dtype).eps),
        "history": one.history is None
        or bool(np.allclose(one.history.objective, several.history.objective, rtol=1e-12, equal_nan=True)),
        "kinds": sorted({found.kind for found in collectives(program)}),
        "messages": [sum(times(found) for found in permuted), factors * messages],
        "bytes": [total_bytes(found, "collective-permute"), factors * nbytes],
        "reduced": [found.bytes for found in found if found.kind == "all-reduce"],
    }


def fits():
    flat = picture((37, 23))
    holes = np.where(rng.random(flat.shape) < 0.2, np.nan, flat)
    both, on_graph = np.stack([flat, -flat], -1).astype(np.float32), rng.normal(size=(60, 2))
    rows = rng.uniform(0.1, 0.2, 50)
    return {
        "grid, float32, two channels, 8": fit(both, GRID, so.GroupL2(0.1), 8, order=2, tol=1e-3),
        "grid, missing, 3": fit(
            holes, GRID, so.L1(0.1), 3, order=1, tol=1e-4, max_steps=400, missing="nan", history=True
        ),
        "chain, weight a row, 8": fit(picture((50,)), CHAIN, so.L1(rows), 8, order=3, tol=1e-4, max_steps=400),
        "cube, MCP, 8": fit(picture((4, 5, 11)), CUBE, so.MCP(0.1, 2.0), 8, tol=1e-4),
        "cube, isotropic, 8": fit(picture((4, 5, 11)), CUBE, so.GroupL2(0.1, axis=0), 8, tol=1e-4),
        "graph, 8": fit(on_graph[:, 0], UNEVEN, so.L1(0.2), 8, order=1, tol=1e-5),
        "graph, the means are the fit, 3": fit(on_graph, UNEVEN, so.GroupL2(1e4), 3, tol=1e-5),
    }


def refusals():
    y = rng.normal(size=(37, 23))
    single = so.trend_filter(y, GRID, so.L1(0.1), devices=2, tol=1e-1)
    cases = {
        "more": {"devices": 9},
        "method": {"devices": 2, "method": "admm"},
        "B": {"devices": 2, "order": 2, "method": so.trend.Doge(B=1)},
        "loss": {"devices": 2, "loss": "huber"},
        "several": {"devices": 2, "penalty": {0: so.L1(1.0), 1: so.L1(1.0)}},
        "rows": {"devices": 2, "penalty": so.MCP(0.1, rng.uniform(2, 3, 5))},
        "axes": {"devices": jax.sharding.Mesh(np.array(jax.devices()), ("x",))},
        "warm start": {"start": single},
        "other warm start": {"devices": 3, "start": single},
        "short": {"devices": 8, "y": np.zeros((5, 5)), "graph": so.Graph.grid((5, 5))},
        "few": {"devices": 8, "y": np.arange(3.0), "graph": so.Graph.from_edges([(0, 1), (1, 2), (0, 2)])},
    }
    said = {}
    for name, changed in cases.items():
        try:
            so.trend_filter(**({"y": y, "graph": GRID, "penalty": so.L1(0.1)} | changed))
        except ValueError as error:
            said[name] = str(error)
    return said


def warm_starts():
    """Steps from nothing, and from what one device and what two found, with two devices."""
    y = picture((37, 23))
    one, two = (so.trend_filter(y, GRID, so.L1(0.1), method="doge", tol=1e-3, devices=d) for d in (None, 2))
    starts = (None, one, two)
    return [int(so.trend_filter(y, GRID, so.L1(0.1), tol=1e-6, devices=2, start=s).steps) for s in starts]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    graphs = {"chain": CHAIN, "grid": GRID, "one row": so.Graph.grid((3, 8)), "cube": SPACED, "graph": UNEVEN}
    found = {
        "products": {
            name: products(graph, devices, order)
            for (name, graph), devices, order in zip(graphs.items(), (8, 3, 8, 3, 8), (3, 4, 4, 3, 4), strict=True)
        },
        "fits": fits(),
        "refusals": refusals(),
        "warm": warm_starts(),
    }
    json.dump(found, sys.stdout)

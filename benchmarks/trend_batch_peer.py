"""The fit of a picture at order 0 by fastprox, and its gradients; JSON lines for `bench_trend_batch.py`.

    INTERPRETER benchmarks/trend_batch_peer.py PROBLEM.npz

The file has the fields y, target, weights (of the edges, `[2, rows, columns]`), along and weights_along (directions for
y and weights), and gap, the duality gap to reach. The loss is the mean squared error of the fit. The first gradient is
taken at the fit, whose pieces may differ from those of the optimum, the second after fastprox has refined the fit.
"""

import json
import platform
import sys
import warnings
from functools import partial
from typing import Any

import numpy as np
from common import installed, warmed

MOST_STEPS = 10_000
# Relative error to which the fit is refined; None for no refinement.
REFINED: dict[str, float | None] = {"fastprox": None, "fastprox, refined": 1e-7}


def main() -> None:
    about = {"version": installed("fastprox"), "python": platform.python_version()}
    if about["version"] is None:
        sys.exit(f"not installed for Python {about['python']}; it needs 3.12 or newer")
    import fastprox

    # The record says whether the derivative is exact.
    warnings.simplefilter("ignore")
    with np.load(sys.argv[1]) as stored:
        given = dict(stored)
    y, target = given["y"], given["target"]
    operator = fastprox.TVAniso(2, edge_weights=given["weights"])
    # Its tolerance is relative to the energy of the signal.
    options = {"threads": 1, "max_iter": MOST_STEPS, "tol": float(given["gap"] / (np.sum(y**2) / 2))}

    def slopes(refine: float | None) -> tuple[Any, Any, Any, int]:
        value, context = operator.prox(y, 1.0, keep=True, **options)
        steps = context.info.iters
        if refine is not None:
            value = context.refine(refine)
            steps += context.info.iters
        in_y, in_parameters = operator.vjp(context, 2 * (value - target) / value.size)
        return context, in_y, in_parameters.edge_weights, steps

    fit = warmed(lambda: operator.prox(y, 1.0, **options))
    for name, refine in REFINED.items():
        both, (context, in_y, in_weights, steps) = warmed(partial(slopes, refine)), slopes(refine)
        along = [float(np.vdot(in_y, given["along"])), float(np.vdot(in_weights, given["weights_along"]))]
        found = {"solver": name, "steps": steps, "exact": bool(context.deriv.exact)}
        print(json.dumps(about | found | {"fit": fit, "both": both, "slopes": along}))


if __name__ == "__main__":
    main()

"""Programs of small problems, compiled in a third or half of the time.

A first call takes seconds of compilation and milliseconds of work. Most of the compilation is LLVM's optimisation,
which saves little work if arrays are small. So on a CPU small problems have their own programs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparseopt.core.base.types import is_traced

# Up to this many entries of all arrays together, these options. CPU seconds of a first call, then milliseconds of the
# next ones: a lasso of 100 × 20 takes 0.60 and 1.5 with the first, 1.20 and 1.2 with the second, 2.11 and 1.3 with
# neither; a grid of 20 × 20 0.66 and 5.2, 1.35 and 3.1, 2.57 and 3.7. On a grid of 256 × 256 the second would take 1.4
# times the time of neither.
QUICK: tuple[tuple[int, dict[str, Any]], ...] = (
    (2**12, {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}),
    (2**14, {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}),
)


class Jitted:
    """`jax.jit(function, **options)`; known arguments with few entries on a CPU use a program that compiles quickly.

    Attributes:
        usual: the function as `jax.jit` compiles it.
        quick: the same with the options of `QUICK`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.usual = jax.jit(function, **options)
        self.quick = [jax.jit(function, compiler_options=quick, **options) for _, quick in QUICK]
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        size = _known_size((arguments, named))
        fitting = [program for program, (most, _) in zip(self.quick, QUICK, strict=True) if size <= most]
        program = fitting[0] if fitting and _knows_quick() else self.usual
        return program(*arguments, **named)


def _known_size(arguments: Any) -> float:
    """The entries of all arrays; infinite if some are traced, or elsewhere than on one CPU."""
    leaves = jax.tree.leaves(arguments)
    if is_traced(leaves):
        return np.inf
    size = sum(np.size(leaf) for leaf in leaves if hasattr(leaf, "dtype"))
    if size > QUICK[-1][0]:
        return np.inf
    # Inside a traced function even what is known is part of the program around it, whose options count.
    here = jax.device_put(np.float32(0))
    if is_traced(here):
        return np.inf
    places = [leaf.devices() for leaf in (here, *leaves) if isinstance(leaf, jax.Array)]
    return size if all([device.platform for device in place] == ["cpu"] for place in places) else np.inf


@functools.cache
def _knows_quick() -> bool:
    """Whether this jaxlib accepts the options, which it does not promise."""
    try:
        jax.jit(lambda: 0, compiler_options=QUICK[0][1]).lower().compile()
    except Exception:
        return False
    return True

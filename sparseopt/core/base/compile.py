"""Programs of small problems, compiled in a third of the time.

A first call takes seconds of compilation and milliseconds of work. LLVM's optimisation is most of the former, and saves
little of the latter where arrays are small. So a small problem has a program of its own, without it, on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# Entries of all arrays together.
SMALL = 2**14


class Jitted:
    """`jax.jit(function, **options)`; known arguments of few entries on a CPU take a program that compiles quickly.

    Attributes:
        usual: the function as `jax.jit` compiles it.
        quick: the same with the options `QUICK`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.usual = jax.jit(function, **options)
        self.quick = jax.jit(function, compiler_options=QUICK, **options)
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        program = self.quick if _is_small((arguments, named)) and _knows_quick() else self.usual
        return program(*arguments, **named)


def _is_small(arguments: Any) -> bool:
    leaves = jax.tree.leaves(arguments)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    if sum(np.size(leaf) for leaf in leaves if hasattr(leaf, "dtype")) > SMALL:
        return False
    # Inside a traced function even what is known is part of the program around it, whose options count.
    here = jax.device_put(np.float32(0))
    if isinstance(here, jax.core.Tracer) or next(iter(here.devices())).platform != "cpu":
        return False
    return all(len(leaf.devices()) == 1 for leaf in leaves if isinstance(leaf, jax.Array))


@functools.cache
def _knows_quick() -> bool:
    """Whether this jaxlib takes the options, which are not part of its promises."""
    try:
        jax.jit(lambda: 0, compiler_options=QUICK).lower().compile()
    except Exception:
        return False
    return True

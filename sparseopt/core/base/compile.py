"""Programs that compile in less time on a CPU, those of small problems in a third or half of it.

A first call takes seconds of compilation and milliseconds of work. Most of the compilation is LLVM's optimisation,
which saves little work if arrays are small, and some of whose passes save none.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparseopt.core.base.types import known_on_cpu

# Up to this many entries of all arrays together, these options. CPU seconds of compilation, then milliseconds of a fit:
# a grid of 128 × 128 at order 0 takes 0.5 and 427 with the first, 1.4 and 39 with the second, 2.0 and 25 with the
# third, 2.8 and 28 with none; a chain of 5,000 nodes at order 2 0.25 and 16.5, 0.8 and 16, 1.1 and 15, 1.2 and 15.
OPTIONS: tuple[tuple[float, dict[str, Any]], ...] = (
    (2**12, {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}),
    (2**16, {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}),
    (np.inf, {"xla_llvm_disable_expensive_passes": True}),
)


class Jitted:
    """`jax.jit(function, **options)`; with known arguments on a CPU, a program that compiles in less time.

    Attributes:
        usual: the function as `jax.jit` compiles it.
        on_cpu: the same with each of `OPTIONS`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.usual = jax.jit(function, **options)
        self.on_cpu = [(most, jax.jit(function, compiler_options=each, **options)) for most, each in OPTIONS]
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        size = _known_size((arguments, named))
        if size is None or not _knows_options():
            return self.usual(*arguments, **named)
        return next(program for most, program in self.on_cpu if size <= most)(*arguments, **named)


def _known_size(arguments: Any) -> int | None:
    """The entries of all arrays; None if some are traced, or elsewhere than on one CPU."""
    # Inside a traced function even what is known is part of the program around it, whose options count.
    here, leaves = jax.device_put(np.float32(0)), jax.tree.leaves(arguments)
    if not known_on_cpu((here, *leaves)):
        return None
    if any(len(leaf.devices()) > 1 for leaf in leaves if isinstance(leaf, jax.Array)):
        return None
    return sum(np.size(leaf) for leaf in leaves if hasattr(leaf, "dtype"))


@functools.cache
def _knows_options() -> bool:
    """Whether this jaxlib accepts the options, which it does not promise."""
    try:
        for _, options in OPTIONS:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except Exception:
        return False
    return True

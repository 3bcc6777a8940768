"""Methods of a pytree, and modules, with every call as one compiled program.

Eagerly, every operation on every shape would be a separate program, and take most of the time of a test.
"""

from functools import partial
from typing import Any

import jax


@partial(jax.jit, static_argnums=1)
def _call(tree: Any, name: str, arguments: tuple) -> Any:
    return getattr(tree, name)(*arguments)


class Jitted:
    """`Jitted(penalty).prox(x, step)` is `penalty.prox(x, step)` as NumPy arrays; those named in `host` run as is."""

    def __init__(self, tree: Any, host: tuple[str, ...] = ()) -> None:
        self.tree, self.host = tree, host

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.tree, name)
        if not callable(member) or name in self.host:
            return member
        return lambda *arguments: jax.device_get(_call(self.tree, name, arguments))


@jax.jit
def run(module: Any, *arguments: Any) -> Any:
    """What a module returns; operation by operation it would take a hundred programs."""
    return module(*arguments)

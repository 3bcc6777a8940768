"""A penalty and a task defined outside the package, named in configs by their dotted paths."""

import time
from typing import Any, ClassVar

import jax.numpy as jnp
from pydantic import Field

import sparseopt as so
from sparseopt.experiments.task import Task


@so.pytree
class CappedL1:
    """`weight * sum min(|x|, cap)`: L1 near zero, no more to pay beyond the cap."""

    weight: Any
    cap: Any = 1.0

    def value(self, x):
        return self.weight * jnp.sum(jnp.minimum(jnp.abs(x), self.cap))

    def prox(self, x, step):
        level = step * self.weight
        size = jnp.abs(x)
        # One candidate minimises each of the two pieces; the better one wins.
        inner = jnp.minimum(jnp.maximum(size - level, 0), self.cap)
        outer = jnp.maximum(size, self.cap)
        cost_inner = (inner - size) ** 2 / 2 + level * inner
        cost_outer = (outer - size) ** 2 / 2 + level * self.cap
        return jnp.sign(x) * jnp.where(cost_outer < cost_inner, outer, inner)


class Toy(Task):
    """Units that take `pause` seconds each; every execution leaves a line in `log`."""

    columns: ClassVar[tuple[str, ...]] = ("value",)

    task: str
    count: int = Field(default=4, ge=1)
    pause: float = 0.0
    log: str | None = None
    fail_at: int | None = None
    scale: float = 1.0

    def units(self):
        return [f"unit-{i}" for i in range(self.count)]

    def run_unit(self, key, folder, observer):
        index = int(key.removeprefix("unit-"))
        observer("pausing", 0, 1)
        time.sleep(self.pause)
        if self.fail_at == index:
            raise RuntimeError("the toy broke")
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{self.scale:g} {key}\n")
        return {"value": self.scale * index, "kind": "toy", "nothing": float("nan")}

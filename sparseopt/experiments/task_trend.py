"""Floor 7: what the tasks on pictures share: the picture with its noise, the problem, names for legends, rooms."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from sparseopt.experiments.datasets import Picture
from sparseopt.experiments.names import PenaltyConfig
from sparseopt.experiments.task import Task
from sparseopt.trend.graph import Graph

METHOD_NAMES = {
    "auto": "automatic choice",
    "doge": "Doge-ADMM",
    "admm": "original ADMM",
    "gtf_admm": "GTF-ADMM",
    "fast_admm": "fast ADMM",
    "doge_groups": "Doge-ADMM with its copies",
}


def method_label(method: str, settings: str) -> str:
    """For legends and bars."""
    return METHOD_NAMES[method] + (", published settings" if settings == "published" else "")


class PictureTask(Task):
    """A trend filter on the pixel grid of a picture with noise.

    Attributes:
        picture: which, and what of it.
        noise: standard deviation of the white noise, in grey levels; values beyond 0..255 stay.
        penalty: by name or path.
        order: k; 0 fits piecewise constants, 1 piecewise linear pictures.
        inner_tol: relative duality gap of the optimisation inside each step of `fast_admm`; None for a tenth of
            `tol`, about the loosest with which every setting reaches it.
        max_steps: step limit.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    picture: Picture = Picture()
    noise: float = Field(default=20.0, ge=0)
    penalty: PenaltyConfig = PenaltyConfig.model_validate({"name": "l1", "weight": 10.0})
    order: int = Field(default=0, ge=0, le=4)
    inner_tol: float | None = Field(default=None, gt=0)
    max_steps: int = Field(default=5000, ge=1)

    def check(self) -> None:
        """The picture's package is there and the picture has the part that is asked for."""
        self.picture.load()

    def pair(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture, and the picture with noise."""
        clean = self.picture.load()
        return clean, clean + self.noise * np.random.default_rng(seed).standard_normal(clean.shape)

    def grid(self) -> Graph:
        """The pixel grid; one object, so that tables are built once in a run."""
        image = self.picture.load()
        return Graph.grid(image.shape[:2])

    @property
    def subject(self) -> str:
        """What is solved, apart from how: equal for runs that have the same answer."""
        return f"{self.picture.name}, noise {self.noise:g}, {self.penalty.label}, order {self.order}"


def by_subject(tasks: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[int]]:
    """Places in the sequence by what `key` says of them, in the order of first sight."""
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(key(task), []).append(index)
    return groups

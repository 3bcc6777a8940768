"""`--log`: what a run does, also in MLflow or Weights & Biases.

Neither belongs to an extra, and each is imported only where it is asked for. Where the records go is said by their own
variables, as MLFLOW_TRACKING_URI and WANDB_MODE.
"""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseopt.core.base.arguments import suggest

PROJECT = "sparseopt"
# Of the events of a pruning run, which have a `kind`.
FIGURES = ("relative_error", "heldout_error", "last_loss", "rise")

logger = logging.getLogger(__name__)


class _Mlflow:
    def __init__(self, mlflow: Any, name: str, parameters: Mapping[str, Any]) -> None:
        self._mlflow = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_params(parameters)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def keep(self, file: Path) -> None:
        self._mlflow.log_artifact(str(file))

    def end(self, well: bool) -> None:
        self._mlflow.end_run("FINISHED" if well else "FAILED")


class _Wandb:
    def __init__(self, wandb: Any, name: str, parameters: Mapping[str, Any]) -> None:
        self._run = wandb.init(project=PROJECT, name=name, config=dict(parameters))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def keep(self, file: Path) -> None:
        self._run.log_artifact(str(file), type="report")

    def end(self, well: bool) -> None:
        self._run.finish(exit_code=0 if well else 1)


TRACKERS = {"mlflow": _Mlflow, "wandb": _Wandb}


def check_tracker(name: str | None) -> None:
    """Import the package of a tracker; None for no tracker.

    Raises:
        ValueError: if there is no such tracker, or its package is not installed.
    """
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"--log knows no {name!r}: {suggest(name, TRACKERS)}")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--log {name} needs {error.name}: pip install {name}") from error


class Tracked:
    """One run in a tracker, as a context; within it an observer of `prune_model`. Without a tracker it does nothing.

    A tracker that fails, as where a network is lost, is left out from there on, with a warning: it ends no run.
    """

    def __init__(self, tracker: str | None, name: str, parameters: Mapping[str, Any]) -> None:
        """Begin the run, after `check_tracker`; what cannot be begun is an error."""
        self._step, self._run = 0, None
        if tracker is not None:
            self._run = TRACKERS[tracker](importlib.import_module(tracker), name, parameters)

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._tell("end", kind is None)

    def __call__(self, event: Any, done: int, total: int) -> None:
        """Log the figures of an event."""
        if kind := getattr(event, "kind", None):
            self.log({f"{kind}/{name}": getattr(event, name, None) for name in FIGURES})

    def log(self, figures: Mapping[str, Any]) -> None:
        """Log those of the figures that are numbers, as the next step."""
        numbers = {name: value for name, value in figures.items() if type(value) in (int, float)}
        if numbers:
            self._step += 1
            self._tell("log", numbers, self._step)

    def keep(self, file: Path) -> None:
        """Store a file with the run."""
        self._tell("keep", file)

    def _tell(self, what: str, *given: Any) -> None:
        try:
            if self._run is not None:
                getattr(self._run, what)(*given)
        except Exception as error:
            self._run = None
            logger.warning("--log: nothing more is logged, since %s failed: %s", what, error)

"""The task `trend`, and the command `sparseopt trend`: a trend filter on a graph or a series in the user's files."""

import contextlib
import dataclasses
import hashlib
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from sparseopt.core.base.types import Observer
from sparseopt.core.losses.residuals import Huber, Squared
from sparseopt.core.losses.scalar import LOSSES, Quantile, ScalarLoss, check_scalar_loss
from sparseopt.core.penalties.names import BY_WEIGHT, penalty_of_weight
from sparseopt.core.problem.problem import Solution, Status
from sparseopt.experiments.names import TrendMethod
from sparseopt.experiments.plots.signals import observed_and_fit
from sparseopt.experiments.read.graph_files import NodeTable, as_dates, write_fit
from sparseopt.experiments.read.signals import Given, is_picture, read_given
from sparseopt.experiments.read.tables import write_table
from sparseopt.experiments.task import FinishedRun, Record, Task
from sparseopt.system import processes, run_folder
from sparseopt.trend.base.noise import noise_level, unlike_channels
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.methods.choice import AUTO, METHODS
from sparseopt.trend.paths.choose_weight import WEIGHT_RULES, choose_weight, weight_rule
from sparseopt.trend.regions import PAIR_COLUMNS, regions
from sparseopt.trend.segments.find import COLUMNS, jumps
from sparseopt.trend.segments.inference import Thinning

GAP = 1.6  # a step of this many usual ones, of times with a season, lacks a row; months differ by 1.11
DIGITS = 10  # of the values that are written: more than a certificate confirms
FIT = "fit.csv"


class Smoothed(NamedTuple):
    """A fit: its table, its pieces of order 0, between jumps or regions, figures, arguments of `observed_and_fit`."""

    table: NodeTable
    pieces: np.ndarray | None
    record: Record
    drawn: dict[str, Any]
    breaks: dict[str, Any] | None = None  # the columns of the table of jumps or regions, if they were found


class Trend(Task):
    """Smooth a signal of your own files, as `sparseopt trend` does: its options are the keys.

    The run's folder holds the fit as `fit.csv`, and what was found as `jumps.csv` or `regions.csv`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "weight", "weight_rule", "pieces", "noise", "relative_duality_gap", "steps", "seconds",
    )  # fmt: skip
    many_devices: ClassVar[bool] = True

    task: Literal["trend"]
    signal: Path = Field(
        description="Signal: one row per node, one column per channel; a first column `node` or `id` names the nodes. "
        "In a series an increasing column `time`, `date`, `timestamp`, `datetime`, `year`, `t` or `index` has the "
        "times. A picture, such as a PNG file, has its regions found."
    )
    weight: float | str | None = Field(
        default=None,
        description=f"Penalty level, in units of the signal, or the rule that chooses it: {', '.join(WEIGHT_RULES)}. "
        "Default: gcv, or cv for labels, losses of outliers and penalties that are not convex; a series or a "
        "picture alone has its jumps or regions found instead.",
    )
    loss: str = Field(
        default="square",
        description=f"{', '.join(LOSSES)}, or quantile:LEVEL. Of counts (poisson) the fit is the rate, of labels 0, 1 "
        "(logistic) the probability of 1; huber and absolute are for outliers.",
    )
    graph: Path | None = Field(
        default=None,
        description="Edges: two columns of node numbers from 0, or ids; a third of weights w, which scale differences "
        "by sqrt(w). Default: a series.",
    )
    times: Path | None = Field(default=None, description="Times of a series with free ends: one column.")
    ends: Literal["free", "graph"] | None = Field(
        default=None,
        description="Ends of a series: free, which keeps polynomials, or graph. Default: free, without a graph.",
    )
    order: int = Field(default=0, ge=0, description="0: piecewise constant; 1: piecewise linear; 2: quadratic.")
    penalty: str | None = Field(
        default=None, description=f"{', '.join(BY_WEIGHT)}; group_l2 couples the channels. Default: l1."
    )
    jumps: bool = Field(
        default=False,
        description="Find the jumps of a series instead, and fit constants or lines between them without shrinkage, or "
        "the regions of a graph or a picture, with a constant each. Default if none of graph, weight, penalty, order, "
        "loss, method, tol and devices is given.",
    )
    thin: str | None = Field(
        default=None,
        description="Law of the values, gaussian:DEVIATION, poisson or binomial:TRIALS: jumps are found on one half of "
        "each value and tested on the other, which gives p-values. Default: no p-values, and approximate intervals.",
    )
    method: TrendMethod = Field(default=cast(Any, AUTO), description=f"{', '.join((AUTO, *METHODS))}.")
    tol: float = Field(default=1e-5, gt=0, description="Relative duality gap to reach.")
    covariates: str | None = Field(
        default=None,
        description="Columns of the signal that explain a part of it, as in temperature,holiday: the trend is fitted "
        "beside them, and their coefficients are said.",
    )
    season: int | None = Field(
        default=None, description="Period of a series in rows, as in 12 for months: fitted beside the trend."
    )
    bounds: tuple[float | None, float | None] | None = Field(
        default=None,
        description="Lower and upper bound of the fit, as in 0,1 or 0, for no upper one. A rule chooses the weight of "
        "the fit without them.",
    )
    monotone: Literal["up", "down"] | None = Field(
        default=None, description="up for a fit that never falls, down for one that never rises."
    )
    missing: bool = Field(default=False, description="Treat NaN and empty cells as unobserved.")
    merge: bool = Field(default=False, description="Drop self-loops and add up duplicate edges.")

    @field_validator("weight", mode="before")
    @classmethod
    def _number_or_rule(cls, weight: Any) -> Any:
        if not isinstance(weight, str) or weight in WEIGHT_RULES:
            return weight
        try:
            return float(weight)
        except ValueError:
            raise ValueError(f"is a number or one of {', '.join(WEIGHT_RULES)}, given {weight!r}") from None

    @field_validator("bounds", mode="before")
    @classmethod
    def _ends(cls, bounds: Any) -> Any:
        if not isinstance(bounds, str):
            return bounds
        ends = [end.strip() or None for end in bounds.split(",")]
        if len(ends) != 2:
            raise ValueError(f"is low,high, where one may be left out, given {bounds!r}")
        return ends

    @field_validator("loss", "penalty")
    @classmethod
    def _known(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None:
            _loss(name) if info.field_name == "loss" else penalty_of_weight(name, 1.0)
        return name

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        self.rule()
        if self.graph is not None and (self.times is not None or self.ends == "free"):
            raise ValueError("times and ends belong to a series, given a graph too: leave out graph, or both of them")
        if self.graph is None and self.merge:
            raise ValueError("merge belongs to the edges of a graph: leave it out, or give graph")
        beside = self._of_trend_filters()
        if self.is_picture and (beside := [*beside, *(n for n in ("times", "ends") if getattr(self, n) is not None)]):
            raise ValueError(
                f"a picture has its regions found, which need no {' and no '.join(beside)}: leave that out, or smooth "
                "it by `sparseopt denoise`"
            )
        if self.jumps and (beside := [name for name in beside if name != "graph"]):
            raise ValueError(f"jumps needs no {' and no '.join(beside)}: leave that out, or leave out jumps")
        if self.season is not None and self.graph is not None:
            raise ValueError("season belongs to a series, given a graph too: leave one out")
        if self.has_beside and (self.penalty not in (None, "l1") or self.devices not in (None, 1)):
            raise ValueError("covariates and season need the penalty l1 on one device: leave penalty and devices out")
        limited = [name for name in ("bounds", "monotone") if getattr(self, name) is not None]
        if limited and (self.has_beside or (self.order and self.loss != "square") or self.devices not in (None, 1)):
            raise ValueError(
                f"{' and '.join(limited)} need one device, no covariates, no season, and from order 1 on the square "
                "loss: leave out the others"
            )
        if self.thinning() and self.sought != "jumps":
            raise ValueError(
                "thin is of jumps in a series: leave it out, or give jumps without a graph and options of the trend "
                "filter"
            )
        return self

    def thinning(self) -> Thinning | None:
        """The law that `thin` names, with its deviation or trials."""
        law, _, number = (self.thin or "").partition(":")
        try:
            given: dict[str, Any] = {"trials" if law == "binomial" else "noise": float(number)} if number else {}
        except ValueError:
            raise ValueError(f"thin is gaussian:DEVIATION, poisson or binomial:TRIALS, given {self.thin!r}") from None
        return None if self.thin is None else Thinning(law, **given)

    def _of_trend_filters(self) -> list[str]:
        """The options given that only a trend filter has."""
        names = ("graph", "weight", "penalty", "order", "loss", "tol", "covariates", "season", "bounds", "monotone")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        others = {"method": self.method.name != AUTO, "devices": self.devices not in (None, 1)}
        return [*given, *(name for name, is_given in others.items() if is_given)]

    @property
    def has_beside(self) -> bool:
        """Whether something is fitted beside the trend."""
        return self.covariates is not None or self.season is not None

    @property
    def is_picture(self) -> bool:
        return is_picture(self.signal)

    @property
    def sought(self) -> Literal["jumps", "regions"] | None:
        """What is found instead of a trend filter's fit: the jumps of a series, or the regions of other graphs."""
        if not self.jumps and self._of_trend_filters():
            return None
        return "jumps" if self.graph is None and not self.is_picture else "regions"

    def _penalty(self, weight: float) -> Any:
        return penalty_of_weight(self.penalty or "l1", weight)

    def rule(self) -> str | None:
        """The rule that chooses the weight; None for a number, and if there is none.

        Raises:
            ValueError: if none can choose it.
        """
        if isinstance(self.weight, float) or self.sought:
            return None
        if self.penalty == "l0":
            raise ValueError("no rule chooses the weight of the penalty l0: give a number")
        if self.devices not in (None, 1):
            raise ValueError("a weight is chosen on one device: give a number, or leave out devices")
        if self.has_beside and not isinstance(_loss(self.loss), Squared | Huber):
            raise ValueError(f"no rule chooses the weight beside covariates or a season for {self.loss}: give a number")
        return weight_rule(self.weight, _loss(self.loss), self._penalty(1.0))

    def units(self) -> list[str]:
        return ["fit"]

    def check(self) -> None:
        self.rule()  # `devices` may have changed
        self.read()

    def inputs(self) -> dict[str, str]:
        found = {}
        for name in ("signal", "graph", "times"):
            with contextlib.suppress(OSError, TypeError), open(getattr(self, name), "rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    def read(self) -> Given:
        """Read the files.

        Raises:
            ValueError: for what cannot be used.
        """
        given = read_given(self.signal, self.graph, self.times, self.ends, self._names(), self.order, self.merge)
        if self.has_beside and len(names := given.table.names) > 1:
            raise ValueError(
                f"covariates and season need one channel, given {', '.join(names)}: name the others in covariates, or "
                "leave them out of the file"
            )
        return given

    def fit(self, given: Given, observer: Observer | None = None) -> Smoothed:
        """Find the jumps or regions, or choose the weight, unless it is a number, and smooth.

        Warns:
            UserWarning: if one weight does not suit all channels.
        """
        table, graph, start = given.table, given.graph, time.perf_counter()
        y, missing, places, columns = table.values, "nan" if self.missing else "error", np.zeros(0, int), None
        record: Record = {
            "signal": str(self.signal), "graph": None if self.graph is None else str(self.graph),
            "ends": self.ends or ("graph" if self.graph or self.is_picture else "free"), "channels": table.names,
            "nodes": graph.num_nodes, "edges": graph.num_edges, "loss": self.loss, "order": self.order,
        }  # fmt: skip
        pieces: Any
        if self.sought == "regions":
            parts = regions(y, graph, missing=missing, observer=observer)
            mean, pieces, columns = parts.fit, parts.pieces, _columns_of(PAIR_COLUMNS, parts.table(), table.names)
            record |= {
                "regions": tuple(map(str, parts.facts())), "pieces": len(parts.counts), "smooth": parts.smooth,
                "noise": float(np.mean(parts.noise)), "seconds": time.perf_counter() - start,
            }  # fmt: skip
        elif self.sought:
            found = jumps(y, graph, missing=missing, thin=self.thinning())
            places, mean = found.places, found.fit
            pieces = np.searchsorted(places, np.arange(len(y)), side="right")
            names = table.dates or table.nodes
            if names is None and table.times is not None:
                names = tuple(f"{at:.{DIGITS}g}" for at in table.times.tolist())
            said, columns = found.facts(names), _columns_of(COLUMNS, found.table(names), table.names)
            record |= {
                "jumps": tuple(map(str, said)), "basis": found.basis, "pieces": len(places) + 1, "lines": found.line,
                "noise": float(np.mean(found.noise)), "seconds": time.perf_counter() - start,
            }  # fmt: skip
        else:
            fit, weight, figures = self._smooth(given, missing, observer)
            # Of counts and labels the fit is a logarithm or a score, and a signal its mean.
            mean, pieces = np.asarray(_loss(self.loss).mean(fit.value)), None if self.order else fit.pieces()
            record |= {
                **figures, "penalty": self.penalty or "l1", "weight": weight, "weight_rule": self.rule() or "given",
                **({} if pieces is None else {"pieces": int(pieces.max()) + 1}),
                **figures_of(fit, time.perf_counter() - start),
            }  # fmt: skip
            if self.has_beside:
                table, mean, beside = self._with_parts(given, fit, mean)
                record |= beside
        rounded = np.array([float(f"{value:.{DIGITS}g}") for value in mean.ravel().tolist()]).reshape(mean.shape)
        drawn = {"observed": y.reshape(len(y), -1), "fit": rounded.reshape(len(y), -1), "names": table.names}
        if self.has_beside:
            trend, fitted, *_ = rounded.T
            # What stands beside the trend of a rate is a factor.
            rest = y * trend / fitted if self.loss == "poisson" else y - (fitted - trend)
            drawn["observed"], drawn["fit"] = np.column_stack([y, rest]), np.column_stack([fitted, trend])
            drawn["names"] = (table.names[0], f"{table.names[0]}, its trend")
        times = table.times if table.dates is None else as_dates(table.dates)
        if self.is_picture:
            drawn["pieces"] = pieces.reshape(graph.shape)
        elif self.graph is None:
            drawn |= {"times": np.arange(len(y)) if times is None else times, "places": table.times_name or "node"}
            drawn |= {"marks": places}
        return Smoothed(dataclasses.replace(table, values=rounded), pieces, run_folder.plain(record), drawn, columns)

    def _with_parts(self, given: Given, fit: TrendSolution, trend: np.ndarray) -> tuple[NodeTable, np.ndarray, Record]:
        """A table with the trend, the whole fit and the season, its values, and the figures of what is beside it."""
        names, values = [*given.table.names, "fitted"], [trend, np.asarray(_loss(self.loss).mean(fit.fitted))]
        figures: Record = {}
        if given.covariates is not None:
            figures["coefficients"] = dict(zip(self._names(), np.asarray(fit.beta).tolist(), strict=True))
        if self.season is not None:
            names, values, figures["season"] = (
                [*names, "season"],
                [*values, fit.season],
                np.asarray(fit.season)[: self.season].tolist(),
            )
        return dataclasses.replace(given.table, names=tuple(names)), np.column_stack(values), figures

    def _names(self) -> list[str]:
        """The names of the covariates."""
        return [] if self.covariates is None else [name.strip() for name in self.covariates.split(",")]

    def _smooth(self, given: Given, missing: str, observer: Observer | None) -> tuple[TrendSolution, float, Record]:
        """The fit of the trend filter, its weight and the noise."""
        y, graph, loss, rule = given.table.values, given.graph, _loss(self.loss), self.rule()
        options: dict[str, Any] = {"missing": missing, "loss": loss}
        alone = getattr(loss, "is_square", False) and self.devices in (None, 1)
        beside = {"covariates": given.covariates, "season": self.season}
        steps = np.diff(np.arange(2) if given.table.times is None else given.table.times)
        if self.season is not None and steps.max() > GAP * np.median(steps):
            warnings.warn(
                f"season counts rows, and after row {np.argmax(steps) + 1} the times make a step of "
                f"{steps.max() / np.median(steps):.2g} usual ones: if rows are missing there, write them, empty where "
                "nothing was observed, and add missing",
                stacklevel=3,
            )
        if rule is not None:
            more = {"method": self.method.build(), "observer": observer, **beside}
            weight = choose_weight(y, graph, self._penalty(1.0), self.order, rule, **options, **more).weight
        else:
            weight = float(self.weight or 0)
            if alone and (unlike := unlike_channels(y, graph, self.order, missing=missing)):
                warnings.warn(unlike, stacklevel=3)
        limits = {"bounds": self.bounds, "monotone": self.monotone}
        more = {"tol": self.tol, "devices": self.devices, **options, **beside, **limits}
        found = trend_filter(y, graph, self._penalty(weight), self.order, self.method.build(), **more)
        y = y - (found.fitted - found.value) if self.has_beside and alone else y
        return found, weight, {"noise": noise_level(y, graph, self.order, missing=missing) if alone else math.nan}

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        observer("smoothing", 0, 0)
        found = self.fit(self.read(), observer)
        if processes.is_first():
            write_fit(folder / FIT, found.table, found.pieces)
            if found.breaks is not None:
                write_table(folder / f"{self.sought}.csv", found.breaks)
            np.savez_compressed(folder / f"signal-{key}.npz", **found.drawn)
        return found.record

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """A figure of the signal and the fit of every run."""
        stored: list[Any] = [run.arrays("signal", record) for run in runs for record in run.records]
        return {
            f"fit-{number}" if number else "fit": observed_and_fit(**arrays) for number, arrays in enumerate(stored)
        }


def figures_of(solution: Solution, seconds: float) -> Record:
    """How a fit ended."""
    return {
        "status": Status(int(solution.status)).name,
        "steps": int(solution.steps),
        "objective": float(solution.objective),
        "relative_duality_gap": float(solution.gap),
        "residual": float(solution.residual),
        "seconds": seconds,
    }


def _columns_of(names: Sequence[str], rows: list[dict[str, Any]], channels: Sequence[str]) -> dict[str, Any]:
    """A table of jumps or regions as columns; of several channels there is a size, its limits or a step for each."""
    columns: dict[str, Any] = {}
    for name in names:
        cells = [row[name] for row in rows]
        if len(channels) > 1 and name in ("size", "low", "high", "step"):
            columns |= {f"{name} {channel}": [cell[i] for cell in cells] for i, channel in enumerate(channels)}
        else:
            columns[name] = cells
    return columns


def _loss(text: str) -> ScalarLoss:
    """The loss of a name, or of the quantile with a level."""
    name, _, level = text.partition(":")
    if name != "quantile":
        return check_scalar_loss(text)
    try:
        return check_scalar_loss(Quantile(float(level)))
    except ValueError:
        raise ValueError(f"quantile needs a level between 0 and 1, as in quantile:0.9, given {text!r}") from None

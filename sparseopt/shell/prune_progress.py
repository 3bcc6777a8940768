"""The live progress of a run that prunes or shrinks: a bar, or plain lines where there is no terminal."""

import time

from rich.progress import TextColumn

from sparseopt.layers.compiled import Compiled
from sparseopt.pruning.base.records import (
    BlockRecord,
    Calibration,
    DistillationRecord,
    Event,
    Footprint,
    GridRecord,
    LayerRecord,
    Passed,
    RemovalRecord,
    RepairRecord,
    Replay,
    ShapeRecord,
    mean,
)
from sparseopt.pruning.memory import bytes_by_size
from sparseopt.shell.console import console, counting_bar, duration, say
from sparseopt.system.machine import format_bytes

# Seconds left from which a run says after its first block that a faster one is possible.
LONG = 1800


class PruneProgress:
    """Observer of `prune_model`: a bar with block, layer, error and time left; without a terminal a line per block."""

    def __init__(self, title: str, faster: bool = False) -> None:
        """Take the title of the run, and whether effort fast takes less time."""
        self._title, self._faster = title, faster
        self._start, self._block = time.perf_counter(), list[LayerRecord | GridRecord]()
        self._replayed, self._finished = False, 0
        # When this run began with the blocks, and when it will have finished them; None before the first.
        self._began = _worked()
        self._end: float | None = None
        self._stage = ("", 0, self._began)
        self._bar = counting_bar(console, TextColumn("{task.fields[note]}"))
        # The first record comes only after reading, tokenising and compiling.
        self._task = self._bar.add_task(title, total=None, note="reading the model")

    def __enter__(self) -> "PruneProgress":
        self._bar.start()
        if not console.is_terminal:
            say(f"{self._title}: reading the model")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event, done: int, total: int) -> None:
        match event:
            case Calibration():
                say("\n".join(calibration_lines(event)))
            case Footprint():
                say("\n".join(footprint_lines(event)))
            case str():
                self._tell_stage(event, done, total)
            case Replay():
                self._replayed = True
            case LayerRecord() | GridRecord():
                self._block.append(event)
                what = "error" if isinstance(event, LayerRecord) else f"in {event.bits}, adds"
                note = f"block {event.block} {event.layer.split('.', 3)[-1]} {what} {event.relative_error:.4f}"
                self._bar.update(self._task, total=total, completed=done, note=note + self._left())
            case Passed(block, blocks):
                self._tell_block(block, blocks, done, total)
            case RepairRecord():
                self._bar.update(self._task, note=f"block {event.block} repairs the gap, error {event.last_error:.4f}")
            case BlockRecord():
                self._bar.update(self._task, note=f"block {event.block} trained, error {event.last_loss:.4f}")
            case RemovalRecord():
                say(f"{self._title}: block {event.block} goes ({done} of {total}), loss {event.rise:+.4f} nats a token")
            case ShapeRecord():
                say(f"{self._title}: keeps {event.kept()}")
            case DistillationRecord():
                self._bar.update(self._task, note=f"distilled, divergence {event.last_loss:.4f}")

    def _tell_stage(self, stage: str, done: int, total: int) -> None:
        now, (name, first, began), left = _worked(), self._stage, ""
        if not (self._block or self._finished):
            # What comes before the blocks says nothing of the time that they take.
            self._began = now
        if name != stage or done <= first:
            self._stage = (stage, done, now)
        elif done < total:
            left = f", {duration((now - began) / (done - first) * (total - done))} left"
        self._bar.update(self._task, total=total, completed=done, note=f"{stage}{left}")
        # About ten lines of a stage.
        if done in (1, total) or 10 * done // total > 10 * (done - 1) // total:
            self._tell(f"{stage} {done}/{total}", left)

    def _tell_block(self, block: int, blocks: int, done: int, total: int) -> None:
        now = _worked()
        if self._replayed:
            # An earlier run's: its records come again in no time.
            self._began, self._replayed = now, False
        else:
            self._finished += 1
            self._end = now + (now - self._began) / self._finished * (blocks - block - 1)
        what = f"block {block} has no layer to prune" if total else f"block {block + 1}/{blocks}"
        if self._block:
            pruned = [record for record in self._block if isinstance(record, LayerRecord)]
            error, of_grid = (
                mean(each.relative_error for each in pruned or self._block),
                "" if pruned else " of the grid",
            )
            what = f"layer {done}/{total}, block {block}, mean relative error{of_grid} {error:.5f}"
        self._block = []
        if not total:
            self._bar.update(self._task, total=blocks, completed=block + 1, note=what)
        self._tell(what, self._left())
        if self._end is not None:
            # Once, after the first block that this run has finished.
            if self._faster and self._end - now > LONG:
                say(f"{self._title}: about {duration(self._end - now)} left; --effort fast takes less")
            self._faster = False

    def _tell(self, what: str, left: str) -> None:
        if not console.is_terminal:
            say(f"{self._title}: {what}, {duration(time.perf_counter() - self._start)}{left}")

    def _left(self) -> str:
        """The time left, at the pace of the blocks that this run has finished."""
        return "" if self._end is None else f", {duration(max(0.0, self._end - _worked()))} left"


def _worked() -> float:
    """A clock in seconds that stops while programs compile: later blocks use the same programs."""
    return time.perf_counter() - Compiled.seconds


def calibration_lines(calibration: Calibration) -> list[str]:
    """What a run calibrates on, and why on so much."""
    given, tokens = calibration, calibration.windows * calibration.seqlen
    lines = [
        f"calibration on {given.windows} windows of {given.seqlen} tokens, {tokens:,} in all"
        + f", and {given.heldout_windows} held out"
        + f"; digest {given.digest}" * bool(given.digest)
    ]
    if given.why:
        lines.append(f"default --windows {given.windows}: {given.why}")
    return [*lines, *([f"warning: {given.warning}"] if given.warning else [])]


def footprint_lines(footprint: Footprint) -> list[str]:
    """The estimated memory and disk space of a run."""
    asked, lines = footprint.budget_bytes, []
    if footprint.memory_bytes is not None:
        limit = "" if asked is None else f" of {format_bytes(asked)} asked for"
        lines.append(
            f"memory {format_bytes(footprint.memory_bytes)}{limit}, estimated, in phase {footprint.phase}: "
            + " + ".join(bytes_by_size(footprint.memory_parts))
        )
    disk = f"disk {format_bytes(footprint.output_bytes)} for the model"
    if footprint.activations == "disk":
        disk += f" and {format_bytes(footprint.scratch_bytes)} for activations, until the run ends"
    return [*lines, disk]

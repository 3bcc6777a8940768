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
    Replay,
    ShapeRecord,
    mean,
)
from sparseopt.shell.console import bytes_by_size, console, counting_bar, duration, say
from sparseopt.system.machine import format_bytes

# Seconds left from which a run says after its first block that a faster one is possible.
LONG = 1800


class PruneProgress:
    """Observer of `prune_models`: a bar with block, layer, error and time left; without a terminal a line per block."""

    def __init__(self, title: str, faster: bool = False) -> None:
        """Take the title of the run, and whether effort fast takes less time."""
        self._title, self._faster = title, faster
        self._start = time.perf_counter()
        self._block: list[LayerRecord | GridRecord] = []
        self._replayed, self._finished, self._blocks_left = False, 0, 0
        self._worked_from = self._passed = _worked()
        self._stage = ("", 0, self._worked_from)
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
                for line in calibration_lines(event):
                    say(line)
            case Footprint():
                for line in footprint_lines(event):
                    say(line)
            case str():
                self._tell_survey(event, done, total)
            case Replay():
                self._replayed = True
            case LayerRecord() | GridRecord():
                self._tell_layer(event, done, total)
            case Passed(block, blocks):
                self._tell_block(block, blocks, done, total)
            case BlockRecord():
                self._bar.update(self._task, note=f"block {event.block} trained, error {event.last_loss:.4f}")
            case RemovalRecord():
                say(f"{self._title}: block {event.block} goes ({done} of {total}), loss {event.rise:+.4f} nats a token")
            case ShapeRecord():
                say(f"{self._title}: keeps {event.kept()}")
            case DistillationRecord():
                self._bar.update(self._task, note=f"distilled, divergence {event.last_loss:.4f}")

    def _tell_survey(self, stage: str, done: int, total: int) -> None:
        now, (name, first, began) = _worked(), self._stage
        if not (self._block or self._finished):
            # What comes before the blocks says nothing of the time that they take.
            self._worked_from = now
        left = ""
        if name != stage or done <= first:
            self._stage = (stage, done, now)
        elif done < total:
            left = f", {duration((now - began) / (done - first) * (total - done))} left"
        self._bar.update(self._task, total=total, completed=done, note=f"{stage}{left}")
        # About ten lines of a stage.
        if not console.is_terminal and (done in (1, total) or 10 * done // total > 10 * (done - 1) // total):
            say(f"{self._title}: {stage} {done}/{total}, {duration(time.perf_counter() - self._start)}{left}")

    def _tell_layer(self, record: LayerRecord | GridRecord, done: int, total: int) -> None:
        layer, what = record.layer.split(".", 3)[-1], "error"
        if isinstance(record, GridRecord):
            what = f"in {record.bits}, adds"
        note = f"block {record.block} {layer} {what} {record.relative_error:.4f}{self._left()}"
        self._bar.update(self._task, total=total, completed=done, note=note)
        self._block.append(record)

    def _tell_block(self, block: int, blocks: int, done: int, total: int) -> None:
        self._passed, self._blocks_left = _worked(), blocks - block - 1
        if self._replayed:
            # An earlier run's: its records come again in no time.
            self._worked_from, self._replayed = self._passed, False
        else:
            self._finished += 1
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
        if not console.is_terminal:
            say(f"{self._title}: {what}, {duration(time.perf_counter() - self._start)}{self._left()}")
        left = self._seconds_left()
        if left is not None:
            # Once, after the first block that this run has finished.
            if self._faster and left > LONG:
                say(f"{self._title}: about {duration(left)} left; --effort fast takes less")
            self._faster = False

    def _left(self) -> str:
        seconds = self._seconds_left()
        return "" if seconds is None else f", {duration(seconds)} left"

    def _seconds_left(self) -> float | None:
        """The time left, at the pace of the blocks that this run has finished; None before the first."""
        if not self._finished:
            return None
        each = (self._passed - self._worked_from) / self._finished
        return max(0.0, each * self._blocks_left - (_worked() - self._passed))


def _worked() -> float:
    """A clock in seconds that stops while programs compile: later blocks use the same programs."""
    return time.perf_counter() - Compiled.seconds


def calibration_lines(calibration: Calibration) -> list[str]:
    """What a run calibrates on, and why on so much."""
    given, tokens = calibration, calibration.windows * calibration.seqlen
    lines = [
        f"calibration on {given.windows} windows of {given.seqlen} tokens, {tokens:,} in all"
        + f", {given.variants} variants of each" * bool(given.variants)
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

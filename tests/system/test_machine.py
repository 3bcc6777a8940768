"""Facts about the machine: amounts, memory, and rates."""

import gc
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from sparseopt.system import machine
from sparseopt.system.machine import available_memory_bytes, format_bytes, parse_bytes

AMOUNTS = {
    "8GiB": 8 * 2**30, "8 gib": 8 * 2**30, "1.5GB": 1_500_000_000, "800M": 800_000_000, "2Ti": 2**41, "512B": 512,
    4096: 4096,
}  # fmt: skip


@pytest.mark.parametrize(("text", "nbytes"), AMOUNTS.items())
def test_amounts_are_read_as_people_write_them(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("given", ["", "8", "GiB", "-1GiB", "1e9B", "8GiBs", "0.1B", 0, -5, True, 1.5, None])
def test_other_amounts_are_refused(given):
    with pytest.raises(ValueError, match="is written like 8GiB"):
        parse_bytes(given)


def test_amounts_are_written_so():
    written = {0: "0.0 KiB", 3000: "2.9 KiB", 5 << 20: "5.0 MiB", 3 << 30: "3.00 GiB"}
    assert {amount: format_bytes(amount) for amount in written} == written


def test_available_memory_is_less_than_there_is():
    total = sys.maxsize
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        total = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert 2**20 < available_memory_bytes() <= total


def test_the_tighter_bound_counts(monkeypatch):
    monkeypatch.setattr(machine, "_bytes_in", lambda file, name: 7)
    monkeypatch.setattr(machine, "_control_group_left", lambda: 5)
    assert available_memory_bytes() == 5
    monkeypatch.setattr(machine, "_control_group_left", lambda: None)
    assert available_memory_bytes() == 7


def test_what_a_control_group_leaves(tmp_path, monkeypatch):
    """The page cache that the kernel would give back counts as free; a limit of `max` is none."""

    def group(folder, limit, used, cached):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("max", limit), ("current", used), ("stat", f"anon 400\ninactive_file {cached}")):
            (folder / f"memory.{name}").write_text(f"{text}\n")

    group(tmp_path, 1000, 700, 250)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "groups")
    (tmp_path / "groups").write_text("3:cpuset:/\n0::/job/step\n")
    assert machine._control_group_left() == 550
    # The group of a scheduler's job, within which that of its step has no limit.
    group(tmp_path / "job", 900, 600, 0)
    group(tmp_path / "job" / "step", "max", 600, 0)
    assert machine._control_group_left() == 300
    group(tmp_path / "job", "max", 600, 0)
    group(tmp_path, "max", 700, 250)
    assert machine._control_group_left() is None
    (tmp_path / "memory.max").unlink()
    assert machine._control_group_left() is None


@pytest.mark.skipif(sys.platform != "linux", reason="SKIPPED: only Linux forgets a peak")
def test_the_peak_of_a_part_of_a_process_is_its_own():
    held = np.ones(2**27, np.uint8)
    del held
    machine.return_freed_memory()
    before, peak = machine.peak_memory_bytes(), machine.peak_from_now()
    first = peak()
    assert first < before - 2**26
    assert abs(first - machine.resident_bytes()) < 2**25
    held = np.ones(2**26, np.uint8)
    assert peak() >= first + len(held) // 2
    assert machine.peak_memory_bytes() >= before


def test_freed_memory_is_kept_for_what_comes_next_and_given_back_at_the_end():
    """On glibc: 256 MiB that are freed stay resident, serve the next array without a page fault, and go at last."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    gc.collect()  # what earlier tests left must not be freed meanwhile
    with machine.freed_memory_kept() as kept:
        if not kept:
            pytest.skip("SKIPPED: this C library has no such options")
        large = np.ones(2**25)
        full = resident()
        del large
        assert full - resident() < 2**26
        before = faults()
        large = np.ones(2**25)
        assert faults() - before < 60
        del large
    # Threads of earlier tests may allocate meanwhile.
    assert full - resident() > 200 * 2**20

"""Facts about the machine: amounts, memory, and rates."""

import gc
import resource
import sys

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
    with pytest.raises(ValueError, match=f"like 8GiB.*given {given!r}"):
        parse_bytes(given)


def test_amounts_are_written_with_a_unit():
    written = {0: "0.0 KiB", 3000: "2.9 KiB", 2**20: "1.0 MiB", 5 << 20: "5.0 MiB", 3 << 30: "3.00 GiB"}
    assert {amount: format_bytes(amount) for amount in written} == written


def test_the_tightest_limit_of_the_system_and_of_all_control_groups_counts(tmp_path, monkeypatch):
    """The page cache that the kernel would give back counts as free; a limit of `max` is none."""

    def group(folder, limit, used, cached, names=("max", "current", "inactive_file")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 400\n{names[2]} {cached}\n")

    for name in ("MEMINFO", "OWN_GROUPS", "CONTROL_GROUPS"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    root, own = tmp_path / "CONTROL_GROUPS", tmp_path / "OWN_GROUPS"
    (tmp_path / "MEMINFO").write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    assert available_memory_bytes() == 1024
    own.write_text("3:cpuset:/\n0::/job/step\n")
    group(root, 1000, 700, 250)
    assert available_memory_bytes() == 550
    # The group of a scheduler's job, within which that of its step has no limit.
    group(root / "job", 900, 600, 0)
    group(root / "job" / "step", "max", 600, 0)
    assert available_memory_bytes() == 300
    group(root / "job", "max", 600, 0)
    group(root, 9000, 700, 250)
    assert available_memory_bytes() == 1024
    # Version 1 has a group for memory alone, other names, and a number near 2**63 for no limit.
    own.write_text("4:memory:/job\n")
    older = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    group(root / "memory", 2**63 - 4096, 700, 0, older)
    group(root / "memory" / "job", 800, 700, 50, older)
    assert available_memory_bytes() == 150


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
    """On glibc: 64 MiB that are freed stay resident, serve the next array without a page fault, and go at last."""

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    gc.collect()  # what earlier tests left must not be freed meanwhile
    with machine.freed_memory_kept() as kept:
        if not kept:
            pytest.skip("SKIPPED: this C library has no such options")
        large = np.ones(2**23)
        full = machine.resident_bytes()
        del large
        assert full - machine.resident_bytes() < 2**24
        before = faults()
        large = np.ones(2**23)
        assert faults() - before < 60
        del large
    # Threads of earlier tests may allocate meanwhile.
    assert full - machine.resident_bytes() > 50 * 2**20

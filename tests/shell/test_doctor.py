"""What `sparseopt doctor` says of this machine, of missing packages, and of a device that JAX cannot use."""

import json
from importlib.metadata import PackageNotFoundError, version

import jax
import pytest

from sparseopt.shell import doctor


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "measure_gflops", lambda seconds: 71.4)
    monkeypatch.setattr(doctor, "measure_gigabytes", lambda seconds: 9.87)


def test_it_tells_what_a_run_would_use(command, monkeypatch):
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("UNRELATED", "secret")
    status, out, err = command("doctor")
    assert status == 0, err
    assert f"jax {version('jax')}" in out
    assert "extra prune: installed" in out
    assert "JAX_TRACEBACK_FILTERING=off" in out
    assert "secret" not in out
    name = str(jax.local_devices()[0])
    assert f"a run uses {name}" in out
    assert f"speed of {name}: 71 GFLOP/s in float32 products, 9.9 GB/s of memory read and written" in out
    found = json.loads(command("doctor", "--json")[1])
    assert found["devices"][0]["platform"] == jax.default_backend()
    assert found["extras"]["prune"] == []
    assert found["memory_available_bytes"] > 0


def test_a_missing_package_is_named_with_the_command_that_installs_it(command, monkeypatch):
    def without(name):
        if name in ("matplotlib", "lm-eval"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    out = command("doctor")[1]
    assert "extra plot: not installed (matplotlib): pip install 'sparseopt[plot]'" in out
    assert "extra eval: not installed (lm-eval): pip install 'sparseopt[eval]'" in out


def test_a_device_that_jax_cannot_use_is_told_and_not_raised(command, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda': no GPU")

    monkeypatch.setattr(jax, "local_devices", none)
    status, out, err = command("doctor")
    assert status == 0, err
    assert "no device: Unable to initialize backend 'cuda': no GPU" in out
    assert "check JAX_PLATFORMS and how JAX was installed" in out
    assert json.loads(command("doctor", "--json")[1])["gflops"] is None


def test_a_device_that_is_full_and_a_lower_precision_are_told(command, monkeypatch):
    def full(seconds):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nlong")

    monkeypatch.setattr(doctor, "measure_gflops", full)
    with jax.default_matmul_precision("high"):
        status, out, err = command("doctor")
    assert status == 0, err
    assert out.rstrip().endswith("not measured: RESOURCE_EXHAUSTED: out of memory")
    assert "JAX is set to products in precision high; pruning takes what --precision says" in out


def test_programs_that_are_kept_are_counted(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(32))
    assert doctor._kept(str(tmp_path)) == {"folder": str(tmp_path), "count": 2, "bytes": 42}

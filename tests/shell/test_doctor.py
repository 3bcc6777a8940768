"""What `sparseopt doctor` says of an installation and a machine."""

import json
from importlib.metadata import PackageNotFoundError, version

import jax
import pytest

from sparseopt.shell import doctor


def fails(text):
    def call(*_):
        raise RuntimeError(text)

    return call


def test_it_tells_what_a_run_would_use(done, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("UNRELATED", "secret")
    out, found = done("doctor"), json.loads(done("doctor", "--json"))
    for line in (
        f"jax {version('jax')}", "extra prune: installed", "JAX_TRACEBACK_FILTERING=off",
        f"a run uses {jax.local_devices()[0]}",
    ):  # fmt: skip
        assert line in out
    assert out.rstrip().endswith("verdict: signals, so.solve and language models work")
    assert "secret" not in out
    assert found["devices"][0]["platform"] == jax.default_backend()
    assert found["extras"]["prune"] == []
    assert found["memory_available_bytes"] > 0
    for name, size in (("a", 10), ("b", 32)):
        (tmp_path / name).write_bytes(bytes(size))
    assert doctor._kept(str(tmp_path)) == {"folder": str(tmp_path), "count": 2, "bytes": 42}


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (["matplotlib", "lm-eval"], "extra plot: not installed (matplotlib): pip install 'sparseopt[plot]'"),
        (["flax"], "so.solve work; language models need pip install 'sparseopt[prune]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(done, monkeypatch, absent, said):
    def without(name):
        if name in absent:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    assert said in done("doctor")


def test_no_device_a_full_one_and_a_lower_precision_are_said(done, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", fails("Unable to initialize backend 'cuda': no GPU"))
        out = done("doctor")
    assert "no device: Unable to initialize backend 'cuda': no GPU" in out
    assert out.rstrip().endswith("verdict: nothing runs here; check JAX_PLATFORMS and how JAX was installed")
    monkeypatch.setattr(jax, "block_until_ready", fails("RESOURCE_EXHAUSTED: out of memory\nlong"))
    with jax.default_matmul_precision("high"):
        out = done("doctor")
    assert "fails: RESOURCE_EXHAUSTED: out of memory verdict: a first product failed" in out
    assert "JAX is set to products in precision high" in out

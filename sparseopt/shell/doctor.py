"""The command `doctor`: what is installed, what the machine has, and what runs would use."""

import json
import os
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import jax
import typer

from sparseopt.core.base.dense import activation_precision
from sparseopt.shell import console
from sparseopt.shell.options import AsJson
from sparseopt.system.machine import available_memory_bytes, format_bytes, processor, versions
from sparseopt.system.programs import SIZE_LIMIT, SWITCH, kept_files

# The extras that commands and functions need, with their modules; the others are for benchmarks and tests.
EXTRAS = {
    "prune": ("flax", "transformers", "tokenizers", "safetensors", "gguf", "pyarrow", "huggingface_hub"),
    "parquet": ("pyarrow",),
    "images": ("PIL", "png", "tifffile", "skimage"),
    "volumes": ("nibabel",),
    "plot": ("matplotlib",),
    "sklearn": ("sklearn",),
    "interior": ("piqp",),
    "torch": ("torch",),
    "eval": ("lm_eval", "datasets", "evaluate"),
    "datasets": ("datasets",),
}
# What decides on devices and programs, besides the variables that JAX lists. TPU_SKIP_MDS_QUERY is set by JAX itself.
VARIABLES = re.compile(r"CUDA_VISIBLE_DEVICES|TPU_(?!SKIP_MDS_QUERY)\w+|LIBTPU_\w+|SPARSEOPT_\w+")


def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, the devices and memory available, and what a run would use.

    Include the output in bug reports.
    """
    found = examine()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for line in (*lines_of(found), found["verdict"]):
        console.say(line)


def examine() -> dict[str, Any]:
    """All that `doctor` tells. A device that JAX cannot use is no error: `device_error` says why."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_available_bytes": available_memory_bytes(),
        "versions": versions(),
        "extras": {extra: _missing(extra) for extra in EXTRAS},
        "variables": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
        "devices": [], "device_error": None, "jax": None,
        "programs": _kept(getattr(jax.config, "jax_compilation_cache_dir", None)),
        "precision": activation_precision(), "product_error": None,
    }  # fmt: skip
    verdict = "signals, so.solve and language models work"
    if found["extras"]["prune"]:
        verdict = "signals and so.solve work; language models need pip install 'sparseopt[prune]'"
    try:
        found["devices"] = [_device(device) for device in jax.local_devices()]
        found["jax"] = jax.print_environment_info(return_string=True)
        jax.block_until_ready(jax.numpy.ones((1024, 1024)) @ jax.numpy.ones(1024))
    except RuntimeError as error:
        if found["devices"]:  # another program may have taken all of its memory
            found["product_error"] = str(error).partition("\n")[0]
            verdict = "a first product failed, and runs would too; free the device's memory or choose another device"
        else:
            found["device_error"] = str(error)
            verdict = "nothing runs here; check JAX_PLATFORMS and how JAX was installed"
    return found | {"verdict": f"verdict: {verdict}"}


def lines_of(found: dict[str, Any]) -> list[str]:
    """The same for a person, without the verdict."""
    memory = format_bytes(found["memory_available_bytes"])
    lines = [
        f"{found['processor']}, {found['cores']} cores, {memory} of memory available",
        ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
    ]
    for extra, missing in found["extras"].items():
        needs = f"not installed ({', '.join(missing)}): pip install 'sparseopt[{extra}]'" if missing else "installed"
        lines.append(f"extra {extra}: {needs}")
    lines += [f"{name}={value}" for name, value in found["variables"].items()]
    if found["device_error"]:
        return [*lines, f"no device: {found['device_error']}"]
    lines += (found["jax"] or "").splitlines()
    for device in found["devices"]:
        limit, used = device["memory_bytes"], device["memory_used_bytes"]
        memory = "" if limit is None else f", {format_bytes(limit)} of memory, {format_bytes(used)} of it in use"
        lines.append(f"device {device['name']}: {device['kind']}{memory}")
    if (programs := found["programs"]) is None:
        lines.append(f"compiled programs are not kept: {SWITCH} is 0, or the cache folder cannot be written")
    else:
        lines.append(
            f"compiled programs: {programs['count']:,}, {format_bytes(programs['bytes'])} of at most "
            f"{format_bytes(SIZE_LIMIT)}, in {programs['folder']}"
        )
    first, many = found["devices"][0]["name"], len(found["devices"])
    lines.append(f"a run uses {first}" + f", or up to {many} devices with --devices" * (many > 1))
    if found["precision"] != "highest":
        lines.append(f"JAX is set to products in precision {found['precision']}; pruning takes what --precision says")
    if found["product_error"]:
        lines.append(f"{first} fails: {found['product_error']}")
    return lines


def _device(device: Any) -> dict[str, Any]:
    """Memory is None where JAX does not know it, as on a CPU."""
    memory = device.memory_stats() or {}
    return {
        "name": str(device), "platform": device.platform, "kind": device.device_kind,
        "memory_bytes": memory.get("bytes_limit"), "memory_used_bytes": memory.get("bytes_in_use"),
    }  # fmt: skip


def _missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    of_extra = re.compile(rf"""^([\w.-]+).*extra\s*==\s*['"]{extra}['"]""")
    names = [match[1] for line in requires("sparseopt") or () if (match := of_extra.match(line))]
    missing = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def _kept(folder: str | None) -> dict[str, Any] | None:
    """How many programs a folder has, and their size."""
    if folder is None:
        return None
    sizes = [found.st_size for _, found in kept_files(Path(folder))]
    return {"folder": folder, "count": len(sizes), "bytes": sum(sizes)}

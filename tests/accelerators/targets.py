"""Accelerators that programs are compiled for, ahead of time and without owning one, and what their compilers tell.

Nothing runs here: compile time, memory, operations, library calls and collectives are the compilers' own figures. XLA
for TPUs comes with `pip install 'jax[tpu]'`, for NVIDIA's GPUs with `pip install 'jax[cuda12]'`.
"""

import functools
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

MESH = 8  # devices of a mesh; as many of the host, on which the tables of a graph are made
# The programs are lowered on the host, and both compilers ask for devices that they do not need. Two processes that
# compile share no TPU. JAX and XLA read these when they start.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
HOST_DEVICES = f"--xla_force_host_platform_device_count={MESH}"
if HOST_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HOST_DEVICES}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

from sparseopt.core.base.mesh import AXIS, over  # noqa: E402
from tests.collectives import collectives, times  # noqa: E402

# OpenXLA keeps such a description of each card under xla/backends/gpu/target_config/specs.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  runtime_version: "12.8.0"  driver_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """An accelerator: its compiler, the topology as that calls it, and the memory of one device."""

    platform: str
    topology: str
    memory: int  # bytes
    module: str  # that the compiler comes in
    extra: str  # of sparseopt, that installs it


TARGETS = {
    "v5e": Target("tpu", "v5e:2x4", 16 * 10**9, "libtpu", "tpu"),
    "v6e": Target("tpu", "v6e:2x4", 32 * 10**9, "libtpu", "tpu"),
    "h100": Target("cuda", "1x1x8", 80 * 10**9, "jax_cuda12_plugin", "cuda"),
}
HOST = "cpu"  # this machine, to compare with


def missing(name: str) -> str | None:
    """Why nothing can be compiled for a target here; None if it can."""
    if name == HOST or find_spec(TARGETS[name].module) is not None:
        return None
    return f"{name}: its compiler is not installed: pip install '.[{TARGETS[name].extra}]'"


@functools.cache
def devices_of(name: str) -> tuple[Any, ...]:
    """The devices of a target's topology, of which none exists; or those of this machine."""
    if name == HOST:
        return tuple(jax.devices())
    target = TARGETS[name]
    if target.platform == "cuda":
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=target.topology, target_config=H100
        )
    else:
        found = topologies.get_topology_desc(platform=target.platform, topology_name=target.topology)
    return tuple(found.devices)


class Place(NamedTuple):
    """Where a program is compiled for: one device of a target, or a mesh of eight."""

    target: str
    mesh: Mesh | None

    @classmethod
    def on(cls, target: str, devices: int = 1) -> "Place":
        return cls(target, Mesh(np.asarray(devices_of(target)[:devices]), (AXIS,)) if devices > 1 else None)

    def whole(self, tree: Any) -> Any:
        """The shapes of a tree of arrays, shapes and numbers, each on the device or on every device of the mesh."""
        if self.mesh is not None:
            return shaped(tree, over(self.mesh, None))
        return shaped(tree, SingleDeviceSharding(devices_of(self.target)[0]))

    def cut(self, tree: Any) -> Any:
        """The same, each array cut along its first axis over the mesh."""
        assert self.mesh is not None
        return shaped(tree, over(self.mesh))

    def as_laid(self, tree: Any) -> Any:
        """The same for arrays over a mesh of this machine's own: each is cut as it is there."""
        mesh = self.mesh
        assert mesh is not None

        def moved(leaf: Any) -> Any:
            here = getattr(leaf, "sharding", None)
            spec = here.spec if isinstance(here, NamedSharding) else PartitionSpec()
            return shaped(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(moved, tree)


def shaped(tree: Any, layout: Any) -> Any:
    """Each leaf as its shape in a layout; numbers become arrays as `jnp.asarray` makes them."""

    def laid(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout, weak_type=leaf.weak_type)

    return jax.tree.map(laid, jax.eval_shape(lambda found: jax.tree.map(jnp.asarray, found), tree))


_TARGET_OF_CALL = re.compile(r'custom_call_target="([^"]+)"')
# Marks that a compiler leaves in a program's text besides the library functions that it calls.
MARKS = {"AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked", "AllocateBuffer", "Sharding"}
# What a program needs to call Python, or to wait for its host.
WAITING = ("callback", "infeed", "outfeed", "send-to-host", "recv-from-host", "is_host_transfer=true")


def facts(lower: Callable[[], jax.stages.Lowered]) -> dict[str, Any]:
    """Compile a program, and what is known of it without running it.

    Returns:
        `lower_seconds` and `compile_seconds`; bytes of `arguments`, `outputs`, `temporaries`, of the `code`, and of the
        `peak`: all of these, without outputs that take over an argument's memory. Of one pass through each loop
        `flops` and `bytes_moved`, None where the compiler does not say. `library_calls` by name and `collectives` by
        kind, each with a number; `collective_bytes` by kind, of one device, each as often as its loops turn where the
        program says it; `loop_bytes`, of one turn, by the number of loops around them. `instructions` of the compiled
        program, `doubles` among them in float64, and `host`: what calls Python or waits for the host.
    """
    start = time.perf_counter()
    lowered = lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost: Any = compiled.cost_analysis() or {}
    exchanged, called = collectives(text), _TARGET_OF_CALL.findall(text)
    sent: Counter[str] = Counter()
    each: Counter[str] = Counter()
    for one in exchanged:
        sent[one.kind] += one.bytes * times(one)
        each[str(len(one.loops))] += one.bytes
    lines = [line for line in text.splitlines() if " = " in line]
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "lower_seconds": round(middle - start, 2),
        "compile_seconds": round(end - middle, 2),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "peak": kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes_moved": cost.get("bytes accessed"),
        "library_calls": dict(sorted(Counter(name for name in called if name not in MARKS).items())),
        "collectives": dict(sorted(Counter(one.kind for one in exchanged).items())),
        "collective_bytes": dict(sorted(sent.items())),
        "loop_bytes": dict(sorted(each.items())),
        "instructions": len(lines),
        "doubles": sum("f64[" in line for line in lines),
        "host": sorted({word for word in WAITING for line in lines if word in line.partition(", metadata=")[0]}),
    }

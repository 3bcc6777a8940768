"""Accelerators that programs are compiled for, without owning one, and what their compilers tell.

XLA for TPUs comes with `pip install 'jax[tpu]'`, for NVIDIA's GPUs with `pip install 'jax[cuda12]'`.
"""

import os
from collections import Counter
from functools import cache
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
    """An accelerator: the arguments of its topology, the bytes of one device, and the module of its compiler."""

    topology: dict[str, str]
    memory: int
    module: str


TARGETS = {
    "v5e": Target({"platform": "tpu", "topology_name": "v5e:2x4"}, 16 * 10**9, "libtpu"),
    "v6e": Target({"platform": "tpu", "topology_name": "v6e:2x4"}, 32 * 10**9, "libtpu"),
    "h100": Target(
        {"platform": "cuda", "topology_name": "", "topology": "1x1x8", "target_config": H100},
        80 * 10**9,
        "jax_cuda12_plugin",
    ),
}
HOST = "cpu"  # this machine, to compare with


def missing(name: str) -> bool:
    """Whether the compiler of a target is not installed."""
    return find_spec(TARGETS[name].module) is None


@cache
def devices_of(name: str) -> tuple[Any, ...]:
    """The devices of a target's topology, of which none exists; or those of this machine."""
    return tuple(jax.devices() if name == HOST else topologies.get_topology_desc(**TARGETS[name].topology).devices)


class Place(NamedTuple):
    """Where a program is compiled for: one device of a target, or a mesh of eight."""

    target: str
    mesh: Mesh | None

    @classmethod
    def on(cls, target: str, devices: int = 1) -> "Place":
        return cls(target, Mesh(np.asarray(devices_of(target)[:devices]), (AXIS,)) if devices > 1 else None)

    def whole(self, tree: Any) -> Any:
        """The shapes of a tree of arrays, shapes and numbers, each on the device or on every device of the mesh."""
        one = SingleDeviceSharding(devices_of(self.target)[0])
        return shaped(tree, one if self.mesh is None else over(self.mesh, None))

    def cut(self, tree: Any) -> Any:
        """The same, each array cut along its first axis over the mesh, if there is one."""
        return self.whole(tree) if self.mesh is None else shaped(tree, over(self.mesh))

    def as_laid(self, tree: Any) -> Any:
        """The same for arrays over a mesh of this machine's own: each is cut as it is there."""

        def moved(leaf: Any) -> Any:
            here = getattr(leaf, "sharding", None)
            spec = here.spec if isinstance(here, NamedSharding) else PartitionSpec()
            return shaped(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(moved, tree)


def shaped(tree: Any, layout: Any) -> Any:
    """Each leaf as its shape in a layout; numbers become arrays as `jnp.asarray` makes them."""

    def laid(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout, weak_type=leaf.weak_type)

    return jax.tree.map(laid, jax.eval_shape(lambda found: jax.tree.map(jnp.asarray, found), tree))


# What a program needs to call Python, or to wait for its host.
WAITING = ("callback", "infeed", "outfeed", "send-to-host", "recv-from-host", "is_host_transfer=true")


class Facts(NamedTuple):
    """What a compiler tells of a program, in bytes and numbers of instructions.

    `sent` is by kind of collective, each as often as its loops turn where the program says it; `loops`, of one turn,
    by the number of loops around them.
    """

    temporaries: int
    peak: int
    instructions: int
    doubles: int
    waiting: list[str]
    sent: Counter[str]
    loops: Counter[int]


def facts(lowered: jax.stages.Lowered) -> Facts:
    compiled = lowered.compile()
    memory, lines = compiled.memory_analysis(), [line for line in compiled.as_text().splitlines() if " = " in line]
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    sent, loops = Counter[str](), Counter[int]()
    for one in collectives(compiled.as_text()):
        sent[one.kind] += one.bytes * times(one)
        loops[len(one.loops)] += one.bytes
    return Facts(
        memory.temp_size_in_bytes,
        kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        len(lines),
        sum("f64[" in line for line in lines),
        [word for word in WAITING if any(word in line.partition(", metadata=")[0] for line in lines)],
        sent,
        loops,
    )

"""What a whole run should take on devices that nobody measured: operations and bytes over 60 % of a device's peak."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from records import Column, Record, field, machine, missing, named, table
from scaling_model import grid_iteration

from sparseopt.models.streaming.streamed import StreamedModel
from sparseopt.pruning import Recipe
from sparseopt.pruning.memory import EFFICIENCY, block_sizes, prune_cost, token_flops

# The share of a device's peak that is assumed to be reached.
REACHED = 0.6
MEASURED = "make bench-gpu RECORD=file"


@dataclass(frozen=True)
class Device:
    """One accelerator, by its maker's figures.

    Attributes:
        rates: products in operations per second, by precision.
        bandwidth: bytes per second from and to its memory.
        memory: bytes.
    """

    name: str
    rates: Mapping[str, float]
    bandwidth: float
    memory: float


# A TPU multiplies in bfloat16: once for default, three times for high, six times for highest. An H100 has units for
# float32 (highest) and for TF32, once for default and three times for high.
DEVICES = (
    Device("TPU v5e", {"highest": 197e12 / 6, "high": 197e12 / 3, "default": 197e12}, 819e9, 16e9),
    Device("TPU v6e", {"highest": 918e12 / 6, "high": 918e12 / 3, "default": 918e12}, 1640e9, 32e9),
    Device("H100", {"highest": 67e12, "high": 495e12 / 3, "default": 495e12}, 3350e9, 80e9),
)
# Width, width of the MLP, blocks, heads, key-value heads, size of a head, vocabulary.
SIZES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936),
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32, 128, 32000),
    "LLaMA-2-70B": (8192, 28672, 80, 64, 8, 128, 32000),
}
# One recipe for all: the calibration of the papers, 128 windows of 2,048 tokens.
TOKENS: dict[str, Any] = {"windows": 128, "seqlen": 2048, "heldout_windows": 0}
RECIPES = {
    "maiht": Recipe(method="maiht", **TOKENS),
    "best one shot": Recipe(method="best", train_epochs=0, variants=0, **TOKENS),
    "best": Recipe(method="best", **TOKENS),
}
KINDS = tuple(EFFICIENCY)
GRIDS = ((4096, 4096), (512, 512, 512))
# Steps to a gap of 10⁻⁴ on a picture of 4096² (`make bench-trend-sizes`), by order.
STEPS = {0: 210, 1: 110}
# Of the programs of `make bench-accelerators`.
WINDOWS, SEQLEN = 4, 512
BFLOAT16 = jnp.dtype("bfloat16")


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: Any = BFLOAT16


class Headers:
    """A Llama without its weights: configuration and shapes of the tensors, which is what estimates read."""

    name = "headers"

    def __init__(self, *sizes: int) -> None:
        width, wide, blocks, heads, kv_heads, head, vocabulary = sizes
        self.config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width,
            "intermediate_size": wide, "num_hidden_layers": blocks, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "max_position_embeddings": 4096, "hidden_act": "silu",
        }  # fmt: skip
        linears = {
            "self_attn.q_proj": (heads * head, width), "self_attn.k_proj": (kv_heads * head, width),
            "self_attn.v_proj": (kv_heads * head, width), "self_attn.o_proj": (width, heads * head),
            "mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width), "mlp.down_proj": (width, wide),
        }  # fmt: skip
        block = linears | {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "model.norm": (width,)}
        shapes |= {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
        self.tensors = {f"{name}.weight": _Header(shape) for name, shape in shapes.items()}

    def read(self, name: str) -> Any:
        raise NotImplementedError(f"{name} has a shape and no values")

    def sidecars(self) -> dict[str, bytes]:
        return {}


def pruning_rows() -> list[dict[str, Any]]:
    """Operations by kind, bytes of the largest phase, and by device with its layers cut, of every model and recipe."""
    rows = []
    for name, sizes in SIZES.items():
        model = StreamedModel(Headers(*sizes))
        for label, recipe in RECIPES.items():
            cost = prune_cost(model, recipe, recipe.layer_method, activations="disk")
            assert cost.flops is not None
            # The package's estimate divides by what is reached on a CPU.
            flops = {kind: cost.flops[kind] * share for kind, share in EFFICIENCY.items()}
            needed = {
                device.name: prune_cost(
                    model, recipe, recipe.layer_method, activations="disk", room=int(device.memory)
                ).peak_memory_bytes
                for device in DEVICES
            }
            rows.append(
                {"model": name, "recipe": label, "flops": flops, "memory": cost.peak_memory_bytes, "needed": needed}
            )
    return rows


def minutes(flops: Mapping[str, float], device: Device, precision: str) -> float:
    """Of a run whose products of activations are in this precision, and all others in the highest."""
    kinds = {kind: device.rates["highest" if kind == KINDS[0] else precision] for kind in flops}
    return sum(flops[kind] / (REACHED * rate) for kind, rate in kinds.items()) / 60


def accelerators_runs(records: list[Record]) -> str:
    """Whole pruning runs: operations, memory, and minutes on one device, or what it needs where that does not fit."""

    def minutes_on(device: Device) -> Column:
        def show(row: Any) -> str:
            if row["needed"][device.name] > device.memory:
                return f"needs {row['needed'][device.name] / 1e9:.3g} GB"
            return " / ".join(f"{minutes(row['flops'], device, precision):.3g}" for precision in device.rates)

        return f"minutes, {device.name}", show

    columns: list[Column] = [("model", field("model")), ("recipe", field("recipe"))]
    columns += [(f"{kind}, Pflop", lambda row, kind=kind: row["flops"][kind] / 1e15) for kind in KINDS]
    columns += [("memory, GB", lambda row: row["memory"] / 1e9), *map(minutes_on, DEVICES)]
    return table(pruning_rows(), columns)


def accelerators_counts(records: list[Record]) -> str:
    """Operations of a block's programs as a compiler counts them, beside those of the package's estimates."""
    rows = []
    for record in named(records, "program"):
        whole = record["program"] in ("forward", "Grams") and record["devices"] == 1 and record.get("flops") is not None
        if not whole or record["shape"] not in SIZES:
            continue
        model = StreamedModel(Headers(*SIZES[record["shape"]]))
        (block,) = block_sizes(model, RECIPES["maiht"])
        flops = token_flops(block, model.config, SEQLEN)
        if record["program"] == "Grams":
            # The last linear's output is not needed.
            outputs, inputs, _ = block.linears[-1]
            flops += block.gram_flops - 2 * outputs * inputs
        rows.append(record | {"counted": WINDOWS * SEQLEN * flops})
    columns: list[Column] = [
        ("program", field("program")),
        ("model", field("shape")),
        ("target", field("target")),
        ("compiler, Gflop", lambda row: row["flops"] / 1e9),
        ("estimate, Gflop", lambda row: row["counted"] / 1e9),
        ("compiler / estimate", lambda row: row["flops"] / row["counted"]),
    ]
    return table(rows, columns) if rows else missing("make bench-accelerators")


def device_machine(records: list[Record]) -> str:
    """Where the estimates were tried, and the rates there."""
    if not records:
        return missing(MEASURED)
    (device,), (memory,) = named(records, "device"), named(records, "bandwidth")
    rates = ", ".join(f"{r['dtype']} {1e3 * r['tflops']:,.0f}" for r in named(records, "matmul"))
    moved = f"{memory['gigabytes_per_second']:.3g}"
    return f"{machine(device)}\nProducts in Gflop a second: {rates}. Memory: {moved} GB a second, read and written.\n"


def device_estimates(records: list[Record]) -> str:
    """The same estimates with the rates of a device at hand, beside measured seconds."""
    rows = []
    for record in (r for r in records if "failed" not in r):
        if record["figure"] == "layer":
            name = f"{record['method']} {record['preset'] or ''}".strip()
            what = f"layer {record['outputs']} x {record['inputs']}, {name}"
            rows.append((what, record["flops"] / record["rate"], record["seconds"]))
        elif record["figure"] == "grid":
            what = f"a step on {record['side']}², order {record['order']}"
            rows.append((what, record["moved"] / record["bandwidth"], record["seconds_per_step"]))
        elif record["figure"] == "run":
            for kind, flops in record["flops"].items():
                if flops:
                    what = f"SmolLM2, {record['recipe']}: {kind}"
                    rows.append((what, flops / record["rate"], record["seconds"][kind]))
    if not rows:
        return missing(MEASURED)
    columns: list[Column] = [
        ("what", lambda row: row[0]),
        ("estimate, s", lambda row: row[1] / REACHED),
        ("measured, s", lambda row: row[2]),
        ("measured / estimate", lambda row: row[2] * REACHED / row[1]),
    ]
    return table(rows, columns)


def accelerators_smoothing(records: list[Record]) -> str:
    """Doge-ADMM on grids in float32: bytes and time of a step, time of a fit where its steps are known, and memory."""
    rows = [
        {"shape": shape, "order": order, "moved": grid_iteration(shape, order, 1).moved}
        for shape in GRIDS
        for order in STEPS
    ]
    peaks = {
        (record["shape"], record["program"]): record["peak"] / 1e9
        for record in named(records, "program")
        if record["target"] == "h100" and record["devices"] == 1 and "peak" in record
    }

    def memory(row: Any) -> float | None:
        name = f"{row['shape'][0]}{'²³'[len(row['shape']) - 2]}"
        return peaks.get((name, f"order {row['order']}, doge"))

    def times_on(device: Device) -> Column:
        def show(row: Any) -> str:
            step = row["moved"] / (REACHED * device.bandwidth)
            whole = f"{STEPS[row['order']] * step:.2g} s" if len(row["shape"]) == 2 else "–"
            return f"{1000 * step:.2g} ms / {whole}"

        return f"a step / a fit, {device.name}", show

    columns: list[Column] = [
        ("grid", lambda row: " x ".join(map(str, row["shape"]))),
        ("order", field("order")),
        ("nodes", lambda row: math.prod(row["shape"])),
        ("a step moves, GB", lambda row: row["moved"] / 1e9),
        ("memory, GB", memory),
        *map(times_on, DEVICES),
    ]
    return table(rows, columns)

"""The programs that the package runs, as data: a name, shapes, and a function that lowers the package's own program.

No array is made but the tables of graphs: arguments are shapes, placed on a target that need not exist.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from scipy.sparse import csr_array
from scipy.spatial import Delaunay

import sparseopt as so
from sparseopt.core.base.mesh import AXIS, at_work
from sparseopt.layers.methods import METHODS, find_method
from sparseopt.layers.patterns import is_group_pattern, parse_pattern
from sparseopt.layers.problem import LayerJob, layer_solver, reads_variances
from sparseopt.layers.side_by_side import side_by_side_solver
from sparseopt.layers.split import Cut, cut_solver
from sparseopt.models import Block, find_family
from sparseopt.models.decoder.decoder import Embedding, Head
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.pruning.base.activations import BATCH_TOKENS
from sparseopt.pruning.base.grams import _output_over, gather_grams, grams_over, sum_over
from sparseopt.pruning.evaluate.perplexity import _loss_of_window
from sparseopt.pruning.measure import survey
from sparseopt.pruning.recipe.allocation import losses_of_linear
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.run.part import propagated_target
from sparseopt.pruning.train import distillation
from sparseopt.pruning.train.reconstruction import Reconstruction, _step_of_rows, split_block
from sparseopt.pruning.train.training import Fixed, kept_entries, start_state
from sparseopt.trend.filter import check_job
from sparseopt.trend.methods.choice import choose
from sparseopt.trend.methods.plan import fit
from tests.accelerators.targets import MESH, Place

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0}
# What the programs depend on in the models' configurations.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _LLAMA
    | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": True},
    "Qwen3-0.6B": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
    | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "LLaMA-2-7B": _LLAMA
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144}
    | {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0, "tie_word_embeddings": False},
    "LLaMA-2-70B": _LLAMA
    | {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
}
PATTERNS = {"unstructured": 0.5, "2:4": None, "per-row": 0.5, "block:4x4": 0.5, "group:64": 0.5}
GRIDS: dict[str, tuple[int, ...]] = {
    "512²": (512, 512),
    "4096²": (4096, 4096),
    "128³": (128, 128, 128),
    "512³": (512, 512, 512),
}
NODES = 20_000  # of the graph that is no grid
ORDERS = (0, 1, 2)
DEFAULTS = Recipe(method="maiht", calibration="pydoc")
_float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


class Program(NamedTuple):
    """One program: `lower` gives it for a place, which has a mesh if `devices` is more than one."""

    kind: str  # of KINDS
    name: str
    shape: str
    devices: int
    lower: Callable[[Place], jax.stages.Lowered]

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.kind, self.name, self.shape, self.devices


@functools.cache
def config_of(model: str) -> DecoderConfig:
    fields = MODELS[model]
    return find_family(fields).configure(fields)


@functools.cache
def part_of(kind: type[nnx.Module], model: str) -> Any:
    """A part of a model with shapes in place of its parameters, in float32 as they are once they are read."""
    config = config_of(model)
    arguments = (config, config.kinds[0]) if kind is Block else (config,)

    def made() -> nnx.Module:
        part = kind(*arguments, rngs=nnx.Rngs(0))  # type: ignore[call-arg]
        nnx.update(part, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(part, nnx.Param)))
        return part

    return nnx.eval_shape(made)


def linear_shapes(model: str) -> list[tuple[int, int]]:
    """The distinct `(out, in)` of a block's linears, in their order."""
    block = part_of(Block, model)
    return list(dict.fromkeys(block.weight_shape(name) for name in block.linears))


def method_names(pattern: str) -> list[tuple[str, str | None]]:
    """The methods with their presets that take a pattern."""
    groups = is_group_pattern(pattern)
    refused = set() if groups else {"osscar", "flap"}
    if groups or pattern.startswith("block"):
        refused.add("sparsegpt")
    # A method with presets is one of them.
    found = [(name, preset) for name, entry in METHODS.items() for preset in entry.presets or (None,)]
    return [pair for pair in found if pair[0] not in refused]


def layer_job(shape: tuple[int, int], method: Any, pattern: str) -> LayerJob:
    """A layer as a run with default options has it: weights in bfloat16, a held-out Gram, for best output weights."""
    outputs, inputs = shape
    return LayerJob(
        weight=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        gram=_float32((inputs, inputs)),
        test_gram=_float32((inputs, inputs)) if DEFAULTS.heldout_windows else None,
        pattern=parse_pattern(pattern, PATTERNS[pattern], shape),
        output_weights=_float32((outputs,)) if method == find_method("best", pattern=pattern) else None,
        input_variances=_float32((inputs,)) if reads_variances(method) else None,
    )


def _layer(shape: tuple[int, int], name: str, preset: str | None, pattern: str, place: Place) -> jax.stages.Lowered:
    method = find_method(name, preset, pattern=pattern)
    return layer_solver.lower(*place.whole((layer_job(shape, method, pattern), method)))


def _layer_cut(shape: tuple[int, int], name: str, preset: str | None, place: Place) -> jax.stages.Lowered:
    method = find_method(name, preset)
    job = layer_job(shape, method, "unstructured")
    outputs = -(-shape[0] // MESH) * MESH
    weight = jax.ShapeDtypeStruct((outputs, shape[1]), job.weight.dtype)
    weights = None if job.output_weights is None else place.cut(_float32((outputs,)))
    rest = dataclasses.replace(place.whole(dataclasses.replace(job, weight=None)), output_weights=weights)
    assert place.mesh is not None
    return cut_solver.lower(place.cut(weight), rest, Cut(place.mesh, shape[0]), place.whole(method))


def _layers_beside(shape: tuple[int, int], name: str, preset: str | None, place: Place) -> jax.stages.Lowered:
    method = find_method(name, preset)
    job, mesh = layer_job(shape, method, "unstructured"), place.mesh
    assert mesh is not None
    # As `place_side_by_side` has them: arrays concatenated, one part a device, and the pattern's counts in a row.
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[None], job.pattern)
    joined = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((mesh.size * leaf.shape[0], *leaf.shape[1:]), leaf.dtype),
        dataclasses.replace(job, pattern=rows),
    )
    rest = place.cut(dataclasses.replace(joined, weight=None))
    count, method = place.whole((np.int32(mesh.size), method))
    return side_by_side_solver(mesh).lower(place.cut(joined.weight), rest, count, method)


def _windows(model: str, place: Place) -> Any:
    """A batch of the stream: as many windows as a device takes at a time, of each device."""
    count = BATCH_TOKENS // DEFAULTS.seqlen * (place.mesh.size if place.mesh else 1)
    return _float32((count, DEFAULTS.seqlen, config_of(model).hidden_size))


def _window(model: str) -> Any:
    return _float32((1, DEFAULTS.seqlen, config_of(model).hidden_size))


def _linear(shape: tuple[int, int]) -> tuple[Any, ...]:
    """A weight in float32, two matrices of its inputs and a number for each output."""
    outputs, inputs = shape
    shapes = (shape, (inputs, inputs), (inputs, inputs), (outputs,))
    return tuple(_float32(each) for each in shapes)


def _grams(model: str, place: Place, drift: bool) -> jax.stages.Lowered:
    block, x, mesh = part_of(Block, model), _windows(model, place), place.mesh
    dense = x if drift else None
    totals = jax.eval_shape(gather_grams, block, x, dense_x=dense)
    counted = None
    spread = place.whole
    if mesh is not None:
        totals = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype), totals)
        counted, spread = jax.ShapeDtypeStruct(x.shape[:1], jnp.bool_), place.cut
    return grams_over(mesh, DEFAULTS.weighting, "routed").lower(
        place.whole(block), *spread((x, dense, counted, totals))
    )


def _grams_summed(model: str, place: Place) -> jax.stages.Lowered:
    block, x, mesh = part_of(Block, model), _windows(model, place), place.mesh
    assert mesh is not None
    found = jax.eval_shape(gather_grams, block, x, dense_x=x)
    totals = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype), found)
    return sum_over(mesh).lower(place.cut(totals))


def _forward(model: str, place: Place) -> jax.stages.Lowered:
    spread = place.whole if place.mesh is None else place.cut
    return _output_over(place.mesh).lower(place.whole(part_of(Block, model)), spread(_windows(model, place)))


def _embedding(model: str, place: Place) -> jax.stages.Lowered:
    tokens = jax.ShapeDtypeStruct((BATCH_TOKENS // DEFAULTS.seqlen, DEFAULTS.seqlen), jnp.int32)
    return jax.jit(Embedding.__call__).lower(*place.whole((part_of(Embedding, model), tokens)))


def _training(model: str) -> tuple[Any, Any, Reconstruction]:
    block, settings = part_of(Block, model), Reconstruction()
    masks = {name: jax.ShapeDtypeStruct(block.weight_shape(name), jnp.bool_) for name in block.linears}
    graph, params, *frozen = split_block(block, masks, settings)
    fixed = Fixed(graph, frozen, jax.eval_shape(kept_entries, params, masks))
    return jax.eval_shape(start_state, params), fixed, settings


def _training_step(model: str, place: Place) -> jax.stages.Lowered:
    (state, fixed, settings), x = _training(model), _windows(model, place)
    rows = jax.ShapeDtypeStruct((settings.windows,), jnp.int32)
    weights, number = _float32(x.shape[-1:]), _float32(())
    return _step_of_rows.lower(*place.whole((state, fixed, weights, (x, x), rows, number, number)))


def _distillation_step(model: str, place: Place) -> jax.stages.Lowered:
    state, fixed, _ = _training(model)
    x, number = _window(model), _float32(())
    return distillation._step_of_block.lower(*place.whole((state, fixed, x, x, number, number)))


def _divergence_gradient(model: str, place: Place) -> jax.stages.Lowered:
    x = _window(model)
    return distillation._gradient_after_blocks.lower(*place.whole((part_of(Head, model), x, x)))


def _loss_gradient(model: str, place: Place) -> jax.stages.Lowered:
    x = _windows(model, place)
    arguments = (part_of(Head, model), x, jax.ShapeDtypeStruct(x.shape[:2], jnp.int32), np.int32(0))
    return survey._gradient_after_blocks.lower(*place.whole(arguments))


def _gradient_through(model: str, place: Place) -> jax.stages.Lowered:
    x = _windows(model, place)
    return survey._gradient_through_block.lower(*place.whole((part_of(Block, model), x, x)))


def _curve(shape: tuple[int, int], place: Place) -> jax.stages.Lowered:
    weight, gram, _, outputs = _linear(shape)
    levels = _float32(survey.LEVELS.shape)
    return losses_of_linear.lower(*place.whole((weight, gram, outputs, outputs, levels)))


def _propagated(shape: tuple[int, int], place: Place) -> jax.stages.Lowered:
    weight, gram, drift, _ = _linear(shape)
    return propagated_target.lower(*place.whole((weight, gram, drift, np.float32(1), np.float32(1))))


def _perplexity(model: str, place: Place) -> jax.stages.Lowered:
    config, time = config_of(model), 2048
    x, tokens = _float32((time, config.hidden_size)), jax.ShapeDtypeStruct((time,), jnp.int32)
    return _loss_of_window.lower(*place.whole((part_of(Head, model), x, tokens, 1)))


@functools.cache
def _graph_of(shape: tuple[int, ...]) -> so.Graph:
    """A grid, or for one number a triangulation of so many random points."""
    if len(shape) > 1:
        return so.Graph.grid(shape)
    starts, neighbours = Delaunay(np.random.default_rng(0).random((*shape, 2))).vertex_neighbor_vertices
    return so.Graph.from_scipy(csr_array((np.ones(neighbours.size), neighbours, starts)))


def _trend(shape: tuple[int, ...], order: int, method: str, place: Place) -> jax.stages.Lowered:
    graph, here = _graph_of(shape), None
    if place.mesh is not None:
        here = Mesh(np.asarray(jax.devices()[: place.mesh.size]), (AXIS,))
    y = np.random.default_rng(0).standard_normal(graph.node_shape).astype(np.float32)
    job = check_job(y, graph, so.L1(1.0), order, None, "error", None, here, method=method)
    with at_work(here):
        plan = choose(job).plan(job)
        arguments = (plan, job.arrays[0], job.rows, None, job.tol, job.max_steps)
        arguments = place.whole(arguments) if here is None else place.as_laid(_on_mesh(arguments, here, place.mesh))
    with at_work(place.mesh):
        return fit.lower(*arguments)


def _on_mesh(tree: Any, here: Mesh, there: Mesh | None) -> Any:
    """A tree whose structure names another mesh; its arrays stay where they are."""
    if tree is here:
        return there
    if isinstance(tree, tuple):
        return tuple(_on_mesh(part, here, there) for part in tree)
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return tree
    fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **{name: _on_mesh(value, here, there) for name, value in fields.items()})


def _label(name: str, preset: str | None) -> str:
    return name if preset is None else f"{name} {preset}"


# The programs that run a model's blocks, its embedding and its head.
BLOCKS: dict[str, Callable[[str, Place], jax.stages.Lowered]] = {
    "embedding": _embedding,
    "forward": _forward,
    "Grams": functools.partial(_grams, drift=False),
    "Grams and drift": functools.partial(_grams, drift=True),
    "step of reconstruction": _training_step,
    "gradient of the loss": _loss_gradient,
    "gradient through the block": _gradient_through,
    "gradient of the divergence": _divergence_gradient,
    "step of distillation": _distillation_step,
    "perplexity of a window": _perplexity,
}
OVER_MESH = {name: BLOCKS[name] for name in ("forward", "Grams and drift")} | {"sum of Grams": _grams_summed}
# What is computed of a linear besides its solve.
LINEARS = {"curve of sparsities": _curve, "propagated target": _propagated}
CUT: tuple[tuple[str, str | None], ...] = (("maiht", "paper"), ("maiht", "tuned"), ("best", None), ("wanda", None))


def of_model(model: str) -> Iterator[Program]:
    """The programs of a model: solves of layers for each method, pattern and shape, and blocks; also over the mesh."""
    for shape in linear_shapes(model):
        size = f"{shape[0]} x {shape[1]}"
        for pattern in PATTERNS:
            for name, preset in method_names(pattern):
                lower = functools.partial(_layer, shape, name, preset, pattern)
                yield Program("layer", f"{_label(name, preset)}, {pattern}", size, 1, lower)
        for name, lower in LINEARS.items():
            yield Program("linear", name, size, 1, functools.partial(lower, shape))
        for name, preset in CUT:
            for how, lower in (("cut", _layer_cut), ("side by side", _layers_beside)):
                lowered = functools.partial(lower, shape, name, preset)
                yield Program("mesh", f"{_label(name, preset)}, {how}", size, MESH, lowered)
    for name, lower in BLOCKS.items():
        yield Program("block", name, model, 1, functools.partial(lower, model))
    for name, lower in OVER_MESH.items():
        yield Program("mesh", name, model, MESH, functools.partial(lower, model))


def trends() -> Iterator[Program]:
    """The trend filter on grids and on a triangulation, on one device and over the mesh."""
    for name, shape in {**GRIDS, f"{NODES:,} nodes": (NODES,)}.items():
        for order, method in itertools.product(ORDERS, ("doge", "admm")):
            lower = functools.partial(_trend, shape, order, method)
            yield Program("trend", f"order {order}, {method}", name, 1, lower)
            if method == "doge":
                yield Program("mesh", f"order {order}, doge", name, MESH, lower)


def programs() -> dict[tuple[str, str, str, int], Program]:
    """All programs, each once: two models may share a shape."""
    found: dict[tuple[str, str, str, int], Program] = {}
    for program in (*itertools.chain.from_iterable(map(of_model, MODELS)), *trends()):
        found.setdefault(program.key, program)
    return found

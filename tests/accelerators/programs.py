"""The package's own programs, lowered for a target that need not exist.

No array is made but the tables of graphs: arguments are shapes. A key is a tuple: the name of a function below and its
arguments.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import sparseopt as so
from sparseopt.core.base.mesh import AXIS, at_work
from sparseopt.layers.methods import METHODS, find_method
from sparseopt.layers.patterns import is_group_pattern, parse_pattern
from sparseopt.layers.problem import LayerJob, layer_solver, reads_variances
from sparseopt.layers.split import Cut, cut_solver
from sparseopt.models import Block, find_family
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.pruning.base.activations import BATCH_TOKENS
from sparseopt.pruning.base.grams import _output_over, gather_grams, grams_over
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.train.reconstruction import Reconstruction, _step_of_rows, split_block
from sparseopt.pruning.train.training import Fixed, kept_entries, start_state
from sparseopt.trend.filter import check_fit
from sparseopt.trend.methods.choice import as_method, choose
from sparseopt.trend.methods.plan import fit
from tests.accelerators.targets import Place

_SILU = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": True}
# What the programs depend on in the models' configurations.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _SILU
    | {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "LLaMA-2-7B": _SILU
    | {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-3-8B": _SILU
    | {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
}
PATTERNS = {"unstructured": 0.5, "2:4": None, "per-row": 0.5, "block:4x4": 0.5, "group:64": 0.5}
DEFAULTS = Recipe(method="maiht", calibration="pydoc")
_float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


@functools.cache
def config_of(model: str) -> DecoderConfig:
    return find_family(MODELS[model]).configure(MODELS[model])


@functools.cache
def block_of(model: str) -> Any:
    """A block with shapes in place of its parameters, in float32 as they are once they are read."""
    config = config_of(model)

    def made() -> Block:
        block = Block(config, config.kinds[0], rngs=nnx.Rngs(0))
        nnx.update(block, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(block, nnx.Param)))
        return block

    return nnx.eval_shape(made)


def methods() -> list[tuple[str, str | None, str]]:
    """Every method, with each of its presets, on every pattern that it takes."""

    def taken(name: str, pattern: str) -> bool:
        if name in ("osscar", "flap"):
            return is_group_pattern(pattern)
        return name != "sparsegpt" or not (is_group_pattern(pattern) or pattern.startswith("block"))

    pairs = [(name, preset) for name, entry in METHODS.items() for preset in entry.presets or (None,)]
    return [(*pair, pattern) for pair in pairs for pattern in PATTERNS if taken(pair[0], pattern)]


def _job(shape: tuple[int, int], method: Any, pattern: str) -> LayerJob:
    """A layer as a run with default options has it: weights in bfloat16, a held-out Gram, for best output weights."""
    outputs, inputs = shape
    return LayerJob(
        weight=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        gram=_float32((inputs, inputs)),
        test_gram=_float32((inputs, inputs)),
        pattern=parse_pattern(pattern, PATTERNS[pattern], shape),
        output_weights=_float32((outputs,)) if method == find_method("best", pattern=pattern) else None,
        input_variances=_float32((inputs,)) if reads_variances(method) else None,
    )


def layer(place: Place, shape: tuple[int, int], name: str, preset: str | None, pattern: str) -> jax.stages.Lowered:
    method = find_method(name, preset, pattern=pattern)
    return layer_solver.lower(*place.whole((_job(shape, method, pattern), method)))


def layer_cut(place: Place, shape: tuple[int, int], name: str, preset: str | None) -> jax.stages.Lowered:
    """One layer, its outputs cut over the mesh."""
    method = find_method(name, preset)
    asked = _job(shape, method, "unstructured")
    rest = place.whole(dataclasses.replace(asked, weight=None))
    return cut_solver.lower(place.cut(asked.weight), rest, Cut(place.mesh, shape[0]), place.whole(method))


def _windows(model: str, place: Place) -> Any:
    """A batch of the stream: as many windows as a device takes at a time, of each device."""
    count = BATCH_TOKENS // DEFAULTS.seqlen * (place.mesh.size if place.mesh else 1)
    return _float32((count, DEFAULTS.seqlen, config_of(model).hidden_size))


def grams(place: Place, model: str) -> jax.stages.Lowered:
    """The Grams and drifts of a block's inputs, with those before, on each device its own."""
    block, x = block_of(model), _windows(model, place)
    totals, counted = jax.eval_shape(gather_grams, block, x, dense_x=x), None
    if place.mesh is not None:
        counted = jax.ShapeDtypeStruct(x.shape[:1], jnp.bool_)
        totals = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((place.mesh.size, *leaf.shape), leaf.dtype), totals)
    rest = place.cut((x, x, counted, totals))
    return grams_over(place.mesh, DEFAULTS.weighting, "routed").lower(place.whole(block), *rest)


def forward(place: Place, model: str) -> jax.stages.Lowered:
    return _output_over(place.mesh).lower(place.whole(block_of(model)), place.cut(_windows(model, place)))


def reconstruction(place: Place, model: str) -> jax.stages.Lowered:
    """A step of training a pruned block."""
    block, settings, x = block_of(model), Reconstruction(), _windows(model, place)
    masks = {name: jax.ShapeDtypeStruct(block.weight_shape(name), jnp.bool_) for name in block.linears}
    graph, params, *frozen = split_block(block, masks, settings)
    fixed = Fixed(graph, frozen, jax.eval_shape(kept_entries, params, masks))
    state, rows = jax.eval_shape(start_state, params), jax.ShapeDtypeStruct((settings.windows,), jnp.int32)
    weights, number = _float32(x.shape[-1:]), _float32(())
    return _step_of_rows.lower(*place.whole((state, fixed, weights, (x, x), rows, number, number)))


def trend(place: Place, shape: tuple[int, ...], order: int, method: str) -> jax.stages.Lowered:
    graph, here = so.Graph.grid(shape), None
    if place.mesh is not None:
        here = Mesh(np.asarray(jax.devices()[: place.mesh.size]), (AXIS,))
    y = np.random.default_rng(0).standard_normal(graph.geometry.node_shape).astype(np.float32)
    asked = check_fit(y, graph, so.L1(1.0), order, None, "error", None, here, method=as_method(method))
    with at_work(here):
        plan = choose(asked).plan(asked)
        arguments = (plan, asked.arrays, asked.rows, (asked.tol, asked.max_steps))
        arguments = place.whole(arguments) if here is None else place.as_laid(_on_mesh(arguments, here, place.mesh))
    with at_work(place.mesh):
        return fit.usual.lower(*arguments)


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

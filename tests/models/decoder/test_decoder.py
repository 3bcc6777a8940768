"""The decoder against the reference layer by layer, attention against a simple formula, one trace for all blocks."""

import json
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.models import (
    FAMILIES,
    Block,
    BlockKind,
    Decoder,
    DecoderConfig,
    Embedding,
    Rope,
    find_family,
    load_decoder,
    open_model,
)
from sparseopt.models.base.rope import Llama3
from sparseopt.models.decoder.attention import QUERY_CHUNK, causal_attention, rotate
from tests.jitted import run
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.oracle.make_golden import CASES

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
SMALL = DecoderConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    kinds=(BlockKind(Rope(10000.0)),) * 3,
    tied=False,
)


def write_golden(file: Path, folder: Path) -> dict[str, np.ndarray]:
    arrays = dict(np.load(file))
    weights = {
        name.removeprefix("weight/"): value.astype(np.float32)
        for name, value in arrays.items()
        if name.startswith("weight/")
    }
    write_folder(folder, json.loads(str(arrays["config"])), weights)
    return arrays


def test_there_are_golden_files() -> None:
    assert {file.stem for file in GOLDEN} == set(CASES)
    assert {CASES[file.stem]["model_type"] for file in GOLDEN} == set(FAMILIES)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_every_layer_equals_the_reference(file: Path, tmp_path: Path) -> None:
    golden = write_golden(file, tmp_path / "model")
    model = open_model(tmp_path / "model")
    x = run(model.embedding(), golden["tokens"])
    np.testing.assert_allclose(x, golden["hidden"][0], atol=1e-4, err_msg="embedding")
    for i in range(model.num_blocks):
        # Each block gets the reference's input, so that a fault shows in its own layer only.
        x = run(model.block(i), golden["hidden"][i])
        np.testing.assert_allclose(x, golden["hidden"][i + 1], atol=1e-4, err_msg=f"block {i}")
    np.testing.assert_allclose(run(model.head(), x), golden["logits"], atol=1e-4, err_msg="head")
    whole = run(model.decoder(), golden["tokens"])
    np.testing.assert_allclose(whole, golden["logits"], atol=1e-4, err_msg="whole model")


@pytest.mark.parametrize("time", [1, 5, QUERY_CHUNK, QUERY_CHUNK + 1, 2 * QUERY_CHUNK + 44])
def test_attention_equals_the_plain_formula(time: int, rng: np.random.Generator) -> None:
    q, k, v = (rng.normal(size=(2, time, heads, 8)) for heads in (6, 2, 2))
    k_full, v_full = np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k_full) / np.sqrt(8)
    scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v_full)
    got = jax.jit(causal_attention)(*(a.astype(np.float32) for a in (q, k, v)))
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_rotated_scores_depend_on_distance_alone(rng: np.random.Generator) -> None:
    q, k = (jnp.asarray(np.tile(rng.normal(size=8), (1, 9, 1, 1)), jnp.float32) for _ in range(2))
    scores = np.einsum("bth,bsh->ts", rotate(q, Rope(100.0))[:, :, 0], rotate(k, Rope(100.0))[:, :, 0])
    for offset in range(-8, 9):
        diagonal = np.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(scores) > 0.1


def test_later_tokens_change_no_earlier_logit() -> None:
    decoder = Decoder(replace(SMALL, kinds=SMALL.kinds[:1]), rngs=nnx.Rngs(0))
    tokens = np.arange(16)[None] % 19
    changed = tokens.copy()
    changed[0, 10] = 18
    before, after = (np.asarray(run(decoder, ids)) for ids in (tokens, changed))
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.abs(before[:, 10:] - after[:, 10:]).max() > 1e-3


def test_a_token_out_of_range_gives_nan_and_not_another_row() -> None:
    assert bool(jnp.isnan(Embedding(SMALL, rngs=nnx.Rngs(0))(np.array([[19]]))).all())


def test_taps_see_input_and_output_of_each_linear_and_may_change_them(rng: np.random.Generator) -> None:
    block = Block(SMALL, SMALL.kinds[0], rngs=nnx.Rngs(3))
    x = jnp.asarray(rng.normal(size=(2, 7, 12)), jnp.float32)
    seen: dict[str, jax.Array] = {}

    def record(name: str, value: jax.Array) -> jax.Array:
        assert name not in seen, f"{name} was tapped twice"
        seen[name] = value
        return value

    plain = block(x, tap=record)
    np.testing.assert_array_equal(plain, block(x))
    assert set(seen) == {*block.linears, *block.linears.values()}
    for linear, tap in block.linears.items():
        np.testing.assert_array_equal(seen[linear], attrgetter(linear)(block)(seen[tap]))
        assert seen[tap].shape == (2, 7, block.weight_shape(linear)[1]), linear
    np.testing.assert_array_equal(seen["attention_input"], block.attention_norm(x))
    gate = block.mlp.gate_proj(seen["mlp_input"])
    np.testing.assert_allclose(seen["mlp_hidden"], jax.nn.silu(gate) * block.mlp.up_proj(seen["mlp_input"]))
    # With its last input replaced by zeros the MLP adds nothing to what attention gave.
    silenced = block(x, tap=lambda name, value: 0 * value if name == "mlp_hidden" else value)
    attended = x + block.self_attn(block.attention_norm(x))
    np.testing.assert_allclose(silenced, attended, atol=1e-6)


def test_an_unknown_linear_is_named() -> None:
    with pytest.raises(KeyError, match=r"self_attn.x_proj.*self_attn.q_proj"):
        Block(SMALL, SMALL.kinds[0], rngs=nnx.Rngs(0)).read("self_attn.x_proj.weight")


def test_all_blocks_share_one_trace(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config()
    model = open_model(write_folder(tmp_path, config, random_tensors(config, rng)))
    split_traces, module_traces = [], []

    def run_split(graphdef, state, x):
        split_traces.append(1)
        return nnx.merge(graphdef, state)(x)

    def run_module(block, x):
        module_traces.append(1)
        return block(x)

    jitted_split, jitted_module = jax.jit(run_split, static_argnums=0), jax.jit(run_module)
    x = jnp.ones((1, 6, 32))
    blocks = [model.block(i) for i in range(3)]
    outputs = [jitted_split(*nnx.split(block), x) for block in blocks]
    for block, output in zip(blocks, outputs, strict=True):
        np.testing.assert_allclose(jitted_module(block, x), output, atol=1e-6)
    assert len({hash(nnx.split(block)[0]) for block in blocks}) == 1
    assert (len(split_traces), len(module_traces)) == (1, 1)
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 1e-3


def test_a_tied_head_is_the_embedding(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config()
    folder = write_folder(tmp_path, config, random_tensors(config, rng))
    decoder = load_decoder(folder)
    assert decoder.head.lm_head.weight is decoder.embed_tokens.weight
    np.testing.assert_array_equal(open_model(folder).head().lm_head.weight[...], decoder.embed_tokens.weight[...])


def test_llama3_scaling_keeps_high_frequencies_and_slows_low_ones() -> None:
    plain, scaled = (rope.frequencies(64) for rope in (Rope(5e5), Rope(5e5, Llama3(8.0, 1.0, 4.0, 8192))))
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert np.all(np.diff(ratio) >= -1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size must be a positive int, given None"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive int, given True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"head_dim": 7}, "given 7 of head_dim=7"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive float"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type='spiral' is unknown"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor must be a positive float"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor must be in"),
        ({"rope_scaling": 2.0}, "rope_scaling must be a table"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "they differ in rope_type, factor",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(changes: dict, named: str) -> None:
    config = tiny_config(**changes)
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        find_family(config).read_config(config)


def test_an_unknown_family_names_those_known() -> None:
    with pytest.raises(ValueError, match=r"unknown model_type 'mamba'; known are gemma2, .*llama"):
        find_family({"model_type": "mamba"})


def test_the_key_table_is_reversible() -> None:
    family = find_family({"model_type": "llama"})
    names = list(family.expected_shapes(SMALL))
    assert len(names) == 3 + 3 * 9
    assert [family.keys.to_key(family.keys.to_path(name)) for name in names] == names
    with pytest.raises(KeyError, match="no entry of the key table"):
        family.keys.to_path("transformer.wte.weight")


@pytest.mark.processes
def test_importing_models_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, sparseopt.models; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

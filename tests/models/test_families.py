"""Every family without torch: its golden models have every fact of the list, and what it does not do is refused."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoConfig

from sparseopt.models import (
    FAMILIES,
    ModelError,
    block_moves,
    find_family,
    generate,
    load_decoder,
    open_model,
    reordered_block,
)
from sparseopt.models.base.rope import max_positions, read_rope
from sparseopt.models.files import safetensors
from sparseopt.pruning import Recipe, audit_sparsity, perplexity, prune_model
from sparseopt.pruning.evaluate.scoring import score_continuations
from tests.fuzz.damage import refused
from tests.jitted import run
from tests.models.tiny import GOLDEN, copy_model, random_tensors, tiny_config, write_folder
from tests.oracle.make_golden import CASES
from tests.tiers import often

TOKENS = np.random.default_rng(1).integers(0, 40, (6, 16)).astype(np.int32)
PROMPT = np.array([5, 9, 30])
# One case of each family.
ONE_EACH = list({case["model_type"]: name for name, case in CASES.items()}.values())
# Run whole too; `tests.oracle.test_families` does so for all.
WHOLE = ("tied_grouped", "gemma2", "gpt2", "mixtral")
EVERY = pytest.mark.parametrize("name", CASES)


def test_every_family_has_a_golden_model_and_its_proofs_in_the_documentation():
    assert {file.stem for file in GOLDEN.glob("*.npz")} == set(CASES)
    assert {case["model_type"] for case in CASES.values()} == set(FAMILIES)
    file = Path(__file__).parents[2] / "docs" / "benchmarks" / "families.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for fact, times in (("logits", 1), ("pruned", 2)):
        proved = sorted((r["family"], r["case"]) for r in records if r["fact"] == fact)
        expected = sorted((case["model_type"], name) for name, case in CASES.items())
        assert proved == sorted(expected * times), f"run `make families` ({fact})"
    assert {r["family"] for r in records} == set(FAMILIES)
    assert max(r["largest_error"] for r in records if "largest_error" in r) < 1e-4


@EVERY
def test_every_layer_equals_the_reference(name, golden):
    _, arrays, model = golden(name)
    hidden, logits = arrays["hidden"], arrays["logits"]
    found = {"embedding": (run(model.embedding(), arrays["tokens"]), hidden[0])}
    # Each block gets the reference's input, so that a fault shows in its own layer only.
    for i in range(model.num_blocks):
        found[f"block {i}"] = (run(model.block(i), hidden[i]), hidden[i + 1])
    found["head"] = (run(model.head(), found[f"block {model.num_blocks - 1}"][0]), logits)
    if name in WHOLE:
        found["whole model"] = (run(model.decoder(), arrays["tokens"]), logits)
    for part, (ours, theirs) in found.items():
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=part)


@EVERY
def test_names_go_to_module_paths_and_back_and_positions_are_read(name, golden):
    model = golden(name).model
    family = model.family
    expected = family.expected_shapes(model.config)
    assert set(expected) <= set(model.source.tensors)
    assert [family.keys.to_key(family.keys.to_path(key)) for key in expected] == list(expected)
    refused(KeyError, "no entry of the key table", family.keys.to_path, "nothing.weight")
    assert model.config.max_positions == {"dynamic_rope": 48, "legacy_linear": 128}.get(name, 64)


# Windows and capped scores, learned positions; experts, ropes that change, blocks side by side and without a rope.
GENERATING = ("gemma2", "gpt2", "mixtral", "dynamic_rope", "phi3_longrope", "stablelm_parallel", "smollm3", "cohere2")


@pytest.mark.parametrize("name", often(GENERATING, "gemma2", "gpt2"))
def test_kept_keys_and_values_give_the_logits_of_the_whole_text(name, golden):
    decoder = golden(name).model.decoder()
    # After one token, and after several at once.
    for prompt in (PROMPT[:1], PROMPT):
        new = generate(decoder, prompt, 12 - len(prompt))
        assert (new.shape, new.dtype) == ((12 - len(prompt),), np.int32)
        # Attention is causal, so that one pass over the whole text gives the choice at each of its tokens.
        choices = np.argmax(run(decoder, np.concatenate([prompt, new])[None])[0], axis=-1)
        np.testing.assert_array_equal(new, choices[len(prompt) - 1 : -1])


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_block_whose_inner_channels_stand_in_another_order_computes_the_same(name, golden):
    _, arrays, model = golden(name)
    config, block, rng = model.config, model.block(0), np.random.default_rng(0)
    tensors = {path: model.stored(key) for path, key in model.block_keys(0).items()}
    downs = [linear for linear in block.linears if linear.endswith("down_proj")]
    orders = {linear: rng.permutation(block.weight_shape(linear)[1]) for linear in downs}
    # Within a head, alike in all heads of a KV group.
    values = np.stack([rng.permutation(config.head_dim) for _ in range(config.num_kv_heads)])
    heads = np.arange(config.num_heads)
    of_heads = values[heads * config.num_kv_heads // config.num_heads] + config.head_dim * heads[:, None]
    moved = reordered_block(tensors, block_moves(config, orders | {"self_attn.o_proj": of_heads.reshape(-1)}))
    changed = {path for path, value in tensors.items() if not np.array_equal(value, moved[path])}
    assert {f"{linear}.weight" for linear in (*orders, "self_attn.o_proj")} < changed
    # Biases follow their rows.
    assert all(path in changed for path in tensors if path.endswith(("v_proj.bias", "up_proj.bias", "qkv_proj.bias")))
    x = arrays["hidden"][0]
    np.testing.assert_allclose(run(model.block_of(0, moved), x), run(block, x), rtol=1e-4, atol=1e-5)


def test_an_order_that_changes_the_function_is_refused(golden):
    config = golden(ONE_EACH[0]).model.config
    across = np.roll(np.arange(config.num_heads * config.head_dim), 1)
    for orders, words in (
        ({"mlp.down_proj": np.zeros(config.intermediate_size, int)}, "must name each of them once"),
        ({"self_attn.o_proj": across}, "move within their head, alike in all heads of a KV group"),
    ):
        refused(ModelError, words, block_moves, config, orders)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "tied_grouped"])
def test_checkpoints_of_the_bare_model_are_read_and_exported_by_their_own_names(name, golden, tmp_path):
    whole = golden(name).model
    base = whole.family.keys.base
    tensors = {key.removeprefix(base): whole.source.read(key) for key in whole.source.tensors}
    model = open_model(write_folder(tmp_path / "bare", whole.source.config, tensors))
    for one, other in zip(jax.tree.leaves(model.decoder()), jax.tree.leaves(whole.decoder()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(key.startswith(base) for key in model.exported_keys())
    copy_model(model, tmp_path / "out")
    assert set(open_model(tmp_path / "out").source.tensors) == set(model.exported_keys())


# `tests.oracle.test_families` has the exports of all families.
def test_a_pruned_export_keeps_names_layouts_and_untouched_bytes(golden, tmp_path):
    dense = golden("gpt2").model
    report = prune_model(golden("gpt2").folder, tmp_path, Recipe(pattern="2:4", method="wanda", calibration=TOKENS))
    pruned = open_model(tmp_path)
    changed = {f"{record.layer}.weight" for record in report.layers}
    assert pruned.source.tensors.keys() == dense.source.tensors.keys()
    for key in dense.source.tensors:
        one, other = pruned.source.read(key), dense.source.read(key)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), key
        assert (one.tobytes() == other.tobytes()) == (key not in changed), key
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(tmp_path))
    # q, k and v in one matrix; the pattern runs along the inputs, which Conv1D stores as rows.
    stored = pruned.source.read("transformer.h.0.attn.c_attn.weight")
    assert stored.shape == (16, 48)
    assert (np.count_nonzero(stored.reshape(4, 4, 48), axis=1) <= 2).all()
    first = next(record for record in report.layers if record.layer == "transformer.h.0.attn.c_attn")
    assert first.shape == (48, 16)
    phi3 = golden("phi3").model
    assert [*phi3.block_linears(0)] == ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert phi3.weight_shape("model.layers.0.self_attn.qkv_proj.weight") == (32, 16)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_parameters_that_are_read_in_pieces_are_those_read_at_once(name, golden, monkeypatch):
    model = golden(name).model
    whole = jax.tree.leaves((model.embedding(), model.block(0), model.head()))
    monkeypatch.setattr(safetensors, "SLICE", 200)
    for one, other in zip(whole, jax.tree.leaves((model.embedding(), model.block(0), model.head())), strict=True):
        np.testing.assert_array_equal(one, other)


UNSUPPORTED = {
    "tied_grouped": {"hidden_act": "quick_gelu", "sliding_window": 128, "quantization_config": {"bits": 4}},
    "mistral": {"layer_types": ["full_attention"] * 3},
    "gemma2": {"use_bidirectional_attention": True, "hidden_activation": "relu2"},
    "gemma3_text": {"attn_logit_softcapping": 50.0},
    "stablelm": {"qk_layernorm": True, "head_dim": 8},
    "granite": {"partial_rotary_factor": 0.5},
    "cohere": {"use_qk_norm": True},
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True},
    "mixtral": {"num_experts_per_tok": 9},
    "qwen3_moe": {"use_sliding_window": True},
}
POSITIVE = {
    "tied_grouped": ("hidden_size", "num_attention_heads", "rms_norm_eps"),
    "mistral": ("sliding_window", "max_position_embeddings"),
    "gemma2": ("attn_logit_softcapping",),
    "gemma3_text": ("sliding_window_pattern",),
    "granite": ("residual_multiplier",),
    "cohere": ("logit_scale",),
    "cohere2": ("sliding_window",),
}
SCALING = {"rope_type": "linear", "factor": 8.0}
LONG = {"rope_parameters": {"rope_type": "longrope", "short_factor": 1}}
# Layers that are of no kind, and ropes that are none.
KINDS = ["full_attention", "chunked_attention", "full_attention"]
SPIRAL, UNSCALED = ({"rope_type": kind, "rope_theta": 1e4} for kind in ("spiral", "linear"))
REFUSED = [
    *((name, {field: value}, f"{field}=") for name, fields in UNSUPPORTED.items() for field, value in fields.items()),
    *(
        (name, {field: bad}, f"{field} must be a positive .*, given {bad!r}")
        for name, fields in POSITIVE.items()
        for field in fields
        for bad in (0, -1, True, "small")
    ),
    ("tied_grouped", {"model_type": "mamba"}, "unknown model_type 'mamba'; known are cohere, .*llama"),
    ("tied_grouped", {"hidden_size": None}, "hidden_size must be a positive int, given None"),
    ("cohere", {"logit_scale": None}, "logit_scale must be a positive float"),
    ("tied_grouped", {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
    ("tied_grouped", {"head_dim": 7}, "given 7 of head_dim=7"),
    ("tied_grouped", {"rope_parameters": SPIRAL}, "rope_type='spiral' is unknown"),
    ("tied_grouped", {"rope_parameters": UNSCALED}, "factor must be a positive float"),
    ("tied_grouped", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor must be in"),
    ("tied_grouped", {"rope_scaling": 2.0}, "rope_scaling must be a table"),
    ("tied_grouped", {"rope_scaling": SCALING}, "they differ in rope_type, factor"),
    ("qwen2", {"layer_types": KINDS}, "chunked_attention"),
    ("qwen2", {"layer_types": KINDS[:1]}, "layer_types must name .* for each of 3 blocks, given 1"),
    ("qwen2", {"rope_parameters": {"mrope_section": [1, 1, 2]}}, "mrope_section="),
    ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers must hold 0 or 1"),
    ("gemma3_images", {"text_config": None}, "text_config must be a table"),
    ("phi3", {"partial_rotary_factor": 2.0, "rope_parameters": None}, "partial_rotary_factor must be in"),
    ("phi3", LONG, "short_factor must be a list"),
    ("phi3_longrope", {"num_attention_heads": 2}, "short_factor has 2 entries, expected 4: .* 8 rotated features"),
    ("cohere2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("glm4", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "given 3 of head_dim=8"),
    ("gpt_neox", {"rotary_pct": -0.5, "rope_parameters": None}, "partial_rotary_factor must be a positive"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_what_a_family_does_not_do_is_refused_by_its_field(name, changes, named):
    config = json.loads(str(np.load(GOLDEN / f"{name}.npz")["config"])) | changes
    with pytest.raises(ModelError, match=named):
        find_family(config).read_config(config)


def test_a_window_beyond_the_positions_of_a_model_is_refused_before_any_work(golden, tmp_path):
    source, _, model = golden("opt")
    ids, decoder = np.zeros((2, 65), np.int32), model.decoder()
    for attempt in (
        lambda: decoder(ids),
        lambda: perplexity(model, ids),
        lambda: perplexity(decoder, ids),
        lambda: generate(decoder, ids[0, :40], 25),
        lambda: score_continuations(model, [([1, 2], [3]), (list(ids[0]), [1])]),
        lambda: prune_model(source, tmp_path / "out", Recipe(calibration=ids, heldout_windows=0)),
        # Said before the folder's lack of a tokenizer is.
        lambda: prune_model(source, tmp_path / "out", Recipe(seqlen=65)),
    ):
        refused(ModelError, "a window of 65 tokens is longer than the 64 positions", attempt)
    assert not (tmp_path / "out").exists()
    # The window grows in steps, and not beyond what the model reads.
    assert generate(decoder, ids[0, :-2], 1).shape == (1,)


@EVERY
def test_a_field_that_has_the_default_of_its_class_in_transformers_may_be_left_out(name):
    config = json.loads(str(np.load(GOLDEN / f"{name}.npz")["config"]))
    family, usual = find_family(config), AutoConfig.for_model(config["model_type"]).to_dict()
    fields = {field for field in config.keys() & usual.keys() if config[field] == usual[field]} - {"model_type"}
    for field in fields:
        short = {key: value for key, value in config.items() if key != field}
        assert family.read_config(short) == family.read_config(config), field


def test_gemma_3_has_the_defaults_of_its_class_and_its_own_base_for_local_blocks():
    # What the published configurations of the 4B model state.
    published = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    read = FAMILIES["gemma3"].configure({"text_config": published | {"rope_scaling": SCALING}})
    assert (read.vocab_size, read.num_heads, read.num_kv_heads, read.head_dim) == (262_208, 8, 4, 256)
    assert (read.num_layers, read.max_positions) == (34, 8 * 131_072)
    ropes = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "default"}}
    own = published | {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_parameters": ropes}
    read = FAMILIES["gemma3_text"].configure(own)
    assert {kind.rope.theta: kind.window for kind in read.kinds if kind.rope} == {5e3: 1024, 1e6: None}


def test_two_names_of_one_rope_agree_and_a_length_beside_it_counts_as_in_transformers():
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    rope = {"rope_type": "llama3", "original_max_position_embeddings": 64, **factors}
    inside, both = {"rope_parameters": rope}, {"rope_parameters": rope, "original_max_position_embeddings": 128}
    outside = {"rope_parameters": {**rope, "original_max_position_embeddings": 128}}
    assert read_rope(both) == read_rope(outside) != read_rope(inside)
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert read_rope({"rope_scaling": old, "rope_parameters": new}) == read_rope({"rope_parameters": new})


def test_yarn_divides_the_frequencies_of_pairs_that_turn_less_than_once_and_some_of_those_above():
    # The pairs 0 to 3 turn 652, 65, 6.5 and 0.65 times in 4096 tokens; from 32 turns on they are kept.
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    between = 1 - np.log(4096 / (2 * np.pi) / 100) / np.log(32)
    for truncate, share in ((None, 0.5), (False, between)):
        found = read_rope({"rope_parameters": yarn | {"truncate": truncate}}).frequencies(8)
        np.testing.assert_allclose(found, [1, 0.1, 0.01 * (1 - 0.75 * share), 0.001 / 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_a_scaling_stretches_the_positions_that_it_does_not_count_in(rope, expected):
    assert max_positions({"max_position_embeddings": 64, "rope_scaling": rope}) == expected
    assert max_positions({"rope_scaling": rope}) is None
    # Of two ropes, the one that reaches least far counts.
    both = {"full_attention": rope or {}, "sliding_attention": {"rope_type": "default"}}
    assert max_positions({"max_position_embeddings": 64, "rope_parameters": both}) == 64


def test_without_torch_the_known_families_and_the_way_out_are_named(tmp_path, rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    config = tiny_config()
    folder = write_folder(tmp_path / "m", config | {"model_type": "nemotron"}, random_tensors(config, rng))
    text = r"unknown model_type 'nemotron'; known are .*llama.* is not installed: pip install 'sparseopt\[torch\]'"
    recipe = Recipe(calibration=np.zeros((6, 8), np.int32))
    calls = (lambda path: prune_model(path, tmp_path / "out", recipe), lambda path: perplexity(path, np.zeros((2, 8))))
    for call in calls:
        refused(ModelError, text, call, folder)
    assert not (tmp_path / "out").exists()
    for call in (open_model, load_decoder):
        refused(ModelError, r"'nemotron'.*known are .*llama.*`sparseopt prune`.*prune_module", call, folder)

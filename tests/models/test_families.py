"""Families without torch: names in both directions, pruned exports, and unsupported configurations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sparseopt.models import FAMILIES, ModelError, find_family, generate, load_decoder, open_model
from sparseopt.models.base.rope import max_positions, read_rope
from sparseopt.models.files import safetensors
from sparseopt.models.files.safetensors import read_header
from sparseopt.pruning import Recipe, audit_sparsity, perplexity, prune_model
from sparseopt.pruning.evaluate.scoring import score_continuations
from tests.jitted import run
from tests.models.decoder.test_decoder import GOLDEN, write_golden
from tests.oracle.make_golden import CASES
from tests.tiers import often

FOLDER = GOLDEN[0].parent
TOKENS = np.random.default_rng(1).integers(0, 40, (6, 16)).astype(np.int32)
# One case of each family.
ONE_EACH = list({case["model_type"]: name for name, case in CASES.items()}.values())


def golden_config(name: str) -> dict[str, Any]:
    return json.loads(str(np.load(FOLDER / f"{name}.npz")["config"]))


def stored_bytes(folder: Path) -> dict[str, bytes]:
    headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.read().tobytes() for header in headers for name, tensor in header.items()}


@pytest.mark.parametrize("name", list(CASES))
def test_names_go_to_module_paths_and_back(name: str) -> None:
    weights = {key.removeprefix("weight/") for key in np.load(FOLDER / f"{name}.npz") if key.startswith("weight/")}
    family = find_family(golden_config(name), weights)
    expected = family.expected_shapes(family.read_config(golden_config(name)))
    assert set(expected) <= weights
    assert [family.keys.to_key(family.keys.to_path(key)) for key in expected] == list(expected)


@pytest.mark.parametrize("name", often(["gpt2", "opt", "gpt_neox", "tied_grouped"], "gpt2"))
def test_checkpoints_of_the_bare_model_are_read_and_exported_by_their_own_names(name: str, tmp_path: Path) -> None:
    golden = write_golden(FOLDER / f"{name}.npz", tmp_path / "whole")
    base = FAMILIES[golden_config(name)["model_type"]].keys.base
    bare = {key.replace("weight/" + base, "weight/"): value for key, value in golden.items()}
    np.savez(tmp_path / "bare.npz", **bare)
    write_golden(tmp_path / "bare.npz", tmp_path / "bare")
    model = open_model(tmp_path / "bare")
    assert not any(key.startswith(base) for key in model.exported_keys())
    np.testing.assert_allclose(run(model.decoder(), golden["tokens"]), golden["logits"], atol=1e-4)
    prune_model(tmp_path / "bare", tmp_path / "out", Recipe(method="magnitude", calibration=TOKENS))
    assert set(stored_bytes(tmp_path / "out")) == set(stored_bytes(tmp_path / "bare"))


# Those of the other families are laid out as one of these is.
@pytest.mark.parametrize("name", often(ONE_EACH, "opt", "gpt2"))
def test_a_pruned_export_keeps_names_layouts_and_untouched_bytes(name: str, tmp_path: Path) -> None:
    write_golden(FOLDER / f"{name}.npz", tmp_path / "source")
    recipe = Recipe(method="wanda", calibration=TOKENS, min_expert_tokens=2)
    report = prune_model(tmp_path / "source", tmp_path / "out", recipe)
    before, after = (open_model(tmp_path / folder).source for folder in ("source", "out"))
    assert {key: info.shape for key, info in after.tensors.items()} == {
        key: info.shape for key, info in before.tensors.items()
    }
    pruned = {f"{record.layer}.weight" for record in report.layers}
    old, new = stored_bytes(tmp_path / "source"), stored_bytes(tmp_path / "out")
    for key, raw in old.items():
        assert (new[key] == raw) == (key not in pruned), key
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(tmp_path / "out"))
    assert np.isfinite(run(load_decoder(tmp_path / "out"), TOKENS)).all()


def test_fused_and_transposed_matrices_are_pruned_as_they_lie_on_disk(tmp_path: Path) -> None:
    write_golden(FOLDER / "gpt2.npz", tmp_path / "gpt2")
    report = prune_model(tmp_path / "gpt2", tmp_path / "out", Recipe(pattern="2:4", method="wanda", calibration=TOKENS))
    stored = open_model(tmp_path / "out").source.read("transformer.h.0.attn.c_attn.weight")
    assert stored.shape == (16, 48)
    # The pattern runs along the inputs, which Conv1D stores as rows.
    assert (np.count_nonzero(stored.reshape(4, 4, 48), axis=1) <= 2).all()
    first = next(record for record in report.layers if record.layer == "transformer.h.0.attn.c_attn")
    assert first.shape == (48, 16)
    phi3 = open_model(write_golden_folder("phi3", tmp_path / "phi3"))
    assert [*phi3.block_linears(0)] == ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert phi3.weight_shape("model.layers.0.self_attn.qkv_proj.weight") == (32, 16)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_parameters_that_are_read_in_pieces_are_those_read_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(write_golden_folder(name, tmp_path / name))
    whole = jax.tree.leaves((model.embedding(), model.block(0), model.head()))
    monkeypatch.setattr(safetensors, "SLICE", 200)
    for one, other in zip(whole, jax.tree.leaves((model.embedding(), model.block(0), model.head())), strict=True):
        np.testing.assert_array_equal(one, other)


def write_golden_folder(name: str, folder: Path) -> Path:
    write_golden(FOLDER / f"{name}.npz", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive int, given 0"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types="),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must name .* for each of 3 blocks, given 1"),
        ("qwen3", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional' is unknown"),
        ("qwen2", {"rope_parameters": {"mrope_section": [1, 1, 2]}}, "mrope_section="),
        ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers must hold 0 or 1"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"hidden_activation": "relu2"}, "hidden_activation='relu2'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be a positive float"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive int"),
        ("gemma3_images", {"text_config": None}, "text_config must be a table"),
        ("phi3", {"partial_rotary_factor": 2.0, "rope_parameters": None}, "partial_rotary_factor must be in"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": 1}}, "short_factor must be a list"),
        (
            "phi3_longrope",
            {"num_attention_heads": 2},
            "short_factor has 2 entries, expected 4: .* 8 rotated features",
        ),
        ("mistral", {"max_position_embeddings": 0}, "max_position_embeddings must be a positive int, given 0"),
        ("olmo2", {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim=8"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"n_embd": None}, "hidden_size must be a positive int"),
        ("gpt_neox", {"rotary_pct": -0.5, "rope_parameters": None}, "partial_rotary_factor must be a positive"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("llama3_rope", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_its_field(name: str, changes: dict, named: str) -> None:
    config = golden_config(name)
    with pytest.raises(ModelError, match=named):
        find_family(config).read_config({**config, **changes})


def test_the_documented_table_of_families_is_whole() -> None:
    file = Path(__file__).parents[2] / "docs" / "benchmarks" / "families.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for fact, times in (("logits", 1), ("pruned", 2)):
        proved = sorted((r["family"], r["case"]) for r in records if r["fact"] == fact)
        expected = sorted((case["model_type"], name) for name, case in CASES.items())
        assert proved == sorted(expected * times), f"run `make families` ({fact})"
    assert {r["family"] for r in records} == set(FAMILIES)
    assert max(r["largest_error"] for r in records if "largest_error" in r) < 1e-4


@pytest.mark.parametrize(("name", "longest"), [("opt", 64), ("dynamic_rope", 48)])
def test_a_window_beyond_the_positions_of_a_model_is_refused_before_any_work(
    name: str, longest: int, tmp_path: Path
) -> None:
    source = write_golden_folder(name, tmp_path / "source")
    ids = np.zeros((2, longest + 1), np.int32)
    model, decoder = open_model(source), load_decoder(source)
    attempts: dict[str, Callable[[], Any]] = {
        "embedding": lambda: decoder(ids),
        "perplexity": lambda: perplexity(model, ids),
        "perplexity in memory": lambda: perplexity(decoder, ids),
        "generation": lambda: generate(decoder, ids[0, :40], longest - 39),
        "scores": lambda: score_continuations(model, [([1, 2], [3]), (list(ids[0]), [1])]),
        "token ids": lambda: prune_model(source, tmp_path / "out", Recipe(calibration=ids, heldout_windows=0)),
        # Said before the folder's lack of a tokenizer is.
        "text": lambda: prune_model(source, tmp_path / "out", Recipe(seqlen=longest + 1)),
    }
    for attempt in attempts.values():
        with pytest.raises(
            ModelError, match=f"a window of {longest + 1} tokens is longer than the {longest} positions"
        ):
            attempt()
    assert not (tmp_path / "out").exists()
    # The window grows in steps, and not beyond what the model reads.
    assert generate(decoder, ids[0, :-2], 1).shape == (1,)


def test_gemma_3_has_the_defaults_of_its_class_and_its_own_base_for_local_blocks() -> None:
    # What the published configurations of the 4B model state.
    published = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaled = published | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    read = FAMILIES["gemma3"].configure({"text_config": scaled})
    assert (read.vocab_size, read.num_heads, read.num_kv_heads, read.head_dim) == (262_208, 8, 4, 256)
    assert (read.num_layers, read.max_positions) == (34, 8 * 131_072)
    ropes = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "default"}}
    own = published | {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_parameters": ropes}
    read = FAMILIES["gemma3_text"].configure(own)
    assert {kind.rope.theta: kind.window for kind in read.kinds if kind.rope} == {5e3: 1024, 1e6: None}
    with pytest.raises(ModelError, match="attn_logit_softcapping"):
        FAMILIES["gemma3_text"].configure({"attn_logit_softcapping": 50.0})


def test_a_length_beside_the_rope_counts_as_in_transformers() -> None:
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    rope = {"rope_type": "llama3", "original_max_position_embeddings": 64, **factors}
    inside, both = {"rope_parameters": rope}, {"rope_parameters": rope, "original_max_position_embeddings": 128}
    outside = {"rope_parameters": {**rope, "original_max_position_embeddings": 128}}
    assert read_rope(both) == read_rope(outside) != read_rope(inside)


def test_two_names_of_one_rope_are_no_contradiction() -> None:
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert read_rope({"rope_scaling": old, "rope_parameters": new}) == read_rope({"rope_parameters": new})


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
def test_a_scaling_stretches_the_positions_that_it_does_not_count_in(rope: dict | None, expected: int) -> None:
    assert max_positions({"max_position_embeddings": 64, "rope_scaling": rope}) == expected
    assert max_positions({"rope_scaling": rope}) is None
    # Of two ropes, the one that reaches least far counts.
    both = {"full_attention": rope or {}, "sliding_attention": {"rope_type": "default"}}
    assert max_positions({"max_position_embeddings": 64, "rope_parameters": both}) == 64


def test_positions_are_read_under_the_names_of_every_family() -> None:
    found = {name: find_family(golden_config(name)).configure(golden_config(name)).max_positions for name in CASES}
    assert found == dict.fromkeys(CASES, 64) | {"dynamic_rope": 48, "legacy_linear": 128}

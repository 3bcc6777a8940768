"""Architectures without a family, loaded whole by transformers: pruned as known families, and scored as in torch."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparseopt.models import LoadedModel, ModelError, open_any, open_model
from sparseopt.pruning import (
    BudgetError,
    Recipe,
    Stopped,
    audit_pattern,
    audit_sparsity,
    perplexity,
    prune_model,
)
from sparseopt.pruning.base.records import Footprint
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.oracle.conftest import reference, reference_logits
from tests.pruning.whole_runs import TOKENIZER, make_tokens

pytestmark = pytest.mark.oracle

_SIZES = {"vocab_size": len(VOCAB), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 256}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT_SIZES = {"vocab_size": len(VOCAB), "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
_GPT_SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Partial rotary positions, biases in attention, an MLP without gate.
    "nemotron": _SIZES | {"num_key_value_heads": 2, "attention_bias": True},
    # ALiBi, a norm behind the embedding, q, k and v in one linear, a tied head.
    "bloom": {"vocab_size": len(VOCAB), "hidden_size": 32, "n_layer": 3, "n_head": 4},
    # Attention beside the MLP, the stream as a keyword, a head with a bias.
    "gptj": _GPT_SIZES | {"rotary_dim": 4, "tie_word_embeddings": False},
    # Weights stored [in, out], norms behind, a list as output.
    "openai-gpt": _GPT_SIZES,
    # One key and value for all heads, the attention beside the MLP.
    "falcon": {"vocab_size": len(VOCAB), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    # One block, which is no list of blocks.
    "mpt": {"vocab_size": len(VOCAB), "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 256},
    # Another mask in every fourth block, which has no positions either.
    "exaone4": _SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2, "sliding_window": 6},
    # Stacked experts, also in the checkpoint; sinks in attention.
    "gpt_oss": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8},
    # Experts apart in the checkpoint, a shared one, latent attention, a dense first block.
    "deepseek_v3": _SIZES
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    | {"n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    # Stacked experts beside a shared one in every other block.
    "llama4_text": _SIZES
    | {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    | {"interleave_moe_layer_step": 2},
}
# Values of matrices in the blocks that are no linears: blocks with experts, experts, values of each, and the routers.
OTHERS = {"gpt_oss": 3 * 4 * (3 * 32 * 48 + 32 + 2 * 48) + 3 * 4 * 32, "deepseek_v3": 2 * (4 * 3 * 32 * 16 + 4 * 32)}
OTHERS["llama4_text"] = 1 * 4 * 3 * 32 * 48
EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))


def build(name: str) -> Any:
    """A random model of an architecture; norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    torch.manual_seed(list(ARCHITECTURES).index(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture, written once, which no test changes."""
    place = tmp_path_factory.mktemp("written")

    @cache
    def folder(name: str) -> Path:
        build(name).save_pretrained(place / name)
        return place / name

    return folder


def torch_perplexity(model: Any, tokens: np.ndarray) -> float:
    import torch

    logits = torch.from_numpy(reference_logits(model, tokens)).double()
    targets = torch.from_numpy(tokens[:, 1:]).long().flatten()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).exp())


@EVERY
def test_an_architecture_is_pruned_and_scored(written, tmp_path, rng, name):
    source, tokens = written(name), make_tokens(rng, 10)
    report = prune_model(source, tmp_path / "out", Recipe(method="sparsegpt", calibration=tokens))
    before, after = open_any(source), open_any(tmp_path / "out")
    assert isinstance(before, LoadedModel)
    pruned = {f"{record.layer}.weight" for record in report.layers}
    assert pruned == set(before.linear_keys())
    for audit in audit_sparsity(after):
        assert audit.zeros == audit.size // 2, audit.layer
    assert before.source.tensors.keys() == after.source.tensors.keys()
    for key in before.source.tensors.keys() - pruned:
        assert before.source.read(key).tobytes() == after.source.read(key).tobytes(), key
    assert all(0 < record.relative_error < 0.5 for record in report.layers)
    assert (report.route, report.other_weights) == ("torch", OTHERS.get(name, 0))
    assert report.summary()["recipe"]["output_weights"] == "uniform"

    found = reference(tmp_path / "out")
    parameters = dict(found.named_parameters())
    for key in pruned:
        assert int((parameters[key] == 0).sum()) == parameters[key].numel() // 2, key
    assert perplexity(tmp_path / "out", tokens) == pytest.approx(torch_perplexity(found, tokens), rel=1e-4)
    assert perplexity(source, tokens) == pytest.approx(torch_perplexity(build(name), tokens), rel=1e-4)

    again = prune_model(source, tmp_path / "out", Recipe(method="sparsegpt", calibration=tokens))
    assert again.kept
    assert again.layers == report.layers
    with pytest.raises(ValueError, match=r"another run, these differ:\n  recipe\.sparsity"):
        prune_model(source, tmp_path / "out", Recipe(method="sparsegpt", sparsity=0.6, calibration=tokens))


# Where two entries compete for the last place of a support, rounding decides, and then maiht goes another way: of its
# presets "paper" is the least sensitive.
ALIKE: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "targets": {"down_proj": 0.7, "q_proj": 0.0}, "ignore": ["up_proj"]},
    "sparsegpt": {"method": "sparsegpt", "propagate": 0.5, "pattern": "2:4"},
    "maiht": {"preset": "paper"},
}


@pytest.mark.parametrize("changes", ALIKE.values(), ids=ALIKE)
def test_a_known_family_gives_the_same_either_way(tmp_path, rng, changes):
    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    recipe = Recipe(calibration=make_tokens(rng, 12), **changes)
    ours = prune_model(source, tmp_path / "ours", recipe)
    theirs = prune_model(LoadedModel(open_model(source).source), tmp_path / "theirs", recipe)
    assert (ours.route, theirs.route) == ("flax", "torch")
    one, other = open_model(tmp_path / "ours"), open_model(tmp_path / "theirs")
    records, differing = {record.layer: record for record in theirs.layers}, 0
    assert records.keys() == {record.layer for record in ours.layers}
    for record in ours.layers:
        twin, key = records[record.layer], f"{record.layer}.weight"
        assert twin.relative_error == pytest.approx(record.relative_error, rel=1e-3), record.layer
        assert twin.zeros == record.zeros
        differing += np.count_nonzero((one.stored(key) == 0) != (other.stored(key) == 0))
    assert differing <= 0.001 * sum(record.size for record in ours.layers)


def test_tensors_of_several_dtypes_keep_them_unless_another_is_asked_for(written, tmp_path, rng):
    import ml_dtypes

    source, tokens = shutil.copytree(written("nemotron"), tmp_path / "source"), make_tokens(rng, 8)
    tensors = load_file(source / "model.safetensors")
    tensors = {k: v if "norm" in k else v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(method="wanda", pattern="2:4", calibration=tokens)
    report = prune_model(source, tmp_path / "out", recipe)
    assert all(audit.exact for audit in audit_pattern(report.output, "2:4"))
    stored = load_file(next(report.output.glob("*.safetensors")))
    assert {key: value.dtype for key, value in stored.items()} == {k: v.dtype for k, v in tensors.items()}
    kept = [key for key in tensors if key.removesuffix(".weight") not in {r.layer for r in report.layers}]
    assert all(stored[key].tobytes() == tensors[key].tobytes() for key in kept)
    output = prune_model(source, tmp_path / "half", recipe.model_copy(update={"dtype": "float16"})).output
    assert {value.dtype.name for value in open_any(output).source.tensors.values()} == {"float16"}


def test_a_run_that_was_stopped_begins_anew(written, tmp_path, rng):
    source, recipe = written("exaone4"), Recipe(method="wanda", calibration=make_tokens(rng, 8))
    calls = iter([False, True])
    with pytest.raises(Stopped, match="stopped after 2 parts; the same call begins anew"):
        prune_model(source, tmp_path / "out", recipe, stop=lambda: next(calls))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    report = prune_model(source, tmp_path / "out", recipe)
    assert len(report.layers) == len((tmp_path / "out" / "records.jsonl").read_text().splitlines())
    # The shard is whole: only what comes after it is done again.
    (tmp_path / "out" / "summary.json").unlink()
    assert prune_model(source, tmp_path / "out", recipe).layers == report.layers


def test_memory_is_told_and_refused(written, tmp_path, rng):
    events: list[Any] = []
    recipe = Recipe(method="wanda", calibration=make_tokens(rng, 8))
    prune_model(written("bloom"), tmp_path / "a", recipe, observer=lambda event, *_: events.append(event))
    footprint = next(event for event in events if isinstance(event, Footprint))
    assert footprint.memory_bytes == sum(footprint.memory_parts.values())
    with pytest.raises(BudgetError, match=r"bloom model.*loaded whole.*model .* and there are 100\.0 MiB"):
        prune_model(written("bloom"), tmp_path / "b", recipe, memory="100MiB")
    assert not (tmp_path / "b").exists()


GRADIENTS = {"output_weights": "gradient", "allocation": "curves", "train_epochs": 2, "weighting": "residual"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (GRADIENTS, r"(?s)output_weights=.*allocation=.*weighting=.*train_epochs"),
    ({"targets": ["lm_head"]}, "only layers of the blocks are pruned"),
    ({"pattern": "5:7"}, r"model\.layers\.0.*5:7"),
]


def test_what_a_loaded_model_cannot_have_is_refused_before_any_work(written, tmp_path, rng):
    source, tokens = written("nemotron"), make_tokens(rng, 8)
    for changes, words in REFUSED:
        with pytest.raises(ValueError, match=words):
            prune_model(source, tmp_path / "out", Recipe(calibration=tokens, **changes))
    with pytest.raises(ValueError, match=r"an output that ends in \.gguf cannot be had"):
        prune_model(source, tmp_path / "out.gguf", Recipe(calibration=tokens))
    assert not (tmp_path / "out").exists()
    best = prune_model(source, tmp_path / "out", Recipe(method="best", calibration=tokens))
    assert not best.blocks
    assert best.recipe["train_epochs"] == 0


def test_what_transformers_cannot_load_is_refused(written, tmp_path, rng):
    recipe = Recipe(method="wanda", calibration=make_tokens(rng, 8))
    file = shutil.copytree(written("nemotron"), tmp_path / "source") / "model.safetensors"
    tensors, config = load_file(file), json.loads((tmp_path / "source" / "config.json").read_text())
    key, remote = "model.layers.1.mlp.up_proj.weight", {"AutoModelForCausalLM": "modeling_mine.Mine"}
    embedding = {"model.embed_tokens.weight": np.ones((3, 32), np.float32)}
    mine = {"model_type": "mine", "auto_map": remote}
    for words, changes, without, fields in (
        (rf"{key} .* NaN", {key: np.full_like(tensors[key], np.nan)}, "", {}),
        (rf"missing: {key}", {}, key, {}),
        (r"missing: model\.norm\.weight", {}, "model.norm.weight", {}),
        (r"misshapen: model\.embed_tokens", embedding, "", {}),
        (r"unknown model_type 'mine'.*llama.*trust_remote_code", {}, "", mine),
        ("its configuration asks for 1000000000 blocks", {}, "", {"num_hidden_layers": 10**9}),
        ("transformers makes no causal language model", {}, "", {"hidden_size": "many"}),
    ):
        held = {name: value for name, value in {**tensors, **changes}.items() if name != without}
        save_file(held, file, metadata={"format": "pt"})
        (tmp_path / "source" / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(ModelError, match=words):
            prune_model(tmp_path / "source", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_block_that_hides_what_a_linear_reads(tmp_path, rng):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    recipe = Recipe(method="wanda", calibration=make_tokens(rng, 8))
    with pytest.raises(ValueError, match=r"does not reach backbone\.layers\.0\.mixer\.dt_proj.*ignore"):
        prune_model(tmp_path / "mamba", tmp_path / "out", recipe)
    recipe = recipe.model_copy(update={"ignore": ["dt_proj"]})
    assert prune_model(tmp_path / "mamba", tmp_path / "out", recipe).sparsity == 0.5


def test_a_checkpoint_without_the_first_part_of_its_names(written, tmp_path, rng):
    file = shutil.copytree(written("bloom"), tmp_path / "source") / "model.safetensors"
    tokens = make_tokens(rng, 8)
    expected = perplexity(written("bloom"), tokens)
    save_file({key.removeprefix("transformer."): value for key, value in load_file(file).items()}, file)
    assert perplexity(tmp_path / "source", tokens) == expected
    report = prune_model(tmp_path / "source", tmp_path / "out", Recipe(method="wanda", calibration=tokens))
    assert report.layers[0].layer == "h.0.self_attention.query_key_value"
    assert reference(tmp_path / "out") is not None


def test_the_shell_prunes_and_scores(written, tmp_path, done):
    source = shutil.copytree(written("gptj"), tmp_path / "source")
    (source / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text("the tall hat, 3 of them.\n" * 400)
    text, windows = f"file:{tmp_path / 'text.txt'}", ("--windows", 6, "--seqlen", 24)
    for words, name, *options in (
        (("loaded whole by transformers", "perplexity on"), "out", "--calibration", text, "--preset", "paper"),
        (("loaded whole by transformers",), "drawn", "--effort", "fast"),
        (("zeros, 50.00% of the linear layers",), "dry", "--dry-run"),
    ):
        shown = done("prune", source, "--output", tmp_path / name, *options, *windows)
        assert all(each in shown for each in words), shown
    assert (tmp_path / "drawn" / "drawn.json").is_file()
    assert not (tmp_path / "dry").exists()
    shown = done("eval", tmp_path / "out", "--text", text, "--windows", 4, "--seqlen", 24, "--json")
    assert json.loads(shown)["sparsity"] == 0.5

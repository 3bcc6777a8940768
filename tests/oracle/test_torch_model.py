"""Architectures without a family, pruned through torch: Gram matrices, exports and scores agree with torch."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparseopt.models import FAMILIES, ModelError, TorchModel, load_decoder, open_model
from sparseopt.models.streaming import torch_bridge
from sparseopt.models.streaming.torch_bridge import to_jax, to_tensor, to_torch
from sparseopt.models.streaming.torch_model import TorchBlock
from sparseopt.models.streaming.torch_skeleton import Call
from sparseopt.pruning import Recipe, audit_pattern, audit_sparsity, perplexity, prune_model, prune_models
from sparseopt.pruning.base.activations import Batches, make_batches
from sparseopt.pruning.base.torch_grams import TorchRunner, runner_of
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.oracle.conftest import reference, reference_logits
from tests.pruning.whole_runs import TOKENIZER, make_tokens

pytestmark = pytest.mark.oracle

_SIZES = {
    "vocab_size": len(VOCAB),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT_SIZES = {"vocab_size": len(VOCAB), "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Partial rotary positions, biases in attention, an MLP without gate.
    "nemotron": _SIZES | {"num_key_value_heads": 2, "attention_bias": True},
    # ALiBi, a norm behind the embedding, q, k and v in one linear, a tied head.
    "bloom": {"vocab_size": len(VOCAB), "hidden_size": 32, "n_layer": 3, "n_head": 4},
    # Attention beside the MLP, the stream as a keyword, a head with a bias.
    "gptj": _GPT_SIZES | {"rotary_dim": 4, "tie_word_embeddings": False},
    # Weights stored [in, out], norms behind, a list as output.
    "openai-gpt": _GPT_SIZES,
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
# Values of the experts, which stay as they are: blocks with experts, experts, values of each.
EXPERTS = {"gpt_oss": 3 * 4 * (3 * 32 * 48 + 32 + 2 * 48), "deepseek_v3": 2 * 4 * 3 * 32 * 16}
EXPERTS["llama4_text"] = 1 * 4 * 3 * 32 * 48
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


def is_linear(part: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, torch.nn.Linear | Conv1D)


@EVERY
def test_grams_streams_and_perplexity_are_those_of_the_whole_model_in_torch(written, rng, name):
    import torch

    whole, tokens = build(name), make_tokens(rng, 6)
    model = open_model(written(name))
    expected: dict[str, np.ndarray] = {}

    def hook_of(key: str) -> Any:
        def hook(_: Any, arguments: tuple) -> None:
            rows = arguments[0].double().reshape(-1, arguments[0].shape[-1])
            expected[key] = (rows.T @ rows).numpy()

        return hook

    for key, part in whole.named_modules():
        if is_linear(part):
            part.register_forward_pre_hook(hook_of(f"{key}.weight"))
    logits = torch.from_numpy(reference_logits(whole, tokens)).double()
    targets = torch.from_numpy(tokens[:, 1:]).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    assert perplexity(written(name), tokens) == pytest.approx(float(loss.exp()), rel=1e-4)

    assert isinstance(model, TorchModel)
    runner, batches = runner_of(model), make_batches(model.embedding()(tokens))
    for index in range(model.num_blocks):
        block = model.block(index)
        grams = runner.grams(block, batches)
        assert list(model.block_linears(index)) == list(block.linears)
        for linear, tap in block.linears.items():
            gram = expected[model.weight_key(index, linear)]
            np.testing.assert_allclose(grams[tap].gram, gram, atol=2e-5 * np.abs(gram).max(), err_msg=linear)
            assert int(grams[tap].tokens) == tokens.size
        if name == "nemotron":  # linears that read one tensor share its Gram
            assert len({id(grams[f"self_attn.{linear}_proj"].gram) for linear in "qkv"}) == 1
            assert len({id(gram.gram) for gram in grams.values()}) == 4
        batches = runner.forward(block, batches)
    assert runner.seconds > 0


def test_a_block_that_routes_and_writes_into_its_tensors(rng):
    """Grams are of what a linear saw, not of what is there later; those of experts are of the tokens sent to them."""
    import torch

    class Routing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = torch.nn.Linear(4, 4)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Any) -> Any:
            mixed = self.front(x)
            x += mixed
            rows = x.reshape(-1, 4)
            added = torch.zeros_like(rows)
            for place, expert in enumerate(self.experts[:2]):
                sent = (rows[:, 0] > 0) == bool(place)
                added[sent] = expert(rows[sent])
            return x + added.reshape(x.shape)

    module = torch.nn.ModuleDict({"mlp": Routing()})
    module.forward = module["mlp"].forward
    caller = SimpleNamespace(attention_width=4, writes_input=True, call=lambda *_: Call((), {}, by_name=False))
    block = TorchBlock(module, 0, {key: value.detach() for key, value in module.named_parameters()}, caller)
    x, dense = (jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32) for _ in range(2))
    kept = np.array(x)
    grams = TorchRunner().grams(block, Batches([x, x]), dense=Batches([dense, dense]))
    np.testing.assert_array_equal(x, kept)

    seen, other = kept.reshape(-1, 4), np.asarray(dense).reshape(-1, 4)
    np.testing.assert_allclose(grams["mlp.front"].gram, 2 * seen.T @ seen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grams["mlp.front"].drift, 2 * seen.T @ (seen - other), rtol=1e-4, atol=1e-5)
    front = module["mlp"].front
    behind = seen + seen @ front.weight.detach().numpy().T + front.bias.detach().numpy()
    for place, name in enumerate(["mlp.experts.0", "mlp.experts.1"]):
        sent = behind[(behind[:, 0] > 0) == bool(place)]
        np.testing.assert_allclose(grams[name].gram, 2 * sent.T @ sent, rtol=1e-4, atol=1e-5)
        assert int(grams[name].tokens) == 2 * len(sent)
        assert grams[name].drift is None
    assert int(grams["mlp.experts.2"].tokens) == 0
    assert not np.any(grams["mlp.experts.2"].gram)

    twin = block.copy()
    twin.write({"mlp.front.weight": jnp.zeros((4, 4))})
    assert not np.any(twin.read("mlp.front.weight"))
    np.testing.assert_array_equal(block.read("mlp.front.weight"), front.weight.detach())
    with pytest.raises(KeyError, match=r"no parameter 'mlp\.back\.weight'"):
        block.read("mlp.back.weight")


@pytest.mark.parametrize("preset", ["paper", "tuned"])
@EVERY
def test_an_export_has_the_exact_count_and_loads(written, tmp_path, rng, name, preset):
    source, recipe = written(name), Recipe(preset=preset, calibration=make_tokens(rng, 10))
    report = prune_model(source, tmp_path / "out", recipe)
    before, after = open_model(source), open_model(tmp_path / "out")
    pruned = {f"{record.layer}.weight" for record in report.layers}
    assert len(pruned) == sum(len(before.block_linears(index)) for index in range(before.num_blocks))
    for audit in audit_sparsity(after):
        assert audit.zeros == audit.size // 2, audit.layer
    assert list(before.source.tensors.keys() ^ after.source.tensors.keys()) == []
    for key in before.source.tensors.keys() - pruned:
        assert before.source.read(key).tobytes() == after.source.read(key).tobytes(), key
    for record in report.layers:
        assert 0 < record.relative_error < 0.5, record.layer
        assert record.heldout_error is not None
        assert record.heldout_error > 0
    assert report.footprint.stacked_weights == EXPERTS.get(name, 0)
    assert report.route == "torch"
    assert report.summary()["recipe"]["output_weights"] == "uniform"
    parameters = dict(reference(tmp_path / "out").named_parameters())
    for key in pruned:
        assert int((parameters[key] == 0).sum()) == parameters[key].numel() // 2, key


@pytest.mark.parametrize("changes", [{}, {"propagate": 0.5}, {"allocation": "owl", "pattern": "per-row"}])
def test_a_known_family_gives_the_same_through_torch(tmp_path, rng, monkeypatch, changes):
    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    recipe = Recipe(preset="paper", calibration=make_tokens(rng, 12), **changes)
    ours = prune_model(source, tmp_path / "ours", recipe)
    monkeypatch.delitem(FAMILIES, "llama")
    theirs = prune_model(source, tmp_path / "theirs", recipe)
    assert (ours.route, theirs.route) == ("flax", "torch")
    one, other = open_model(tmp_path / "ours").source, open_model(tmp_path / "theirs").source
    records = {record.layer: record for record in theirs.layers}
    assert records.keys() == {record.layer for record in ours.layers}
    # Both gather the same Grams to rounding. Where two entries compete for the last place of a support, rounding
    # decides, and what stands behind that layer sees other inputs.
    same = []
    for record in ours.layers:
        twin = records[record.layer]
        assert twin.relative_error == pytest.approx(record.relative_error, rel=0.1, abs=1e-6), record.layer
        assert twin.heldout_error == pytest.approx(record.heldout_error, rel=0.1, abs=1e-6), record.layer
        assert twin.zeros == record.zeros
        key = f"{record.layer}.weight"
        differing = np.count_nonzero((one.read(key) == 0) != (other.read(key) == 0))
        assert differing <= 0.05 * record.size, key
        alike = twin.relative_error == pytest.approx(record.relative_error, rel=1e-4, abs=1e-6)
        same.append(alike and differing <= 0.005 * record.size)
    assert all(same[: len(open_model(source).block_linears(0))])
    assert np.mean(same) >= 0.5


def test_several_recipes_share_a_pass(written, tmp_path, rng):
    source, tokens = written("bloom"), make_tokens(rng, 8)
    plans = [
        (Recipe(method=method, pattern="2:4", calibration=tokens), tmp_path / method) for method in ("wanda", "maiht")
    ]
    reports = prune_models(source, plans)
    for report in reports:
        assert all(audit.exact for audit in audit_pattern(report.output, "2:4"))
    alone = prune_model(source, tmp_path / "alone", plans[0][0])
    assert [r.relative_error for r in alone.layers] == [r.relative_error for r in reports[0].layers]


def test_what_takes_gradients_is_refused_before_any_work(written, tmp_path, rng):
    source, tokens = written("nemotron"), make_tokens(rng, 8)
    recipe = Recipe(
        output_weights="gradient", allocation="curves", train_epochs=2, weighting="residual", calibration=tokens
    )
    with pytest.raises(ValueError, match=r"(?s)nemotron.*output_weights=.*allocation=.*train_epochs.*weighting="):
        prune_model(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    best = prune_model(source, tmp_path / "out", Recipe(method="best", calibration=tokens))
    assert not best.blocks
    assert best.recipe["train_epochs"] == 0


def test_what_cannot_run_block_by_block_is_refused_by_name(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    cases = {
        "bert": (_SIZES, "a token sees later tokens"),
        "mamba": ({"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}, "does not call mixer.dt_proj"),
    }
    for name, (sizes, text) in cases.items():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=text):
            open_model(tmp_path / name).check_finite()


def test_names_and_values_that_do_not_fit_are_listed(written, tmp_path):
    file = shutil.copytree(written("nemotron"), tmp_path, dirs_exist_ok=True) / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, key: np.full_like(tensors[key], np.nan)}, file)
    with pytest.raises(ModelError, match=rf"{key} .* NaN"):
        open_model(tmp_path).check_finite()
    changed = tensors | {key: tensors[key][:, 1:].copy(), "model.layers.1.other": np.ones(3, np.float32)}
    del changed["model.norm.weight"]
    save_file(changed, file)
    with pytest.raises(ModelError, match=r"(?s)3 problems.*missing: model\.norm\.weight.*misshapen.*extra: .*other"):
        open_model(tmp_path)


def test_a_checkpoint_without_the_first_part_of_its_names(written, tmp_path, rng):
    file = shutil.copytree(written("bloom"), tmp_path, dirs_exist_ok=True) / "model.safetensors"
    tokens = rng.integers(0, len(VOCAB), (4, 20))
    expected = perplexity(written("bloom"), tokens)
    save_file({key.removeprefix("transformer."): value for key, value in load_file(file).items()}, file)
    assert open_model(tmp_path).weight_key(1, "mlp.dense_h_to_4h") == "h.1.mlp.dense_h_to_4h.weight"
    assert perplexity(tmp_path, tokens) == expected


def test_masks_of_old_checkpoints_are_no_weights(tmp_path):
    """-1e9 would be an infinity in float16."""
    from transformers import AutoModelForCausalLM, GPTJConfig

    config = GPTJConfig(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4, bos_token_id=0, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    masks = {"transformer.h.0.attn.masked_bias": np.array(-1e9, np.float32)}
    save_file(load_file(file) | masks, file, metadata={"format": "pt"})
    tokens = np.random.default_rng(0).integers(0, 40, (6, 16))
    prune_model(tmp_path / "source", tmp_path / "out", Recipe(method="magnitude", calibration=tokens, dtype="float16"))
    assert "transformer.h.0.attn.masked_bias" not in open_model(tmp_path / "out").source.tensors


def test_models_that_nobody_knows_and_code_beside_the_weights(written, tmp_path):
    with pytest.raises(ModelError, match="nemotron model runs block by block in torch and cannot be loaded"):
        load_decoder(written("nemotron"))
    shutil.copytree(written("nemotron"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    remote = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": remote}))
    with pytest.raises(ModelError, match=r"unknown model_type 'mine'.*known are .*llama.*trust_remote_code"):
        open_model(tmp_path)


def test_tensors_move_without_copies():
    import torch

    tensor = to_tensor(np.arange(12, dtype=np.float16).reshape(3, 4))
    array = to_jax(tensor)
    assert tensor.dtype == torch.float32
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    own = jnp.ones((5, 7)) * 3
    assert to_torch(own).data_ptr() == own.unsafe_buffer_pointer()
    np.testing.assert_array_equal(to_jax(tensor.T), np.arange(12).reshape(3, 4).T)


def test_tensors_move_by_way_of_numpy_where_jax_alone_has_a_device(monkeypatch):
    monkeypatch.setattr(torch_bridge, "_is_host_of_jax", lambda device: True)
    tensor = to_tensor(np.arange(12, dtype=np.float16).reshape(3, 4))
    array = to_jax(tensor.T)
    np.testing.assert_array_equal(array, np.arange(12).reshape(3, 4).T)
    np.testing.assert_array_equal(to_torch(array).numpy(), array)


def test_the_shell_prunes_and_scores(written, tmp_path, command):
    source = shutil.copytree(written("gptj"), tmp_path / "source")
    (source / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text("the tall hat, 3 of them.\n" * 400)
    text, out = f"file:{tmp_path / 'text.txt'}", tmp_path / "out"
    windows = ["--windows", 6, "--seqlen", 24, "--heldout-windows", 2]
    status, shown, _ = command("prune", source, "--output", out, "--calibration", text, "--preset", "paper", *windows)
    assert status == 0
    assert "blocks ran in torch" in shown
    status, shown, told = command("eval", out, "--text", text, "--windows", 4, "--seqlen", 24, "--json")
    assert status == 0, told
    assert json.loads(shown)["sparsity"] == 0.5

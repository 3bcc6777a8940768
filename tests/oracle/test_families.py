"""Families, file formats and the bundled model against transformers: logits, and what we write as it reads it.

`make families` records the results for the table in the documentation, see `conftest`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sparseopt import models
from sparseopt.models import ModelError, StreamedModel, load_decoder, load_tokenizer, open_model
from sparseopt.models.files.safetensors import read_header
from sparseopt.pruning import Recipe, ShrinkRecipe, audit_sparsity, perplexity, prune_model, shrink_model
from sparseopt.system.run_folder import FolderError
from tests.jitted import run
from tests.models.decoder.test_tokenizer import TRICKY
from tests.models.reshape.test_shrunk import reduced, write_smaller
from tests.models.tiny import (
    CONFIGS,
    GOLDEN,
    copy_model,
    random_tensors,
    sentencepiece_metadata,
    tiny_config,
    write_architecture,
    write_folder,
    write_golden,
)
from tests.oracle.conftest import reference, reference_logits
from tests.oracle.make_golden import CASES, build_model, compute_case
from tests.pruning.whole_runs import TOKENIZER

pytestmark = pytest.mark.oracle
EVERY = pytest.mark.parametrize("name", list(CASES))

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 24)).astype(np.int32)
CALIBRATION = np.random.default_rng(1).integers(0, 40, (10, 32)).astype(np.int32)
# Written otherwise by transformers: left out of comparisons of configurations.
SPELLED_OTHERWISE = {"architectures", "dtype", "rope_theta", "rope_local_base_freq"}
# Architectures whose GGUF files transformers reads, and those that it refuses. Of a StarCoder 2 file it leaves out the
# number of rows of the embedding, so that tiny files do not fit.
IN_GGUF = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
REFUSED_IN_GGUF = tuple(CONFIGS.keys() - set(IN_GGUF))
# Fields that a class lacks, or that transformers does not read from a file.
UNREAD_IN_GGUF = {"qwen2": {"head_dim"}, "phi3": {"head_dim", "original_max_position_embeddings"}}


def saved(name: str, dtype: str, folder: Path, **options: Any) -> Path:
    """The model of a case as transformers writes it."""
    import torch

    build_model(name).to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder."""
    headers = [read_header(file) for file in folder.glob("*.safetensors")]
    tensors = {name: tensor for header in headers for name, tensor in header.items()}
    return {name: (tensor.dtype.name, tensor.shape, tensor.read().tobytes()) for name, tensor in tensors.items()}


@EVERY
def test_golden_files_are_what_the_reference_gives_and_so_are_our_logits(name, tmp_path, proof):
    """`tests.models.test_families` compares every layer with these files."""
    stored, computed = write_golden(GOLDEN / f"{name}.npz", tmp_path), compute_case(name)
    assert set(stored) == set(computed)
    for key, value in computed.items():
        if key in ("hidden", "logits"):
            # Processors order the sums of float32 products differently: ten roundings or so of the largest value.
            np.testing.assert_allclose(stored[key], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=key)
        elif key == "config":
            # A release of transformers writes its version, and fields that it has added.
            stored_fields, fields = (json.loads(str(text)) for text in (stored[key], value))
            for config in (stored_fields, fields):
                config.pop("transformers_version", None)
            assert {field: fields.get(field) for field in stored_fields} == stored_fields
        else:
            np.testing.assert_array_equal(stored[key], value, err_msg=key)
    error = float(np.abs(run(load_decoder(tmp_path), computed["tokens"]) - computed["logits"]).max())
    assert error < 1e-4
    proof(CASES[name]["model_type"], "logits", case=name, largest_error=error)


@pytest.mark.parametrize(("preset", "dtype"), [("paper", "float32"), ("tuned", "bfloat16")])
@EVERY
def test_a_pruned_export_is_loaded_with_our_logits_and_untouched_bytes(name, preset, dtype, tmp_path, proof):
    size = "1GB" if dtype == "float32" else "10KB"
    source, output = saved(name, dtype, tmp_path / "source", max_shard_size=size), tmp_path / "out"
    assert len(list(source.glob("*.safetensors"))) > 1 or size == "1GB"
    report = prune_model(source, output, Recipe(preset=preset, calibration=CALIBRATION, min_expert_tokens=8))
    before, after = stored_bytes(source), stored_bytes(output)
    pruned = {f"{record.layer}.weight" for record in report.layers}
    assert pruned <= set(before) == set(after)
    for key, (kind, shape, raw) in before.items():
        assert after[key][:2] == (kind, shape), key
        assert (after[key][2] == raw) == (key not in pruned), key
    assert {kind for kind, _, _ in after.values()} == {dtype}
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(output))
    logits, ours, dense = reference_logits(output, TOKENS), *(run(load_decoder(f), TOKENS) for f in (output, source))
    np.testing.assert_allclose(ours, logits, atol=1e-4)
    assert np.abs(ours - dense).max() > 1e-2
    assert json.loads((output / "config.json").read_text())["model_type"] == CASES[name]["model_type"]
    assert {str(value.dtype) for value in reference(output, dtype="auto").parameters()} == {f"torch.{dtype}"}
    error = float(np.abs(ours - logits).max())
    proof(CASES[name]["model_type"], "pruned", case=name, preset=preset, dtype=dtype, largest_error=error)


@EVERY
def test_a_model_in_memory_is_that_of_its_saved_folder(name, tmp_path):
    import torch

    model = build_model(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    memory, folder = open_model(model), open_model(tmp_path)
    assert sorted(memory.exported_keys()) == sorted(folder.exported_keys())
    assert memory.check_finite() == folder.check_finite()
    assert memory.source.config == folder.source.config
    file = tmp_path / "generation_config.json"
    assert memory.source.sidecars() == ({file.name: file.read_bytes()} if file.exists() else {})


@pytest.mark.parametrize(
    ("name", "normalised", "experts"),
    [("mixtral", True, (0.75, 3)), ("qwen3_moe", True, (0.667, 4)), ("qwen3_moe", False, (0.667, 4))],
)
def test_a_model_with_fewer_experts_has_our_logits(name, normalised, experts, tmp_path):
    """Its shares are those among the experts that stay, normalised or not as its configuration says."""
    source, output = saved(name, "float32", tmp_path / "source"), tmp_path / "out"
    config, (share, kept) = json.loads((source / "config.json").read_text()), experts
    if name == "qwen3_moe":
        (source / "config.json").write_text(json.dumps(config | {"norm_topk_prob": normalised}))
    report = shrink_model(source, output, ShrinkRecipe(calibration=CALIBRATION, experts=share, train_epochs=0))
    assert report.shape.experts == open_model(output).config.experts.count == kept
    np.testing.assert_allclose(run(load_decoder(output), TOKENS), reference_logits(output, TOKENS), atol=1e-4)


# A tied head, transposed weights, and experts that transformers stacks in memory.
@pytest.mark.parametrize("name", ["tied_grouped", "gpt2", "mixtral"])
def test_pruning_a_model_in_memory_gives_what_pruning_its_saved_folder_gives(name, tmp_path):
    import torch

    model, source, out, memory = build_model(name).to(torch.bfloat16), *(tmp_path / each for each in "abc")
    model.save_pretrained(source)
    recipe = Recipe(method="wanda", calibration=torch.tensor(CALIBRATION), min_expert_tokens=8)
    prune_model(source, out, recipe)
    prune_model(model, memory, recipe)
    assert stored_bytes(memory) == stored_bytes(out)
    assert (memory / "config.json").read_text() == (out / "config.json").read_text()
    # The model itself is not changed, and if it is that is another run.
    assert open_model(model).check_finite() == open_model(source).check_finite()
    assert perplexity(model, TOKENS) == perplexity(source, TOKENS)
    assert prune_model(model, out, recipe).kept
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(FolderError, match=r"(?s)these differ:.*weights"):
        prune_model(model, out, recipe)


def test_the_tokenizer_of_a_model_in_memory_is_that_of_its_folder(tmp_path, rng):
    from transformers import AutoModelForCausalLM

    config = tiny_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config, rng))
    (source / "tokenizer.json").write_text(TOKENIZER)
    model = AutoModelForCausalLM.from_pretrained(source)
    recipe = Recipe(method="wanda", calibration=["the quick brown fox " * 50], windows=2, seqlen=24)
    reports = [prune_model(each, tmp_path / f"out{i}", recipe) for i, each in enumerate((model, source))]
    assert reports[0].calibration == reports[1].calibration
    assert (tmp_path / "out0" / "tokenizer.json").read_text() == TOKENIZER
    model.name_or_path = ""
    with pytest.raises(ModelError, match=r"comes without a tokenizer.*set model\.name_or_path"):
        prune_model(model, tmp_path / "out", recipe)


def test_what_cannot_be_pruned_from_memory_says_why():
    import torch

    quantised = build_model("qwen2")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    for model, words in [
        (torch.nn.Linear(2, 2), "Linear is a torch module and no transformers model.*pruning.prune_module"),
        (quantised, "the Qwen2ForCausalLM is quantised: load the model that it was made from"),
        (build_model("qwen2").to("meta"), r"39 tensors .* cannot be read: .*weight \(on the meta device\)"),
        (build_model("qwen2").to(torch.float8_e4m3fn), r"embed_tokens.weight \(float8_e4m3fn\).*in float32, float16"),
    ]:
        with pytest.raises(ModelError, match=words):
            open_model(model)


@EVERY
def test_a_smaller_model_is_loaded_with_our_logits(name, tmp_path):
    model = open_model(saved(name, "bfloat16", tmp_path / "source"))
    folder = write_smaller(model, reduced(model), tmp_path / "out")
    loaded = reference(folder)
    assert loaded.config.get_text_config().num_hidden_layers == 2
    np.testing.assert_allclose(run(load_decoder(folder), TOKENS), reference_logits(loaded, TOKENS), atol=1e-4)


def write_tiny(folder: Path, architecture: str, rng: np.random.Generator) -> StreamedModel:
    # transformers takes no head_dim from a Qwen3 file and no scale of scores from a Gemma file, but these defaults, and
    # reads no scaling of rotary embeddings.
    heads = {"qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 256}, "gemma3": {"head_dim": 256}}
    config = CONFIGS[architecture] | heads.get(architecture, {})
    # It counts tokens, not rows, where the file names no vocabulary.
    values = {"rope.scaling.type": None, "rope.scaling.factor": None, "vocab_size": config["vocab_size"]}
    changes = {f"{architecture}.{name}": value for name, value in values.items()}
    kind, tensors = GGMLQuantizationType.Q8_0, random_tensors(config, rng)
    return open_model(write_architecture(folder / "m.gguf", architecture, config, tensors, kind, changes))


def rounded(value: Any) -> Any:
    """A float as the shortest decimal of its float32, which is what a file holds."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


@pytest.mark.parametrize("architecture", sorted(REFUSED_IN_GGUF))
def test_transformers_refuses_a_gguf_file_and_loads_the_folder_made_of_it(tmp_path, rng, architecture, proof):
    from transformers import AutoModelForCausalLM

    model, out = write_tiny(tmp_path, architecture, rng), tmp_path / "out"
    with pytest.raises((ValueError, RuntimeError), match=r"not supported yet|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    copy_model(model, out)
    tokens = rng.integers(0, 320, (2, 40))
    np.testing.assert_allclose(run(model.decoder(), tokens), reference_logits(reference(out), tokens), atol=1e-4)
    proof(model.source.config["model_type"], "gguf", case=architecture)


@pytest.mark.parametrize("architecture", IN_GGUF)
def test_transformers_reads_the_same_model_and_tokens_from_gguf(tmp_path, rng, architecture, proof):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, file = write_tiny(tmp_path, architecture, rng), {"gguf_file": "m.gguf"}
    source, out = model.source, tmp_path / "out"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **file).eval()
    assert type(theirs).__name__ == source.config["architectures"][0]
    state = theirs.state_dict()
    assert set(state) - {"lm_head.weight"} == set(source.tensors) - {"lm_head.weight"}
    for name in source.tensors:
        np.testing.assert_array_equal(source.read(name), state[name].numpy(), err_msg=name)
    skipped = SPELLED_OTHERWISE | UNREAD_IN_GGUF.get(architecture, set())
    expected = {name: value for name, value in source.config.items() if name not in skipped}
    assert {name: rounded(getattr(theirs.config, name)) for name in expected} == expected
    # A folder written from what was read is the same model.
    copy_model(model, out)
    tokens = rng.integers(0, 320, (2, 40))
    logits = reference_logits(theirs, tokens)
    copied = reference(out, attn_implementation=theirs.config._attn_implementation)
    np.testing.assert_allclose(reference_logits(copied, tokens), logits, rtol=1.3e-6, atol=1e-5)

    ours, exported = load_tokenizer(source), AutoTokenizer.from_pretrained(out)
    read = AutoTokenizer.from_pretrained(tmp_path, **file)
    for text in TRICKY:
        ids = ours.encode(text).ids
        assert exported(text)["input_ids"] == ids, text
        assert exported.decode(ids) == ours.decode(ids, skip_special_tokens=False), text
        # transformers leaves Qwen's normalisation out when it reads a GGUF file.
        if "\u0301" not in text:
            assert read(text)["input_ids"] == ids, text
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 2, 0)
    proof(source.config["model_type"], "gguf", case=architecture)


def test_llama_2_tokens_and_what_lies_beside_them(tmp_path, rng):
    from transformers import AutoTokenizer, GenerationConfig

    template = "{% for m in messages %}<b>{{ m['content'] }}{% endfor %}"
    metadata = sentencepiece_metadata(prefix=True) | {"tokenizer.chat_template": template}
    metadata |= {"tokenizer.ggml.merges": None, "tokenizer.ggml.add_bos_token": True}
    config, file = CONFIGS["llama"], tmp_path / "m.gguf"
    model = open_model(write_architecture(file, "llama", config, random_tensors(config, rng), changes=metadata))
    copy_model(model, tmp_path / "out")
    ours, theirs = load_tokenizer(model.source), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TRICKY:
        assert exported(text)["input_ids"] == ours.encode(text).ids, text
        # transformers puts no prefix before text that begins with a space or follows a special token.
        if not text.startswith(" ") and not any(mark in text for mark in ("<", "\n\n", "  ")):
            assert theirs(text)["input_ids"] == ours.encode(text).ids, text
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 2, 0)
    assert exported.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<b>he"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == config["eos_token_id"]


TEXT = (
    "The harbour lay quiet in the early light. In 1936 two hundred ships called here; by the end of the century "
    "hardly thirty did, and the cranes along the northern quay had long been sold for scrap."
)


def test_from_gguf_the_bundled_model_gives_the_reference_logits_and_tokens(tmp_path):
    from transformers import AutoTokenizer

    model = open_model(models.bundled_model())
    copy_model(model, tmp_path)
    tokens = models.encode_text(load_tokenizer(model.source), TEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokens.tolist()
    assert theirs.decode(tokens) == TEXT
    expected = reference_logits(tmp_path, tokens[None])
    np.testing.assert_allclose(run(model.decoder(), tokens[None]), expected, atol=2e-3, rtol=1e-4)


def test_made_smaller_and_pruned_the_bundled_model_gives_the_reference_logits_and_keeps_its_tokenizer(tmp_path):
    import torch
    from transformers import AutoTokenizer

    model = open_model(models.bundled_model())
    sizes = replace(models.sizes_of(model), channels=64, kv_heads=models.possible_kv_heads(model)[0], blocks=(3,))
    folder = write_smaller(model, sizes, tmp_path / "small")
    recipe = Recipe(preset="paper", calibration="pydoc", windows=2, seqlen=256, heldout_windows=0, score="none")
    prune_model(folder, tmp_path / "out", recipe)
    tokenizer, loaded = AutoTokenizer.from_pretrained(tmp_path / "out"), reference(tmp_path / "out")
    tokens = np.array(tokenizer(TEXT, return_tensors="np")["input_ids"])
    assert tokenizer.decode(tokens[0]) == TEXT
    ours = run(load_decoder(tmp_path / "out"), tokens)
    np.testing.assert_allclose(ours, reference_logits(loaded, tokens), atol=1e-3)
    linears = [part for part in loaded.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 7
    assert all(int((part.weight == 0).sum()) == part.weight.numel() // 2 for part in linears)

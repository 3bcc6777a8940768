"""Whole runs that put linears on grids of few bits: CASES of a source, a recipe and an output, and FACTS of them."""

import dataclasses
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from sparseopt.layers.bits import multiples_of, parse_bits
from sparseopt.models import ModelError, load_decoder, load_tokenizer, open_model
from sparseopt.models.files.gguf.header import read_header
from sparseopt.models.files.safetensors import read_part
from sparseopt.pruning import PruneReport, Recipe, ShrinkRecipe, prune_model
from sparseopt.pruning.base.records import GridRecord, Passed
from sparseopt.pruning.run.facts import model_facts
from sparseopt.pruning.run.output_form import run_folder_of
from sparseopt.system import files
from sparseopt.system.files import DiskError
from sparseopt.system.run_folder import FolderError
from tests.jitted import run
from tests.models.tiny import CONFIGS, random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.whole_runs import SQUARE, TOKENIZER, Broken, breaking_at, ended_by, tensors_of, write_model

HELDOUT = 2
PLAIN = {"method": "wanda", "score": "none"}


class Case(NamedTuple):
    """A run: a model of `whole_runs`, or one in a GGUF file of this type, a recipe, and the grids of its linears."""

    model: str | Kind
    output: str
    grids: set[str]
    recipe: dict[str, Any]


def of(model, output, *grids, **recipe):
    return Case(model, output, set(grids), {"method": "wanda"} | recipe)


SMALLER = {"channels": 0.5, "multiple": 32, "layers": 0.67}
CASES = {
    "zeros": of("square", "out.gguf", "q4_0", bits="q4_0"),
    "dense": of("bfloat16", "out.gguf", "q8_0", bits="q8_0", sparsity=0.0, head_bits="q4_0"),
    "trained": of("biased", "out.gguf", "q5_0", bits="q5_0", pattern="2:4", train_epochs=1, propagate=0.5),
    "smaller": of("llama", "out.gguf", "q4_0", bits="q4_0", train_epochs=1, **SMALLER),
    "of a file": of(Kind.Q4_1, "out.gguf", "q4_0", ignore=["k_proj", "re:.*layers.1"]),
    "other bits, of a file": of(Kind.Q5_1, "out.gguf", "q8_0", bits="q8_0", ignore=["k_proj"]),
    "fewer blocks, of a file": of(Kind.Q4_1, "out.gguf", train_epochs=0, repair=False, **SMALLER | {"channels": 1.0}),
    "a repair, of a file": of(Kind.Q4_1, "out.gguf", "q4_0", train_epochs=0, **SMALLER | {"channels": 1.0}),
    "a folder": of("square", "out", "int8", bits="int8", train_epochs=1),
    "a folder of experts": of("experts", "out", "int4:8", bits="int4:8", min_expert_tokens=1),
}  # fmt: skip
QUICK = ("zeros", "trained", "smaller", "of a file", "fewer blocks, of a file", "a folder")


class Whole(NamedTuple):
    """A case that was run to its end."""

    case: Case
    source: Path
    recipe: Recipe | ShrinkRecipe
    report: PruneReport
    output: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models, tokens):
    """`whole(name)`: the unbroken run of a case, made once."""

    @cache
    def made(name):
        case, place = CASES[name], tmp_path_factory.mktemp("few")
        if isinstance(case.model, Kind):
            source = write_gguf(place / "in.gguf", tiny_config(), tensors_of(), case.model)
        else:
            source = models(case.model)
        fields = {"calibration": tokens, "heldout_windows": HELDOUT, "score": "none"} | case.recipe
        recipe = (ShrinkRecipe if "channels" in fields else Recipe)(**fields)
        return Whole(case, source, recipe, prune_model(source, place / case.output, recipe), place / case.output)

    return made


def weights(path):
    model = open_model(path)
    return {key.removesuffix(".weight"): model.stored(key) for key in model.linear_keys()}


def in_target(done, layer):
    """The name in the new model of a linear of the dense one."""
    if done.report.shape is None:
        return layer
    parts = layer.split(".")
    return ".".join([*parts[:2], str(done.report.shape.blocks.index(int(parts[2]))), *parts[3:]])


def linears_lie_on_their_grids(done):
    """Those with a record of it, exactly; zeros stay, and a weight that was kept may become one."""
    stored, grids = weights(done.output), done.report.grids
    assert {record.bits for record in grids} == done.case.grids
    if done.recipe.bits is not None:
        ignored = ("k_proj",) if done.recipe.get("ignore") else ()
        assert {in_target(done, record.layer) for record in grids} == {n for n in stored if not n.endswith(ignored)}
    for record in grids:
        weight = stored[in_target(done, record.layer)]
        multiples, scales = multiples_of(weight, parse_bits(record.bits))
        apart = scales.astype(np.float32)[..., None] * multiples.reshape(*scales.shape, -1)
        assert np.array_equal(apart.reshape(weight.shape), weight)
    for record in done.report.layers if done.report.shape is None else ():
        assert np.count_nonzero(stored[record.layer] == 0) >= record.zeros == round(done.recipe.sparsity * record.size)
        if done.recipe.pattern == "2:4":
            assert np.count_nonzero(stored[record.layer].reshape(-1, 4), axis=1).max() == 2


def a_grid_costs_less_than_plain_rounding(done):
    for record in done.report.grids:
        assert 0 <= record.relative_error <= record.rounded_error < 0.2
    if done.report.grids:
        better = [r.relative_error < 0.8 * r.rounded_error for r in done.report.grids if r.rounded_error]
        assert np.mean(better) > 0.5


def the_model_is_near_the_dense_one_with_its_tokens(done):
    ids = done.recipe.calibration[:1]
    logits, dense = (np.asarray(run(load_decoder(path), ids)) for path in (done.output, done.source))
    assert np.isfinite(logits).all()
    assert np.mean((logits - dense) ** 2) < 2 * np.mean(dense**2)
    before, after = (load_tokenizer(open_model(path).source) for path in (done.source, done.output))
    assert after.encode("the quick fox, 12").ids == before.encode("the quick fox, 12").ids


def it_is_not_run_again(done):
    before = files_of(done.output.parent)
    report = prune_model(done.source, done.output, done.recipe)
    assert report.kept
    assert report.grids == done.report.grids
    assert files_of(done.output.parent) == before


def files_of(place):
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in place.rglob("*") if file.is_file()}


FACTS = (
    linears_lie_on_their_grids,
    a_grid_costs_less_than_plain_rounding,
    the_model_is_near_the_dense_one_with_its_tokens,
    it_is_not_run_again,
)
MARKED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in CASES]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
@pytest.mark.parametrize("name", MARKED)
def test_of_every_run_in_few_bits_every_fact_holds(whole, name, fact):
    fact(whole(name))


@pytest.mark.parametrize("name", ["trained", "of a file", "a folder"])
def test_a_run_in_few_bits_that_was_interrupted_gives_the_same_bytes(tmp_path, whole, name):
    done = whole(name)
    output = tmp_path / done.case.output
    for end in (breaking_at(2), ended_by(GridRecord, 1), ended_by(GridRecord, len(done.report.grids))):
        with pytest.raises(Broken):
            prune_model(done.source, output, done.recipe, observer=end)
        assert not output.is_file()
    report = prune_model(done.source, output, done.recipe)
    resumed, unbroken = (
        [dataclasses.replace(record, seconds=0, compile_seconds=0) for record in each.grids]
        for each in (report, done.report)
    )
    assert resumed == unbroken
    shards = sorted(file.name for file in run_folder_of(done.output).glob("model*"))
    assert shards
    for shard in shards:
        assert (run_folder_of(output) / shard).read_bytes() == (run_folder_of(done.output) / shard).read_bytes(), shard
    if output.is_file():
        assert output.read_bytes() == done.output.read_bytes()


def content(tensor):
    stored = read_part(tensor.file, np.dtype(np.uint8), tensor.stored_bytes, tensor.start).tobytes()
    return tensor.kind, tensor.shape, stored


NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
NAMES |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
NAMES |= {"ffn_down": "mlp.down_proj"}


@pytest.mark.parametrize("name", [each for each in MARKED if "of a file" in each.values[0]])
def test_of_a_file_all_that_does_not_change_is_copied_byte_for_byte(whole, name):
    done = whole(name)
    before, after = read_header(done.source), read_header(done.output)
    blocks = range(3) if done.report.shape is None else done.report.shape.blocks
    touched = {record.layer for record in [*done.report.layers, *done.report.grids]}
    same = changed = 0
    for key, tensor in after.tensors.items():
        place, number, part = [*key.split("."), "", ""][:3]
        if place == "blk" and f"model.layers.{number}.{NAMES.get(part)}" in touched:
            assert tensor.kind.name.lower() in done.case.grids
            changed += 1
        else:
            old = ".".join([place, str(blocks[int(number)]), *key.split(".")[2:]]) if place == "blk" else key
            assert content(tensor) == content(before.tensors[old]), key
            same += 1
    assert same > 2
    assert (changed > 0) == bool(done.case.grids)
    apart = {"general.file_type", "general.quantization_version"}
    if done.report.shape is not None:
        apart |= {"llama.block_count"}
        assert after.metadata["llama.block_count"] == len(blocks)
    for key, value in before.values.items():
        assert key in apart or after.values[key] == value, key


def test_a_file_that_appears_before_the_end_or_after_it_is_kept(tmp_path, source, whole):
    """Put there while the run was broken off behind its last block, while it works, and when it is finished."""
    done, output = whole("zeros"), tmp_path / "out.gguf"
    with pytest.raises(Broken):
        prune_model(source, output, done.recipe, observer=ended_by(Passed, 3))
    output.write_text("mine")
    with pytest.raises(ModelError, match=r"out\.gguf exists .* start the same command"):
        prune_model(source, output, done.recipe)
    assert output.read_text() == "mine"
    output.unlink()
    assert prune_model(source, output, done.recipe).resumed_blocks == 3
    # Killed before its end was noted.
    summary = run_folder_of(output) / "summary.json"
    noted = summary.read_text()
    summary.unlink()
    assert not prune_model(source, output, done.recipe).kept
    assert json.loads(summary.read_text())["stored_bytes"] == json.loads(noted)["stored_bytes"]
    output.write_text("mine")
    with pytest.raises(FolderError, match=r"out\.gguf is not the file .* move it"):
        prune_model(source, output, done.recipe)
    assert output.read_text() == "mine"


def test_a_disk_that_is_full_at_the_end_leaves_the_shards_and_no_file(tmp_path, source, monkeypatch, whole):
    output, recipe, plain = tmp_path / "out.gguf", whole("zeros").recipe, files.temporary_of

    def full(file):
        if file == output:
            raise OSError(28, "No space left on device")
        return plain(file)

    with monkeypatch.context() as patch:
        patch.setattr(files, "temporary_of", full)
        with pytest.raises((DiskError, OSError), match="No space left"):
            prune_model(source, output, recipe)
    assert not output.exists()
    assert prune_model(source, output, recipe).resumed_blocks == 3
    assert output.read_bytes() == whole("zeros").output.read_bytes()


# A tensor and what it is multiplied with, and two parts of what is told.
QUERY, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
UNSCALED = [
    (QUERY, 1e7, "q4_0", "weights up to 52"),
    (QUERY, 1e-9, "q4_0", "make 1,024 weights 0"),
    (EMBEDDING, 1e8, "q8_0", "weights up to 8.3"),
    (EMBEDDING, 1e-9, "q8_0", "weights 0"),
]


@pytest.mark.parametrize(("key", "factor", "bits", "given"), UNSCALED)
def test_weights_that_no_scale_in_half_precision_holds_are_named(tmp_path, tokens, key, factor, bits, given):
    tensors = tensors_of("square")
    tensors[key] = tensors[key] * np.float32(factor)
    source = write_model(tmp_path / "in", "square", tensors)
    with pytest.raises(ModelError, match=f"{key}: bits '{bits}' .*{given}"):
        prune_model(source, tmp_path / "out.gguf", Recipe(calibration=tokens, bits="q4_0", sparsity=0.0, **PLAIN))
    assert not (tmp_path / "out.gguf").exists()


def test_types_without_a_grid_as_wide_take_bits_and_floats_the_dtype_asked_for(tmp_path, tokens):
    source = write_gguf(tmp_path / "in.gguf", tiny_config(**SQUARE), tensors_of("square"), Kind.MXFP4)
    recipe = Recipe(calibration=tokens, **PLAIN)
    with pytest.raises(ModelError, match=r"type MXFP4, .*: give bits"):
        prune_model(source, tmp_path / "out.gguf", recipe)
    update = {"bits": "q4_0", "ignore": ["k_proj", "v_proj", "mlp.up_proj"]}
    prune_model(source, tmp_path / "out.gguf", recipe.model_copy(update=update))
    kinds = {name: tensor.kind for name, tensor in read_header(tmp_path / "out.gguf").tensors.items()}
    assert (kinds["blk.0.attn_k.weight"], kinds["blk.0.attn_q.weight"]) == (Kind.MXFP4, Kind.Q4_0)
    source = write_gguf(tmp_path / "floats.gguf", tiny_config(**SQUARE), tensors_of("square"))
    prune_model(source, tmp_path / "half.gguf", recipe.model_copy(update={"dtype": "float16", "ignore": ["k_proj"]}))
    kinds = {len(tensor.shape): tensor.kind for tensor in read_header(tmp_path / "half.gguf").tensors.values()}
    assert kinds == {1: Kind.F32, 2: Kind.F16}


def test_an_effort_that_distributes_zeros_and_trains_on_leaves_that_out_without_zeros(tmp_path, source, tokens):
    told, recipe = [], Recipe(effort="most", calibration=tokens, bits="q4_0", sparsity=0.0, score="none")
    report = prune_model(source, tmp_path / "out.gguf", recipe, observer=lambda event, *_: told.append(event))
    # Nothing is measured for the zeros, and weights on a grid are trained block by block alone.
    assert "survey, pass" not in told
    assert (report.layers, len(report.grids), len(report.blocks)) == ([], 21, 3)
    assert (report.distilled, report.recipe["distil_epochs"]) == (None, 0)
    assert all(record.heldout_best <= 1.05 * record.heldout_first for record in report.blocks)
    card = (run_folder_of(tmp_path / "out.gguf") / "README.md").read_text()
    assert ", in few bits" in card
    assert "- pruned" not in card
    zeros = sum(record.zeros for record in report.grids) / sum(record.size for record in report.grids)
    assert f"21 linear layers in q4_0, with {zeros:.2%} of the weights zero afterwards" in card


FEWER = {"multiple": 32, "bits": "q8_0", "train_epochs": 0}
# The model, the output, fields of the recipe, and two parts of what is told.
REJECTED = [
    ("llama", "out", {"bits": "q4_0"}, "bits 'q4_0'", ".gguf"),
    ("llama", "out.gguf", {"bits": "int8"}, "bits 'int8'", "q8_0"),
    ("llama", "out.gguf", {"bits": "q4_1"}, "bits 'q4_1'", "offset"),
    ("llama", ".gguf", {"bits": "q4_0"}, "would be a folder", "NAME.gguf"),
    ("llama", "model.safetensors", {}, "would be a folder", "model.safetensors"),
    ("llama", "out", {"bits": "int4:48"}, "each 48 inputs", "32, 64 inputs"),
    ("llama", "out", {"head_bits": "q8_0"}, "head_bits", "GGUF"),
    ("llama", "out.gguf", {"bits": "q4_0", "distil_epochs": 1}, "trains the whole model", "grids"),
    ("llama", "out.gguf", {"bits": "q4_0", "sparsity": 0.0, "allocation": "curves"}, "allocation", "'curves'"),
    (
        "llama",
        "a.gguf",
        {"bits": "q4_0", "sparsity": 0.0, "output_weights": "gradient"},
        "output_weights",
        "'gradient'",
    ),
    ("experts", "out.gguf", {"bits": "q4_0"}, "mixtral", "GGUF"),
    ("qwen2", "out.gguf", {"parameters": 0.8} | FEWER, "parameters", "channels or layers"),
    ("smollm3", "out.gguf", {"layers": 0.8} | FEWER, "measured losses choose", "GGUF"),
    ("llama", "taken.gguf", {"bits": "q4_0"}, "taken.gguf exists", "not of this run"),
    ("llama", "folder.gguf", {"bits": "q4_0"}, "folder.gguf exists", "not of this run"),
]


@pytest.mark.parametrize(("model", "output", "fields", "field", "given"), REJECTED)
def test_what_cannot_be_stored_is_rejected_before_any_work(
    tmp_path, models, tokens, model, output, fields, field, given
):
    (tmp_path / "taken.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    if model in ("llama", "experts"):
        source = models(model)
    else:
        config = CONFIGS[model] | {"vocab_size": 320}
        tensors = random_tensors(config, np.random.default_rng(1))
        source = write_folder(tmp_path.with_name(f"{tmp_path.name}-in"), config, tensors)
    told, make = [], ShrinkRecipe if "multiple" in fields else Recipe
    with pytest.raises((ValueError, ModelError, FolderError), match=field) as caught:
        prune_model(source, tmp_path / output, make(method="wanda", calibration=tokens, **fields), observer=told.append)
    assert given in str(caught.value)
    assert told == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.gguf", "taken.gguf"]
    assert (tmp_path / "taken.gguf").read_text() == "mine"


def test_a_linear_that_no_group_tiles_stays_as_it_is(tmp_path, tokens):
    config = tiny_config(intermediate_size=48, num_hidden_layers=1)
    source = write_folder(tmp_path / "in", config, random_tensors(config, np.random.default_rng(2)))
    (source / "tokenizer.json").write_text(TOKENIZER)
    recipe = Recipe(calibration=tokens, bits="q8_0", sparsity=0.0, **PLAIN)
    report = prune_model(source, tmp_path / "out.gguf", recipe)
    kinds = {name: tensor.kind for name, tensor in read_header(tmp_path / "out.gguf").tensors.items()}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == (Kind.F32, Kind.Q8_0)
    key = "model.layers.0.mlp.down_proj.weight"
    assert f"{key.removesuffix('.weight')}" not in {record.layer for record in report.grids}
    assert list(report.in_floats) == [key]
    assert dict(model_facts(report))["few bits"].endswith(f" stay in floats: {key}")
    before, after = open_model(source), open_model(tmp_path / "out.gguf")
    assert after.stored(key).tobytes() == before.stored(key).tobytes()


def test_bits_are_in_records_summary_and_card(whole):
    done = whole("zeros")
    folder = run_folder_of(done.output)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    kinds = [kind for kind, _ in itertools.groupby(line["kind"] for line in lines)]
    assert kinds == ["layer", "grid"] * 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["mean_grid_error"] < summary["mean_rounded_error"]
    card = (folder / "README.md").read_text()
    assert "21 linear layers in q4_0" in card
    assert "--output FILE.gguf" in card
    assert "library_name: gguf" in card

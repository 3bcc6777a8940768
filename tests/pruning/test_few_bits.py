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

from sparseopt.layers.bits import BITS, multiples_of, parse_bits
from sparseopt.models import ModelError, load_decoder, load_tokenizer, open_model
from sparseopt.models.files.gguf.header import read_header
from sparseopt.models.files.safetensors import read_part
from sparseopt.pruning import PruneReport, Recipe, ShrinkRecipe, prune_model
from sparseopt.pruning.base.records import BlockRecord, GridRecord, Passed
from sparseopt.pruning.run.facts import model_facts
from sparseopt.pruning.run.output_form import run_folder_of
from sparseopt.system import files
from sparseopt.system.files import DiskError
from sparseopt.system.run_folder import FolderError
from tests.jitted import run
from tests.models.tiny import CONFIGS, random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.whole_runs import TOKENIZER, Broken, breaking_at, ended_by, tensors_of, write_model

HELDOUT = 2


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
    "zeros": of("llama", "out.gguf", "q4_0", bits="q4_0"),
    "2:4": of("llama", "out.gguf", "q4_0", bits="q4_0", pattern="2:4"),
    "dense": of("bfloat16", "out.gguf", "q8_0", bits="q8_0", sparsity=0.0, head_bits="q4_0"),
    "trained": of("biased", "out.gguf", "q5_0", bits="q5_0", pattern="2:4", train_epochs=1, propagate=0.5),
    "smaller": of("llama", "out.gguf", "q4_0", bits="q4_0", train_epochs=1, **SMALLER),
    "of a file": of(Kind.Q4_1, "out.gguf", "q4_0", ignore=["k_proj", "re:.*layers.1"]),
    "trained, of a file": of(Kind.Q5_1, "out.gguf", "q5_0", ignore=["k_proj"], train_epochs=1),
    "other bits, of a file": of(Kind.Q5_1, "out.gguf", "q8_0", bits="q8_0", ignore=["k_proj"]),
    "fewer blocks, of a file": of(Kind.Q4_1, "out.gguf", train_epochs=0, **SMALLER | {"channels": 1.0}),
    "a folder": of("llama", "out", "int8", bits="int8", train_epochs=1),
    "a folder of experts": of("experts", "out", "int4:8", bits="int4:8", min_expert_tokens=1),
}  # fmt: skip
QUICK = ("zeros", "trained", "smaller", "of a file", "fewer blocks, of a file", "a folder")


class Whole(NamedTuple):
    """A case that was run to its end."""

    case: Case
    source: Path
    recipe: Recipe | ShrinkRecipe
    report: PruneReport

    @property
    def output(self):
        return self.report.output

    @property
    def records(self):
        return [*self.report.layers, *self.report.grids]


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
        return Whole(case, source, recipe, prune_model(source, place / case.output, recipe))

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


def the_model_is_near_the_floats(done):
    """Those of the same recipe without bits."""
    ids = done.recipe.calibration[:1]
    logits = np.asarray(run(load_decoder(done.output), ids))
    assert np.isfinite(logits).all()
    dense = np.asarray(run(load_decoder(done.source), ids))
    assert np.mean((logits - dense) ** 2) < 2 * np.mean(dense**2)


def tokens_are_those_of_the_source(done):
    before, after = (load_tokenizer(open_model(path).source) for path in (done.source, done.output))
    text = "the quick brown fox, 12"
    assert after.encode(text).ids == before.encode(text).ids


def it_is_not_run_again(done):
    place = done.output.parent
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in place.rglob("*") if file.is_file()}
    report = prune_model(done.source, done.output, done.recipe)
    assert report.kept
    assert report.grids == done.report.grids
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in place.rglob("*") if file.is_file()} == before


FACTS = (
    linears_lie_on_their_grids,
    a_grid_costs_less_than_plain_rounding,
    the_model_is_near_the_floats,
    tokens_are_those_of_the_source,
    it_is_not_run_again,
)
MARKED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in CASES]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
@pytest.mark.parametrize("name", MARKED)
def test_of_every_run_in_few_bits_every_fact_holds(whole, name, fact):
    fact(whole(name))


@pytest.mark.parametrize("name", [each for each in MARKED if each.values[0] not in ("dense", "smaller")])
def test_a_run_in_few_bits_that_was_interrupted_gives_the_same_bytes(tmp_path, whole, name):
    done = whole(name)
    output, records = tmp_path / done.case.output, done.report
    ends = [breaking_at(2)] if records.layers else [ended_by(Passed)]
    ends += [ended_by(GridRecord, count) for count in (1, len(records.grids)) if records.grids]
    for end in ends:
        with pytest.raises(Broken):
            prune_model(done.source, output, done.recipe, observer=end)
        assert not output.is_file()
    report = prune_model(done.source, output, done.recipe)
    timeless = [
        [dataclasses.replace(r, seconds=0, compile_seconds=0) for r in each.grids] for each in (report, records)
    ]
    assert timeless[0] == timeless[1]
    shards = [file.name for file in run_folder_of(done.output).glob("model*")]
    pairs = [(run_folder_of(output) / name, run_folder_of(done.output) / name) for name in shards]
    for one, other in [*pairs, *([(output, done.output)] if output.is_file() else [])]:
        assert one.read_bytes() == other.read_bytes(), one.name


def raw(tensor):
    return read_part(tensor.file, np.dtype(np.uint8), tensor.stored_bytes, tensor.start).tobytes()


@pytest.mark.parametrize("name", [each for each in MARKED if "of a file" in each.values[0]])
def test_of_a_file_all_that_does_not_change_is_copied_byte_for_byte(whole, name):
    done = whole(name)
    before, after = read_header(done.source), read_header(done.output)
    touched = {record.layer for record in done.records}
    kept = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    kept |= {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
    same = changed = 0
    for gguf_name, tensor in after.tensors.items():
        parts = gguf_name.split(".")
        old = gguf_name
        if done.report.shape is not None and parts[0] == "blk":
            old = ".".join([parts[0], str(done.report.shape.blocks[int(parts[1])]), *parts[2:]])
        ending = kept.get(parts[2], "norm") if parts[0] == "blk" else "outer"
        part = "self_attn" if ending in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        if parts[0] == "blk" and f"model.layers.{parts[1]}.{part}.{ending}" in touched:
            assert tensor.kind.name.lower() in done.case.grids
            changed += 1
        elif not (ending == "norm" and done.recipe.train_epochs):
            assert (tensor.kind, tensor.shape) == (before.tensors[old].kind, before.tensors[old].shape)
            assert raw(tensor) == raw(before.tensors[old]), gguf_name
            same += 1
    assert same > 2
    assert (changed > 0) == bool(done.case.grids)
    apart = {"general.file_type", "general.quantization_version"}
    if done.report.shape is not None:
        apart |= {"llama.block_count"}
        assert after.metadata["llama.block_count"] == len(done.report.shape.blocks)
    for key, value in before.values.items():
        assert key in apart or after.values[key] == value, key


def test_a_file_of_somebody_else_is_never_replaced(tmp_path, source, tokens):
    output, recipe = tmp_path / "out.gguf", Recipe(method="wanda", calibration=tokens, bits="q4_0", score="none")
    output.write_text("mine")
    with pytest.raises(FolderError, match=r"out\.gguf exists and is not of this run; choose another output or remove"):
        prune_model(source, output, recipe)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert output.read_text() == "mine"


def test_a_file_that_appears_before_the_end_or_after_it_is_kept(tmp_path, source, whole):
    """Put there while the run was broken off behind its last block, while it works, and when it is finished."""
    done, output = whole("zeros"), tmp_path / "out.gguf"
    with pytest.raises(Broken):
        prune_model(source, output, done.recipe, observer=ended_by(Passed, 3))
    output.write_text("mine")
    with pytest.raises(
        ModelError, match=r"out\.gguf exists and is not of this run: move it, and start the same command"
    ):
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
    with pytest.raises(FolderError, match=r"out\.gguf is not the file that its run in .*run wrote: move it"):
        prune_model(source, output, done.recipe)
    assert output.read_text() == "mine"


def test_a_folder_in_place_of_the_file_is_refused_before_any_work(tmp_path, source, whole):
    (tmp_path / "out.gguf").mkdir()
    with pytest.raises(FolderError, match=r"out\.gguf exists and is not of this run"):
        prune_model(source, tmp_path / "out.gguf", whole("zeros").recipe)


@pytest.mark.parametrize(
    ("key", "factor", "words"),
    [
        (
            "model.layers.1.self_attn.q_proj.weight",
            1e7,
            r"1\.self_attn\.q_proj\.weight: bits 'q4_0' hold weights up to 52",
        ),
        (
            "model.layers.1.self_attn.q_proj.weight",
            1e-9,
            r"q_proj\.weight: bits 'q4_0' make 1,024 weights 0, which are",
        ),
        ("model.embed_tokens.weight", 1e8, r"model\.embed_tokens\.weight: bits 'q8_0' hold weights up to 8.3"),
        ("model.embed_tokens.weight", 1e-9, r"model\.embed_tokens\.weight: bits 'q8_0' make 1,[0-9]* weights 0"),
    ],
)
def test_weights_that_no_scale_in_half_precision_holds_are_named(tmp_path, tokens, key, factor, words):
    tensors = tensors_of()
    tensors[key] = tensors[key] * np.float32(factor)
    source = write_model(tmp_path / "in", tensors=tensors)
    recipe = Recipe(method="wanda", calibration=tokens, sparsity=0.0, bits="q4_0", score="none")
    with pytest.raises(ModelError, match=words):
        prune_model(source, tmp_path / "out.gguf", recipe)
    assert not (tmp_path / "out.gguf").exists()


def test_floats_of_a_file_take_the_dtype_asked_for(tmp_path, tokens):
    source = write_gguf(tmp_path / "in.gguf", tiny_config(), tensors_of())
    recipe = Recipe(method="wanda", calibration=tokens, dtype="float16", ignore=["k_proj"], score="none")
    prune_model(source, tmp_path / "out.gguf", recipe)
    kinds = {len(tensor.shape): tensor.kind for tensor in read_header(tmp_path / "out.gguf").tensors.values()}
    assert kinds == {1: Kind.F32, 2: Kind.F16}


def test_types_without_a_grid_as_wide_are_pruned_into_folders_or_with_bits(tmp_path, tokens):
    source = write_gguf(tmp_path / "in.gguf", tiny_config(), tensors_of(), Kind.MXFP4)
    plain = {"method": "wanda", "calibration": tokens, "score": "none"}
    with pytest.raises(ModelError, match="has the type MXFP4, and no grid without an offset is as wide: give bits"):
        prune_model(source, tmp_path / "out.gguf", Recipe(**plain))
    prune_model(source, tmp_path / "folder", Recipe(**plain))
    prune_model(source, tmp_path / "out.gguf", Recipe(**plain, bits="q4_0", ignore=["k_proj", "v_proj", "mlp.up_proj"]))
    kinds = {name: tensor.kind for name, tensor in read_header(tmp_path / "out.gguf").tensors.items()}
    assert (kinds["blk.0.attn_k.weight"], kinds["blk.0.attn_q.weight"]) == (Kind.MXFP4, Kind.Q4_0)


def test_without_zeros_nothing_is_distributed(tmp_path, source, tokens):
    plain = {"calibration": tokens, "sparsity": 0.0, "bits": "q4_0", "score": "none"}
    with pytest.raises(ValueError, match="allocation 'curves' distributes zeros, and none are asked for: leave it out"):
        prune_model(source, tmp_path / "a.gguf", Recipe(method="wanda", allocation="curves", **plain))
    with pytest.raises(
        ValueError, match="output_weights 'gradient' compares the outputs that have zeros, and none are"
    ):
        prune_model(source, tmp_path / "a.gguf", Recipe(method="wanda", output_weights="gradient", **plain))
    told, recipe = [], Recipe(effort="most", train_epochs=0, **plain)
    report = prune_model(source, tmp_path / "b.gguf", recipe, observer=lambda event, *_: told.append(event))
    # And nothing is measured for the zeros.
    assert "survey, pass" not in told
    assert (report.layers, len(report.grids)) == ([], 21)
    card = (tmp_path / "b.gguf.run" / "README.md").read_text()
    assert ", in few bits" in card
    assert "- pruned" not in card
    zeros = sum(record.zeros for record in report.grids) / sum(record.size for record in report.grids)
    assert f"21 linear layers in q4_0, with {zeros:.2%} of the weights zero afterwards" in card


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("qwen2", {"parameters": 0.8}, r"parameters may choose what a GGUF file cannot have .*give channels or layers"),
        (
            "smollm3",
            {"layers": 0.8},
            r"measured losses choose the blocks that go, and a GGUF file cannot be without any",
        ),
    ],
)
def test_a_smaller_model_that_gguf_cannot_express_is_refused_before_any_work(tmp_path, tokens, family, fields, words):
    config = CONFIGS[family] | {"vocab_size": 320}
    source = write_folder(tmp_path / "in", config, random_tensors(config, np.random.default_rng(1)))
    recipe = ShrinkRecipe(method="wanda", calibration=tokens, multiple=32, bits="q8_0", **fields)
    told = []
    with pytest.raises(ModelError, match=words):
        prune_model(source, tmp_path / "out.gguf", recipe, observer=lambda *event: told.append(event))
    assert told == []


def test_a_disk_that_is_full_at_the_end_leaves_the_shards_and_no_file(tmp_path, source, tokens, monkeypatch, whole):
    output, recipe = tmp_path / "out.gguf", whole("zeros").recipe
    real = files.temporary_of

    def full(file):
        if file == output:
            raise OSError(28, "No space left on device")
        return real(file)

    with monkeypatch.context() as patch:
        patch.setattr(files, "temporary_of", full)
        with pytest.raises((DiskError, OSError), match="No space left"):
            prune_model(source, output, recipe)
    assert not output.exists()
    report = prune_model(source, output, recipe)
    assert report.resumed_blocks == 3
    assert output.read_bytes() == whole("zeros").output.read_bytes()


REFUSED = [
    ({"bits": "q4_0"}, "out", "bits 'q4_0' are stored in a GGUF file: give an output that ends in .gguf, or int8 or"),
    ({"bits": "int8"}, "out.gguf", "bits 'int8' are stored in a folder: leave .gguf out of the output, or give q8_0"),
    ({"bits": "q4_1"}, "out.gguf", "bits 'q4_1' moves zeros, since its grid has an offset"),
    ({"bits": "q4_k"}, "out.gguf", "moves zeros"),
    ({"bits": "q4_0"}, ".gguf", "would be a folder: give the name of a folder, or of a GGUF file, NAME.gguf"),
    ({}, "model.safetensors", "model.safetensors would be a folder: give the name of a folder"),
    ({"bits": "int4:48"}, "out", r"a scale for each 48 inputs, which tile no layer of this model, of 32, 64 inputs"),
    ({"head_bits": "q8_0"}, "out", "head_bits are stored in a GGUF file"),
    ({"bits": "q4_0", "distil_epochs": 1}, "out.gguf", "trains the whole model after its layers were put on grids"),
]


@pytest.mark.parametrize(("fields", "output", "words"), REFUSED)
def test_what_cannot_be_stored_is_refused_before_any_work(tmp_path, source, tokens, fields, output, words):
    with pytest.raises(ValueError, match=words):
        prune_model(source, tmp_path / output, Recipe(method="wanda", calibration=tokens, **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_gguf_does_not_name_is_refused_before_any_work(tmp_path, models, tokens):
    with pytest.raises(ValueError, match="mixtral"):
        prune_model(models("experts"), tmp_path / "out.gguf", Recipe(method="wanda", calibration=tokens, bits="q4_0"))
    assert list(tmp_path.iterdir()) == []


def test_an_effort_that_would_train_on_leaves_that_out(tmp_path, source, tokens):
    recipe = Recipe(effort="most", calibration=tokens, bits="q8_0", allocation="uniform", score="none")
    assert recipe.distillation is not None
    report = prune_model(source, tmp_path / "out.gguf", recipe)
    assert report.distilled is None
    assert report.recipe["distil_epochs"] == 0
    assert len(report.blocks) == 3
    first = [record for record in report.blocks if isinstance(record, BlockRecord)]
    assert all(record.heldout_best <= 1.05 * record.heldout_first for record in first)


def test_a_linear_that_no_group_tiles_stays_as_it_is(tmp_path, tokens):
    config = tiny_config(intermediate_size=48)
    source = tmp_path / "in"
    write_folder(source, config, random_tensors(config, np.random.default_rng(2)))
    (source / "tokenizer.json").write_text(TOKENIZER)
    recipe = Recipe(method="wanda", calibration=tokens, bits="q8_0", sparsity=0.0, score="none")
    report = prune_model(source, tmp_path / "out.gguf", recipe)
    kinds = {name: tensor.kind for name, tensor in read_header(tmp_path / "out.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == Kind.F32
    assert kinds["blk.0.ffn_up.weight"] == Kind.Q8_0
    assert not [record for record in report.grids if record.layer.endswith("down_proj")]
    named = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(3)]
    assert list(report.in_floats) == named
    told = dict(model_facts(report))["few bits"]
    assert told.endswith(f"; the other 3 stay in floats: {', '.join(named)}")
    before, after = open_model(source), open_model(tmp_path / "out.gguf")
    key = "model.layers.0.mlp.down_proj.weight"
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
    assert BITS["q4_0"].low == -8

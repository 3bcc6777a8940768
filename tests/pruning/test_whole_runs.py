"""Whole runs as a table: CASES of a model and a recipe, and FACTS that hold of every one of them.

A case is pruned once. Facts of a finished run read its folder; the three tests after them prune it again: broken off,
with activations on disk, and after others that measured the dense model.
"""

import dataclasses
import itertools
import json
import re
from functools import cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from sparseopt.layers.patterns import parse_pattern, pattern_count
from sparseopt.models import load_decoder, open_model, sizes_of
from sparseopt.pruning import (
    LayerRecord,
    PruneReport,
    Recipe,
    ShrinkRecipe,
    audit_pattern,
    audit_sparsity,
    perplexity,
    prune_model,
)
from sparseopt.pruning.base import activations
from sparseopt.pruning.base.activations import DiskBatches
from sparseopt.pruning.base.grams import gather_grams
from sparseopt.pruning.base.records import (
    BlockRecord,
    Calibration,
    DistillationRecord,
    Footprint,
    Passed,
    RemovalRecord,
    Replay,
)
from sparseopt.pruning.memory import phase_bytes
from sparseopt.pruning.recipe.allocation import default_bounds
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.pruning.run.card import CARD
from sparseopt.pruning.run.measured import forget
from sparseopt.system.run_folder import LOCK, RECORDS, plain
from tests.jitted import run
from tests.models.tiny import GOLDEN, write_golden
from tests.pruning.whole_runs import MODELS, TOKENIZER, Broken, breaking_at, ended_by, model_bytes, stored, written

HELDOUT = 2


class Case(NamedTuple):
    """A run, and what must come of it.

    Attributes:
        model: a name in `MODELS`, or of a golden file.
        recipe: fields; those of a `ShrinkRecipe` where `sizes` are given.
        left_out: matches the names of the linears that stay as they are.
        shares: of zeros, by the last part of a linear's name, where they are not the recipe's sparsity.
        sizes: channels, key-value groups, blocks and experts of a smaller model.
    """

    model: str
    recipe: dict[str, Any]
    left_out: str
    shares: dict[str, float]
    sizes: tuple[int | None, ...]


def of(model, *, left_out="^$", shares=(), sizes=(), **recipe):
    return Case(model, recipe, left_out, dict(shares), sizes)


SOME = {"re:.*layers.[01].self_attn.q_proj": 0.75, "layers.1.mlp.up_proj": 0, "re:.*layers.2": 0}
BOUNDED = {"method": "wanda", "sparsity": 0.6, "bounds": (0.4, 0.75)}
ALL_TRAINED = {"train_epochs": 1, "distil_epochs": 1}
CASES = {
    "tuned": of("llama", preset="tuned", sparsity=0.6),
    "paper": of("llama", preset="paper", sparsity=0.6),
    "weighted tokens": of("llama", method="wanda", weighting="residual"),
    "weighted outputs": of("llama", method="sparsegpt", sparsity=0.4, output_weights="gradient"),
    "propagated": of("llama", method="wanda", pattern="2:4", propagate=0.5),
    "per row": of("llama", method="wanda", pattern="per-row", sparsity=0.6),
    "1:4": of("llama", method="wanda", pattern="1:4", variants=1),
    "blocks": of("llama", method="wanda", pattern="block:4x8", sparsity=0.6),
    "groups": of("llama", method="wanda", pattern="group:8", sparsity=0.5),
    "trained": of(
        "llama", preset="tuned", train_epochs=2, propagate=0.5, variants=2, output_weights="gradient"
    ),
    "distilled": of("llama", method="wanda", distil_epochs=1),
    "bounds": of("llama", allocation="curves", **BOUNDED),
    "curves of blocks": of("llama", allocation="curves", pattern="block:4x4", **BOUNDED),
    "curves of some": of(
        "llama", method="admm", allocation="curves", ignore=["re:.*layers.1", "down_proj"], left_out=r"s\.1\.|down_proj"
    ),
    "curves": of("llama", method="wanda", allocation="curves", output_weights="gradient"),
    "curves per row": of("llama", allocation="curves", pattern="per-row", **BOUNDED),
    "to bfloat16": of("llama", preset="paper", dtype="bfloat16"),
    "of bfloat16": of("bfloat16", method="wanda"),
    "of float16": of("float16", method="wanda"),
    "permuted": of("planted", pattern="2:4", permute=True, dtype="bfloat16", propagate=0.5),
    "some": of(
        "biased", method="wanda", propagate=0.5, targets=SOME, ignore=["down_proj", "lm_head"], **ALL_TRAINED,
        left_out=r"down_proj|1\.mlp\.up_proj|layers\.2", shares={"q_proj": 0.75},
    ),
    "some to bfloat16": of(
        "biased", method="wanda", dtype="bfloat16", train_epochs=1, ignore=["re:.*layers.0", "v_proj"],
        left_out=r"layers\.0|v_proj",
    ),
    "experts": of("experts", preset="paper", min_expert_tokens=1),
    "experts, tuned": of("experts", preset="tuned", min_expert_tokens=1),
    "experts, trained": of("experts", min_expert_tokens=1, train_epochs=2),
    "experts, curves": of("experts", min_expert_tokens=1, allocation="curves"),
    "experts, some": of(
        "experts", method="wanda", min_expert_tokens=0, train_epochs=1, ignore=["re:.*experts.2"],
        left_out=r"experts\.2",
    ),
    "smaller": of("llama", channels=0.75, layers=0.67, **ALL_TRAINED, sizes=(48, 2, 2, None)),
    "smaller by wanda": of("llama", channels=0.75, method="wanda", sizes=(48, 2, 3, None)),
    "smaller tied_grouped": of(
        "tied_grouped", channels=0.667, heads=0.5, layers=0.67, method="wanda", sizes=(16, 1, 2, None)
    ),
    "smaller phi3": of("phi3", channels=0.333, heads=0.5, method="wanda", sizes=(8, 1, 3, None)),
    "smaller gpt2": of("gpt2", channels=0.5, layers=0.67, method="wanda", sizes=(32, 4, 2, None)),
    "smaller mixtral": of(
        "mixtral", channels=0.667, heads=0.5, experts=0.75, method="wanda", min_expert_tokens=1, sizes=(16, 1, 3, 3)
    ),
}  # fmt: skip
QUICK = {
    *("tuned", "per row", "1:4", "trained", "distilled", "bounds", "some", "experts, trained", "smaller"),
    "smaller gpt2",
}
# The errors told are those of the weights stored: nothing is trained, propagated or rounded.
PLAIN = {"tuned", "paper", "weighted tokens", "per row", "blocks", "groups", "bounds"}


class Whole(NamedTuple):
    """A case that was run to its end."""

    case: Case
    source: Any
    recipe: Recipe | ShrinkRecipe
    report: PruneReport
    events: list[tuple[Any, int, int]]

    @property
    def folder(self):
        return self.report.output

    @property
    def trains(self):
        return bool(self.recipe.train_epochs or self.recipe.distil_epochs)


@pytest.fixture(scope="module", autouse=True)
def _several_batches(module_monkeypatch):
    module_monkeypatch.setattr(activations, "BATCH_TOKENS", 48)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models, tokens):
    """`whole(name)`: the unbroken run of a case, made once."""

    @cache
    def made(name):
        case, place = CASES[name], tmp_path_factory.mktemp("whole")
        if case.model in MODELS:
            source = models(case.model)
        else:
            source = place / "source"
            write_golden(GOLDEN / f"{case.model}.npz", source)
            (source / "tokenizer.json").write_text(TOKENIZER)
        ids = tokens % open_model(source).config.vocab_size
        fields = {"calibration": ids, "heldout_windows": HELDOUT} | case.recipe
        # Channels need not be multiples of 64, and blocks are trained only where that is asked for.
        recipe = ShrinkRecipe(**{"multiple": 8, "train_epochs": 0} | fields) if case.sizes else Recipe(**fields)
        events = []
        report = prune_model(source, place / "out", recipe, observer=lambda *told: events.append(told))
        return Whole(case, source, recipe, report, events)

    return made


def again(done, folder, **how):
    """The run of a case once more, into a folder."""
    return prune_model(done.source, folder, done.recipe, **how)


def read_back(values):
    """As JSON gives them back."""
    return json.loads(json.dumps(plain(values)))


def linears(done):
    """The names of the linears that are to be pruned."""
    names = [key.removesuffix(".weight") for key in open_model(done.source).linear_keys()]
    return [name for name in names if not re.search(done.case.left_out, name)]


def counts_are_exact(done):
    """Every linear that is pruned has its pattern and its zeros to the weight, as the records say."""
    recipe, report = done.recipe, done.report
    zeros = {audit.layer: audit.zeros for audit in audit_sparsity(done.folder)}
    assert [record.layer for record in report.layers] == linears(done)
    for record in report.layers:
        assert record.zeros == zeros[record.layer], record.layer
    made, size = sum(record.zeros for record in report.layers), sum(record.size for record in report.layers)
    assert report.sparsity == made / size
    assert report.total_sparsity == made / report.prunable_size
    assert report.prunable_size == sum(audit.size for audit in audit_sparsity(done.source))
    if recipe.allocation != "uniform":
        shares = [record.zeros / record.size for record in report.layers]
        low, high = recipe.bounds or default_bounds(recipe.sparsity)
        assert abs(made - recipe.sparsity * size) <= (0.5 if recipe.pattern == "unstructured" else 32)
        # Bounds that nobody gave are met up to one weight of a linear.
        slack = 0 if recipe.bounds else 1
        for record in report.layers:
            assert low * record.size - slack <= record.zeros <= high * record.size + slack, record.layer
        assert len(set(shares)) > 1
        assert report.survey_seconds > 0
        return
    for record in report.layers:
        share = done.case.shares.get(record.layer.rpartition(".")[2], recipe.sparsity)
        kept = pattern_count(parse_pattern(recipe.pattern, share, record.shape), record.shape)
        assert record.size - record.zeros == kept, record.layer
        (audit,) = audit_pattern(done.folder, recipe.pattern, share, only=[f"{record.layer}.weight"])
        assert audit.fits, record.layer
        assert audit.exact, record.layer


def what_is_not_pruned_keeps_every_byte(done):
    """Also through training, which moves what is left of pruned linears, and norms and biases beside them."""
    before, after, recipe = stored(done.source), stored(done.folder), done.recipe
    model = open_model(done.source)
    pruned = {f"{record.layer}.weight" for record in done.report.layers}
    kept = before.keys() - pruned
    if done.trains:
        untouched = set(range(model.num_blocks)) - {record.block for record in done.report.layers}
        still = {f".layers.{index}." for index in untouched} if not recipe.distil_epochs else set()
        kept = {
            key for key in kept
            if key in model.linear_keys() or ".layers." not in key or any(part in key for part in still)
        }  # fmt: skip
    assert kept
    for key in kept:
        assert after[key].tobytes() == before[key].astype(recipe.dtype or before[key].dtype).tobytes(), key
    for key in pruned:
        assert not np.array_equal(after[key], before[key]), key


def the_folder_is_that_of_the_source(done):
    """Configuration, data types and tokenizer; the number and the names of its tensors."""
    before, after = (open_model(folder).source for folder in (done.source, done.folder))
    dtype = done.recipe.dtype
    assert after.config == before.config | ({"dtype": dtype} if dtype else {})
    assert after.tensors.keys() == before.tensors.keys()
    assert {str(info.dtype) for info in after.tensors.values()} == {dtype or before.config["dtype"]}
    assert (done.folder / "tokenizer.json").read_text() == TOKENIZER


def the_sizes_are_those_asked_for(done):
    """Those of the folder, of the report and of the summary, down to the bytes."""
    shape, values, small = done.report.shape, stored(done.folder), open_model(done.folder)
    sizes = sizes_of(small)
    assert (sizes.channels, sizes.kv_heads, len(sizes.blocks), sizes.experts) == done.case.sizes
    assert shape.sizes == dataclasses.replace(sizes, blocks=shape.blocks)
    assert set(shape.blocks) | set(shape.removed) == set(range(open_model(done.source).num_blocks))
    assert shape.parameters == sum(value.size for value in values.values()) < shape.dense_parameters
    assert shape.dense_parameters == parameters_of(open_model(done.source))
    assert done.report.stored_bytes == sum(value.nbytes for value in values.values()) < shape.dense_bytes
    assert np.isfinite(perplexity(small, done.recipe.calibration))
    assert (done.folder / "tokenizer.json").read_text() == TOKENIZER


def it_loads_and_computes_something_else_than_the_dense_model(done):
    dense, pruned = (
        np.asarray(run(load_decoder(folder), done.recipe.calibration[:1])) for folder in (done.source, done.folder)
    )
    assert np.isfinite(pruned).all()
    assert 0 < np.mean((pruned - dense) ** 2) < 4 * np.mean(dense**2)
    if done.case.model == "experts":
        assert np.mean((pruned - dense) ** 2) < np.mean(dense**2)


def records_summary_card_and_events_say_what_the_report_says(done):
    report, case = done.report, done.case
    lines = [json.loads(line) for line in (done.folder / RECORDS).read_text().splitlines()]
    records = sorted([*report.layers, *report.blocks], key=lambda record: record.block)
    records += [record for record in (report.distilled,) if record is not None]
    first = [line["kind"] for line in lines].index("layer")
    assert {line["kind"] for line in lines[:first]} <= {"allocation", "shape"}
    assert lines[first:] == [plain(record.as_dict()) for record in records]
    assert json.loads((done.folder / "summary.json").read_text()) == read_back(report.summary())
    assert {record.status for record in report.layers} == {"CONVERGED"}

    _, head, body = (done.folder / CARD).read_text().split("---\n", 2)
    tags = {"sparseopt", "pruned"} | ({done.recipe.pattern} if getattr(done.recipe, "pattern", "") == "2:4" else set())
    assert tags <= set(yaml.safe_load(head)["tags"])
    size = sum(record.size for record in report.layers)
    said = f"{report.sparsity:.2%} of the {size:,} weights of {len(report.layers)} linear layers are zero"
    assert (f"- size: keeps {report.shape.kept()}; " if case.sizes else said) in body

    shown = [event for event, *_ in done.events]
    assert [type(event) for event in shown[:2]] == [Calibration, Footprint]
    assert shown[:2] == [report.calibration, report.footprint]
    total = len(report.layers)
    told = [(event, *count) for event, *count in done.events if isinstance(event, LayerRecord)]
    assert told == [(record, done, total) for done, record in enumerate(report.layers, 1)]
    blocks = open_model(done.source).num_blocks
    assert [event for event in shown if isinstance(event, Passed)] == [Passed(index, blocks) for index in range(blocks)]
    # What is measured on the dense model is told by steps, before the first linear.
    steps = [event for event in done.events if event[0] in ("variants, block", "survey, pass")]
    expected = [("variants, block", 2 * blocks)] * bool(done.recipe.variants)
    expected += [("survey, pass", 2 * blocks + (blocks > 2))] * done.recipe.needs_sensitivities
    assert steps == [(what, number, count) for what, count in expected for number in range(1, count + 1)]


def training_helps(done):
    """Where there is any; blocks in which nothing was pruned are not trained alone."""
    report, trained = done.report, done.recipe.train_epochs
    assert [record.block for record in report.blocks] == (
        sorted({record.block for record in report.layers}) if trained else []
    )
    for record in report.blocks:
        assert record.heldout_best <= record.heldout_first
        assert record.last_loss < record.first_loss or not record.best_epoch
    assert (report.distilled is not None) == bool(done.recipe.distil_epochs)
    if report.distilled is not None:
        assert report.distilled.heldout_best < report.distilled.heldout_first


def a_program_serves_all_linears_of_a_shape(done):
    assert done.report.layer_compilations <= len({record.shape for record in done.report.layers})


def errors_are_those_on_the_activations_of_the_pruned_model(done):
    """Recomputed from the folder: every block sees the pruned blocks before it."""
    recipe, records = done.recipe, {record.layer: record for record in done.report.layers}
    dense, pruned = load_decoder(done.source), load_decoder(done.folder)
    x = run(pruned.embed_tokens, jnp.asarray(recipe.calibration[:-HELDOUT]))
    for index, (before, after) in enumerate(zip(dense.layers, pruned.layers, strict=True)):
        grams = gather_grams(before, x, recipe.weighting)
        for name, tap in before.linears.items():
            weight = np.asarray(before.read(f"{name}.weight"), np.float64)
            change = np.asarray(after.read(f"{name}.weight"), np.float64) - weight
            gram = np.asarray(grams[tap].gram, np.float64)
            error = np.sum(change @ gram * change) / np.sum(weight @ gram * weight)
            record = records[f"model.layers.{index}.{name}"]
            assert record.relative_error == pytest.approx(error, rel=1e-3), record.layer
            assert record.heldout_error > 0
        x = run(after, x)


def it_is_not_run_again_and_its_report_is_returned(done):
    before, told = written(done.folder), []
    report = again(done, done.folder, observer=lambda *event: told.append(event))
    assert report.kept
    again_plain, first_plain = (
        dataclasses.replace(each, kept=False, recipe=read_back(each.recipe)) for each in (report, done.report)
    )
    assert again_plain == first_plain
    assert read_back(report.summary()) == read_back(done.report.summary())
    assert told == []
    assert written(done.folder) == before


PRUNED = (counts_are_exact, the_folder_is_that_of_the_source, what_is_not_pruned_keeps_every_byte)
FACTS = (
    it_loads_and_computes_something_else_than_the_dense_model,
    records_summary_card_and_events_say_what_the_report_says,
    training_helps,
    a_program_serves_all_linears_of_a_shape,
    it_is_not_run_again_and_its_report_is_returned,
)


def tiered(names, quick=QUICK):
    """Cases of a test; those in `quick` for `make test` too."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in names]


def facts_of(name):
    case = CASES[name]
    own = (the_sizes_are_those_asked_for,) if case.sizes else PRUNED
    # Permuting moves the channels of other tensors too.
    own = own[:2] if "permute" in case.recipe else own
    return [*own, *FACTS, *([errors_are_those_on_the_activations_of_the_pruned_model] if name in PLAIN else [])]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        pytest.param(*case.values, fact, marks=case.marks, id=f"{case.values[0]}-{fact.__name__}")
        for case in tiered(CASES)
        for fact in facts_of(*case.values)
    ],
)
def test_of_every_whole_run_every_fact_holds(whole, name, fact):
    fact(whole(name))


def ended_in_distillation(event, done, total):
    if isinstance(event, str) and event.startswith("distillation") and done == 2:
        raise Broken


def ends(report):
    """Moments at which a run is broken off, one after the other: in every kind of work that it does."""
    before_last = sum(record.block < report.layers[-1].block for record in report.layers)
    found = {"in the first block": breaking_at(3), "behind the last but one": breaking_at(before_last)}
    found["in the last block"] = breaking_at(before_last + 2)
    if report.shape is not None:
        found = {"in a block": breaking_at(1), "in the last block": breaking_at(before_last + 1)}
        if report.shape.removed:
            found = {"while blocks are chosen": ended_by(RemovalRecord)} | found
    if report.blocks:
        found["before the last block is written"] = ended_by(BlockRecord, len(report.blocks))
    if report.distilled is not None:
        found["in the distillation"] = ended_in_distillation
        found["behind the distillation"] = ended_by(DistillationRecord)
    return found


def timeless(record):
    return record and dataclasses.replace(record, seconds=0, compile_seconds=0)


BROKEN = ("to bfloat16", "trained", "distilled", "curves of some", "permuted", "some", "some to bfloat16", "smaller")


@pytest.mark.parametrize(
    "name", tiered((*BROKEN, "smaller gpt2", "experts, trained"), ("trained", "distilled", "smaller"))
)
def test_a_run_interrupted_anywhere_gives_the_same_bytes(tmp_path, whole, name):
    done, folder, told = whole(name), tmp_path / "broken", []
    for end, observer in ends(done.report).items():
        with pytest.raises(Broken):
            again(done, folder, observer=observer)
        assert not (folder / LOCK).exists(), end
        if end == "in the distillation":
            # The pass is finished and stays.
            kept = range(open_model(done.source).num_blocks) if done.report.shape is None else done.report.shape.blocks
            shards = {file.name.partition("-block-")[2] for file in folder.glob("*-block-*.safetensors")}
            assert shards == {f"{index:04d}.safetensors" for index in kept}
    report = again(done, folder, observer=lambda event, *_: told.append(event))
    assert model_bytes(folder) == model_bytes(done.folder)
    assert [timeless(record) for record in report.layers] == [timeless(record) for record in done.report.layers]
    assert timeless(report.distilled) == timeless(done.report.distilled)
    if report.shape is not None:
        assert (report.shape.sizes, report.shape.removed) == (done.report.shape.sizes, done.report.shape.removed)
    # Each finished block is announced, so that its records are not taken for work.
    blocks, finished = open_model(done.source).num_blocks, report.resumed_blocks
    assert finished == (blocks if report.distilled else report.layers[-1].block)
    if report.distilled is not None:
        assert not [event for event in told if isinstance(event, str | RemovalRecord)]
    shown = [event for event in told if isinstance(event, Replay | LayerRecord)]
    expected = []
    for block, records in itertools.groupby(report.layers, lambda record: record.block):
        records = list(records)
        expected += [Replay(len(records)), *records] if block < finished else records
    assert [event for event in shown if event != Replay(0)] == expected
    lines = [
        [json.loads(line) for line in (place / RECORDS).read_text().splitlines()] for place in (folder, done.folder)
    ]
    resumed, unbroken = (sorted((line["kind"], line.get("layer", "")) for line in found) for found in lines)
    assert resumed == unbroken


def tight(source, recipe):
    """The least budget that is not refused: too little for activations in memory."""
    windows, seqlen = recipe.calibration.shape
    sizes = {"windows": windows - recipe.heldout_windows, "seqlen": seqlen}
    model, method = open_model(source), recipe.layer_method
    found = [phase_bytes(model, recipe.model_copy(update=sizes), method, where)[0] for where in ("memory", "disk")]
    in_memory, on_disk = (max(sum(parts.values()) for parts in phases.values()) for phases in found)
    assert on_disk < in_memory
    return on_disk


@pytest.mark.parametrize("name", tiered(("to bfloat16", "trained", "curves", "bounds"), ("trained", "bounds")))
def test_activations_on_disk_change_no_bit(tmp_path, whole, name, monkeypatch):
    done, on_disk, append = whole(name), [], DiskBatches.append
    monkeypatch.setattr(DiskBatches, "append", lambda *given: on_disk.append(1) or append(*given))
    names, told = set(), []

    def observer(event, *_):
        told.append(event)
        names.update(entry.name for entry in (tmp_path / "disk").iterdir())

    report = again(done, tmp_path / "disk", memory=tight(done.source, done.recipe), observer=observer)
    assert on_disk
    assert [event for event in told if isinstance(event, Footprint)] == [report.footprint]
    assert (done.report.footprint.activations, report.footprint.activations) == ("memory", "disk")
    assert report.footprint.scratch_bytes > 0
    assert model_bytes(tmp_path / "disk") == model_bytes(done.folder)
    assert [timeless(record) for record in report.layers] == [timeless(record) for record in done.report.layers]
    summary = json.loads((tmp_path / "disk" / "summary.json").read_text())
    assert summary["footprint"] == dataclasses.asdict(report.footprint)
    # A run that is killed leaves nothing behind, since no scratch file has a name at any moment.
    assert all(name.endswith((".safetensors", ".json", ".jsonl", ".lock", ".md")) for name in names), names


# Cases of one model and the same tokens.
ALIKE = [name for name, case in CASES.items() if case.model == "llama"]


@pytest.mark.parametrize(
    "names",
    [("trained", "distilled", "per row", "1:4"), pytest.param(ALIKE, marks=pytest.mark.thorough)],
    ids=["some", "all"],
)
def test_runs_that_measure_the_dense_model_once_give_what_each_gives_alone(tmp_path, whole, names):
    """Bit for bit, recipes and sizes of all kinds one after the other."""
    done, stages = [whole(name) for name in (*names, "trained")], []

    def heard(told, event, *_):
        told.append(event)

    forget()
    for number, each in enumerate(done):
        name, told = each.case, []
        report = prune_model(each.source, tmp_path / f"{number}", each.recipe, observer=partial(heard, told))
        stages.append({event.partition(",")[0] for event in told if isinstance(event, str)})
        assert report.calibration == each.report.calibration, name
        assert (report.shape is None) == (each.report.shape is None), name
        assert model_bytes(report.output) == model_bytes(each.folder), name
        assert [(r.layer, r.relative_error, r.heldout_error) for r in report.layers] == [
            (r.layer, r.relative_error, r.heldout_error) for r in each.report.layers
        ], name
    assert {"survey", "variants"} <= set().union(*stages[:-1])
    assert {"survey", "variants"}.isdisjoint(stages[-1])

"""Whole runs: FACTS that hold of every one of `CASES`, each of which is pruned once.

Three tests prune them again: broken off, with activations on disk, and after others that measured the dense model.
"""

import dataclasses
import itertools
import json
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.layers.patterns import parse_pattern, pattern_count
from sparseopt.models import load_decoder, open_model, sizes_of
from sparseopt.pruning import LayerRecord, audit_pattern, audit_sparsity, perplexity, prune_model
from sparseopt.pruning.base.grams import gather_grams
from sparseopt.pruning.base.records import (
    BlockRecord,
    Calibration,
    DistillationRecord,
    Footprint,
    Passed,
    RemovalRecord,
    RepairRecord,
    Replay,
)
from sparseopt.pruning.memory import phase_bytes
from sparseopt.pruning.recipe.allocation import default_bounds
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.pruning.run.measured import forget
from sparseopt.pruning.train.reconstruction import channel_weights, stream_loss
from sparseopt.system.run_folder import LOCK, RECORDS, plain
from tests.jitted import run
from tests.pruning.whole_runs import (
    CASES,
    HELDOUT,
    SIZES,
    TOKENIZER,
    Broken,
    breaking_at,
    ended_by,
    model_bytes,
    stored,
    whole_run,
    written,
)
from tests.tiers import often

pytestmark = pytest.mark.usefixtures("several_batches")
QUICK = {"tuned", "per row", "1:4", "trained", "bounds", "some", "experts", "smaller", "smaller gpt2"}
# The errors told are those of the weights stored: nothing is trained, propagated or rounded.
PLAIN = {"tuned", "paper", "weighted", "per row", "blocks", "bounds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models, tokens):
    """`whole(name)`: the unbroken run of a case, made once."""
    return cache(lambda name: whole_run(name, models(CASES[name][0]), tokens, tmp_path_factory.mktemp("whole")))


def read_back(values):
    """As JSON gives them back."""
    return json.loads(json.dumps(plain(values)))


def lines_of(folder):
    return [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]


# The linears that stay as they are, and a share of zeros that is not the recipe's.
LEFT_OUT = {
    "curves of some": r"s\.1\.|down_proj",
    "some": r"down_proj|1\.mlp\.up_proj|layers\.2",
    "some to bfloat16": r"layers\.0|v_proj",
    "experts, some": r"experts\.2",
}
SHARES = {("some", "q_proj"): 0.75}


def linears(done):
    """The names of the linears that are to be pruned."""
    names = [key.removesuffix(".weight") for key in open_model(done.source).linear_keys()]
    return [name for name in names if not re.search(LEFT_OUT.get(done.name, "^$"), name)]


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
        low, high = recipe.bounds or default_bounds(recipe.sparsity)
        assert abs(made - recipe.sparsity * size) <= (0.5 if recipe.pattern == "unstructured" else 32)
        # Bounds that nobody gave are met up to one weight of a linear.
        slack = 0 if recipe.bounds else 1
        for record in report.layers:
            assert low * record.size - slack <= record.zeros <= high * record.size + slack, record.layer
        assert len({record.zeros / record.size for record in report.layers}) > 1
        return
    for record in report.layers:
        share = SHARES.get((done.name, record.layer.rpartition(".")[2]), recipe.sparsity)
        kept = pattern_count(parse_pattern(recipe.pattern, share, record.shape), record.shape)
        assert record.size - record.zeros == kept, record.layer
        (audit,) = audit_pattern(done.folder, recipe.pattern, share, only=[f"{record.layer}.weight"])
        assert audit.fits, record.layer
        assert audit.exact, record.layer


def what_is_not_pruned_keeps_every_byte(done):
    """Also through training, which moves what is left of pruned linears, and norms and biases beside them."""
    before, after, recipe, model = stored(done.source), stored(done.folder), done.recipe, open_model(done.source)
    pruned = {f"{record.layer}.weight" for record in done.report.layers}
    kept = before.keys() - pruned
    if recipe.train_epochs or recipe.distil_epochs:
        changed = {f".layers.{record.block}." for record in done.report.layers}
        inside = {key for key in kept if recipe.distil_epochs or any(part in key for part in changed)}
        kept -= {key for key in inside if ".layers." in key and key not in model.linear_keys()}
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
    assert (sizes.channels, sizes.kv_heads, len(sizes.blocks), sizes.experts) == SIZES[done.name]
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


def records_summary_and_events_say_what_the_report_says(done):
    report, lines = done.report, lines_of(done.folder)
    records = sorted([*report.layers, *report.repairs, *report.blocks], key=lambda record: record.block)
    records += [record for record in (report.distilled,) if record is not None]
    first = [line["kind"] for line in lines].index("layer")
    assert {line["kind"] for line in lines[:first]} <= {"allocation", "shape"}
    assert lines[first:] == [plain(record.as_dict()) for record in records]
    assert json.loads((done.folder / "summary.json").read_text()) == read_back(report.summary())
    assert {record.status for record in report.layers} == {"CONVERGED"}

    shown = [event for event, *_ in done.events]
    assert [type(event) for event in shown[:2]] == [Calibration, Footprint]
    assert shown[:2] == [report.calibration, report.footprint]
    total = len(report.layers)
    told = [(event, *count) for event, *count in done.events if isinstance(event, LayerRecord)]
    assert told == [(record, done, total) for done, record in enumerate(report.layers, 1)]
    blocks = open_model(done.source).num_blocks
    assert [event for event in shown if isinstance(event, Passed)] == [Passed(index, blocks) for index in range(blocks)]
    # What is measured on the dense model is told by steps, before the first linear.
    steps, count = [event for event in done.events if event[0] == "survey, pass"], 2 * blocks + (blocks > 2)
    expected = range(1, count + 1) if done.recipe.needs_sensitivities else ()
    assert steps == [("survey, pass", number, count) for number in expected]


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
        assert report.distilled.heldout_best < report.distilled.heldout_first or not report.distilled.best_epoch


def losses_of_blocks_are_those_of_their_outputs(done):
    """On the held-out tokens, recomputed from the folder, in units of the dense model's calibration outputs."""
    dense, pruned = load_decoder(done.source), load_decoder(done.folder)
    x = y = run(dense.embed_tokens, done.recipe.calibration[-HELDOUT:])
    calibrated = run(dense.embed_tokens, done.recipe.calibration[:-HELDOUT])
    for block, target, record in zip(pruned.layers, dense.layers, done.report.blocks, strict=True):
        x, y, calibrated = run(block, x), run(target, y), run(target, calibrated)
        loss = jax.jit(stream_loss)(x, y, channel_weights([calibrated]))
        assert loss == pytest.approx(record.heldout_best, rel=1e-3)


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
    report = done.again(done.folder, observer=lambda *event: told.append(event))
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
    records_summary_and_events_say_what_the_report_says,
    training_helps,
    a_program_serves_all_linears_of_a_shape,
    it_is_not_run_again_and_its_report_is_returned,
)


def facts_of(name):
    own = (the_sizes_are_those_asked_for,) if name in SIZES else PRUNED
    # Permuting moves the channels of other tensors too.
    own = own[:2] if name == "permuted" else own
    own = [*own, losses_of_blocks_are_those_of_their_outputs] if name == "trained" else own
    return [*own, *FACTS, *([errors_are_those_on_the_activations_of_the_pruned_model] if name in PLAIN else [])]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        pytest.param(*case.values, fact, marks=case.marks, id=f"{case.values[0]}-{fact.__name__}")
        for case in often(CASES, *QUICK)
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
    if report.shape is None:
        found = [breaking_at(3), breaking_at(before_last), breaking_at(before_last + 2)]
    else:
        found = [ended_by(RemovalRecord)] if report.shape.removed else []
        found += [breaking_at(1), breaking_at(before_last + 1)]
    if report.repairs:
        found.append(ended_by(RepairRecord))
    if report.blocks:
        found.append(ended_by(BlockRecord, len(report.blocks)))
    if report.distilled is not None:
        found += [ended_in_distillation, ended_by(DistillationRecord)]
    return found


def timeless(record):
    return record and dataclasses.replace(record, seconds=0, compile_seconds=0)


BROKEN = ("trained", "some", "smaller")
MORE = ("curves of some", "permuted", "some to bfloat16", "smaller gpt2", "experts, some")


@pytest.mark.parametrize("name", often([*BROKEN, *MORE], *BROKEN))
def test_a_run_interrupted_anywhere_gives_the_same_bytes(tmp_path, whole, name):
    done, folder, told = whole(name), tmp_path / "broken", []
    blocks, shape = open_model(done.source).num_blocks, done.report.shape
    for end in ends(done.report):
        with pytest.raises(Broken):
            done.again(folder, observer=end)
        assert not (folder / LOCK).exists()
    report = done.again(folder, observer=lambda event, *_: told.append(event))
    assert model_bytes(folder) == model_bytes(done.folder)
    assert [timeless(record) for record in report.layers] == [timeless(record) for record in done.report.layers]
    assert timeless(report.distilled) == timeless(done.report.distilled)
    if shape is not None:
        assert (report.shape.sizes, report.shape.removed) == (shape.sizes, shape.removed)
    finished = report.resumed_blocks
    assert finished == (blocks if report.distilled else report.layers[-1].block)
    if report.distilled is not None:
        assert not [event for event in told if isinstance(event, str | RemovalRecord)]
    # Each finished block is announced, so that its records are not taken for work.
    expected = []
    for block, records in itertools.groupby(report.layers, lambda record: record.block):
        records = list(records)
        expected += [Replay(len(records)), *records] if block < finished else records
    shown = [event for event in told if isinstance(event, Replay | LayerRecord)]
    assert [event for event in shown if event != Replay(0)] == expected
    resumed, unbroken = (
        sorted((line["kind"], line.get("layer", "")) for line in lines_of(place)) for place in (folder, done.folder)
    )
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


@pytest.mark.parametrize("name", often(["trained", "bounds", "some to bfloat16"], "trained", "bounds"))
def test_activations_on_disk_change_no_bit(tmp_path, whole, name):
    done, names, told = whole(name), set(), []

    def observer(event, *_):
        told.append(event)
        names.update(entry.suffix for entry in (tmp_path / "disk").iterdir())

    # A run goes on with another budget.
    with pytest.raises(Broken):
        done.again(tmp_path / "disk", memory="64GiB", observer=breaking_at(10))
    report = done.again(tmp_path / "disk", memory=tight(done.source, done.recipe), observer=observer)
    assert report.resumed_blocks in (1, 2)
    assert [event for event in told if isinstance(event, Footprint)] == [report.footprint]
    assert (done.report.footprint.activations, report.footprint.activations) == ("memory", "disk")
    assert report.footprint.scratch_bytes > 0
    assert model_bytes(tmp_path / "disk") == model_bytes(done.folder)
    assert [timeless(record) for record in report.layers] == [timeless(record) for record in done.report.layers]
    summary = json.loads((tmp_path / "disk" / "summary.json").read_text())
    assert summary["footprint"] == dataclasses.asdict(report.footprint)
    # A run that is killed leaves nothing behind, since no scratch file has a name at any moment.
    assert names <= {".safetensors", ".json", ".jsonl", ".lock", ".md"}


def test_runs_that_measure_the_dense_model_once_give_what_each_gives_alone(tmp_path, whole):
    """Bit for bit, recipes and sizes of several kinds one after the other."""
    done, stages = [whole(name) for name in ("trained", "smaller", "per row", "1:4", "trained")], []

    def heard(told, event, *_):
        told.append(event)

    forget()
    for number, each in enumerate(done):
        told = []
        report = prune_model(each.source, tmp_path / f"{number}", each.recipe, observer=partial(heard, told))
        stages.append({event.partition(",")[0] for event in told if isinstance(event, str)})
        assert report.calibration == each.report.calibration
        assert model_bytes(report.output) == model_bytes(each.folder)
        assert [timeless(record) for record in report.layers] == [timeless(record) for record in each.report.layers]
    assert "survey" in set().union(*stages[:-1])
    assert "survey" not in stages[-1]

"""Floor 6: the pipeline, a plain loop over blocks.

    source --embedding--> activations
    for each block:   load it; Grams of its linears' inputs; prune each linear; store the shard;
                      run the block again with the pruned weights -> activations of the next block
    index, config, tokenizer; audit

Memory holds one block and the activations, never the model. Every block sees what the pruned blocks before it
give, so later blocks make up for earlier ones' errors.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.solve import Status
from sparseopt.machine import peak_memory_bytes
from sparseopt.models import (
    OUTER_TAG,
    Block,
    ShardedWriter,
    StreamedModel,
    block_tag,
    encode_text,
    load_tokenizer,
    open_model,
)
from sparseopt.pruning.calibration import BlockRunner, make_batches
from sparseopt.pruning.evaluation import audit_pattern
from sparseopt.pruning.layer import LayerJob, LayerMethod, check_answer, check_method, layer_solver
from sparseopt.pruning.patterns import Pattern, parse_pattern
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import LayerRecord, PruneReport, RunLog
from sparseopt.pruning.texts import TextError, check_vocabulary, load_text, token_windows

Observer = Callable[[LayerRecord, int], None]


class PruningError(RuntimeError):
    """A run that had to stop; the message names the layer and what to do."""


def ignore(record: LayerRecord, total: int) -> None:
    """The observer that shows nothing."""
    del record, total


def prune_model(
    source: str | Path, output: str | Path, recipe: Recipe | None = None, *, observer: Observer = ignore
) -> PruneReport:
    """Prune all linears of a causal language model and write a folder that transformers loads.

    Args:
        source: a Hugging Face model folder (safetensors) or a GGUF file.
        output: a folder that does not exist yet or is empty.
        recipe: what to do; default: mAIHT, preset best, 50 %.
        observer: called with each layer's record and the number of layers in all, as they finish.

    Returns:
        A `PruneReport`; the same figures lie in `output/records.jsonl` and `output/summary.json`.

    Raises:
        ValueError: before any work, for a recipe, a model or a text that cannot be used.
        PruningError: if activations or a solve become non-finite (finished shards stay), or if what was stored, read
            back, breaks the pattern.
    """
    start = time.perf_counter()
    recipe = recipe or Recipe()
    method = recipe.check()
    model = open_model(source)
    patterns = layer_patterns(model, recipe, method)
    calibration, heldout = calibration_windows(model, recipe)
    model.check_finite()
    writer = ShardedWriter(output, model.source, dtype=recipe.dtype)
    log = RunLog(Path(output))

    embedding = model.embedding()
    batches = make_batches(embedding(jnp.asarray(calibration)))
    heldout_batches = make_batches(embedding(jnp.asarray(heldout))) if len(heldout) else []
    del embedding
    writer.write(OUTER_TAG, {key: model.source.read(key) for key in model.outer_keys()})

    runner = BlockRunner(recipe.token_weighting())
    records: list[LayerRecord] = []
    for index in range(model.num_blocks):
        block = model.block(index)
        keys = model.block_keys(index)
        total = model.num_blocks * len(block.linears)
        grams = _checked(runner.grams(block, batches), index, "calibration")
        tests = _checked(runner.grams(block, heldout_batches), index, "held-out") if heldout_batches else {}
        tensors = {key: model.source.read(key) for key in keys.values()}
        for name, tap in block.linears.items():
            key = keys[f"{name}.weight"]
            weight = tensors[key].astype(writer.dtype_of(key), copy=False)
            record, pruned = _prune_linear(weight, grams[tap], tests.get(tap), patterns[key], method, index, key)
            tensors[key] = pruned
            block.linear(name).weight[...] = jnp.asarray(pruned, jnp.float32)
            records.append(record)
            log.record(record.as_dict())
            observer(record, total)
        writer.write(block_tag(index), tensors)
        if index + 1 < model.num_blocks:
            batches = runner.forward(block, batches)
            heldout_batches = runner.forward(block, heldout_batches)
    writer.finish()
    broken = [audit.layer for audit in audit_pattern(output, recipe.pattern, recipe.sparsity) if not audit.fits]
    if broken:
        raise PruningError(
            f"{len(broken)} linears read back from {output} break the pattern {recipe.pattern!r}, {broken[0]} first; "
            "was the folder changed while it was written?"
        )

    report = PruneReport(
        output=Path(output),
        recipe=recipe.as_dict(),
        layers=records,
        solver_seconds=sum(r.seconds for r in records),
        compile_seconds=sum(r.compile_seconds for r in records) + runner.compile_seconds,
        layer_compilations=sum(r.compile_seconds > 0 for r in records),
        calibration_seconds=runner.seconds,
        calibration_gflops=runner.flops / max(runner.seconds, 1e-9) / 1e9,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )
    log.finish(report.summary())
    return report


def layer_patterns(model: StreamedModel, recipe: Recipe, method: LayerMethod) -> dict[str, Pattern]:
    """The pattern of every linear, by the key of its weight.

    Raises:
        ValueError: naming the layer, if the pattern is impossible there or the method cannot take it.
    """
    patterns: dict[str, Pattern] = {}
    checked: set[tuple[int, ...]] = set()
    for index in range(model.num_blocks):
        keys = model.block_keys(index)
        for name in Block.linears:
            key = keys[f"{name}.weight"]
            shape = model.source.tensors[key].shape
            try:
                patterns[key] = parse_pattern(recipe.pattern, recipe.sparsity, shape)
                if shape not in checked:
                    check_method(method, patterns[key], shape)
            except ValueError as error:
                raise ValueError(f"{key.removesuffix('.weight')}: {error}") from error
            checked.add(shape)
    return patterns


def calibration_windows(model: StreamedModel, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and held-out windows, `[samples, seqlen]` each; held-out ones follow the calibration's text.

    Raises:
        TextError: for a text that is too short, or token ids that do not fit.
    """
    if isinstance(recipe.calibration, str):
        tokens = encode_text(load_tokenizer(model.source), load_text(recipe.calibration, "calibration"))
        windows = token_windows(tokens, recipe.samples + recipe.heldout_samples, recipe.seqlen, seed=recipe.seed)
    else:
        windows = np.asarray(recipe.calibration)
        if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer) or windows.shape[1] < 2:
            raise TextError(
                "calibration token ids must be integers of shape [samples, seqlen], given "
                f"{windows.dtype} of shape {list(windows.shape)}"
            )
        if len(windows) <= recipe.heldout_samples:
            raise TextError(
                f"{len(windows)} windows of token ids leave none for calibration after "
                f"{recipe.heldout_samples} held-out windows; give more or set heldout_samples=0"
            )
        check_vocabulary(windows, model.config.vocab_size)
    split = len(windows) - recipe.heldout_samples
    return windows[:split].astype(np.int32), windows[split:].astype(np.int32)


def _checked(grams: dict[str, jax.Array], block: int, tokens: str) -> dict[str, jax.Array]:
    """The Grams, if they are finite."""
    for name, gram in grams.items():
        if not np.isfinite(np.asarray(gram)).all():
            raise PruningError(
                f"non-finite activations in block {block}, {name}, on the {tokens} tokens: the model's weights "
                "overflow there or the tokens are out of its range; check the source with `sparseopt eval`"
            )
    return grams


def _prune_linear(
    weight: np.ndarray,
    gram: jax.Array,
    test_gram: jax.Array | None,
    pattern: Pattern,
    method: LayerMethod,
    block: int,
    key: str,
) -> tuple[LayerRecord, np.ndarray]:
    timed = layer_solver(LayerJob(weight, gram, test_gram, pattern), method)
    report: Any = timed.value
    status = Status(int(report.status))
    if status is Status.NONFINITE:
        raise PruningError(
            f"the solve of {key} became non-finite; shards of earlier blocks are whole. "
            "Check its weights and Gram for huge values, or try another method"
        )
    try:
        check_answer(report, method, pattern)
    except RuntimeError as error:
        raise PruningError(f"{key.removesuffix('.weight')}: {error}") from error
    record = LayerRecord(
        block=block,
        layer=key.removesuffix(".weight"),
        shape=(weight.shape[0], weight.shape[1]),
        size=weight.size,
        zeros=int(report.zeros),
        relative_error=float(report.relative_error),
        heldout_error=None if test_gram is None else float(report.test_error),
        steps=int(report.steps),
        status=status.name,
        seconds=timed.seconds,
        compile_seconds=timed.compile_seconds,
        dead_inputs=int(report.dead_inputs),
    )
    return record, np.asarray(report.weight)

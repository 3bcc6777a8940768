"""MyST tables of the committed benchmark records, `docs/benchmarks/*.jsonl`, one JSON object per line.

    trend.jsonl            output of `make bench-trend`
    trend_sizes.jsonl      output of `make bench-trend-sizes`
    trend_peers.jsonl      output of `make bench-trend-peers`
    trend_batch.jsonl      output of `make bench-trend-batch`
    trend_selection.jsonl  output of `make bench-trend-selection`
    core.jsonl             output of `make bench-core`
    prune.jsonl            output of `make bench-prune`
    shrink.jsonl           output of `make bench-shrink`
    memory.jsonl           output of `make bench-memory`
    quality.jsonl          output of `make bench-quality`
    reliability.jsonl      output of `make bench-reliability`
    scaling.jsonl          output of `make bench-scaling`
    runtime.jsonl          output of `make bench-runtime`
    families.jsonl         output of `make families`
    accelerators.jsonl     output of `make bench-accelerators`
    precision.jsonl        output of `make bench-precision`

A table without records becomes a sentence that names the command.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import accelerator_tables
import core_tables
import family_tables
import pruning_tables
import reliability_tables
import runtime_tables
import scaling_tables
import shrink_tables
import trend_tables
from records import Record, read

# A table's name begins with the name of its file, except for these.
STEMS = {"sizes": "trend_sizes", "selection": "trend_selection", "peers": "trend_peers", "batch": "trend_batch"}


def _stem(name: str) -> str:
    word = name.partition("_")[0]
    return STEMS.get(word, word)


TABLES: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    function.__name__.replace("_", "-"): (_stem(function.__name__), function)
    for function in (
        trend_tables.trend_machine,
        trend_tables.trend_steps,
        trend_tables.trend_paths,
        trend_tables.trend_scaling,
        trend_tables.trend_truth,
        trend_tables.trend_reach,
        trend_tables.sizes_machine,
        trend_tables.sizes_growth,
        trend_tables.peers_machine,
        trend_tables.peers_times,
        trend_tables.peers_each,
        trend_tables.batch_machine,
        trend_tables.batch_gradients,
        trend_tables.batch_pictures,
        trend_tables.batch_calls,
        trend_tables.selection_machine,
        trend_tables.selection_errors,
        trend_tables.selection_concave,
        core_tables.core_machine,
        core_tables.core_regressions,
        core_tables.core_pictures,
        core_tables.core_derivatives,
        pruning_tables.prune_machine,
        pruning_tables.prune_models,
        pruning_tables.prune_layers,
        shrink_tables.shrink_machine,
        shrink_tables.shrink_sizes,
        shrink_tables.shrink_methods,
        shrink_tables.shrink_windows,
        pruning_tables.memory_machine,
        pruning_tables.memory_blocks,
        pruning_tables.quality_machine,
        pruning_tables.quality_layers,
        pruning_tables.quality_each_layer,
        pruning_tables.quality_models,
        pruning_tables.quality_ablation,
        pruning_tables.quality_complete,
        pruning_tables.quality_draws,
        pruning_tables.quality_tokens,
        reliability_tables.reliability_machine,
        reliability_tables.reliability_kills,
        reliability_tables.reliability_budget,
        reliability_tables.reliability_inputs,
        reliability_tables.reliability_fuzz,
        scaling_tables.scaling_machine,
        scaling_tables.scaling_grid,
        scaling_tables.scaling_layer,
        scaling_tables.scaling_block,
        runtime_tables.runtime_machine,
        runtime_tables.runtime_decode,
        runtime_tables.runtime_prefill,
        runtime_tables.runtime_sizes,
        runtime_tables.runtime_skipped,
        accelerator_tables.accelerators_layers,
        accelerator_tables.precision_machine,
        accelerator_tables.precision_models,
        family_tables.families_machine,
        family_tables.families_proved,
    )
}


def write_all(source: Path, target: Path) -> None:
    """Write every table to `target/NAME.md`."""
    for name, (stem, make) in TABLES.items():
        (target / f"{name}.md").write_text(make(read(source / f"{stem}.jsonl")), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    for table_name, (stem, make) in TABLES.items():
        sys.stdout.write(f"## {table_name}\n\n{make(read(folder / 'benchmarks' / f'{stem}.jsonl'))}\n")

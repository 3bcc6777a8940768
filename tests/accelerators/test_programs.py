"""Facts about the programs: of a few once compiled, of every kind before that. Each is compiled once."""

import functools
import itertools
import re

import jax
import pytest

from sparseopt.core.base.dense import HIGH_BY_TF32, activations_in
from sparseopt.layers.methods import find_method, method_cost
from tests.accelerators import programs
from tests.accelerators.programs import methods
from tests.accelerators.targets import HOST, MESH, TARGETS, Place, facts, missing

pytestmark = pytest.mark.accelerators

MODEL, SMALL, WIDE = "SmolLM2-135M", (576, 576), (576, 1536)
LAYERS = [("wanda", None), ("sparsegpt", None), ("maiht", "tuned"), ("best", None)]
# How much more than the estimate a small layer may take: pieces of a few kilobytes that no estimate has.
SLACK = 1.15


def lowered(target, name, *arguments, devices=1):
    return getattr(programs, name)(Place.on(target, devices), *arguments)


@functools.cache
def found(target, name, *arguments, devices=1):
    return facts(lowered(target, name, *arguments, devices=devices))


@pytest.fixture(params=TARGETS)
def target(request):
    if missing(request.param):
        pytest.skip(f"SKIPPED: the compiler for {request.param} is not installed")
    return request.param


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_s_program_does_not_grow_with_the_layer_and_takes_the_memory_that_is_estimated(target, method):
    small, wide = (found(target, "layer", shape, *method, "unstructured") for shape in (SMALL, WIDE))
    assert abs(wide.instructions / small.instructions - 1) < 0.1
    workspace = method_cost(find_method(*method)).workspace
    assert small.temporaries < SLACK * workspace.nbytes(*SMALL)
    assert wide.temporaries < SLACK * workspace.nbytes(*WIDE)


@pytest.mark.parametrize("name", ["grams", "reconstruction"])
def test_a_block_of_7b_fits_in_one_device(target, name):
    program = found(target, name, "LLaMA-2-7B")
    assert program.peak < TARGETS[target].memory
    assert (program.waiting, program.doubles, program.sent) == ([], 0, {})


def test_high_is_three_products_in_tf32_on_an_h100():
    if missing("h100"):
        pytest.skip("SKIPPED: the compiler for h100 is not installed")
    with jax.default_matmul_precision(HIGH_BY_TF32):
        text = lowered("h100", "forward", MODEL).compile().as_text()
    assert "algorithm=dot_tf32_tf32_f32_x3" in text


@pytest.mark.parametrize("name", ["forward", "grams"])
def test_bfloat16_gives_every_product_of_a_block_of_8b_operands_of_16_bits(target, name):
    with activations_in("bfloat16"):
        text = lowered(target, name, "Llama-3-8B").as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all(re.search(r"\(tensor<\S+xbf16>, tensor<\S+xbf16>\) -> tensor<\S+xf32>", line) for line in products)


def test_bfloat16_moves_fewer_bytes_for_the_same_operations_on_a_tpu():
    if missing("v5e"):
        pytest.skip("SKIPPED: the compiler for v5e is not installed")
    full = lowered("v5e", "forward", "Llama-3-8B").compile().cost_analysis()
    with activations_in("bfloat16"):
        half = lowered("v5e", "forward", "Llama-3-8B").compile().cost_analysis()
    assert half["flops"] == pytest.approx(full["flops"], rel=0.001)
    assert half["bytes accessed"] < 0.9 * full["bytes accessed"]


EXCHANGES = {
    "windows of their own": ("forward", MODEL),
    "a linear cut": ("layer_cut", SMALL, "maiht", "tuned"),
    "a signal cut": ("trend", (512, 512), 1, "doge"),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_devices_exchange_what_they_exchange_on_the_host(target, name):
    """`tests.pruning.test_devices` and `tests.trend.test_devices` have the formulas."""
    here, there = (found(place, *EXCHANGES[name], devices=MESH) for place in (HOST, target))
    inside = here.loops.keys() - {0}
    assert there.loops.keys() - {0} == inside
    # Outside of loops the partitioners differ: that for GPUs gathers the masks around the breaking of ties. Where
    # others gather one number from each device, a TPU adds rows of all eight.
    rows = MESH if name == "a linear cut" and target != "h100" else 1
    assert all(here.loops[depth] <= there.loops[depth] <= rows * here.loops[depth] for depth in inside)


# Before they are compiled, at shapes that take too long to compile in a test --------------

OTHERS = [(name, MODEL) for name in ("forward", "grams", "reconstruction")]
SHAPES = [(512, 512), (128, 128, 128)]
OTHERS += [("trend", *case) for case in itertools.product(SHAPES, (0, 1, 2), ("doge", "admm"))]
OPERATION = re.compile(r"(?:stablehlo|chlo|func|mhlo|sdy)\.[a-z_]+")
# Operations of the padding that some sizes need: the largest program has 4,000.
PADDING = 10


@pytest.mark.parametrize("program", [*(("layer", SMALL, *method) for method in methods()), *OTHERS], ids=str)
def test_no_program_calls_python_or_has_an_array_in_float64_and_all_sum_products_in_float32(target, program):
    # With 64-bit types enabled an array that is silently promoted shows; settings are numbers in float64 then.
    with jax.enable_x64(True):
        text = lowered(target, *program).as_text()
    assert "callback" not in text
    assert not re.findall(r"tensor<(?:\d+x)+f64>", text)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all(line.endswith(("f32>", "f32> loc(#loc)")) for line in products)


@pytest.mark.parametrize("method", methods(), ids=str)
def test_a_layer_s_lowered_program_does_not_grow_with_the_layer(target, method):
    """Each function that is called counts once, as it is compiled once or inlined."""
    small, large = (
        len(OPERATION.findall(lowered(target, "layer", shape, *method).as_text()))
        for shape in ((4096, 4096), (8192, 28672))
    )
    assert abs(large - small) <= PADDING

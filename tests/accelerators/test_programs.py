"""Facts about the programs: of a few once compiled, of every kind before that. Each is compiled once."""

import functools
import re

import jax
import pytest

from sparseopt.core.base.dense import HIGH_BY_TF32
from sparseopt.core.base.mesh import AXIS
from sparseopt.layers.methods import find_method, method_cost
from tests.accelerators.programs import PATTERNS, config_of, linear_shapes, programs
from tests.accelerators.targets import HOST, MESH, TARGETS, Place, facts, missing

pytestmark = pytest.mark.accelerators

PROGRAMS = programs()
SMALL, WIDE = "576 x 576", "576 x 1536"
LAYERS = {
    "wanda, unstructured": ("wanda", None),
    "sparsegpt, unstructured": ("sparsegpt", None),
    "maiht tuned, unstructured": ("maiht", "tuned"),
    "best, unstructured": ("best", None),
}
BLOCK = ("Grams and drift", "step of reconstruction")
# How much more than the estimate a small layer may take: pieces of a few kilobytes that no estimate has.
SLACK = 1.15


@functools.cache
def found(target, kind, name, shape, devices=1):
    program = PROGRAMS[kind, name, shape, devices]
    return facts(lambda: program.lower(Place.on(target, devices)))


@pytest.fixture(params=TARGETS)
def target(request):
    if reason := missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_program_does_not_grow_with_the_layer(target, name):
    small, wide = (found(target, "layer", name, shape) for shape in (SMALL, WIDE))
    assert small["library_calls"] == wide["library_calls"]
    assert abs(wide["instructions"] / small["instructions"] - 1) < 0.1


@pytest.mark.parametrize("shape", [SMALL, WIDE])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_the_memory_that_is_estimated(target, name, shape):
    outputs, inputs = map(int, shape.split(" x "))
    cost = method_cost(find_method(*LAYERS[name]))
    estimate = cost.workspace.nbytes(outputs, inputs)
    assert found(target, "layer", name, shape)["temporaries"] < SLACK * estimate


@pytest.mark.parametrize("name", BLOCK)
def test_a_block_of_7b_fits_in_one_device(target, name):
    program = found(target, "block", name, "LLaMA-2-7B")
    assert program["peak"] < TARGETS[target].memory
    assert program["host"] == []
    assert program["doubles"] == 0
    assert program["collectives"] == {}


def test_high_is_three_products_in_tf32_on_an_h100():
    if reason := missing("h100"):
        pytest.skip(reason)
    with jax.default_matmul_precision(HIGH_BY_TF32):
        lowered = PROGRAMS["block", "forward", "SmolLM2-135M", 1].lower(Place.on("h100", 1))
    assert "algorithm=dot_tf32_tf32_f32_x3" in lowered.compile().as_text()


def test_devices_with_a_linear_each_or_windows_of_their_own_exchange_nothing(target):
    assert Place.on(target, MESH).mesh.shape == {AXIS: MESH}
    assert found(target, "mesh", "forward", "SmolLM2-135M", MESH)["collectives"] == {}
    assert found(target, "mesh", "wanda, side by side", SMALL, MESH)["collectives"] == {}


def test_the_grams_of_a_block_are_summed_once(target):
    adding = found(target, "mesh", "Grams and drift", "SmolLM2-135M", MESH)
    summing = found(target, "mesh", "sum of Grams", "SmolLM2-135M", MESH)
    assert adding["collectives"] == {}
    assert set(summing["collectives"]) == {"all-reduce"}
    config = config_of("SmolLM2-135M")
    widths = [config.hidden_size] * 3 + [config.intermediate_size]
    # Gram, drift and sum of every input, the sum of the tokens' weights and their number.
    assert summing["collective_bytes"]["all-reduce"] == sum(2 * 4 * w**2 + 4 * w + 4 + 4 for w in widths)


def test_an_iteration_of_maiht_on_a_cut_layer_exchanges_single_numbers(target):
    """Those of the host, which `tests.pruning.test_devices` counts."""
    here, there = (found(place, "mesh", "maiht tuned, cut", SMALL, MESH)["loop_bytes"] for place in (HOST, target))
    # Outside of the loops the partitioners differ: that for GPUs gathers the masks around the breaking of ties, a byte
    # a weight and four times a solve. Where others gather one number from each device, a TPU adds rows of all eight.
    assert there.keys() == {"0", "1"}
    assert here["1"] < 100
    assert there["1"] <= here["1"] * (MESH if TARGETS[target].platform == "tpu" else 1)


def test_a_step_of_the_trend_filter_sends_what_it_sends_on_the_host(target):
    """`tests.trend.test_devices` has the formula: one row of a neighbour for each factor."""
    here, there = (found(place, "mesh", "order 1, doge", "512²", MESH) for place in (HOST, target))
    # In one turn of each loop: a TPU's program does not say how often they turn.
    assert there["loop_bytes"].keys() == {"0", "1", "2"}
    assert all(there["loop_bytes"][loops] == here["loop_bytes"][loops] for loops in "12")


# Before they are compiled, at shapes that take too long to compile in a test --------------


EVERY_LAYER = [key for key in PROGRAMS if key[0] == "layer" and key[2] == SMALL]
OTHERS = [
    key
    for key in PROGRAMS
    if (key[0] == "block" and key[2] in ("SmolLM2-135M", "Qwen3-30B-A3B"))
    or (key[0] == "linear" and key[2] == SMALL)
    or (key[0] == "trend" and key[2] in ("512²", "128³", "20,000 nodes"))
]
OPERATION = re.compile(r"(?:stablehlo|chlo|func|mhlo|sdy)\.[a-z_]+")
# Operations of the padding that some sizes need: the largest program has 4,000.
PADDING = 10


def text_of(target, key):
    return PROGRAMS[key].lower(Place.on(target, PROGRAMS[key].devices)).as_text()


def named(key):
    return ", ".join(key[:3])


@pytest.mark.parametrize("key", EVERY_LAYER + OTHERS, ids=named)
def test_no_program_calls_python_or_has_an_array_in_float64_and_all_sum_products_in_float32(target, key):
    # With 64-bit types enabled an array that is silently promoted shows; settings are numbers in float64 then.
    with jax.enable_x64(True):
        text = text_of(target, key)
    assert "callback" not in text
    assert not re.findall(r"tensor<(?:\d+x)+f64>", text)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all(line.endswith(("f32>", "f32> loc(#loc)")) for line in products)


@pytest.mark.parametrize("key", EVERY_LAYER, ids=named)
def test_a_layer_s_lowered_program_does_not_grow_with_the_layer(target, key):
    """Each function that is called counts once, as it is compiled once or inlined."""
    shapes = ("4096 x 4096", "8192 x 28672")
    sizes = [len(OPERATION.findall(text_of(target, (key[0], key[1], shape, key[3])))) for shape in shapes]
    assert abs(sizes[1] - sizes[0]) <= PADDING


def test_every_pattern_and_model_is_in_the_list_with_the_shapes_of_the_models():
    assert {name.partition(", ")[2] for kind, name, *_ in PROGRAMS if kind == "layer"} == set(PATTERNS)
    models = {"SmolLM2-135M", "Qwen3-0.6B", "Qwen3-30B-A3B", "LLaMA-2-7B", "LLaMA-2-70B"}
    assert {key[2] for key in PROGRAMS if key[1] == "Grams"} == models
    assert set(TARGETS) == {"v5e", "v6e", "h100"}
    assert linear_shapes("LLaMA-2-7B") == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert (8192, 28672) in linear_shapes("LLaMA-2-70B")

"""Facts about every kind of program before it is compiled, at shapes that take too long to compile in a test."""

import re
from collections import Counter

import pytest

from tests.accelerators.programs import PATTERNS, programs
from tests.accelerators.targets import TARGETS, Place, missing

pytestmark = pytest.mark.accelerators

PROGRAMS = programs()
SMALL, LARGE, WIDE = "576 x 576", "4096 x 4096", "8192 x 28672"
LAYERS = [key for key in PROGRAMS if key[0] == "layer" and key[2] == SMALL]
OTHERS = [
    key
    for key in PROGRAMS
    if (key[0] == "block" and key[2] in ("SmolLM2-135M", "Qwen3-30B-A3B"))
    or (key[0] == "linear" and key[2] == SMALL)
    or (key[0] == "trend" and key[2] in ("512²", "128³", "20,000 nodes"))
]
# Operations of the padding that some sizes need: the largest program has 4,000.
PADDING = 10
OPERATION = re.compile(r"(?:stablehlo|chlo|func|mhlo|sdy)\.[a-z_]+")


@pytest.fixture(params=TARGETS)
def target(request):
    if reason := missing(request.param):
        pytest.skip(reason)
    return request.param


def text_of(target, key):
    program = PROGRAMS[key]
    return program.lower(Place.on(target, program.devices)).as_text()


def operations(text):
    """How many of each operation; each function that is called counts once, as it is compiled once or inlined."""
    return Counter(OPERATION.findall(text))


def named(key):
    return ", ".join(key[:3])


@pytest.mark.parametrize("key", LAYERS + OTHERS, ids=named)
def test_no_program_calls_python_or_has_an_array_in_float64_and_all_sum_products_in_float32(target, key):
    # With 64-bit types enabled an array that is silently promoted shows; settings are numbers in float64 then.
    with jax.enable_x64(True):
        text = text_of(target, key)
    assert "callback" not in text
    assert not re.findall(r"tensor<(?:\d+x)+f64>", text)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all(line.endswith(("f32>", "f32> loc(#loc)")) for line in products)


@pytest.mark.parametrize("key", LAYERS, ids=named)
def test_a_layer_s_program_does_not_grow_with_the_layer(target, key):
    sizes = [sum(operations(text_of(target, (key[0], key[1], shape, key[3]))).values()) for shape in (LARGE, WIDE)]
    assert abs(sizes[1] - sizes[0]) <= PADDING


def test_every_pattern_and_model_is_in_the_list():
    assert {name.partition(", ")[2] for kind, name, *_ in PROGRAMS if kind == "layer"} == set(PATTERNS)
    assert {key[2] for key in PROGRAMS if key[1] == "Grams"} == {
        "SmolLM2-135M",
        "Qwen3-0.6B",
        "Qwen3-30B-A3B",
        "LLaMA-2-7B",
        "LLaMA-2-70B",
    }
    assert set(TARGETS) == {"v5e", "v6e", "h100"}

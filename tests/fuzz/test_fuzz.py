"""The readers and argument checks on a fixed set of random inputs."""

import time

import hypothesis
import pytest

from tests.fuzz.bad_inputs import SLOW
from tests.fuzz.choices import inputs_of
from tests.fuzz.solver_targets import SOLVERS
from tests.fuzz.targets import READERS, run_folder, run_gguf, run_safetensors, seed_folders, seed_gguf


@pytest.mark.parametrize("target", [*READERS, *SOLVERS], ids=lambda target: target.name)
def test_every_input_gives_a_value_or_the_documented_error(target):
    refused = []

    @hypothesis.settings(
        max_examples=8 if target in SOLVERS else 60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs_of(target))
    def check(given):
        start = time.process_time()
        refused.append(target(given))
        assert time.process_time() - start < SLOW

    check()
    # A target that lets everything pass looks at nothing.
    assert sum(refused) > 0


def test_what_is_mutated_is_accepted_as_it_is():
    """Otherwise every mutation would end at the same door."""
    for folder in seed_folders():
        run_folder(folder)
        for name, content in folder.items():
            if name.endswith(".safetensors"):
                run_safetensors(content)
    for content in seed_gguf():
        run_gguf(content)

"""Every bad input quickly ends in the documented error, with a message that says what is wrong."""

import time

import pytest

from tests.fuzz.bad_inputs import BAD_INPUTS
from tests.fuzz.run import SLOW


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: f"{bad.kind}: {bad.name}")
def test_it_ends_in_a_clear_error(bad, tmp_path):
    use = bad.make(tmp_path)
    start = time.process_time()
    with pytest.raises(bad.error) as caught:
        use()
    assert type(caught.value) is bad.error
    assert bad.text in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert time.process_time() - start < SLOW


def test_names_are_unique():
    names = [(bad.kind, bad.name) for bad in BAD_INPUTS]
    assert len(set(names)) == len(names)

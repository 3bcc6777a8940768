import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sparseopt.models import open_source
from sparseopt.pruning import TextError, load_text, token_windows
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.pruning.text.windows import begin_windows, text_windows
from tests.models.tiny import tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER


def test_the_two_parts_of_pydoc_share_no_paragraph_and_suffice_for_the_demo():
    calibration, evaluation = load_text("pydoc", "calibration"), load_text("pydoc", "evaluation")
    assert min(len(calibration), len(evaluation)) > 100_000
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))


def test_a_file_is_cut_into_halves_at_a_line_end(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i}\n" for i in range(101)))
    first, second = load_text(f"file:{file}", "calibration"), load_text(f"file:{file}", "evaluation")
    assert first + second == file.read_text()
    assert first.endswith("\n")


def test_parquet_rows_are_joined_by_blank_lines(tmp_path):
    for split in ("validation", "test"):
        rows = [f"{split} one", "", f"{split} two"]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"{split}.parquet")
    assert load_text(f"wikitext2:{tmp_path}", "calibration") == "validation one\n\n\n\nvalidation two"
    assert load_text(f"wikitext2:{tmp_path}", "evaluation") == "test one\n\n\n\ntest two"


def test_what_cannot_be_had_is_said(tmp_path):
    with pytest.raises(TextError, match="unknown text 'wiki'; known are pydoc"):
        load_text("wiki", "calibration")
    with pytest.raises(TextError, match="names no source; write file:PATH"):
        load_text("file:", "calibration")
    with pytest.raises(TextError, match="cannot read the text file"):
        load_text(f"file:{tmp_path / 'absent'}", "calibration")
    with pytest.raises(TextError, match="does not exist"):
        load_text(f"wikitext2:{tmp_path / 'absent'}", "calibration")
    (tmp_path / "other.csv").touch()
    with pytest.raises(TextError, match=r"no validation\*.parquet; it holds other.csv"):
        load_text(f"wikitext2:{tmp_path}", "calibration")
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TextError, match="cannot read a text column"):
        load_text(f"wikitext2:{tmp_path}", "calibration")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TextError, match="is empty"):
        load_text(f"file:{tmp_path / 'empty.txt'}", "calibration")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match=r"not UTF-8 \(byte 3\)"):
        load_text(f"file:{tmp_path / 'latin.txt'}", "calibration")


def test_windows_come_from_the_start():
    np.testing.assert_array_equal(token_windows(np.arange(100), 3, 10), np.arange(30).reshape(3, 10))


def test_random_windows_do_not_repeat_and_follow_the_seed():
    tokens = np.arange(200)
    drawn = token_windows(tokens, 15, 10, "random", seed=3)
    assert len(np.unique(drawn)) == 150
    np.testing.assert_array_equal(drawn, token_windows(tokens, 15, 10, "random", seed=3))
    for seed in (0, 4):
        assert not np.array_equal(drawn, token_windows(tokens, 15, 10, "random", seed=seed))
    assert not np.array_equal(token_windows(tokens, 15, 10, "random"), token_windows(tokens, 15, 10))


@pytest.mark.parametrize(("count", "heldout"), [(20, 4), (12, 3), (7, 0), (100, 20)])
def test_spread_windows_lie_at_equal_distances_and_so_do_the_heldout_ones(count, heldout):
    found = token_windows(np.arange(100 * 10), count, 10, "spread")
    places = found[:, 0] // 10
    np.testing.assert_array_equal(np.sort(places), np.arange(count) * 100 // count)
    for part in np.split(places, [count - heldout]):
        around = np.concatenate([part, part + 100])
        assert len(part) == 0 or np.diff(np.sort(around)).max() <= 2 * 100 / len(part)


def test_too_short_a_text_names_the_figures():
    with pytest.raises(TextError, match=r"4 windows of 32 tokens need 128 tokens, the text has 100 \(3 windows\)"):
        token_windows(np.arange(100), 4, 32)
    with pytest.raises(TextError, match=r"the text has 10 \(0 windows\)"):
        token_windows(np.arange(10), 1, 32)
    with pytest.raises(TextError, match="given 0 windows of 32"):
        token_windows(np.arange(100), 0, 32)
    with pytest.raises(TextError, match="windows must be one of first, spread, random, given 'sprad'"):
        token_windows(np.arange(100), 1, 32, "sprad")


def test_windows_begin_with_bos_in_place_of_their_last_token():
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_array_equal(begin_windows(ids, 99), [[99, 0, 1, 2], [99, 4, 5, 6], [99, 8, 9, 10]])
    assert begin_windows(ids, None) is ids


def test_it_is_said_which_half_of_a_file_is_read_and_too_short(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_config(), {})
    (folder / "tokenizer.json").write_text(TOKENIZER)
    text = f"file:{tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text("hello there\n" * 4)
    assert part_of_text(text, "calibration") == f"the first half of {text}"
    assert part_of_text(text, "evaluation") == f"the second half of {text}"
    assert part_of_text("pydoc", "calibration") == "pydoc"
    source = open_source(folder)
    ids, bos = text_windows(source, text, "calibration", 2, 8, bos="yes")
    assert (ids.shape, bos) == ((2, 8), 1)
    assert text_windows(source, text, "calibration", 2, 8).bos is None
    with pytest.raises(TextError, match=r"the first half of file:.*: 9 windows of 8 tokens need 72 tokens"):
        text_windows(source, text, "calibration", 9, 8)

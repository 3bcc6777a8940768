"""`sparseopt zero-shot` if its extra is not installed."""

import sys


def test_the_missing_extra_is_named(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [m for m in sys.modules if m.startswith("lm_eval.") or m == "sparseopt.pruning.evaluate.zero_shot"]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = command("zero-shot", "model", "--tasks", "arc_easy")
    assert status == 2
    assert "pip install 'sparseopt[eval]'" in err

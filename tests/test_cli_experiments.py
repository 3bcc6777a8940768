"""`sparseopt run` and `sparseopt report` as a person types and sees them."""

import pytest
import yaml

TOY = "tests.experiments.toy.Toy"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.yaml"
    values = {"name": "toy", "title": "A toy", "task": TOY, "sweep": {"grid": {"scale": [1.0, 2.0, 3.0]}}}
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_dry_run_shows_every_run_and_writes_nothing(tmp_path, config, command):
    status, out, _ = command("run", config, "count=2", "--output", tmp_path / "runs", "--dry-run")
    assert status == 0
    assert out.count("new") == 3
    assert "3 runs, 0 finished; time unknown on two cores" in out
    assert not (tmp_path / "runs").exists()


def test_shards_together_do_the_sweep_and_the_report_gathers_it(tmp_path, config, command):
    output = tmp_path / "runs"
    for shard in ("1/2", "2/2"):
        status, out, _ = command("run", config, "--output", output, "--shard", shard)
        assert status == 0
        assert f"(shard {shard})" in out
    assert out.count("done") == 1
    status, out, _ = command("run", config, "--output", output)
    assert status == 0
    assert "3 runs, finished before" in out
    assert out.count("kept") == 3
    status, out, _ = command("report", output, "--output", tmp_path / "report")
    assert status == 0
    assert "A toy" in out
    assert "3 ± 2.2" in out
    assert (tmp_path / "report" / "report.html").is_file()


def test_mistakes_end_before_any_work_with_status_2(tmp_path, config, command):
    status, _, err = command("run", config, "cuont=2", "--output", tmp_path / "runs")
    assert status == 2
    assert "cuont: no such key; did you mean 'count'?" in err
    assert not (tmp_path / "runs").exists()
    assert command("run", config, "--shard", "3/2")[0] == 2
    assert command("report", tmp_path / "none")[0] == 2


def test_a_failed_run_ends_with_status_1_after_the_others(tmp_path, config, command):
    status, out, err = command("run", config, "fail_at=1", "--output", tmp_path / "runs")
    assert status == 1
    assert out.count("FAILED") == 3
    assert "3 of 3 runs failed" in err
    status, out, _ = command("run", config, "--output", tmp_path / "other")
    assert status == 0


def test_other_settings_in_the_folder_stop_everything_before_work(tmp_path, config, command):
    command("run", config, "--output", tmp_path / "runs")
    status, _, err = command("run", config, "count=9", "--output", tmp_path / "runs")
    assert status == 2
    assert err.count("holds the results of other settings") == 3
    assert command("run", config, "count=9", "--output", tmp_path / "runs", "--again")[0] == 0

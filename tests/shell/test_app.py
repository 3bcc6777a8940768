"""All commands: their help, what they import, and what surrounds them."""

import contextlib
import importlib
import inspect
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from rich.console import Console

from sparseopt.shell import app as cli
from sparseopt.shell import console
from sparseopt.shell.options import completed
from tests.experiments.inputs import write_inputs

GROUP = typer.main.get_command(cli.app)
COMMANDS = {
    each.name or each.callback.__name__.replace("_", "-"): each.callback for each in cli.app.registered_commands
}
HOW = ("How to prune", "Calibration", "Machine")
PANELS = {"prune": ("Output", "What to prune", *HOW), "shrink": ("Output", "What to keep", *HOW)}
LIGHT = "assert not {'flax', 'transformers', 'matplotlib'} & set(sys.modules)"
MAIN = "from sparseopt.shell.app import main\ntry: main()\nfinally: "


def process(*call, **environment):
    given = {"env": os.environ | environment, "capture_output": True, "text": True, "check": False}
    return subprocess.run([sys.executable, *map(str, call)], **given)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("before", "arguments", "after"),
    [
        ("from sparseopt.experiments import plots; [getattr(plots, name) for name in plots.__all__]", "--help", LIGHT),
        ("", "--version", LIGHT),
        ("sys.modules['flax'] = None", "denoise --help", "pass"),
    ],
)
def test_help_and_plots_need_no_heavy_import_and_other_commands_nothing_of_the_pruner(before, arguments, after):
    call = f"import sys; sys.argv = ['sparseopt', *{arguments.split()}]"
    done = process("-c", f"{call}\n{before}\n{MAIN}{after}")
    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_in_80_columns_and_two_examples_that_are_taken(command, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    lines = GROUP.commands[name].epilog.split("\n\n")[1:]
    assert len(lines) == 2
    for line in lines:
        program, own, *arguments = shlex.split(line)
        assert (program, own) == ("sparseopt", name)
        with GROUP.make_context("sparseopt", [own]) as context:
            assert GROUP.commands[own].make_context(own, arguments, parent=context).params
    status, out, _ = command(name, "-h")
    assert status == 0
    assert lines[1].split()[-1] in out.split("Examples:")[1]
    places = [out.index(f"─ {panel} ") for panel in PANELS.get(name, ())]
    assert places == sorted(places)
    shown = inspect.signature(completed(COMMANDS[name])).parameters.keys() - {"as_json", "context"}
    assert [option for option in shown if option not in out and option.replace("_", "-") not in out] == []


@pytest.mark.processes
def test_in_a_shell_options_of_a_recipe_are_completed_json_stands_alone_and_an_absent_platform_is_an_error(tmp_path):
    asked = {"_SPARSEOPT_COMPLETE": "complete_bash", "COMP_WORDS": "sparseopt prune --spars", "COMP_CWORD": "2"}
    done = process("-c", f"import sys; sys.argv = ['sparseopt']\n{MAIN}pass", **asked)
    assert "--sparsity" in done.stdout.split(), done.stderr
    done = process("-m", "sparseopt", "doctor", "--json", FORCE_COLOR="1")
    assert json.loads(done.stdout)["devices"], done.stderr
    source, text = write_inputs(tmp_path)
    call = ["prune", source, "--output", tmp_path / "out", "--calibration", text, "--windows", 2, "--seqlen", 32]
    done = process("-m", "sparseopt", *call, JAX_PLATFORMS="abacus")
    assert (done.returncode, "error: Unable to initialize backend 'abacus'" in done.stderr) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def pressed(folder, when, presses, call, before):
    """Run the command in a terminal and press Ctrl-C so many times once it shows a text: status, seconds, the rest."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    main = f"import sys; from sparseopt.shell import app; sys.argv[0] = 'sparseopt'; {before}; app.main()"
    line = [sys.executable, "-c", spawn, sys.executable, "-c", main, *map(str, call)]
    shown, place = b"", {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(Path.cwd())}}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **place) as started:
        while when not in shown:
            read = os.read(started.stdout.fileno(), 4096)
            assert read, shown.decode()
            shown += read
        time.sleep(1)
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it may have ended meanwhile
            for _ in range(presses):
                os.write(started.stdin.fileno(), b"\x03")
                time.sleep(0.2)
        rest = started.stdout.read().decode()
        return started.wait(), time.monotonic() - start, " ".join(rest.split())


# In place of a command: compiled code without end, in which the main thread raises nothing.
ENDLESS = (
    "import jax; loop = jax.jit(lambda x: jax.lax.while_loop(lambda v: v > 0, lambda v: v + 1, x)); "
    "app.app = lambda **_: (print('begins', flush=True), loop(1.0).block_until_ready())"
)
PATIENT = f"{ENDLESS}; app.GRACE = 600"
READING = ["eval", "source", "--text", "file:long.txt", "--windows", 3_000, "--seqlen", 128]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("when", "presses", "call", "before"),
    [(b"begins", 1, [], ENDLESS), (b"begins", 2, [], PATIENT), (b"perplexity", 1, READING, "pass")],
)
def test_ctrl_c_ends_a_command_in_time_and_says_that_nothing_was_written(tmp_path, when, presses, call, before):
    write_inputs(tmp_path)
    (tmp_path / "long.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 60_000)
    held = set(tmp_path.iterdir())
    status, seconds, rest = pressed(tmp_path, when, presses, call, before)
    assert (status, rest.endswith("stopped; nothing was written")) == (130, True), rest
    assert seconds < 20  # 1, where nothing else runs
    assert set(tmp_path.iterdir()) == held


@pytest.mark.parametrize("call", [["-m", "sparseopt", "doctor"], ["sparseopt", "doctor"], ["-c", "import sparseopt"]])
def test_ctrl_c_while_a_command_imports_ends_it_at_once_without_a_traceback(tmp_path, call):
    """In a process that is not the command, Ctrl-C raises as ever."""
    (tmp_path / "sparseopt").write_text("import sys\nfrom sparseopt.shell.app import main\nsys.exit(main())\n")
    # In place of JAX, whose import takes most of the time.
    (tmp_path / "jax.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)\n")
    line = [sys.executable, str(tmp_path / "sparseopt") if call[0] == "sparseopt" else call[0], *call[1:]]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    with subprocess.Popen(line, env=os.environ | {"PYTHONPATH": path}, **given) as started:
        assert started.stdout.readline() == "imports\n"
        started.send_signal(signal.SIGINT)
        _, said = started.communicate()
    if call[0] == "-c":
        assert "KeyboardInterrupt" in said
    else:
        assert (started.returncode, said) == (130, "stopped; nothing was written\n")


def test_what_a_stopped_command_has_written_is_told(tmp_path):
    for name in ("calm.png", "calm-summary.json", ".calm-picture.png.tmp", "other.png"):
        (tmp_path / name).touch()
    before, after = 0.0, time.time() + 60
    assert console.left_in(tmp_path / "calm.png", after) == console.left_in(None, before) == console.NOTHING
    names = ", ".join(str(tmp_path / name) for name in ("calm-summary.json", "calm.png"))
    assert console.left_in(tmp_path / "calm.png", before) == f"stopped; what was written stays: {names}"
    assert str(tmp_path / "other.png") in console.left_in(tmp_path, before)
    for number in range(2):
        (tmp_path / f"more-{number}").touch()
    assert console.left_in(tmp_path, before).endswith(f": 5 files in {tmp_path}")


def test_a_home_in_an_option_is_found(tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, _, err = command("denoise", "absent.png", "--output=~/x.png")
    assert sys.argv[-1] == f"--output={tmp_path}/x.png"
    assert "absent.png" in err


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, command):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [m for m in sys.modules if m.startswith("lm_eval.") or m == "sparseopt.pruning.evaluate.zero_shot"]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = command("zero-shot", "model", "--tasks", "arc_easy")
    assert (status, "pip install 'sparseopt[eval]'" in err) == (2, True), err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for missing, extra in (("tifffile.absent_part", "images"), ("matplotlib", "plot")):
        monkeypatch.setattr(cli, "app", lambda missing=missing, **_: importlib.import_module(missing))
        status, _, err = command("denoise")
        assert (status, f"needs {missing}: pip install 'sparseopt[{extra}]'" in err) == (2, True), err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_is_broken_only_between_words_and_only_on_a_terminal(terminal):
    place = Console(file=io.StringIO(), width=20, force_terminal=terminal, highlight=False)
    console.say("2 mistakes: [bold]\n  a sentence that is longer, in /a/folder/with/a/long/name", place)
    broken = ["2 mistakes: [bold]", "  a sentence that is", "  longer, in", "  /a/folder/with/a/long/name"]
    whole = ["2 mistakes: [bold]", "  a sentence that is longer, in /a/folder/with/a/long/name"]
    assert [line.rstrip() for line in place.file.getvalue().splitlines()] == (broken if terminal else whole)


def test_times_have_the_unit_that_suits_them():
    times = {0.4: "0 s", 89.4: "89 s", 90: "2 min", 5399: "90 min", 5400: "1.5 h"}
    assert {seconds: console.duration(seconds) for seconds in times} == times


# How a shell starts a process whose output nobody takes, or not as it is.
CONSOLES = {
    "a full disk": "> /dev/full",
    "none from the start": ">&-",
    "none at all": ">&- 2>&- <&-",
    "a pager that was closed": "| true",
    "one of ASCII": "PYTHONIOENCODING=ascii",
}
SPEAKING = """
import os, sys
from sparseopt.shell import console
# The first file that is opened must not be what others print to.
with open(sys.argv[1], "wb") as stream:
    try:
        os.write(1, b"printed by a library")
    except OSError:
        pass
    console.say("error ‖X (V - W)ᵀ‖², na\\u00efve, \\udcff")
    console.console.print(console.comparison_table("title", ["a", "b"], [["1", "²"]]))
    console.errors.print("told")
    stream.write(b"whole")
"""


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "shell"), CONSOLES.items())
def test_a_console_that_takes_no_output_or_not_all_letters_ends_nothing(tmp_path, kind, shell):
    environment, redirect = (shell, "") if "=" in shell else ("", shell)
    line = f'set -o pipefail; {environment} "$0" -c "$1" "$2" {redirect}'
    call = ["bash", "-c", line, sys.executable, SPEAKING, str(tmp_path / "file")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "" if kind == "none at all" else "told\n")
    assert (tmp_path / "file").read_bytes() == b"whole"
    if kind == "one of ASCII":
        assert "error ?X (V - W)??" in done.stdout
        assert "| 1" in done.stdout

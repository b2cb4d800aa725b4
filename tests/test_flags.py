"""What the examples say with `--help`, and how soon: torch takes seconds, and no flag needs it."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_dualrate import decoding, planning

ROOT = Path(__file__).parents[1]
SCRIPTS = ["train_dual_rate", "train_single_rate", "distill", "train_classifier"]
SCRIPTS += ["evaluate", "make_card", "generate", "plan", "benchmark"]
# Runs a script as a shell does, and says at its end whether it had to wait for torch.
WATCH = """
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", [name for name in ("torch", "diffusers", "datasets") if name in sys.modules]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(script, *arguments):
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    command = [sys.executable, "-c", path + WATCH, f"examples/{script}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_wrong_flag_are_answered_before_torch_is_imported(script):
    done = call(script, "--help")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "loaded: []", done.stderr
    done = call(script, "--no_such_flag")
    assert done.returncode == 2 and done.stdout.splitlines() == ["loaded: []"]
    assert done.stderr.splitlines()[-1].startswith(f"{script}.py: error: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_of_help_can_be_pasted(script):
    """A shell's line break between words would be a part of a word where it is pasted elsewhere."""
    module = importlib.import_module(script)
    commands = re.findall(r"^    ((?:python|accelerate launch) .*)$", module.__doc__, re.MULTILINE)
    assert commands and "\\\n" not in module.__doc__
    for command in commands:
        words = shlex.split(command.removeprefix("accelerate launch ").removeprefix("python "))
        assert words[0] == f"examples/{script}.py" and not [word for word in words if re.search(r"\s", word)]
        module.parse_args(words[1:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_and_says_every_default(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    parser = []
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", lambda self, argv=None: parser.append(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(script).parse_args([])
    text = parser[0].format_help()
    blocks = {block.split()[0]: block for block in re.split(r"\n  (?=-)", text)}
    for action in parser[0]._actions:
        assert action.help, action.dest
        if action.option_strings and action.default not in (None, False, [], "==SUPPRESS=="):
            assert f"(default: {action.default})" in blocks[action.option_strings[0]]
    assert "(default: None)" not in text and "(default: False)" not in text


def test_what_flags_repeat_of_slower_modules_is_what_these_say(capsys):
    import plan

    for unit in planning.UNITS:
        words = ["--model", "m", "--output", "o", "--budget", "1", "--unit", unit]
        assert plan.parse_args(words).unit == unit
    with pytest.raises(SystemExit):
        plan.parse_args(["--model", "m", "--output", "o", "--budget", "1", "--unit", "hours"])
    assert ", ".join(planning.UNITS) in capsys.readouterr().err.replace("'", "")
    import train_classifier

    args = train_classifier.parse_args(["--preset", "p", "--label_column", "l", "--output", "o"])
    assert args.max_image_pixels == decoding.MAX_IMAGE_PIXELS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--no_such_flag"],
            "train_dual_rate.py: error: the following arguments are required: --preset, --output_dir",
        ),
        (["--preset", "nope", "--output_dir", "run"], "ValueError: --preset 'nope' is neither a file nor one of "),
        (
            ["--preset", "tiny", "--output_dir", "run", "--train_data_dir", "nowhere"],
            "ValueError: The folder 'nowhere' does not exist.",
        ),
    ],
)
def test_what_accelerate_launches_quietly_ends_with_our_sentence(arguments, sentence, tmp_path):
    """Without --quiet Accelerate's launcher, another process, prints a trace of its own after it."""
    launcher = Path(sys.executable).with_name("accelerate")
    command = [launcher, "launch", "--quiet", ROOT / "examples/train_dual_rate.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.splitlines()[-1].startswith(sentence), done.stderr
    assert not (tmp_path / "run").exists()

"""A short drill, and whether the drill notices a trainer that loses something."""

import json
import re
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import quick_start
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, run_stage_command

# The drill, whose trainers are quick starts: a kill while they load PyTorch would tell nothing. The
# first one waits for the libraries, and is none whose time the drill takes.
PROGRAM = f"""
import subprocess, sys
sys.path[:0] = [sys.argv.pop(1), {str(REPOSITORY / "tests")!r}]
import quick_start
quick_start.run([sys.executable, "-c", ""], timeout=60)
subprocess.Popen = quick_start.Popen
import kill_drill
kill_drill.run_stage(kill_drill.main)
"""


def drill(repository: Path, *arguments: object) -> CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, repository / "scripts", *map(str, arguments)]
    return quick_start.run(command, timeout=280, env=COMMAND_ENVIRONMENT)


def test_six_kills_change_nothing(tmp_path: Path) -> None:
    output = tmp_path / "drill.json"
    done = drill(REPOSITORY, "--kills", 6, "--folder", tmp_path, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "drill.json").read_text())
    kinds = ("at random moments", "while saving", "while resuming")
    assert record["kills"] == dict.fromkeys(kinds, 2)
    kills = 6 + record["more_kills_that_missed_their_moment"]
    assert done.stdout.count("  kill ") == kills
    assert record["runs_compared"] >= 1
    assert record["steps"]["done_twice_after_one_kill"] <= 8
    assert len(record["outcome"]["metrics"]) == record["outcome"]["epochs"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["drill.json"]


def test_a_trainer_that_forgets_its_momentum_is_found_out(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "scripts").mkdir(parents=True)
    for path in (*REPOSITORY.glob("*.py"), REPOSITORY / "scripts/kill_drill.py"):
        shutil.copy(path, copy / path.relative_to(REPOSITORY))
    code = (copy / "engine.py").read_text()
    line = 'self.optimizer.load_state_dict(state["optimizer"])'
    assert code.count(line) == 1
    (copy / "engine.py").write_text(code.replace(line, "pass"))
    done = drill(copy, "--kills", 3, "--folder", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: ")
    # In the rows of an epoch after a kill, or else at the end of the run.
    assert re.search("other rows than the undisturbed run|ended with other .*momentum", message)
    (kept,) = tmp_path.glob("kill_drill_*")
    assert str(kept) in message
    shutil.rmtree(kept)  # 600 MB


def test_no_kills_are_refused(tmp_path: Path) -> None:
    command = ("scripts/kill_drill.py", "--kills", 0, "--folder", tmp_path)
    done = run_stage_command(*command, from_nothing=True)
    assert done.returncode == 2
    assert done.stderr == "error: kills is 0: it must be 1 or more\n"
    assert not list(tmp_path.iterdir())

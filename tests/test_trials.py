"""Trials: real runs of the trainer one after another, and what their table says of them."""

import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quick_start
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images
from scipy import stats

sys.path.insert(0, str(REPOSITORY / "scripts"))

import trials
import trials_table

from utils import EXIT_NOT_COPIED, RECIPES, UserError, commit

COMMITTED = sorted(
    log.with_suffix(".toml") for log in (REPOSITORY / "benchmarks/trials").glob("*.jsonl")
)
# The script, whose trainers are quick starts.
PROGRAM = f"""
import subprocess, sys
sys.path[:0] = [{str(REPOSITORY / "scripts")!r}, {str(REPOSITORY / "tests")!r}]
import quick_start
quick_start.run([sys.executable, "-c", ""], timeout=60)
subprocess.Popen = quick_start.Popen
import trials
trials.run_stage(trials.main)
"""
COMMON = """
title = "Waves"
[common]
train_folder_name = "images/train"
val_folder_name = "images/val"
epochs = 2
batch_size = 8
train_px = 32
val_px = 32
val_resize_px = 32
workers = 0
precision = "fp32"
max_lr = 0.01
price_per_hour = 0.0
"""
PLAN = f"""{COMMON}
[variants.plain]
[variants."smooth, averaged"]
label_smoothing = 0.1
average_steps = 3
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return quick_start.run(command(*arguments), cwd=folder, env=COMMAND_ENVIRONMENT, timeout=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    make_images(folder / "images", px=32)
    (folder / "plan.toml").write_text(PLAN)
    return folder


def read(folder: Path, name: str = "plan") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_signal_while_a_trainer_ends_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tmp_path / "ends_anyway.py"
    trainer.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(trials, "TRAINER", trainer)
    before = signal.getsignal(signal.SIGTERM)
    assert trials.train(RECIPES["fast"].config) == (0, True)
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_variant_is_trained_with_every_seed_and_broken_off_trials_go_on(
    folder: Path,
) -> None:
    first = quick_start.Popen(
        command("plan.toml"), cwd=folder, env=COMMAND_ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    log = folder / "plan.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and list(folder.glob("runs/trials/plan/smooth*/checkpoints/*.pt"))):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) in {75, -signal.SIGTERM}  # the latter between two runs
    finished_before = log.read_text()
    assert len(finished_before.splitlines()) < 4

    done = run(folder, "plan.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().startswith(finished_before)
    lines = read(folder)
    assert [(line["seed"], line["variant"]) for line in lines] == [
        (seed, variant) for seed in (0, 1) for variant in ("plain", "smooth, averaged")
    ]
    for line in lines:
        name = f"{'plain' if line['variant'] == 'plain' else 'smooth_averaged'}-seed{line['seed']}"
        run_folder = folder / "runs/trials/plan" / name
        config = json.loads((run_folder / "config.json").read_text())["config"]
        last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert line["ended"] == "finished"
        assert (line["correct1"], line["images"]) == (last["val_correct1"], 24)
        assert line["epochs_correct1"][-1] == line["correct1"]
        assert len(line["epochs_train_s"]) == 2
        assert math.isclose(sum(line["epochs_train_s"]), line["train_s"])
        assert config["seed"] == line["seed"]
        assert config["label_smoothing"] == (0.1 if line["variant"] != "plain" else 0)
        assert line["settings"].get("label_smoothing", 0) == config["label_smoothing"]
        assert line["epochs"] == last["epoch"] == 2
    results = [100 * line["correct1"] / 24 for line in lines if line["variant"] == "plain"]
    table = (folder / "plan.md").read_text()
    assert table in done.stdout
    assert f"| plain | {np.mean(results):.2f} % ± {np.std(results, ddof=1):.2f} | 2 |" in table

    again = run(folder, "plan.toml", "--report")
    assert again.returncode == 0
    assert (folder / "plan.md").read_text() == table


def test_a_failed_run_is_kept_in_the_log_and_the_exit_code(folder: Path) -> None:
    (folder / "failing.toml").write_text(f"{COMMON}[variants.mad]\nmomentum = 0.99\n")
    text = (folder / "failing.toml").read_text().replace("max_lr = 0.01", "max_lr = 1e30")
    (folder / "failing.toml").write_text(text)
    done = run(folder, "failing.toml", "--seeds", 0)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = read(folder, "failing")
    assert line["ended"] == "failed with exit code 1"
    assert "| mad | none finished, 1 failed |" in (folder / "failing.md").read_text()


def test_a_plan_is_not_overwritten_by_its_table(folder: Path) -> None:
    for name in ("plan.md", "plan.jsonl"):
        (folder / "named").mkdir(exist_ok=True)
        path = folder / "named" / name
        path.write_text(PLAN)
        done = run(folder, path, "--report")
        assert done.returncode == 2 and f"{path} is no plan: it must be called" in done.stderr
        assert path.read_text() == PLAN


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("variants = 3", "needs [variants.NAME]"),
        ("[variants.a]\nlearning_rate = 1.0", "learning_rate is no setting"),
        ("[variants.a]\nseed = 1", "seed is no setting that a plan may have"),
        ("[variants.a]\nmax_lr_from_finder = true", "max_lr_from_finder is no setting that"),
        ("[variants.a]\nepochs = 'many'", "epochs is 'many', and must be a int"),
        ("[variants.a]\nrecipe = 'slow'", "no recipe slow: there are reference, fast"),
        ("[variants.a]\nrecipe = ['fast']", "no recipe ['fast']: there are reference, fast"),
        ("[variants.a]\noptimizer = 'adam'", "optimizer is 'adam': it must be one of sgd, muon"),
        ("[variants.a]\nprecision = 64", "precision is 64: it must be one of auto, fp16, bf16"),
        ("[variants]\na = 3", "needs [variants.NAME]"),
        ("common = 3\n[variants.a]", "needs [variants.NAME]"),
        ("[[common]]\n[variants.a]", "needs [variants.NAME]"),
        ("[variants.'+ mix']\n[variants.'- mix']", "variants + mix and - mix would share a folder"),
        ("[variants.a]\n[variants.'β']", "variant 'β': '-seed0' is no name for a run"),
        ("[variants.a]\nepochs = 0", "variant a: epochs is 0: it must be above 0"),
        ("[variants", "is no TOML file"),
        ("colour = 1\n[variants.a]\n", "not colour"),
        ("top1_to_reach = 70\n[variants.a]\n", "must be a list of percentages"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(tmp_path: Path, plan: str, complaint: str) -> None:
    (tmp_path / "plan.toml").write_text(plan)
    with pytest.raises(UserError) as refusal:
        trials.read_plan(tmp_path / "plan.toml")
    assert complaint in str(refusal.value)
    assert "plan.toml" in str(refusal.value)


def test_what_would_not_run_is_told_in_a_line(folder: Path) -> None:
    (folder / "nowhere.toml").write_text(PLAN.replace("images/train", "nowhere"))
    for arguments, complaint in (
        (("missing.toml",), "no plan missing.toml"),
        (
            ("plan.toml", "--variants", "odd"),
            'plan.toml has no variant "odd": it has "plain", "smooth, averaged"',
        ),
        (("plan.toml", "--seeds", 0, -1), "seed is -1: it must be 0 or more"),
        (("nowhere.toml",), "plain, seed 0 did not run: the line above says why"),
    ):
        done = run(folder, *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert complaint in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert not (folder / "nowhere.jsonl").exists()


def check_refused(folder: Path, plan: str, complaint: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/trials/own/**/*")}
    (folder / "own.toml").write_text(plan)
    log = read(folder, "own") if (folder / "own.jsonl").exists() else None
    done = run(folder, "own.toml", "--seeds", 0)
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr.splitlines()[-1]
    assert log == (read(folder, "own") if (folder / "own.jsonl").exists() else None)
    for path, changed in before.items():
        assert path.stat().st_mtime_ns == changed, path


def test_a_run_is_not_taken_for_one_of_other_settings_or_images(folder: Path) -> None:
    plan = f"{COMMON}[variants.plain]\n".replace("epochs = 2", "epochs = 1")
    (folder / "own.toml").write_text(plan)
    assert run(folder, "own.toml", "--seeds", 0).returncode == 0
    shutil.copytree(folder / "images", folder / "others", dirs_exist_ok=True)
    of_others = plan.replace("images/", "others/")
    longer = plan.replace("epochs = 1", "epochs = 3")
    check_refused(folder, longer, "own.jsonl with other settings (epochs was 1, is 3): name the")
    check_refused(folder, of_others, "(train_folder_name was images/train, is others/train; val_f")
    # What changes no result is free.
    (folder / "own.toml").write_text(f"{plan}workers = 1\n")
    assert run(folder, "own.toml", "--seeds", 0).returncode == 0
    # The run is there, but not its line: the trainer itself compares no folders, for they may move.
    (folder / "own.jsonl").unlink()
    check_refused(folder, of_others, "plain-seed0 holds another run (train_folder_name was images/")


def test_a_run_whose_budget_is_spent_goes_on_with_a_higher_one(folder: Path) -> None:
    plan = f"{COMMON}[variants.paid]\n".replace("price_per_hour = 0.0", "price_per_hour = 1e4")
    path = folder / "paid.toml"
    path.write_text(f"{plan}budget_usd = 0.01\n")
    done = run(folder, "paid.toml", "--seeds", 0)
    assert done.returncode == 76, done.stdout + done.stderr
    assert "is spent" in done.stdout + done.stderr and not path.with_suffix(".jsonl").exists()
    path.write_text(f"{plan}budget_usd = 1e4\n")
    assert run(folder, "paid.toml", "--seeds", 0).returncode == 0
    (line,) = read(folder, "paid")
    assert (line["ended"], line["epochs"]) == ("finished", 2)


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Trials of a plan with two variants, whose trainer is a script and leaves an epoch's row."""
    row = {**dict.fromkeys(trials.FIELDS, 1.0), "val_images": 12, "val_correct1": 3}
    leave_it = f"""
import pathlib, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(options["runs-folder"], options["name"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.jsonl").write_text({json.dumps(row)!r})
"""
    (tmp_path / "plan.toml").write_text(PLAN)
    options = trials.TrialOptions(tmp_path / "plan.toml", (0,), runs_folder=tmp_path / "runs")

    def run_trials(trainer: str) -> int:
        (tmp_path / "trainer.py").write_text(leave_it + trainer)
        monkeypatch.setattr(trials, "TRAINER", tmp_path / "trainer.py")
        plan = trials.read_plan(options.plan)
        return trials.run_trials(options, plan, tmp_path / "plan.jsonl")

    return run_trials


def test_a_trainer_that_the_system_kills_has_not_failed(
    run_here: Callable[[str], int], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"plain, seed 0 was ended by signal 9 .SIGKILL.*goes on"):
        run_here("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert not (tmp_path / "plan.jsonl").exists()
    assert run_here("raise SystemExit(1)\n") == 1
    assert [line["ended"] for line in read(tmp_path)] == ["failed with exit code 1"] * 2
    assert run_here("raise AssertionError('not again')\n") == 1  # a failure stays one


def test_a_line_has_the_last_epochs_counts_and_the_time_of_all(tmp_path: Path) -> None:
    """The best of the epochs would favour the noisy."""
    config = dataclasses.replace(RECIPES["fast"].config, name="run", runs_folder=str(tmp_path))
    rows = [
        {
            **dict.fromkeys(trials.FIELDS, 1.0),
            "val_correct1": correct,
            "val_images": 12,
            "train_s": train_s,
        }
        for correct, train_s in ((3, 10.0), (9, 20.0), (5, 40.0))
    ]
    (tmp_path / "run").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run/metrics.jsonl").write_text(text)
    line = trials.outcome(config, 0, "plain", 0)
    assert (line["correct1"], line["epochs_correct1"]) == (5, [3, 9, 5])
    assert (line["train_s"], line["val_s"], line["epochs"]) == (70, 3, 3)


def test_a_run_whose_mirror_lacks_something_is_finished(
    run_here: Callable[[str], int], tmp_path: Path
) -> None:
    assert run_here(f"raise SystemExit({EXIT_NOT_COPIED})\n") == 0
    assert [line["ended"] for line in read(tmp_path)] == ["finished"] * 2


def test_trials_that_share_a_plan_lose_no_line(
    run_here: Callable[[str], int], tmp_path: Path
) -> None:
    log, ended = tmp_path / "plan.jsonl", tmp_path / "ended"
    held = threading.Event()

    def write_a_line_slowly() -> None:
        with trials.alone(tmp_path / "plan.toml"):
            held.set()
            lines = trials.read_log(log)
            while not ended.exists():
                time.sleep(0.02)
            time.sleep(0.5)  # in which the other line is not to be written
            lines.append(a_line("another", 700))
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))

    others = threading.Thread(target=write_a_line_slowly, daemon=True)
    others.start()
    assert held.wait(60)
    assert run_here(f"import pathlib\npathlib.Path({os.fspath(ended)!r}).touch()\n") == 0
    assert [line["variant"] for line in read(tmp_path)] == ["another", "plain", "smooth, averaged"]


def test_a_run_that_trials_beside_have_logged_meanwhile_counts_once(
    run_here: Callable[[str], int], tmp_path: Path
) -> None:
    assert run_here("") == 0
    log = tmp_path / "plan.jsonl"
    text = log.read_text()
    assert len(text.splitlines()) == 2
    log.unlink()
    assert run_here(f"open({os.fspath(log)!r}, 'w').write({text!r})\n") == 0
    assert log.read_text() == text


def test_a_run_goes_on_at_its_own_commit_only(
    run_here: Callable[[str], int], tmp_path: Path
) -> None:
    begun = tmp_path / "runs/plan/plain-seed0/config.json"
    begun.parent.mkdir(parents=True)
    planned = trials.read_plan(tmp_path / "plan.toml")["plain"]
    known = {"config": vars(planned), "classes": ["a"]}
    begun.write_text(json.dumps({**known, "commit": "0" * 40}))
    with pytest.raises(UserError, match=r"plain-seed0 was begun at commit 0{40}, and this is "):
        run_here("raise AssertionError('this is not to be trained')\n")
    assert not (tmp_path / "plan.jsonl").exists()
    for nothing in ("[]", '{"commit": []}'):
        begun.write_text(nothing)
        with pytest.raises(UserError, match=r"plain-seed0 was begun at commit unknown, and this"):
            run_here("raise AssertionError('this is not to be trained')\n")
    begun.write_text(json.dumps({**known, "commit": f"{commit().removesuffix('-dirty')}-dirty"}))
    assert run_here("") == 0


def test_an_empty_line_where_one_was_removed_is_no_damage(tmp_path: Path) -> None:
    log = tmp_path / "plan.jsonl"
    log.write_text("\n".join([json.dumps(a_line("a", 700)), "", json.dumps(a_line("b", 710)), ""]))
    assert trials.read_log(log) == [a_line("a", 700), a_line("b", 710)]
    log.write_text(json.dumps(a_line("a", 700)) + "\n" + json.dumps(a_line("b", 710))[:20])
    with pytest.raises(UserError, match=r"plan.jsonl, line 2 is damaged: mend or remove it"):
        trials.read_log(log)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"variant": 5}, {"seed": None}, {"ended": []}, {"settings": ["a"]}, {"commit": 7}),
        *({"images": 0}, {"train_s": "long"}, {"correct1": 10**400}, {"epochs": None}),
        *({"epochs_train_s": [1, 2], "epochs_correct1": [1]}, {"epochs_train_s": 5}),
    ],
    ids=str,
)
def test_a_line_that_is_no_runs_is_named(tmp_path: Path, wrong: dict) -> None:
    log = tmp_path / "plan.jsonl"
    failed = {"variant": "a", "seed": 1, "ended": "failed with exit code 1", "epochs": 0}
    whole = [a_line("a", 0), {**failed, "settings": {}}]
    log.write_text("".join(json.dumps(line) + "\n" for line in whole))
    assert trials.read_log(log) == whole
    log.write_text(json.dumps(whole[1]) + "\n" + json.dumps({**a_line("a", 700), **wrong}))
    with pytest.raises(UserError, match=r"plan.jsonl, line 2 is damaged: mend or remove it"):
        trials.read_log(log)


def a_line(variant: str, correct1: int, **settings: float) -> dict:
    return {
        "variant": variant,
        "seed": 0,
        "ended": "finished",
        "epochs": 5,
        "settings": settings,
        "correct1": correct1,
        "images": 1000,
        "train_s": 50.0,
        "train_images": 5000,
    }


def test_the_tables_figures_are_those_of_scipy() -> None:
    results = {"a": [700, 720, 716], "b": [750, 744, 760], "wild": [300, 900], "single": [800]}
    lines = [
        a_line(name, correct, **({"max_lr": 0.1} if name == "b" else {}))
        for name, group in results.items()
        for correct in group
    ]
    text = trials_table.table("Title", ["a", "b", "wild", "single", "c"], lines)
    a, b, wild, single = (np.array(group) / 10 for group in results.values())
    for other in (b, wild):  # each by its own spread and that of a; wild's is of another kind
        interval = stats.ttest_ind(other, a, equal_var=other is b).confidence_interval(0.95)
        width = (interval.high - interval.low) / 2
        assert f"| {other.mean() - a.mean():+.2f} ± {width:.2f} |" in text
    assert (
        f"| a | {a.mean():.2f} % ± {a.std(ddof=1):.2f} | 3 | 70.00, 72.00, 71.60 |  | 5 |" in text
    )
    assert "| 50 s | 100 | max_lr 0.1 |" in text
    assert "| c | none finished, 0 failed | 0 |" in text
    # All together, but the one that parts by far more: the degrees of freedom are 2, 2 and 0.
    deviation = math.sqrt((2 * a.var(ddof=1) + 2 * b.var(ddof=1)) / 4)
    reach = stats.t.ppf(0.975, 4) * deviation
    assert f"| {single[0] - a.mean():+.2f} ± {reach * math.sqrt(1 / 3 + 1):.2f} |" in text
    least = reach * math.sqrt(2)  # of single runs
    assert f"Seeds part by {deviation:.2f} points" in text
    assert "4 degrees of freedom; without wild, which part by far more)" in text
    assert f"differences below {least:.2f} points cannot be told from chance" in text
    share = statistics.fmean([*a, *b, *wild, *single]) / 100
    assert f"uncertain by {100 * math.sqrt(share * (1 - share) / 1000):.2f} points" in text


def test_nothing_takes_the_place_of_a_first_variant_without_a_result() -> None:
    text = trials_table.table("Title", ["a", "b", "c"], [a_line("b", 700), a_line("c", 720)])
    (row,) = [row for row in text.splitlines() if row.startswith("| c |")]
    assert row.startswith("| c | 72.00 % | 1 | 72.00 |  | 5 |")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_log_is_of_its_plan_and_the_table_of_its_log(path: Path) -> None:
    plan, log = trials.read_plan(path), path.with_suffix(".jsonl")
    lines = trials.read_log(log)
    assert {line["variant"] for line in lines} <= set(plan)
    for line in lines:
        variant, seed = line["variant"], line["seed"]
        assert trials.logged(log, variant, seed, plan[variant]) == line  # once, with its settings
    title, goals = trials.title_and_goals(path)
    assert (
        trials_table.table(title, list(plan), lines, goals) == path.with_suffix(".md").read_text()
    )


def test_single_runs_are_not_compared_as_if_their_spread_were_known() -> None:
    text = trials_table.table("Title", ["a", "b"], [a_line("a", 700), a_line("b", 800)])
    assert "| +10.00 |" in text
    assert "One run each: what differs may be the seed's doing." in text
    assert "No run has finished" in trials_table.table("Title", ["a"], [])


def test_runs_with_other_validation_images_are_not_taken_for_alike() -> None:
    lines = [a_line("a", 700), {**a_line("b|c", 350), "images": 500}]
    text = trials_table.table("Title", ["a", "b|c"], lines)
    assert "500 images); not all runs had the same ones" in text
    assert "\n| b\\|c | 70.00 % | 1 |" in text  # one cell
    assert "1,000 images); all variants share that." in trials_table.table("T", ["a"], lines[:1])


def test_the_fewest_images_say_how_uncertain_an_accuracy_is() -> None:
    lines = [a_line("a", 700), {**a_line("b", 350), "images": 500}]
    text = trials_table.table("Title", ["a", "b"], lines)
    assert f"uncertain by {100 * math.sqrt(0.7 * 0.3 / 500):.2f} points" in text


def test_the_interval_of_two_that_spread_unlike_is_welchs() -> None:
    narrow, wide = [70.0, 70.1, 70.2], [60.0, 65.0, 75.0, 80.0]
    welch = stats.ttest_ind(wide, narrow, equal_var=False).confidence_interval(0.95)
    half = trials_table.interval([wide, narrow], trials_table.alike([wide, narrow]))
    assert math.isclose(half, (welch.high - welch.low) / 2, rel_tol=1e-6)


def test_runs_of_a_variant_whose_settings_differ_are_told_with_both() -> None:
    lines = [a_line("a", 700), a_line("a", 710, compile=True), a_line("b", 720, compile=True)]
    rows = trials_table.table("Title", ["a", "b"], lines).splitlines()
    (a,), (b,) = ([row for row in rows if row.startswith(f"| {name} |")] for name in "ab")
    assert a.endswith("| compile False/True |")
    assert b.endswith("| compile True |")


def test_the_training_that_an_accuracy_took_ends_with_the_epoch_that_reached_it() -> None:
    curves = {"a": [[500, 700, 690], [400, 600, 700]], "b": [[300, 650, 640]], "old": [None]}
    lines = [
        {
            **a_line(name, 700),
            **({"epochs_train_s": [100.0, 20.0, 3.0], "epochs_correct1": curve} if curve else {}),
        }
        for name, group in curves.items()
        for curve in group
    ]
    text = trials_table.table("Title", [*curves, "none"], lines, goals=(40, 70, 70.1))
    assert "| variant | 40 % | 70 % | 70.1 % |" in text
    assert "| a | 1 min 40 s (2 of 2) | 2 min 2 s (2 of 2) | never (0 of 2) |" in text  # 121.5 s
    assert "| b | 2 min 0 s (1 of 1) | never (0 of 1) | never (0 of 1) |" in text
    assert "| old | not logged | not logged | not logged |" in text
    assert "| none | not logged |" in text
    assert "40 %" not in trials_table.table("Title", [*curves], lines)

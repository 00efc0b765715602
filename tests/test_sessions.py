"""sessions.jsonl: what it survives, and real runs that are interrupted and run out of budget."""

import datetime
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY
from test_interruption import Service, in_seconds, notice, reply, service  # noqa: F401 (a fixture)
from test_trainer import (  # noqa: F401 (fixtures are among them)
    _remove_checkpoints,
    images,
    outcome,
    run_folder,
    settings,
    train,
)
from test_trouble import train_with

sys.path.insert(0, str(REPOSITORY / "scripts"))

import cost_report

import mirror
import sessions
from interruption import NOTICE_PATH
from sessions import Session
from utils import Config, UserError, check_config

HARDWARE = {"gpu": "NVIDIA A10G", "cpu": "EPYC", "memory_bytes": 1}


def begin(folder: Path, price_per_hour: float = 0.97, step: int = 0, epochs: int = 0) -> Session:
    return Session(folder, price_per_hour, HARDWARE, step, epochs)


# ------------------------------------------------------------------------------ the file


def test_every_line_tells_the_whole_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is on the disk when the session ends: the machine may go."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.extend(sessions.read(tmp_path)[-1:]))
    session = begin(tmp_path, step=7, epochs=1)
    session.beat(9, 1, now=True)
    session.ending = sessions.SIGNAL
    session.end()
    first, second, last = sessions.read(tmp_path)
    assert (first["first_step"], first["step"], first["epochs"]) == (7, 7, 1)
    assert (second["first_step"], second["step"], second["ended"]) == (7, 9, None)
    assert (last["first_step"], last["step"], last["ended"]) == (7, 9, "signal")
    assert flushed == [last]
    for line in (first, second, last):
        assert (line["gpu"], line["cpu"], line["instance_type"]) == ("NVIDIA A10G", "EPYC", None)
        assert (line["session"], line["began"]) == (first["session"], first["began"])
    assert first["startup_s"] == first["alive_s"] <= second["alive_s"] <= last["alive_s"]
    assert begin(tmp_path).line["session"] != first["session"]


def test_a_line_is_written_once_a_minute_and_when_something_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(tmp_path)
    for step in range(1000):
        session.beat(step, 0)
    assert len(sessions.read(tmp_path)) == 1
    session._started -= 61  # as if a minute had passed
    session.beat(1000, 0)
    session.beat(1001, 0)
    assert [line["step"] for line in sessions.read(tmp_path)] == [0, 1000]


def test_the_price_is_that_of_all_sessions_each_at_its_own(tmp_path: Path) -> None:
    first = begin(tmp_path, price_per_hour=2.0)
    first.end()
    (first_s,) = {line["alive_s"] for line in sessions.read(tmp_path)[-1:]}
    second = begin(tmp_path, price_per_hour=6.0)
    second._started -= 3600
    price_usd = second.beat(1, 0, now=True)
    expected = first_s / 3600 * 2 + second.line["alive_s"] / 3600 * 6
    assert math.isclose(price_usd, expected) and price_usd > 6
    assert math.isclose(sessions.price_usd(sessions.read(tmp_path)), expected)


def test_a_budget_is_spent_at_its_last_cent(tmp_path: Path) -> None:
    session = begin(tmp_path, price_per_hour=2.5)
    session._started -= 3600  # as if an hour had passed
    spent_usd = session.beat(1, 0, now=True)
    budgets = (0.0, spent_usd - 0.01, spent_usd, spent_usd + 0.01)
    configs = [Config(budget_usd=usd) for usd in budgets]
    assert [sessions.budget_is_spent(tmp_path, config) for config in configs] == [
        *(False, True, True, False)
    ]


def test_wherever_the_last_line_is_torn_all_others_stay(tmp_path: Path) -> None:
    session = begin(tmp_path)
    session.beat(1, 0, now=True)
    path = tmp_path / sessions.FILE
    whole = path.read_bytes()
    before = whole.rindex(b"\n")
    (kept, _) = sessions.read(tmp_path)
    for size in range(before, len(whole)):
        path.write_bytes(whole[:size])
        assert sessions.read(tmp_path) == [kept]
        later = begin(tmp_path, step=1)
        assert sessions.read(tmp_path) == [kept, later.line]


def test_a_line_that_is_damaged_is_passed_over(tmp_path: Path) -> None:
    kept = begin(tmp_path).line
    with open(tmp_path / sessions.FILE, "a") as file:
        for wrong in ({"alive_s": "x"}, {"price_per_hour": None}, {"alive_s": [1]}):
            file.write(f"\n{json.dumps({**kept, **wrong})}")
        file.write('\n[]\n{"session": "1"}\n"x"')
    assert sessions.read(tmp_path) == [kept]
    assert begin(tmp_path).before_usd == sessions.price_usd([kept])


@pytest.mark.parametrize("name", [*sessions.NUMBERS, *sessions.COUNTS])
def test_a_line_with_a_negative_number_lowers_no_price(tmp_path: Path, name: str) -> None:
    kept = begin(tmp_path).line
    with open(tmp_path / sessions.FILE, "a") as file:
        file.write(f"\n{json.dumps({**kept, name: -1})}")
    assert sessions.read(tmp_path) == [kept]


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
def test_a_moment_without_a_zone_is_utc_wherever_the_machine_is(
    zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        found = [sessions.seconds(f"2026-11-24T08:22:00{utc}") for utc in ("", "Z", "+00:00")]
        said = sessions.utc(found[0])
    time.tzset()
    assert found == [1795508520.0] * 3
    assert said == "2026-11-24T08:22:00.000Z"


def test_a_disk_that_is_full_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = begin(tmp_path)
    (tmp_path / sessions.FILE).unlink()
    (tmp_path / sessions.FILE).symlink_to("/dev/full")
    for step in range(3):
        assert session.beat(step, 0, now=True) > 0
    session.end()
    (record,) = caplog.records
    assert "cannot be written (No space left on device)" in record.getMessage()


def test_a_session_began_when_its_process_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour before its first line here: began and alive_s together tell when that was written."""
    started = time.clock_gettime(time.CLOCK_BOOTTIME) - 3600
    monkeypatch.setattr(sessions, "_process_started", lambda: started)
    began = time.time() - 3600
    line = begin(tmp_path).line
    assert 3600 <= line["startup_s"] < 3660
    assert began - 0.1 <= sessions.seconds(line["began"]) < began + 60


def test_the_time_is_that_of_the_process_and_no_clock_can_shift_it(tmp_path: Path) -> None:
    program = f"""if True:
        import time
        time.sleep(1)
        from pathlib import Path
        import sessions
        session = sessions.Session(Path({str(tmp_path)!r}), 1, {{}}, 0, 0)
        real = time.time
        time.time = lambda: real() + 10**9
        session.beat(1, 0, now=True)
    """
    before = time.time()
    subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=COMMAND_ENVIRONMENT, check=True
    )
    for line in sessions.read(tmp_path):
        assert 1 <= line["alive_s"] <= time.time() - before + 0.02  # a tick of the kernel's clock
        assert (
            before - 0.02
            <= datetime.datetime.fromisoformat(line["began"]).timestamp()
            < before + 60
        )


# ------------------------------------------------------------------------------ the mirror


def test_a_mirror_keeps_what_was_paid_on_every_machine(tmp_path: Path) -> None:
    """Also a session that was gone before its first checkpoint, and one that the mirror has not."""
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path}/disk"
    folders = [tmp_path / name / "run" for name in ("first", "second")]
    for folder in folders:
        (folder / "checkpoints").mkdir(parents=True)
        begin(folder)
    first, second = (sessions.read(folder) for folder in folders)
    copies = mirror.start(url, folders[0])
    assert sessions.read(folders[0]) == first
    assert copies.finish(10)

    copies = mirror.start(url, folders[1])
    assert sessions.read(folders[1]) == first + second
    third = begin(folders[1])
    assert copies.finish(10)
    assert sessions.read(tmp_path / "disk" / "run") == [*first, *second, third.line]
    third.end()  # a line more is a change like any other
    assert copies.finish(10)
    assert sessions.read(tmp_path / "disk" / "run")[-1]["ended"] == "failed"

    # An older copy comes back: nothing is lost, and nothing stands there twice.
    newest = sessions.read(folders[1])
    mirror.start(url, folders[0])
    assert sessions.read(folders[0]) == newest


def test_a_start_elsewhere_that_came_no_further_stays_in_the_mirror(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path}/disk"
    first, second = (tmp_path / name / "run" for name in ("first", "second"))
    (first / "checkpoints").mkdir(parents=True)
    digest = hashlib.sha256(b"state").hexdigest()[:16]
    (first / f"checkpoints/epochs-001-step-00000010-{digest}.pt").write_bytes(b"state")
    begin(first)
    assert mirror.start(url, first).finish(10)
    copies = mirror.start(url, second)
    begin(second).end()
    assert copies.finish(10)
    copies = mirror.start(url, first)
    assert sessions.read(first) == sessions.read(second)
    begin(first)
    assert copies.finish(10)
    assert len({line["session"] for line in sessions.read(tmp_path / "disk/run")}) == 3


# ------------------------------------------------------------------------------ real runs


def test_a_budget_needs_a_price() -> None:
    check_config(Config(budget_usd=5))
    for wrong in ({"budget_usd": 5, "price_per_hour": 0}, {"budget_usd": -1}):
        with pytest.raises(UserError, match="budget_usd is"):
            check_config(Config(**wrong))


# A line at each step, EC2 asked all the time; and a process that kills itself before its 11th step.
QUICK = "import interruption, sessions; interruption.POLL_S = 0.01; sessions.BEAT_S = 0"
KILLED = f"""{QUICK}
import os, signal
train_step = engine.train_step
def killed_before_step_11(run, *arguments):
    if run.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(run, *arguments)
engine.train_step = killed_before_step_11
"""


def test_a_run_taken_away_killed_and_out_of_budget_ends_the_same_and_its_report_tells_it_all(
    settings: dict[str, object],
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs of seven steps, at $1 a second; the last machine has nothing but a mirror."""
    settings = {**settings, "batch_size": 3, "log_interval_s": 1e-9, "price_per_hour": 3600}
    train({**settings, "name": "undisturbed"})
    (tmp_path / "disk").mkdir()
    mirrored = {"mirror": f"file://{tmp_path}/disk"}
    folder = run_folder(settings)
    logs = []

    def start(exit_code: int, fault: str = QUICK, **more: object) -> str:
        done = train_with(fault, {**settings, **more})
        assert (done.returncode, done.stderr) == (exit_code, "")
        logs.append(done.stdout)
        return done.stdout

    monkeypatch.setitem(COMMAND_ENVIRONMENT, "AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setitem(COMMAND_ENVIRONMENT, "AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
    taken_at = math.floor(time.time() + 120)  # a notice has whole seconds
    service.answers[NOTICE_PATH] = reply(200, notice("terminate", in_seconds(120)))
    saved = re.search(r"saved (\S+) s after its notice, with (\d+) s to spare", start(75))
    assert saved and float(saved[1]) < 10
    # How long the trainer took to start is the machine's affair; what it says is left has to be so.
    assert taken_at - time.time() - 1 <= float(saved[2]) <= 121
    summary = cost_report.summarize(sessions.read(folder), [], None)
    assert summary["interruptions"] == {"EC2's notice": 1}
    assert summary["steps_twice"] == 0
    monkeypatch.setitem(COMMAND_ENVIRONMENT, "AWS_EC2_METADATA_DISABLED", "true")

    start(-9, KILLED)
    spent_usd = sessions.price_usd(sessions.read(folder))
    budget_usd = spent_usd + 0.2  # for less than a start takes: the first step is over it
    out = start(76, budget_usd=budget_usd, **mirrored)
    assert f"the budget of ${budget_usd:.2f} is spent, with $" in out
    assert "a higher --budget-usd goes on" in out

    shutil.rmtree(folder)
    out = start(76, budget_usd=budget_usd, **mirrored)
    assert "nothing is trained; a higher --budget-usd goes on" in out
    assert "training and validation images" not in out
    ends = [line["ended"] for line in sessions.read(folder)]
    assert len(set(ends)) == 3

    out = start(0, budget_usd=spent_usd + 1000, **mirrored)
    told_usd = [float(usd) for usd in re.findall(r"\$(\d+\.\d\d) of \$", out)]
    assert spent_usd < told_usd[0] and told_usd == sorted(told_usd)  # from the first line on
    assert outcome(settings) == outcome({**settings, "name": "undisturbed"})
    copied = tmp_path / "disk" / "run" / sessions.FILE
    assert copied.read_bytes() == (folder / sessions.FILE).read_bytes()

    # What the log tells a second time was done a second time.
    told = [step for text in logs for step in re.findall(r"epoch (\d)/2  step (\d)/7", text)]
    assert len(set(told)) == 14
    resumed_steps = [int(found) for found in re.findall(r"epochs and (\d+) steps", "".join(logs))]
    whole = cost(folder)
    assert whole["steps_twice"] == len(told) - 14 == 10 - resumed_steps[1] > 0
    assert whole["interruptions"] == {"EC2's notice": 1, "killed": 1, "budget": 1}
    starts = whole["sessions"]
    assert [one["ended"] for one in starts] == ["EC2's notice", "killed", "budget", "finished"]
    assert [one["first_step"] for one in starts] == [0, *resumed_steps]
    assert [one["last_step"] for one in starts] == [
        resumed_steps[0], 10, resumed_steps[2], 14,
    ]  # fmt: skip
    assert math.isclose(whole["usd"], whole["running_s"], rel_tol=1e-6)
    assert 0 < whole["twice_usd"] < whole["gpu_s"] < whole["running_s"] < whole["wall_s"]
    # The log's last price is that of all starts, but for the moments since the last evaluation.
    finished = float(re.search(r"finished in .* for \$(\d+\.\d+):", out)[1])
    assert whole["usd"] - 2 < finished <= whole["usd"] + 0.01
    result = json.loads((folder / "result.json").read_text())
    assert round(result["price_usd"], 2) == finished


def cost(folder: Path) -> dict[str, object]:
    """cost.json, by the real command."""
    done = subprocess.run(
        [sys.executable, "scripts/cost_report.py", folder],
        cwd=REPOSITORY,
        env={**os.environ},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((folder / "cost.json").read_text())

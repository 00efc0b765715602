"""The cost report: its arithmetic against an example worked out by hand, and the real command."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPOSITORY, run_stage_command
from PIL import Image

sys.path.insert(0, str(REPOSITORY / "scripts"))

import cost_report

import sessions
from utils import Config, UserError, save_config

# Two starts on one machine. The first, of midnight, costs $1 an hour and is killed after 2 h: $2.
#
#     after    600 s  begins to train                   step    0
#             3600 s  epoch 1 has ended: $1.00          step 1000
#             6600 s  epoch 2 has ended: $1.8333        step 2000, the last checkpoint
#             7200 s  last sign of life                 step 2200
#
# The second, of 3 o'clock, one hour later, costs $0.50 an hour and takes 1 h: $0.50, $2.50 in all.
#
#     after    600 s  begins to train                   step 2000
#             1600 s  500 steps, each 2 s               step 2500
#             2600 s  epoch 3 has ended: $2 + $0.3611   step 3000
#             3600 s  the last evaluation has ended
#
# Steps 2001 to 2200 were made twice: 200 steps of 2 s, 400 s at $0.50 an hour: $0.0556.
SHARED = {"gpu": "NVIDIA A10G", "cpu": "EPYC", "instance_type": "g5.xlarge", "startup_s": 600}
FIRST = {"session": "a", "began": "2026-11-24T00:00:00Z", "price_per_hour": 1.0, "first_step": 0}
SECOND = {"session": "b", "began": "2026-11-24T03:00:00Z", "price_per_hour": 0.5}
LINES = [
    {**SHARED, **of, "alive_s": alive_s, "step": step, "epochs": epochs, "ended": ended}
    for of, alive_s, step, epochs, ended in (
        (FIRST, 600, 0, 0, None),
        (FIRST, 3600, 1000, 1, None),
        (FIRST, 6600, 2000, 2, None),
        (FIRST, 7200, 2200, 2, None),
        ({**SECOND, "first_step": 2000}, 600, 2000, 2, None),
        ({**SECOND, "first_step": 2000}, 1600, 2500, 2, None),
        ({**SECOND, "first_step": 2000}, 2600, 3000, 3, None),
        ({**SECOND, "first_step": 2000}, 3600, 3000, 3, "finished"),
    )
]
ROWS = [
    {"epoch": epoch, "val_top1": top1, "train_images": 1_000_000, "train_s": train_s, "val_s": 100}
    for epoch, top1, train_s in ((1, 24.9, 2900), (2, 51.0, 2900), (3, 75.5, 1900))
]
# The price changes within both starts: 0.5 h at $0.30 and 1.5 h at $0.60, then half an hour at
# $0.60 and half an hour at $0.90: $1.05 and $0.75. The newest stands first, as AWS prints it.
SPOT_PRICES = {
    "SpotPriceHistory": [
        {
            "AvailabilityZone": "us-east-1a",
            "InstanceType": "g5.xlarge",
            "ProductDescription": "Linux/UNIX",
            "SpotPrice": price,
            "Timestamp": moment,
        }
        for moment, price in (
            ("2026-11-24T09:00:00+00:00", "7.000000"),
            ("2026-11-24T03:30:00+00:00", "0.900000"),
            ("2026-11-24T00:30:00+00:00", "0.600000"),
            ("2026-11-23T12:00:00+00:00", "0.300000"),
            ("2026-11-22T12:00:00+00:00", "9.000000"),
        )
    ]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example's folder, as the trainer leaves it."""
    folder = tmp_path / "runs" / "example"
    folder.mkdir(parents=True)
    write_lines(folder, LINES)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_config(folder, Config(price_per_hour=2.0), ["a"], {})
    return folder


def write_lines(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "sessions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def command(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """The real command."""
    return run_stage_command("scripts/cost_report.py", folder, *options)


def report(folder: Path, *options: object) -> None:
    """What the command does, in this process, for speed."""
    with mock.patch.object(sys, "argv", ["cost_report.py", str(folder), *map(str, options)]):
        cost_report.main()


def record(folder: Path, *options: object) -> dict[str, object]:
    """cost.json of a run."""
    report(folder, *options)
    return json.loads((folder / "cost.json").read_text())


def refusal(folder: Path, *options: object) -> str:
    with pytest.raises(UserError) as error:
        report(folder, *options)
    assert not (folder / "cost.json").exists()
    return str(error.value)


def test_the_numbers_are_those_worked_out_by_hand(folder: Path) -> None:
    whole = record(folder, "--storage-usd-per-month", 30)
    for key, expected in {
        "wall_s": 4 * 3600,
        "running_s": 3 * 3600,
        "away_s": 3600,
        "startup_s": 1200,
        "gpu_s": 3 * 3600 - 1200,
        "img_per_s": 3_000_000 / 7700,
        "steps_twice": 200,
        "twice_s": 400,
        "twice_usd": 400 / 3600 * 0.5,
        "usd": 2.5,
        "storage_usd": 30 * 4 / 730,
        "best_top1": 75.5,
    }.items():
        assert math.isclose(whole[key], expected, rel_tol=1e-9), key
    assert whole["interruptions"] == {"killed": 1}
    assert [session["ended"] for session in whole["sessions"]] == ["killed", "finished"]
    assert [round(point["usd"], 4) for point in whole["curve"]] == [1.0, 1.8333, 2.3611]
    reached = {percent: (at["epoch"], at["usd"]) for percent, at in whole["usd_to_top1"].items()}
    second, third = (2, pytest.approx(6600 / 3600)), (3, pytest.approx(2 + 2600 / 3600 * 0.5))
    assert reached == {"25": second, "50": second, "60": third, "70": third, "75": third}


def test_an_accuracy_is_reached_exactly_and_kept_as_the_best_of_all_epochs(folder: Path) -> None:
    rows = [{**row, "val_top1": top1} for row, top1 in zip(ROWS, (24.9, 75.0, 74.9), strict=True)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = record(folder)
    assert whole["best_top1"] == 75.0
    assert whole["usd_to_top1"]["75"]["epoch"] == 2


def test_the_page_says_the_same_and_has_a_picture(folder: Path) -> None:
    done = command(folder)
    page = (folder / "cost.md").read_text()
    assert done.stdout.rstrip().endswith("cost.png")
    for row in (
        ("from the first start to the end", "4.00 h (4 h 0 min)", "27.23 h (27 h 13 min)"),
        ("without one", "1.00 h (1 h 0 min)", "–"),
        ("interruptions", "1: 1 killed", "–"),
        ("work done twice", "200 steps, 6 min 40 s, $0.0556", "–"),
        ("price of the machine", "$2.50", "$26.41"),
        ("machine, to 75 % top-1", "$2.36 (epoch 3)", "$26.41 (epoch 50)"),
        ("machine, to 76 % top-1", "–", "–"),
    ):
        (line,) = [line for line in page.splitlines() if f"| {row[0]}" in line]
        assert [cell.strip() for cell in line.split("|")][1:4] == list(row)
        assert all(cell in done.stdout for cell in row)
    assert "At $0.50 and $1.00 an hour" in page
    assert "its last minute may be missing" in page
    with Image.open(folder / "cost.png") as picture:
        assert picture.size == (1800, 1012)


@pytest.mark.parametrize(
    "name", ["resnet50_imagenet_1k_onecycleLr", 3 * "resnet50_imagenet_accurate_", "_hidden"]
)
def test_names_stay_on_the_picture_and_in_its_legend(name: str) -> None:
    """Without an interruption, as with one."""
    summary = cost_report.summarize(LINES[4:], ROWS, None)
    figure = cost_report.draw(name, {**summary, "interruptions": {}})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text()[:9] for text in legend.get_texts()] == ["reference", f"{name}: be"[:9]]
    for part in (legend, figure._suptitle):
        box = part.get_window_extent()
        assert figure.bbox.xmin <= box.xmin < box.xmax <= figure.bbox.xmax


def test_another_price_takes_the_place_of_those_that_were_given(folder: Path) -> None:
    whole = record(folder, "--price-per-hour", 0.2)
    assert math.isclose(whole["usd"], 0.6)
    assert math.isclose(whole["twice_usd"], 400 / 3600 * 0.2)


def test_each_spot_price_counts_for_its_hours(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(SPOT_PRICES))
    whole = record(folder, "--spot-prices", path)
    assert [round(session["usd"], 9) for session in whole["sessions"]] == [1.05, 0.75]
    # Epoch 1 ended after an hour, half of it at $0.30 and half at $0.60.
    assert math.isclose(whole["curve"][0]["usd"], 0.45)
    assert math.isclose(whole["twice_usd"], 400 / 3600 * 0.6)
    assert whole["notes"][0].endswith("prices.json, of g5.xlarge, us-east-1a, Linux/UNIX.")
    write_lines(folder, LINES[:4] + [{**line, "instance_type": "g5.2xlarge"} for line in LINES[4:]])
    note = record(folder, "--spot-prices", path)["notes"][0]
    assert note.endswith("But some starts were on g5.2xlarge, which has another price.")


def test_a_start_from_before_the_first_price_is_not_for_nothing(
    folder: Path, tmp_path: Path
) -> None:
    """Also where it is not the first one in the file, after a clock was set."""
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(SPOT_PRICES))
    write_lines(
        folder, LINES[:4] + [{**line, "began": "1970-01-01T00:00:10Z"} for line in LINES[4:]]
    )
    says = refusal(folder, "--spot-prices", path)
    assert "the run at 1970-01-01T00:00:10.000Z" in says and "or give --price-per-hour" in says


def test_a_price_from_the_very_second_of_the_first_start_is_known(folder: Path) -> None:
    began = sessions.seconds(FIRST["began"])
    entry = {**SPOT_PRICES["SpotPriceHistory"][0], "Timestamp": FIRST["began"]}
    text = json.dumps({"SpotPriceHistory": [entry]})
    prices, _ = cost_report.read_spot_prices(text, "prices.json", began)
    assert prices == [(began, 7.0)]


def test_spot_prices_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    assert "cannot read" in refusal(folder, "--spot-prices", path)
    entries = SPOT_PRICES["SpotPriceHistory"]
    other = {**entries[0], "AvailabilityZone": "us-east-1b"}
    for content, says in (
        ("{", "is not what `aws ec2"),
        ("[1]", "is not what `aws ec2"),
        (json.dumps({"SpotPriceHistory": []}), "is empty"),
        (json.dumps({"SpotPriceHistory": entries[:3]}), "--start-time 2026-11-24T00:00:00.000Z"),
        (json.dumps({"SpotPriceHistory": [*entries, other]}), "us-east-1b"),
        *(
            (json.dumps(SPOT_PRICES).replace("7.000000", odd), "is not what")
            for odd in ("NaN", "-1")
        ),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            cost_report.read_spot_prices(content, "FILE", sessions_began())
    assert "two prices" in refusal(folder, "--spot-prices", path, "--price-per-hour", 1)


def sessions_began() -> float:
    return sessions.seconds(FIRST["began"])


def test_aws_is_asked_for_the_machine_of_the_sessions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--availability-zone" in refusal(folder, "--spot-prices", "aws")
    zone = ("--spot-prices", "aws", "--availability-zone", "us-east-1a")
    aws = tmp_path / "bin" / "aws"
    aws.parent.mkdir()
    aws.write_text("#!/bin/sh\necho 'An error occurred (UnauthorizedOperation)' >&2\nexit 254\n")
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", str(aws.parent), prepend=os.pathsep)
    assert "failed: An error occurred" in refusal(folder, *zone)
    (tmp_path / "prices.json").write_text(json.dumps(SPOT_PRICES))
    aws.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/prices.json\n')
    assert math.isclose(record(folder, *zone)["usd"], 1.8)
    asked = (tmp_path / "asked").read_text().strip()
    assert asked == (
        "ec2 describe-spot-price-history --output json --instance-types g5.xlarge "
        "--product-descriptions Linux/UNIX --availability-zone us-east-1a "
        "--start-time 2026-11-24T00:00:00Z"
    )


def test_the_reference_run_costs_what_was_published() -> None:
    """27.2268 h at $0.97 are $26.41; 27 h are not, and 50 epochs of 35 min are neither."""
    assert (cost_report.REFERENCE_HOURS, cost_report.REFERENCE_USD_PER_HOUR) == (27.2268, 0.97)
    reference = cost_report.summarize_reference()
    assert round(reference["usd"], 2) == 26.41
    assert round(27 * 0.97, 2) == 26.19
    assert round(50 * 35 / 60 * 0.97, 2) == 28.29
    for figure in ("27 h at $0.97 are $26.19", "29.17 h and $28.29", "27.2268 h at $0.97"):
        assert figure in cost_report.REFERENCE_NOTE
    assert math.isclose(reference["gpu_s"], 27.2268 * 3600)
    reached = {percent: at["epoch"] for percent, at in reference["usd_to_top1"].items()}
    assert reached == {"25": 5, "50": 15, "60": 40, "70": 45, "75": 50}
    assert round(reference["usd_to_top1"]["25"]["usd"], 3) == 2.641


def test_a_torn_line_and_lines_of_something_else_are_passed_over(folder: Path) -> None:
    whole = cost_report.summarize(sessions.read(folder), ROWS, None)
    path = folder / "sessions.jsonl"
    longer = json.dumps({**LINES[-1], "alive_s": 9999}).encode()
    others = [b"[]", b"\xff\xfe\0", longer.replace(b"alive_s", b"amive_s"), longer[:-9]]
    for key, value in (
        *(("step", None), ("epochs", "3"), ("session", []), ("alive_s", math.nan)),
        *(("epochs", 2.5), ("began", "midnight"), ("began", None), ("ended", []), ("cpu", {})),
        *(("alive_s", 10**400), ("alive_s", 1e200)),
    ):
        others.append(json.dumps({**LINES[-1], key: value}).encode())
    others.append(json.dumps({**LINES[-1], "price_per_hour": -1.0}).encode())
    path.write_bytes(b"\n".join((path.read_bytes(), *others)))
    assert cost_report.summarize(sessions.read(folder), ROWS, None) == whole


def test_a_run_under_way_is_no_interruption(folder: Path) -> None:
    now = time.time()
    last = {**LINES[-2], "began": sessions.utc(now - 2660)}  # alive a minute ago
    begun = {**LINES[-4], "began": last["began"]}
    write_lines(folder, [*LINES[:4], begun, last])
    whole = record(folder)
    assert whole["ended"] == "under way"
    assert whole["interruptions"] == {"killed": 1}
    for other_clock, ended in ((3600, "killed"), (-90, "under way"), (-3600, "killed")):
        summary = cost_report.summarize([begun, last], ROWS, None, now + other_clock)
        assert summary["ended"] == ended


def test_before_the_first_epoch_there_is_a_page_without_a_picture(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    write_lines(folder, LINES[:1])
    whole = record(folder)
    assert (whole["usd"], whole["best_top1"]) == (pytest.approx(1 / 6), None)
    assert not (folder / "cost.png").exists()


def test_a_run_without_a_price_has_its_hours(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(folder, [{**line, "price_per_hour": 0.0} for line in LINES])
    report(folder)
    out = capsys.readouterr().out
    assert "No price is known: give --price-per-hour" in out
    assert "3.00 h" in out
    assert not (folder / "cost.png").exists()
    # The second start has a price, and the interruption before it none.
    write_lines(folder, [{**line, "price_per_hour": 0.0} for line in LINES[:4]] + LINES[4:])
    whole = record(folder)
    assert math.isclose(whole["usd"], 0.5)
    assert "no price was known, and the sums lack it" in whole["notes"][0]
    page = (folder / "cost.md").read_text()
    assert "| machine, to 50 % top-1          | not known (epoch 2) " in page
    assert "| machine, to 76 % top-1          | – " in page  # never reached
    assert (folder / "cost.png").exists()
    # A report without prices leaves no other one's picture.
    write_lines(folder, [{**line, "price_per_hour": 0.0} for line in LINES])
    report(folder)
    assert not (folder / "cost.png").exists()


def test_older_runs_are_as_long_as_their_metrics_say(folder: Path, tmp_path: Path) -> None:
    (folder / "sessions.jsonl").unlink()
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps(SPOT_PRICES))
    assert "does not tell" in refusal(folder, "--spot-prices", prices)
    whole = record(folder)
    assert whole["gpu_s"] == whole["wall_s"] == 2900 + 2900 + 1900 + 3 * 100
    assert math.isclose(whole["usd"], 8000 / 3600 * 2)  # config.json's price
    assert math.isclose(whole["curve"][0]["usd"], 3000 / 3600 * 2)
    page = (folder / "cost.md").read_text()
    assert "there is no sessions.jsonl: their hours are those of training and validation" in page
    assert "| interruptions                   | – " in page
    assert "| 1 | – | 2 h 13 min | " in page  # when it began nobody knows


def test_sessions_that_begin_in_the_middle_of_a_run_are_added_to_its_metrics(folder: Path) -> None:
    write_lines(folder, LINES[4:])  # after two epochs, 6,000 s
    whole = record(folder)
    assert math.isclose(whole["usd"], 6000 / 3600 * 2 + 0.5)
    assert [point["epoch"] for point in whole["curve"]] == [1, 2, 3]
    assert "Of the first 2 epochs there is no sessions.jsonl" in (folder / "cost.md").read_text()


def test_steps_are_done_twice_up_to_the_furthest_that_any_start_had_reached(folder: Path) -> None:
    """Killed at step 2200, then, gone on with from 2000, at 2100, before another checkpoint."""
    between = {**LINES[4], "session": "between", "began": "2026-11-24T02:15:00Z"}
    its = [between, {**between, "alive_s": 800, "step": 2100}]
    write_lines(folder, [*LINES[:4], *its, *LINES[4:]])
    whole = record(folder)
    assert [session["steps_twice"] for session in whole["sessions"]] == [0, 100, 200]
    assert math.isclose(whole["twice_s"], 200 + 400)


def test_a_copy_of_the_sessions_in_another_order_changes_nothing(folder: Path) -> None:
    """A mirror's lines come before those that are here alone."""
    whole = record(folder)
    write_lines(folder, [*LINES[4:], *LINES[:4]])
    assert record(folder) == whole


def test_an_epoch_that_was_finished_twice_costs_what_it_did_by_the_second_time(
    folder: Path,
) -> None:
    """The second start goes on from the end of epoch 1: of epoch 2 its row is the one that stays.

    It ends at $2 + $0.2222, not at $1.8333.
    """
    again = {**SHARED, **SECOND, "first_step": 1000, "ended": None}
    ends = ((600, 1000, 1), (1600, 2000, 2), (2600, 3000, 3))
    later = [{**again, "alive_s": s, "step": step, "epochs": epochs} for s, step, epochs in ends]
    write_lines(folder, [*LINES[:4], *later])
    whole = record(folder)
    assert [round(point["usd"], 4) for point in whole["curve"]] == [1.0, 2.2222, 2.3611]
    assert round(whole["usd_to_top1"]["50"]["usd"], 4) == 2.2222


def test_an_hour_in_which_two_machines_train_is_paid_twice_and_passes_once(folder: Path) -> None:
    """The second starts at 1:30 here, half an hour before the first is killed, at 2."""
    early = [{**line, "began": "2026-11-24T01:30:00Z"} for line in LINES[4:]]
    write_lines(folder, [*LINES[:4], *early])
    whole = record(folder)
    assert math.isclose(whole["wall_s"], 2.5 * 3600) and whole["away_s"] == 0
    assert math.isclose(whole["running_s"], 3 * 3600) and math.isclose(whole["usd"], 2.5)
    # A third is there and gone while the first runs, and a fourth comes an hour after it.
    third = {**LINES[4], "session": "c", "began": "2026-11-24T00:30:00Z", "ended": "signal"}
    write_lines(folder, [*LINES[:4], third, *LINES[4:]])
    whole = record(folder)
    assert math.isclose(whole["wall_s"], 4 * 3600) and math.isclose(whole["away_s"], 3600)


def test_a_machine_that_began_last_and_went_first_does_not_end_the_run(folder: Path) -> None:
    """It is there for ten minutes from 0:30 on; the first goes on until 2."""
    second = {**LINES[4], "began": "2026-11-24T00:30:00Z", "ended": "signal"}
    write_lines(folder, [*LINES[:4], second])
    whole = record(folder, "--storage-usd-per-month", 73)
    assert math.isclose(whole["wall_s"], 2 * 3600) and whole["away_s"] == 0
    assert math.isclose(whole["storage_usd"], 0.2)


def test_a_config_json_without_a_price_is_refused_where_it_is_needed(folder: Path) -> None:
    (folder / "sessions.jsonl").unlink()
    (folder / "config.json").write_text('{"config": {"price_per_hour": "low"}, "classes": []}')
    assert "config.json has not the settings and classes of a run" in refusal(folder)
    assert math.isclose(record(folder, "--price-per-hour", 3600)["usd"], 8000)


def test_a_folder_without_a_run_is_refused(folder: Path, tmp_path: Path) -> None:
    done = command(tmp_path / "runs" / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no such run: there is no folder ")
    (folder / "metrics.jsonl").write_text("[1]\n")
    assert "metrics.jsonl, line 1: not a JSON object" in refusal(folder)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert "metrics.jsonl, line 1: val_top1 is missing or not a number" in refusal(folder)
    for name in ("sessions.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    assert "neither sessions.jsonl nor a finished epoch" in refusal(folder)

"""Training runs: what they leave, that they are exact, and that they go on where they were."""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import quick_start
import torch
import torchvision
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray

import augment
import checkpoint
import data
import engine
import image_files
import interruption
import trainer
from utils import Config, learning_rate

TIMES = ("train_s", "val_s", "img_per_s")  # fields of a metrics row that no two runs share


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 7 training and some validation images: 21 = 2 batches of 8 and one of 5."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, classes=3, images=7)
    return folder


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> dict[str, object]:
    """Two epochs of three steps, in fp32: some seconds."""
    return plain_settings(images, tmp_path / "runs")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A run with these settings that nothing has disturbed, made once, for all that compare."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_images(folder / "images", classes=3, images=7)
    settings = plain_settings(folder / "images", folder / "runs")
    train(settings)
    yield settings
    shutil.rmtree(folder)  # 600 MB, which pytest would keep


def plain_settings(images: Path, runs_folder: Path) -> dict[str, object]:
    return {
        "runs_folder": str(runs_folder),
        "name": "run",
        "train_folder_name": str(images / "train"),
        "val_folder_name": str(images / "val"),
        "epochs": 2,
        "batch_size": 8,
        "max_lr": 0.02,
        "train_px": 32,
        "val_px": 32,
        "val_resize_px": 36,
        "precision": "fp32",
        "workers": 1,
    }


@pytest.fixture(autouse=True)
def _remove_checkpoints(tmp_path: Path) -> Iterator[None]:
    """A run has 600 MB; pytest would keep those of the last three sessions."""
    yield
    for path in tmp_path.rglob("*.pt"):
        path.unlink()


def as_options(settings: dict[str, object]) -> list[str]:
    options = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        options += [option] if value is True else [option, str(value)]
    return options


def train(settings: dict[str, object], *options: str) -> subprocess.CompletedProcess:
    done = run_stage_command("trainer.py", *as_options(settings), *options)
    assert done.returncode == 0, done.stderr
    return done


def run_folder(settings: dict[str, object]) -> Path:
    return Path(str(settings["runs_folder"])) / str(settings["name"])


def outcome(settings: dict[str, object]) -> dict[str, object]:
    """All that two equal runs must share: hashes of weights and momentum, metrics but for times."""
    folder = run_folder(settings)
    state = checkpoint.load_latest(folder / "checkpoints")
    assert state is not None

    def digest(tensors: list[torch.Tensor]) -> str:
        whole = hashlib.sha256()
        for tensor in tensors:
            whole.update(tensor.contiguous().numpy().tobytes())
        return whole.hexdigest()

    momentum = [part["momentum_buffer"] for part in state["optimizer"]["state"].values()]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    result = json.loads((folder / "result.json").read_text())
    return {
        "weights": digest(list(state["model"].values())),
        "last.pt": digest(list(torch.load(folder / "last.pt").values())),
        "best.pt": digest(list(torch.load(folder / "best.pt").values())),
        "momentum": digest(momentum),
        "step": state["step"],
        "rows": [{key: row[key] for key in row if key not in TIMES} for row in rows],
        "result": {key: result[key] for key in result if key not in ("elapsed_s", "price_usd")},
    }


def test_the_step_that_compiles_counts_in_no_rate(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """An hour of compiling, then two steps of 4 s and 8 images: 2 img/s, and three are left."""
    config = Config(**settings, log_interval_s=5.0)
    train_set, _, _ = image_files.open_images(config)
    run = engine.new_run(config, 3)
    run.model.train()
    compiles = dataclasses.replace(config, compile=True)
    caplog.set_level(logging.DEBUG)
    with trainer.Progress(run, compiles, train_set) as progress:
        now = progress.told_at + 3600
        for batch, labels in data.train_batches(train_set, config, 0, 0):
            engine.train_step(run, batch, labels, 0.01)
            progress.tell(now)
            now += 4
    # Other tests may have left threads or levels behind, by which more is logged.
    messages = [record.getMessage() for record in caplog.records]
    (line,) = [message for message in messages if message.startswith("epoch ")]
    assert "step 3/3" in line
    assert "  2 img/s  ETA 12 s" in line


def test_what_is_left_counts_the_validations_to_come(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """In the second of four epochs: two steps and two epochs of three, 4 s each, 3 × 100 s."""
    config = Config(**{**settings, "epochs": 4}, log_interval_s=1.0)
    run = engine.new_run(config, 3)
    run.step, run.history = 3, [{"val_s": 100.0}]
    run.totals["counts"] += 1
    caplog.set_level(logging.DEBUG)
    with trainer.Progress(run, config, range(21)) as progress:
        run.step = 4
        progress.tell(progress.told_at + 4)
    messages = [record.getMessage() for record in caplog.records]
    (line,) = [message for message in messages if message.startswith("epoch ")]
    assert "epoch 2/4  step 1/3" in line and "  2 img/s  ETA 5 min 32 s" in line


def test_a_run_leaves_what_the_readme_says(settings: dict[str, object]) -> None:
    done = train(settings, "--price-per-hour", "3", "--log-interval-s", "1e-9", "--tensorboard")
    folder = run_folder(settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["train_images"] == 21
        assert row["val_images"] == len(list((Path(settings["val_folder_name"])).glob("*/*")))
        for part in ("train", "val"):
            for rank in ("1", "5"):
                share = row[f"{part}_correct{rank}"] / row[f"{part}_images"]
                assert math.isclose(row[f"{part}_top{rank}"], 100 * share)
            assert row[f"{part}_top5"] == 100  # there are three classes
            assert math.isfinite(row[f"{part}_loss"])
        config = Config(**settings)
        assert row["learning_rate"] == learning_rate(config, 3 * row["epoch"], 3)

    log_lines = (folder / "train.log").read_text().splitlines()
    assert log_lines[-1] in done.stdout
    progress = next(line for line in log_lines if "epoch 2/2  step 2/3" in line)
    for part in ("loss ", "top-1 ", "lr ", " img/s", "ETA ", "$"):
        assert part in progress
    assert any((folder / "tensorboard").iterdir())

    # Weights bear torchvision's names, and best.pt is what result.json says it is.
    model = torchvision.models.resnet50(num_classes=3)
    model.load_state_dict(torch.load(folder / "best.pt"), strict=True)
    result = json.loads((folder / "result.json").read_text())
    best = max(rows, key=lambda row: row["val_top1"])
    assert result["epoch"] == best["epoch"]
    assert result["val_correct1"] == brute_force_correct(model, settings)
    assert result["val_top1"] == best["val_top1"]  # fp32 in both evaluations

    # A finished run is not trained again, and says what would.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = train(settings)
    assert "is finished" in again.stdout
    assert "--extra-epochs" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    # Extended, it keeps its rows and adds to them.
    train({**settings, "extra_epochs": 1})
    extended = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert extended[:2] == rows
    assert [row["epoch"] for row in extended] == [1, 2, 3]
    at_once = {**settings, "name": "at_once", "extra_epochs": 1}
    train(at_once)
    assert outcome(at_once) == outcome(settings)


def test_an_epoch_that_cannot_be_saved_has_no_row(settings: dict[str, object]) -> None:
    """No file may grow beyond what the metrics need, as on a disk that is full by then."""
    limited = 'ulimit -f 1000 && exec "$0" "$@"'  # units of 1 kB
    done = subprocess.run(
        ["bash", "-c", limited, sys.executable, REPOSITORY / "trainer.py", *as_options(settings)],
        env=COMMAND_ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    folder = run_folder(settings)
    assert done.returncode == 2 and "epoch 1/2  train loss" in done.stdout, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "config.json").exists()
    assert not (folder / "metrics.jsonl").exists()


def test_what_is_kept_is_the_average_of_the_best_epoch_the_first_of_equals(
    settings: dict[str, object],
) -> None:
    config = Config(**{**settings, "average_steps": 2, "zero_init_residual": True})
    _, val_set, _ = image_files.open_images(config)
    run = engine.new_run(config, 3)
    torch.nn.init.normal_(run.average.model.model.fc.weight)

    def finish(run: engine.Run) -> None:
        run.step, run.epoch_s = run.step + 3, 1.0
        run.totals["counts"] += 1
        run.model.train()
        trainer.finish_epoch(run, config, val_set, bool)
        assert not run.model.training  # else too little memory would name another setting

    def validated(net: torch.nn.Module) -> dict[str, float]:
        batches = data.val_batches(val_set, config)
        return engine.evaluate(net, batches, run.device, "fp32", bool)

    finish(run)
    assert run.elapsed_s == run.history[0]["val_s"] > 0  # steps count their own time
    assert validated(run.average.model).items() <= run.history[0].items()
    assert validated(run.model)["val_loss"] != run.history[0]["val_loss"]
    best = torch.load(io.BytesIO(run.best.numpy().tobytes()))
    for name, value in run.average.model.model.state_dict().items():
        assert torch.equal(best[name], value), name

    resumed = engine.new_run(config, 3)
    resumed.load(run.state())
    with torch.no_grad():
        resumed.average.model.model.fc.bias += 1.0  # changes no answer
    finish(resumed)
    assert resumed.history[1]["val_correct1"] == resumed.history[0]["val_correct1"]
    assert torch.equal(resumed.best, run.best)


def test_a_run_is_saved_when_that_is_due_and_stops_once_its_budget_is_spent() -> None:
    """Ten minutes after it was saved last, and at exactly the dollars of the budget."""
    config = Config(checkpoint_minutes=10, budget_usd=5.0)
    run = types.SimpleNamespace(
        step=7, history=[], device=torch.device("cpu"), spent_usd=0.0,
        totals=engine.new_totals(torch.device("cpu")),
    )  # fmt: skip
    saver = types.SimpleNamespace(check=lambda: None)
    spent_usd, saved = 4.99, []
    session = types.SimpleNamespace(beat=lambda *_: spent_usd)
    keeper = trainer.Keeper(run, config, {}, interruption.Requests(), session, saver)
    keeper.save = lambda: saved.append(run.step)
    for step, minutes in ((7, 1000), (8, 0), (9, 8), (10, 11)):  # nothing is new at first
        run.step, keeper.saved_at = step, time.monotonic() - 60 * minutes
        keeper.heed(None)
    assert saved == [10]
    assert run.spent_usd == 4.99
    spent_usd = 5.0
    with pytest.raises(trainer.Interrupted):
        keeper.heed(None)


def test_a_first_epoch_without_a_right_answer_is_kept_and_skipped_steps_go_on_in_the_next(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps were skipped, the last three of them in a row, which the next one may end."""
    config = Config(**settings)
    run = engine.new_run(config, 3)
    run.step, run.epoch_s = 3, 1.0
    run.totals["counts"] += 1
    run.totals["trouble"][:2] = torch.tensor([4, 3])
    val = {"val_loss": 1.0, "val_top1": 0.0, "val_top5": 0.0, "val_images": 21}
    monkeypatch.setattr(engine, "evaluate", lambda *_: val)
    monkeypatch.setattr(data, "val_batches", lambda *_, **__: None)
    trainer.finish_epoch(run, config, None, bool)
    best = torch.load(io.BytesIO(run.best.numpy().tobytes()))
    assert torch.equal(best["fc.weight"], run.model.model.fc.weight)
    assert run.history[0]["skipped_steps"] == 4
    assert run.totals["trouble"].tolist() == [0, 3, 0]
    assert run.totals["counts"].tolist() == [0, 0, 0]


def test_what_was_saved_just_now_is_not_due_at_the_next_step() -> None:
    """Else a run would save at every step, once it has gone on for checkpoint_minutes."""
    totals = engine.new_totals(torch.device("cpu"))
    run = types.SimpleNamespace(
        step=7, history=[], device=torch.device("cpu"), spent_usd=0.0, totals=totals,
        state=lambda: {"step": run.step, "totals": totals},
    )  # fmt: skip
    saved = []
    saver = types.SimpleNamespace(
        check=lambda: None, save=lambda state: saved.append(state["step"])
    )
    session = types.SimpleNamespace(beat=lambda *_, **__: 0.0)
    config = Config(checkpoint_minutes=10)
    keeper = trainer.Keeper(run, config, {}, interruption.Requests(), session, saver)
    keeper.saved_at -= 60 * 11
    for run.step in (8, 9, 10):
        keeper.heed(None)
    assert saved == [8]


def test_a_tensorboard_that_is_open_follows_a_run_that_goes_on_from_an_earlier_epoch(
    tmp_path: Path,
) -> None:
    """Read by the loader that TensorBoard has where its quick one is not installed."""
    board = EventMultiplexer()
    rows = [{"epoch": epoch, "val_top1": 10.0 * epoch} for epoch in (1, 2, 3)]
    again = [*rows[:1], {"epoch": 2, "val_top1": 21.0}]
    for history in (rows[:1], rows[:2], rows, again):
        trainer.write_tensorboard(tmp_path, history)
        board.AddRunsFromDirectory(str(tmp_path))
        board.Reload()
        shown = [
            (event.step, float(make_ndarray(event.tensor_proto)))
            for event in board.Tensors("tensorboard", "val/top1")
        ]
        assert shown == [(row["epoch"], row["val_top1"]) for row in history]


def brute_force_correct(model: torch.nn.Module, settings: dict[str, object]) -> int:
    """Right answers, counted picture by picture with torchvision's own preprocessing."""
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(settings["val_resize_px"]),
            torchvision.transforms.CenterCrop(settings["val_px"]),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pictures = torchvision.datasets.ImageFolder(settings["val_folder_name"], transform)
    with torch.inference_mode():
        guesses = [model.eval()(picture[None]).argmax().item() for picture, _ in pictures]
    return sum(guess == label for guess, (_, label) in zip(guesses, pictures.samples, strict=True))


def test_workers_and_repetition_change_nothing(
    settings: dict[str, object], undisturbed: dict[str, object]
) -> None:
    with_one = outcome(undisturbed)
    for workers in (2, 4, 0):
        named = {**settings, "name": f"workers{workers}", "workers": workers}
        train(named)
        assert outcome(named) == with_one, workers
    other = {**settings, "name": "seed", "seed": 1}
    train(other)
    assert outcome(other)["weights"] != with_one["weights"]


def stop_again_and_again(
    stopped: dict[str, object],
    signals: list[signal.Signals],
    starts: Iterator[dict[str, object]] | None = None,
    steps: int = 1,
) -> list[int]:
    """Start the real command, stop it after about so many steps, until it ends; where it stopped.

    With `starts` each start has settings of its own.
    """
    starts = starts or itertools.repeat(stopped)
    folder = run_folder(stopped)
    ends = []
    for number in signals:
        log = folder / "train.log"
        seen = log.read_text().count("  step ") if log.exists() else 0
        process = quick_start.Popen(
            [sys.executable, "trainer.py", *as_options(next(starts))],
            cwd=REPOSITORY,
            env=COMMAND_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("  step ") >= seen + steps:
                process.send_signal(number)
                process.send_signal(number)  # a second one does no harm
                break
            time.sleep(0.01)
        code = process.wait(60)
        if code == 0:
            break
        assert code == 75
        ends.append(checkpoint.load_latest(folder / "checkpoints")["step"])
    assert code == 0
    return ends


def test_signals_again_and_again_change_nothing(
    settings: dict[str, object], undisturbed: dict[str, object]
) -> None:
    """The real command, stopped by SIGTERM or SIGINT a step or so after each start.

    Each start has another number of workers.
    """
    stopped = {**settings, "name": "stopped", "log_interval_s": 1e-9}
    folder = run_folder(stopped)
    starts = ({**stopped, "workers": workers} for workers in itertools.cycle((2, 0, 4, 1)))
    ends = stop_again_and_again(stopped, [signal.SIGTERM, signal.SIGINT] * 4, starts)
    assert len(ends) >= 2
    assert ends == sorted(ends)
    assert "everything is saved" in (folder / "train.log").read_text()
    assert outcome(stopped) == outcome(undisturbed)


def test_weights_of_a_lost_attempt_do_not_outlive_it(
    settings: dict[str, object], undisturbed: dict[str, object]
) -> None:
    """Killed between a checkpoint and its weights; back at an older checkpoint; best.pt lost."""
    whole, other = run_folder(undisturbed), {"fc.bias": torch.ones(3)}
    for name, generation in (("killed", 0), ("damaged", 1)):
        killed = {**settings, "name": name}
        folder = shutil.copytree(whole, run_folder(killed))
        (folder / "result.json").unlink()
        newest, older = checkpoint.generations(folder / "checkpoints")
        for file in ("best.pt", "last.pt"):
            torch.save(other, folder / file)
        if generation:
            newest.write_bytes(newest.read_bytes()[:-1])
            (folder / "best.pt").unlink()
            assert older.exists()
        train(killed)
        assert outcome(killed) == outcome(undisturbed)


def growing(settings: dict[str, object]) -> dict[str, object]:
    """Three epochs of three steps at 32, 64 and 96 px."""
    ramp = {"px_ramp_start": 0.0, "px_ramp_end": 1.0}
    return {**settings, "epochs": 3, "first_train_px": 32, "train_px": 96, **ramp}


def test_a_run_whose_crops_grow_says_so_and_goes_on_at_the_same_size(
    settings: dict[str, object],
) -> None:
    """The real command, stopped again and again, across both changes of size."""
    whole = {**growing(settings), "name": "whole"}
    train(whole)
    stopped = {**growing(settings), "name": "stopped", "log_interval_s": 1e-9}
    assert len(stop_again_and_again(stopped, [signal.SIGTERM] * 14, steps=2)) >= 2
    assert outcome(stopped) == outcome(whole)
    folder = run_folder(stopped)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_px"] for row in rows] == [32, 64, 96]

    changed = run_stage_command(
        "trainer.py", *as_options({**stopped, "px_ramp_end": 0.5, "extra_epochs": 1})
    )
    assert changed.returncode == 2
    assert "px_ramp_end was 1.0, is 0.5" in changed.stderr
    train({**stopped, "extra_epochs": 1})
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["epoch"], last["train_px"]) == (4, 96)


def test_a_run_from_before_the_crops_could_grow_keeps_their_size(
    settings: dict[str, object], undisturbed: dict[str, object]
) -> None:
    shutil.copytree(run_folder(undisturbed), run_folder(settings))
    folder = run_folder(settings) / "checkpoints"
    state = checkpoint.load_latest(folder)
    for name in ("first_train_px", "px_ramp_start", "px_ramp_end", "val_batch_size", "compile"):
        del state["config"][name]
    checkpoint.save(folder, state)
    grown = {**settings, "train_px": 32, "first_train_px": 32, "extra_epochs": 1}
    refused = run_stage_command("trainer.py", *as_options(grown))
    assert refused.returncode == 2
    assert "first_train_px was 0, is 32" in refused.stderr
    train({**settings, "extra_epochs": 1})


def test_every_size_is_loaded_at_every_epoch(settings: dict[str, object]) -> None:
    config = Config(**growing(settings))
    train_set, _, _ = image_files.open_images(config)
    for epoch, px in enumerate((32, 64, 96, 96)):
        images, _ = next(data.train_batches(train_set, config, epoch))
        assert images.shape == (8, px, px, 3)


def test_what_is_left_counts_larger_steps_for_more(settings: dict[str, object]) -> None:
    config = Config(**growing(settings))
    # One step of 32 px, three of 64 px, which are four each, three of 96 px, which are nine each.
    assert trainer.steps_left(config, epoch=0, step=2, steps_per_epoch=3) == 1 + 3 * 4 + 3 * 9
    assert trainer.steps_left(config, epoch=2, step=9, steps_per_epoch=3) == 0
    plain = Config(**settings)
    assert trainer.steps_left(plain, epoch=0, step=1, steps_per_epoch=3) == 5


def test_extra_epochs_are_left_too(settings: dict[str, object]) -> None:
    config = Config(**growing(settings), extra_epochs=2)
    assert trainer.steps_left(config, epoch=2, step=6, steps_per_epoch=3) == 3 + 2 * 3
    assert trainer.steps_left(config, epoch=3, step=10, steps_per_epoch=3) == 2 + 3


def test_compile_without_a_compiler_ends_with_one_line(
    settings: dict[str, object], tmp_path: Path
) -> None:
    nowhere = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_stage_command("trainer.py", *as_options(settings), "--compile", env=nowhere)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "C++ compiler" in line
    assert "--compile" in line
    assert "Traceback" not in done.stderr
    assert not Path(settings["runs_folder"]).exists()


def test_a_dry_run_says_everything_and_writes_nothing(settings: dict[str, object]) -> None:
    done = train({**settings, "epochs": 3, "price_per_hour": 2}, "--dry-run")
    assert not Path(settings["runs_folder"]).exists()
    for text in ("21 training and", "3 classes", "3 steps of 8 an epoch", "GB of main memory"):
        assert text in done.stdout
    config = Config(**{**settings, "epochs": 3})
    for epoch in (1, 2, 3):
        assert f"epoch   {epoch}  {learning_rate(config, 3 * epoch, 3):.7f}" in done.stdout
    assert "at $2.00 an hour" in done.stdout
    assert done.stdout.count("32 px: ") == 1

    grown = train(growing(settings), "--dry-run").stdout
    rates = [f"{learning_rate(config, 3 * epoch, 3):.7f}" for epoch in (1, 2, 3)]
    for epoch, (rate, px) in enumerate(zip(rates, (32, 64, 96), strict=True), start=1):
        assert f"epoch   {epoch}  {rate}  {px} px" in grown
        assert f"{px} px: " in grown  # its timed steps


def test_a_loss_that_is_not_a_number_stops_the_run(settings: dict[str, object]) -> None:
    done = run_stage_command("trainer.py", *as_options({**settings, "max_lr": 1e30}))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the loss is not a number any more by step ")
    assert "--max-lr" in line


def test_a_steps_memory_serves_the_next_one() -> None:
    """Page faults of ten large tensors, one after the other: none, once the heap has settled.

    Before that, a block that was freed may be a few bytes short for the next one, a few times over.
    """
    program = """if True:
        import resource, torch, utils
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        usual = faults()
        utils.keep_freed_memory()
        print(usual, faults(), faults())
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    usual, settling, settled = map(int, done.stdout.split())
    assert settled < usual / 100
    assert settling < usual


# ------------------------------------------------------------------------------ stores


def packed(images: Path, path: Path) -> Path:
    """A store of the pictures as they are, made by the real command."""
    done = run_stage_command("scripts/prepare_data.py", "pack", images, path, "--max-side", 0)
    assert done.returncode == 0, done.stderr
    return path


def on_store(settings: dict[str, object], path: Path, name: str) -> dict[str, object]:
    paths = {"train_folder_name": str(path), "val_folder_name": str(path)}
    return {**settings, **paths, "name": name}


def test_a_store_gives_the_folders_weights_and_each_goes_on_from_the_other(
    settings: dict[str, object], undisturbed: dict[str, object], images: Path, tmp_path: Path
) -> None:
    path = packed(images, tmp_path / "store")
    whole = on_store(settings, path, "store")
    train(whole)
    assert outcome(whole) == outcome(undisturbed)

    # Begun on the store, stopped, gone on with on the folder, stopped, and so on.
    both = [on_store(settings, path, "both"), {**settings, "name": "both"}]
    runs = [{**both[number % 2], "log_interval_s": 1e-9} for number in range(8)]
    ends = stop_again_and_again(runs[0], [signal.SIGTERM] * 8, iter(runs))
    assert len(ends) >= 2
    assert outcome({**settings, "name": "both"}) == outcome(undisturbed)


def test_a_damaged_picture_stops_training_until_the_store_is_mended(
    settings: dict[str, object], undisturbed: dict[str, object], images: Path, tmp_path: Path
) -> None:
    path = packed(images, tmp_path / "store")
    whole = path.read_bytes()
    train_set = image_files.open_image_set(str(path), "train")
    config = Config(**settings)
    # The last picture of the second epoch, so that the run has something to save.
    index = int(augment.epoch_order(config.seed, 1, 21)[-1])
    last_of_first = augment.epoch_order(config.seed, 0, 21).tolist().index(index)
    record = train_set.store.records[train_set.positions[index]]
    damaged = bytearray(whole)
    damaged[int(record["offset"]) + int(record["size"]) // 2] ^= 1
    path.write_bytes(damaged)
    broken = on_store(settings, path, "broken")
    done = run_stage_command("trainer.py", *as_options({**broken, "workers": 0}))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot read ")
    assert f"train/{train_set.file(index)} in {path} is damaged" in line
    state = checkpoint.load_latest(run_folder(broken) / "checkpoints")
    assert state["step"] == last_of_first // 8  # all that came before its batch is saved

    path.write_bytes(whole)
    train(broken)
    assert outcome(broken) == outcome(undisturbed)


def test_a_store_that_is_cut_short_meanwhile_stops_the_run_with_one_line(
    settings: dict[str, object], images: Path, tmp_path: Path
) -> None:
    """As by a copy over it, which begins with nothing."""
    path = packed(images, tmp_path / "store")
    cut = on_store(settings, path, "cut")
    log = run_folder(cut) / "train.log"
    process = quick_start.Popen(
        [sys.executable, "trainer.py", *as_options({**cut, "epochs": 100, "log_interval_s": 1e-9})],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and "epoch 2/100  step 1/3" in log.read_text():
                path.write_bytes(b"")
                break
            time.sleep(0.01)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2
    (line,) = errors.decode().splitlines()
    assert line.startswith(f"error: {path} was cut short while it was in use: copy it again")
    assert checkpoint.load_latest(run_folder(cut) / "checkpoints")["step"] >= 3


def test_a_store_cut_short_is_refused(
    settings: dict[str, object], images: Path, tmp_path: Path
) -> None:
    path = packed(images, tmp_path / "store")
    path.write_bytes(path.read_bytes()[:-1000])
    done = run_stage_command("trainer.py", *as_options(on_store(settings, path, "short")))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path} is damaged (")
    assert "cut short" in line and "pack it again" in line
    assert not run_folder(on_store(settings, path, "short")).exists()

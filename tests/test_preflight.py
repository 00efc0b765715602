"""The dry run: what it says of a machine that is fit, and of each trouble, provoked for real."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command
from test_interruption import Service, reply, service  # noqa: F401 (a fixture is among them)
from test_mirror import (  # noqa: F401 (fixtures are among them)
    Bucket,
    Proxy,
    ProxyHandler,
    _environment,
    bucket,
    emulator,
    proxy,
)
from test_trainer import (  # noqa: F401 (fixtures are among them)
    _remove_checkpoints,
    as_options,
    images,
    run_folder,
    settings,
    train,
)

import checkpoint
import image_files
import mirror
import preflight
import utils
from utils import Config, UserError

Settings = dict[str, object]

CPU = torch.device("cpu")
CHECK = re.compile(r"^\S+ \S+ {4}(ok|WARNING|PROBLEM) +(\w+) +(.+)$", re.M)


def dry_run(settings: Settings, *options: object) -> subprocess.CompletedProcess[str]:
    return run_stage_command("trainer.py", *as_options(settings), "--dry-run", *options)


def checks(stdout: str) -> dict[str, tuple[str, str]]:
    """Level and text of each check's line."""
    return {check: (level, text) for level, check, text in CHECK.findall(stdout)}


def tree(*folders: Path) -> set[Path]:
    """Everything in these folders, but for the indexes that are kept of images."""
    found = {path for folder in folders for path in folder.rglob("*")}
    return {path for path in found if path.name != image_files.INDEX_NAME}


# ------------------------------------------------------------------------------ the whole command


def test_a_fit_machine_is_told_so_and_nothing_is_left_behind(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    before = tree(tmp_path)
    done = dry_run(
        {**settings, "device": "cpu", "mirror": f"file://{tmp_path}/other"},
        *("--price-per-hour", 1, "--budget-usd", 5),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree(tmp_path) == before
    found = checks(done.stdout)
    clock_level, clock = found.pop("clock")  # whatever the machine's is
    assert clock_level in ("ok", "WARNING") and time.strftime("%Y-%m-%d", time.gmtime()) in clock
    assert found.pop("loader")[0] in ("ok", "WARNING")  # a busy machine may keep it from its work
    assert {level for level, _ in found.values()} == {"ok"}
    assert list(found) == ["run", "gpu", "memory", "files", "room", "mirror", "disk", "budget"]
    assert "the run begins" in found["run"][1]
    assert "as --device cpu asks" in found["gpu"][1]
    assert "listed, written, read and tidied" in found["mirror"][1]
    assert re.fullmatch(r"\$0\.\d\d of \$5\.00", found["budget"][1])
    last = done.stdout.splitlines()[-1]
    assert "dry run: " in last and "problem" not in last


# Runs on a disk that is full, under a limit of open files.
UNFIT = """
set -eu
mount -t tmpfs -o size=100m tmpfs "$DISK"
ulimit -n 60
exec "$@"
"""


def test_all_that_is_wrong_is_told_at_once(
    settings: Settings, tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    (tmp_path / "disk").mkdir()
    proxy.fault = 403
    unfit = {**settings, "runs_folder": str(tmp_path / "disk/runs"), "mirror": bucket.url}
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin", "echo NVIDIA A10G, 535.129.03")
    done = subprocess.run(
        [
            *("unshare", "--mount", "--map-root-user", "bash", "-c", UNFIT, "unfit"),
            *(sys.executable, str(REPOSITORY / "trainer.py"), *as_options(unfit), "--dry-run"),
        ],
        env={
            **COMMAND_ENVIRONMENT,
            "DISK": str(tmp_path / "disk"),
            "PATH": f"{tmp_path / 'bin'}:{COMMAND_ENVIRONMENT['PATH']}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
            "AWS_ACCESS_KEY_ID": "AKIAtestonly",
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == ""
    found = checks(done.stdout)
    problems = {check: text for check, (level, text) in found.items() if level == "PROBLEM"}
    assert list(problems) == ["gpu", "files", "room", "mirror"]
    assert "driver (535.129.03) sees NVIDIA A10G, PyTorch does not" in problems["gpu"]
    assert "60 open files, 1 workers need 65" in problems["files"]
    assert "make room" in problems["room"]
    for text in ("cannot list (it answers 403 AccessDenied)", "s3:ListBucket, s3:PutObject on"):
        assert text in problems["mirror"]
    assert "no step is timed before that is mended" in done.stdout
    assert "dry run: 4 problems (gpu, files, room, mirror) and " in done.stdout
    assert "wJalr" not in done.stdout


def test_a_volume_that_still_loads_and_a_budget_that_is_too_small(
    settings: Settings, slow_store: "SlowStore"
) -> None:
    with slow_store(first_ms=300, again_ms=0) as store:
        done = dry_run(
            {**settings, "train_folder_name": store, "val_folder_name": store, "epochs": 1},
            *("--price-per-hour", 3600, "--budget-usd", 2),
        )
    assert done.returncode == 2, done.stdout + done.stderr
    found = checks(done.stdout)
    level, text = found["disk"]
    assert level in ("WARNING", "PROBLEM")
    for part in ("still loads from its snapshot", "the run would wait", "At most 0.0 GB", "NVMe"):
        assert part in text
    assert "of it waiting for the disk" in done.stdout
    level, text = found["budget"]
    price, budget, above = map(float, re.findall(r"\$(\d+\.\d\d)", text))
    assert level == "PROBLEM" and budget == 2 and above == pytest.approx(price - budget)


# ------------------------------------------------------------------------------ the run


def test_whether_a_run_begins_goes_on_or_is_finished(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    settings = {**settings, "epochs": 1, "mirror": f"file://{tmp_path}/other"}
    train(settings)
    folder = run_folder(settings)
    before = tree(tmp_path)
    # Extended, it goes on; what is left is what is estimated.
    extended = dry_run(settings, "--extra-epochs", 2)
    assert "1 of 3 epochs are finished, 3 steps taken" in checks(extended.stdout)["run"][1]
    assert "for the 2 epochs left" in extended.stdout
    # On another machine too, and what was paid until now counts.
    elsewhere = {**settings, "runs_folder": str(tmp_path / "elsewhere"), "extra_epochs": 2}
    found = checks(dry_run(elsewhere, "--price-per-hour", 1, "--budget-usd", 5).stdout)
    assert "is fetched, and the run goes on after epoch 1 of 3" in found["run"][1]
    assert re.fullmatch(r"\$0\.\d\d of \$5\.00, of which \$0\.\d\d are spent", found["budget"][1])
    assert tree(tmp_path) == before

    state = checkpoint.load_latest(folder / "checkpoints")
    config = Config(**settings)
    access = mirror.try_access(config.mirror, folder)
    level, text = preflight.check_run(config, folder, state, state["images"], access)
    assert level == "ok" and text.startswith("run run is finished: 1 epochs")
    level, text = preflight.check_run(config, tmp_path / "empty", None, {}, access)
    assert level == "ok" and "the mirror is fetched, and the run goes on after epoch 1" in text
    further = dataclasses.replace(
        access, checkpoints=["epochs-009-step-00000009-0123456789abcdef.pt"]
    )
    cases = (
        (dataclasses.replace(config, seed=7), access, "seed was 0, is 7"),
        (config, further, "further on (epochs-009"),
    )
    for asked, there, part in cases:
        level, text = preflight.check_run(asked, folder, state, state["images"], there)
        assert level == "PROBLEM" and part in text
    others = {**state["images"], "val": "x"}
    assert (
        "val images are not those" in preflight.check_run(config, folder, state, others, None).text
    )
    with contextlib.closing(checkpoint.lock(folder)):
        level, text = preflight.check_run(config, folder, state, state["images"], access)
        assert level == "PROBLEM" and "another process trains" in text


def test_what_the_mirror_mends_is_no_problem(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    train({**settings, "epochs": 1, "mirror": f"file://{tmp_path}/other"})
    for path in (run_folder(settings) / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    done = dry_run({**settings, "mirror": f"file://{tmp_path}/other"}, "--extra-epochs", 1)
    assert "is fetched, and the run goes on after epoch 1" in checks(done.stdout)["run"][1]
    assert "is damaged: put a copy there" in done.stdout
    assert "without --dry-run the mirror's is fetched" in done.stdout
    done = dry_run(settings)
    assert done.returncode == 2 and "is damaged: put a copy there" in done.stderr


def test_a_result_of_fewer_epochs_is_not_that_of_the_run(tmp_path: Path) -> None:
    """Stopped between the last epoch of an extension and its last evaluation."""
    config = Config(name="run", epochs=2, extra_epochs=1)
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    result = {"epoch": 2, "val_top1": 50.0}
    for epochs, told in ((2, False), (3, True)):
        utils.write_json(tmp_path / "result.json", {**result, "epochs": epochs})
        said = preflight.tell_finished(tmp_path, config, {"history": [{}] * 3})
        assert said.startswith("run run is finished: 3 epochs, 50.00 %") == told
    assert not preflight.tell_finished(tmp_path, config, {"history": [{}] * 2})


def test_of_the_epoch_under_way_what_is_done_takes_no_more_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two of its four steps of 10 s are; one more epoch follows, and both are validated."""
    config = Config(
        name="run", epochs=3, batch_size=5, workers=1, device="cpu", train_px=32, val_px=32,
        val_resize_px=32,
    )  # fmt: skip
    reading = preflight.Reading(np.arange(8), 1e3, first=1e6, again=1e6)
    left = []
    monkeypatch.setattr(preflight, "read_at_random", lambda *_: reading)
    monkeypatch.setattr(preflight, "time_sizes", lambda *_: {32: preflight.Timing(10.0, 10.0, 6)})
    monkeypatch.setattr(preflight, "tell_estimate", lambda *given: left.append(given[2]) or "")
    config_before = dataclasses.asdict(config)
    images = {"train": "a", "val": "b", "skipped": []}
    for step in (4, 6):
        state = {"history": [{}], "step": step, "config": config_before, "images": images}
        preflight.dry_run(
            config, tmp_path, CPU, state, images, range(20), range(15), lambda *_: None
        )
    # A picture takes 2 s to train on, a third of that to validate: 40 s and 10 s an epoch.
    assert left == pytest.approx([100.0, 75.0])


def test_the_schedule_is_that_of_each_cycle(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(epochs=4, extra_epochs=2, max_lr=0.1, batch_size=1)
    with caplog.at_level("INFO", logger="resnet50"):
        preflight.print_settings(config, range(10))
    rates = [float(rate) for rate in re.findall(r"epoch +\d+  (0\.\d+) ", caplog.text)]
    lowest = 0.1 / 25 / 1e4
    assert len(rates) == 6 and rates[3] == pytest.approx(lowest, abs=1e-7)
    assert rates[5] < 1e-6 < rates[4]


def test_a_damaged_checkpoint_stays_where_it_is(tmp_path: Path) -> None:
    good = {"step": 1, "history": []}
    checkpoint.save(tmp_path, good)
    later = checkpoint.save(tmp_path, {**good, "step": 2})
    later.write_bytes(b"damaged")
    before = tree(tmp_path)
    assert checkpoint.load_latest(tmp_path, tidy=False) == good
    assert tree(tmp_path) == before
    assert checkpoint.load_latest(tmp_path) == good
    assert later not in tree(tmp_path)


# ------------------------------------------------------------------------------ the mirror


class Refusing(ProxyHandler):
    """Refuses some kinds of requests as S3 does for a role that lacks a permission."""

    kinds: frozenset[str] = frozenset()
    ahead_s = 0.0  # of the store's clock

    def pass_on(self) -> None:
        kind = "list" if "list-type=2" in self.path else self.command
        self.server.fault = 403 if kind in self.kinds else None
        super().pass_on()

    do_GET = do_PUT = do_HEAD = do_DELETE = pass_on

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        super().answer(
            status,
            {**headers, "Date": formatdate(time.time() + self.ahead_s, usegmt=True)},
            content,
        )


def find(url: str, folder: Path) -> preflight.Finding:
    config = Config(mirror=url)
    return preflight.check_mirror(config, mirror.try_access(url, folder))


@pytest.mark.parametrize(
    ("kind", "action", "permission"),
    [
        ("list", "list", "s3:ListBucket"),
        ("PUT", "write", "s3:PutObject"),
        ("GET", "read", "s3:GetObject"),
        ("DELETE", "remove", "s3:DeleteObject"),
    ],
)
def test_the_permission_that_is_missing_is_named(
    kind: str, action: str, permission: str, bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert find(bucket.url, folder).level == "ok"
    assert bucket.files() == {}
    proxy.RequestHandlerClass = type("", (Refusing,), {"kinds": frozenset({kind})})
    level, text = find(bucket.url, folder)
    assert level == "PROBLEM"
    assert f": cannot {action} (it answers 403 AccessDenied): allow this" in text
    assert re.findall(r"s3:\w+", text.removeprefix("s3:")) == [permission]
    left = list(bucket.files())
    assert left == re.findall(r"preflight-\w+", text)
    assert bool(left) == (action == "remove")


def test_a_mirror_that_cannot_be_reached(
    bucket: Bucket, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert "404 NoSuchBucket): create bucket nosuch," in find("s3://nosuch/x", folder).text
    assert "No such file or directory): mount" in find(f"file://{tmp_path}/none", folder).text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot list (it cannot be reached): mend the network" in find(bucket.url, folder).text
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    level, text = find(bucket.url, folder)
    assert level == "PROBLEM" and text.count("no credentials") == 1


@pytest.mark.parametrize(
    ("ahead_s", "level", "words"),
    [(0, "ok", "to a minute"), (-300, "WARNING", "ahead of"), (1000, "PROBLEM", "behind")],
)
def test_the_clock_is_compared_with_that_of_the_store(
    ahead_s: float, level: str, words: str, bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.RequestHandlerClass = type("", (Refusing,), {"ahead_s": ahead_s})
    found = preflight.check_clock(mirror.try_access(bucket.url, tmp_path / "run").clock_ahead_s)
    assert found.level == level and words in found.text


# ------------------------------------------------------------------------------ the machine


def stand_in(folder: Path, command: str) -> None:
    """An nvidia-smi that does this."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)


def test_what_driver_and_pytorch_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    level, text = preflight.check_gpu(Config(), CPU)
    assert level == "WARNING" and text.startswith("none: ") and "--device cpu" in text
    assert preflight.check_gpu(Config(device="cpu"), CPU).level == "ok"
    stand_in(tmp_path, "echo NVIDIA-SMI has failed because it could not talk to the driver; exit 9")
    level, text = preflight.check_gpu(Config(), CPU)
    assert level == "PROBLEM" and "(NVIDIA-SMI has failed because" in text
    stand_in(tmp_path, "echo NVIDIA H100 80GB HBM3, 550.54; echo NVIDIA H100 80GB HBM3, 550.54")
    assert "CUDA_VISIBLE_DEVICES is ''" in preflight.check_gpu(Config(), CPU).text
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    level, text = preflight.check_gpu(Config(), CPU)
    assert level == "PROBLEM"
    assert "driver (550.54) sees NVIDIA H100 80GB HBM3, PyTorch does not (" in text
    assert preflight.check_gpu(Config(device="cpu"), CPU).level == "ok"
    # Training does not begin on the CPU of such a machine, unless that is asked for.
    with pytest.raises(UserError, match=r"sees NVIDIA H100 80GB HBM3, .* --device cpu says that"):
        preflight.refuse_lost_gpu(Config(), CPU)
    preflight.refuse_lost_gpu(Config(device="cpu"), CPU)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    preflight.refuse_lost_gpu(Config(), CPU)


@pytest.mark.parametrize("stage", ["trainer.py", "lr_finder.py"])
def test_a_gpu_that_pytorch_does_not_see_is_not_paid_for(stage: str, tmp_path: Path) -> None:
    stand_in(tmp_path, "echo NVIDIA A10G, 535.183.01")
    done = subprocess.run(
        [sys.executable, REPOSITORY / stage, "--runs-folder", tmp_path / "runs"],
        env={
            **{k: v for k, v in COMMAND_ENVIRONMENT.items() if k != "CUDA_VISIBLE_DEVICES"},
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the driver (535.183.01) sees NVIDIA A10G, PyTorch does")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("life_cycle", "url", "level"),
    [("on-demand", "", "ok"), ("spot", "", "WARNING"), ("spot", "s3://bucket/x", "ok")],
)
def test_an_instance_says_what_it_is(
    life_cycle: str, url: str, level: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight.check_machine(Config()) is None
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
    odd = preflight.check_machine(Config())
    assert odd.level == "WARNING" and "answers oddly (GET " in odd.text
    for item, value in (
        ("instance-type", "g5.xlarge"),
        ("placement/availability-zone", "us-east-1a"),
        ("instance-life-cycle", life_cycle),
    ):
        service.answers[f"/latest/meta-data/{item}"] = reply(200, value.encode())
    found = preflight.check_machine(Config(mirror=url))
    assert found.level == level
    assert found.text.startswith(f"EC2 g5.xlarge in us-east-1a, {life_cycle}")
    assert ("--mirror" in found.text) == (level == "WARNING")


def test_batches_that_are_larger_than_memory() -> None:
    level, text = preflight.check_memory(Config(batch_size=10**9), torch.device("cuda"))
    assert level == "PROBLEM" and "--batch-size" in text
    on_cpu, on_gpu = (
        preflight.needed_memory(Config(), torch.device(kind)) for kind in ("cpu", "cuda")
    )
    assert on_gpu < 3e9 and 30e9 < on_cpu < 40e9  # the reference recipe, which needs a GPU


def test_parts_of_a_batch_take_less_memory_on_a_cpu() -> None:
    whole, parts = (preflight.needed_memory(Config(micro_batch_size=n), CPU) for n in (0, 64))
    assert whole - parts == pytest.approx((Config().batch_size - 64) * preflight.ACTIVATIONS_BYTES)


@pytest.mark.parametrize(
    ("limits", "available"),
    [
        ({}, 8_192_000_000),
        ({"memory.max": "max"}, 8_192_000_000),
        ({"memory.max": "2000000000"}, 2_000_000_000),
        ({"memory/memory.limit_in_bytes": "3000000000"}, 3_000_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, 8_192_000_000),
    ],
)
def test_a_container_has_the_memory_of_its_limit(
    limits: dict[str, str], available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        if path == Path("/proc/meminfo"):
            return "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"
        name = str(path.relative_to("/sys/fs/cgroup"))
        if name not in limits:
            raise FileNotFoundError(name)
        return limits[name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert preflight.available_memory() == available


def test_an_unlimited_number_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    assert preflight.check_limits(Config()) == ("ok", "any number may be open")


# ------------------------------------------------------------------------------ the disk


class SlowStore:
    """Shows a packed store on a disk that is slow, while the context lasts."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.store, self.folder = store, folder

    @contextlib.contextmanager
    def __call__(self, first_ms: float, again_ms: float) -> Iterator[str]:
        script = REPOSITORY / "tests" / "slow_disk.py"
        process = subprocess.Popen(
            [sys.executable, script, self.store, self.folder, str(first_ms), str(again_ms)],
            stderr=subprocess.PIPE,
        )
        shown = self.folder / "store"
        try:
            while not shown.exists():
                if process.poll() is not None:
                    pytest.skip(f"no FUSE here: {process.stderr.read().decode()[-200:]}")
                time.sleep(0.02)
            yield str(shown)
        finally:
            process.terminate()  # which unmounts it
            process.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training pictures of some 3.5 kB."""
    folder = tmp_path_factory.mktemp("packed")
    make_images(folder / "source", images=20, px=96)
    done = run_stage_command(
        "scripts/prepare_data.py", "pack", folder / "source", folder / "a.store"
    )
    assert done.returncode == 0, done.stderr
    return folder / "a.store"


@pytest.fixture
def slow_store(store: Path, tmp_path: Path) -> SlowStore:
    if importlib.util.find_spec("mfusepy") is None:
        pytest.skip("no mfusepy: pip install -r requirements-dev.txt")
    (tmp_path / "slow").mkdir()
    return SlowStore(store, tmp_path / "slow")


@pytest.mark.parametrize(
    ("first_ms", "again_ms", "level", "sign"),
    [
        (50, 0, "PROBLEM", "still loads from its snapshot"),
        (20, 20, "PROBLEM", "more reads and bytes a second"),
        (0, 0, "ok", ""),
    ],
)
def test_a_slow_disk_is_told_from_one_that_still_loads(
    first_ms: float,
    again_ms: float,
    level: str,
    sign: str,
    slow_store: SlowStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "READ_S", 0.5)
    config = Config(batch_size=8, workers=2, epochs=3)
    with slow_store(first_ms, again_ms) as path:
        reading = preflight.read_at_random(config, image_files.open_image_set(path, "train"))
    # As if a GPU took 100 a second, and memory kept nothing.
    timings, epochs_s = {224: preflight.Timing(0.08, 0.08, 6)}, [0.6] * 3
    waits_s = preflight.disk_waits(reading, 60, epochs_s, kept=0.0)
    found = preflight.check_disk(config, reading, 60, timings, epochs_s, waits_s)
    assert found.level == level, found.text
    assert sign in found.text


def test_a_disk_that_fails_is_not_taken_for_a_picture_that_is_damaged(
    store: Path, slow_store: SlowStore
) -> None:
    fails = Path(f"{store}.fails")
    with slow_store(first_ms=0, again_ms=0) as path:
        train_set = image_files.open_image_set(path, "train")
        fails.touch()
        try:
            with pytest.raises(UserError, match="the disk's or the system's fault: mend that"):
                preflight.read_at_random(Config(batch_size=8, workers=2), train_set)
        finally:
            fails.unlink()


def test_waiting_for_the_disk_is_counted_once_a_place() -> None:
    lazy = preflight.Reading(np.arange(8), 1e5, first=10.0, again=1000.0)
    # 100 images: 10 s at first, then 0.05 s for the half that memory does not keep; the GPU: 4 s.
    assert preflight.disk_waits(lazy, 100, [4.0] * 3, kept=0.5) == [6.0, 0, 0]
    slow = preflight.Reading(np.arange(8), 1e5, first=10.0, again=11.0)
    assert preflight.disk_waits(slow, 100, [4.0] * 3, kept=0.5) == [6.0, 1.0, 1.0]
    assert preflight.disk_waits(slow, 100, [4.0] * 3, kept=1.0) == [6.0, 0, 0]


def test_files_are_read_from_the_disk_again(images: Path) -> None:
    """On a disk of blocks, the kernel counts what it reads from there; see proc(5)."""
    train_set = image_files.open_image_set(str(images / "train"), "train")
    chosen = np.arange(len(train_set))

    def read_bytes() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))

    train_set.forget(chosen)
    before = read_bytes()
    preflight.read_some(train_set, chosen, 2)
    cold = read_bytes() - before
    if not cold:
        pytest.skip("the images lie in memory")
    preflight.read_some(train_set, chosen, 2)
    assert read_bytes() == before + cold  # now they are in the page cache
    train_set.forget(chosen)
    preflight.read_some(train_set, chosen, 2)
    assert read_bytes() == before + 2 * cold


def test_a_long_first_step_does_not_end_the_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is compiled: what follows would be two steps on the loader's stock."""
    monkeypatch.setattr(preflight, "TIMED_S", 0.5)
    make_images(tmp_path, classes=2, images=16)
    train_set = image_files.open_image_set(str(tmp_path / "train"), "train")
    config = Config(batch_size=2, workers=1)
    durations = iter([1.0])

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        time.sleep(next(durations, 0.0))

    timing = preflight.time_steps(
        config, 32, torch.device("cpu"), train_set, np.arange(len(train_set)), step
    )
    assert timing.steps == preflight.TIMED_STEPS // 2
    assert timing.step_s < 0.5


def test_an_epoch_is_its_steps_and_a_validation_of_a_third_a_picture() -> None:
    config = Config(
        epochs=3, batch_size=10, train_px=64, first_train_px=32, px_ramp_start=0.0,
        px_ramp_end=1.0, val_px=128,
    )  # fmt: skip
    timings = {px: preflight.Timing(px / 32, px / 32, 6) for px in (32, 64)}
    # 3 s of steps at 32 px, 6 s at 64 px; 30 pictures of 4 × the pixels at 0.2 s each, / 3.
    assert preflight.epoch_seconds(config, range(25), range(30), timings, 0) == pytest.approx(
        [3 + 8, 6 + 8, 6 + 8]
    )
    assert len(preflight.epoch_seconds(config, range(25), range(30), timings, 2)) == 1


def test_what_is_spent_counts_for_the_budget() -> None:
    config = Config(price_per_hour=1.0, budget_usd=3.5)
    assert preflight.check_budget(config, 3.0, 1800).level == "ok"
    level, text = preflight.check_budget(config, 3.0, 3600)
    assert level == "PROBLEM"
    assert text.startswith("$4.00 of $3.50, of which $3.00 are spent: $0.50 too much")


@pytest.mark.parametrize(
    ("micro_batch_size", "told"), [(0, ""), (5, ""), (4, "1 of 3, are compiled: choose a")]
)
def test_parts_that_would_not_be_compiled_are_told(
    micro_batch_size: int, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten images in parts of four are 4, 3 and 3."""
    make_images(tmp_path, classes=2, images=5)
    folders = {f"{part}_folder_name": str(tmp_path / part) for part in ("train", "val")}
    sizes = {"batch_size": 10, "micro_batch_size": micro_batch_size}
    config = Config(**folders, **sizes, compile=True, workers=1)
    train_set, val_set, _ = image_files.open_images(config)
    hardware = preflight.describe_hardware(torch.device("cpu"), "fp32")
    caplog.set_level(logging.INFO)
    preflight.describe_run(config, hardware, train_set, val_set, [])
    assert ("larger parts of a batch" in caplog.text) == bool(told)
    assert told in caplog.text

"""The train step, the evaluation and the average, against each written out by hand."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from test_trainer import (  # noqa: F401 (fixtures are among them)
    _remove_checkpoints,
    images,
    run_folder,
    settings,
    train,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import augment
import checkpoint
import data
import engine
import image_files
import muon
from utils import RECIPES, Config, UserError, learning_rate


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_train_px": 32, "train_px": 64},  # one in the first epoch, the other in the second
        {"optimizer": "muon", "average_steps": 2, "label_smoothing": 0.1, "blurpool": True},
    ],
)
def test_a_stop_after_any_step_changes_nothing(
    settings: dict[str, object], changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a run in turn is its last before a restart; in one process, for speed."""
    monkeypatch.setattr(muon, "ROUNDS", 1)  # five take most of the time
    config = Config(**{**settings, **changes})
    train_set, _, _ = image_files.open_images(config)
    folder = Path(settings["runs_folder"])
    folder.mkdir()

    def steps(run: engine.Run, count: int) -> None:
        run.model.train()
        while count:
            epoch, first = divmod(run.step, 3)
            for batch, labels in data.train_batches(train_set, config, epoch, first):
                engine.train_step(run, batch, labels, learning_rate(config, run.step, 3))
                count -= 1
                if not count:
                    break

    undisturbed = engine.new_run(config, 3)
    steps(undisturbed, 6)
    run = engine.new_run(config, 3)
    for stop in range(1, 6):
        steps(run, 1)
        assert run.step == stop
        checkpoint.save(folder, run.state())
        resumed = engine.new_run(dataclasses.replace(config, seed=9), 3)
        resumed.load(checkpoint.load_latest(folder))
        assert resumed.step == stop
        steps(resumed, 6 - stop)
        for name, value in undisturbed.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), (stop, name)
        for name, value in undisturbed.kept.state_dict().items():
            assert torch.equal(resumed.kept.state_dict()[name], value), (stop, name)
        assert torch.equal(resumed.totals["loss"], undisturbed.totals["loss"])
        for path in folder.iterdir():
            path.unlink()


def test_the_size_of_a_validation_batch_changes_no_count(settings: dict[str, object]) -> None:
    config = Config(**settings)
    _, val_set, _ = image_files.open_images(config)
    run = engine.new_run(config, 3)
    rows = []
    for size in (1, 4, 8, 512):
        batches = list(data.val_batches(val_set, dataclasses.replace(config, val_batch_size=size)))
        assert len(batches[0][1]) == min(size, 21)
        rows.append(engine.evaluate(run.model, iter(batches), run.device, "fp32", bool))
    for row in rows:
        assert row["val_images"] == 21
        assert math.isclose(row["val_loss"], rows[0]["val_loss"], rel_tol=1e-5)
        for name in ("val_correct1", "val_correct5"):
            assert row[name] == rows[0][name]


def test_a_compiled_run_goes_on_exactly_and_its_checkpoint_is_anyones(
    settings: dict[str, object],
) -> None:
    """A stop and another start give the same weights, bit for bit; names are torchvision's."""
    config = Config(**{**settings, "compile": True, "zero_init_residual": True})
    train_set, _, _ = image_files.open_images(config)
    folder = Path(settings["runs_folder"])
    folder.mkdir()

    def steps(run: engine.Run, last: int) -> engine.Run:
        run.model.train()
        while run.step < last:
            epoch, first = divmod(run.step, 3)
            for images, labels in data.train_batches(train_set, config, epoch, first):
                engine.train_step(run, images, labels, 1e-3)
                if run.step == last:
                    break
        return run

    compiled = steps(engine.new_run(config, 3), 2)
    checkpoint.save(folder, compiled.state())
    steps(compiled, 5)  # undisturbed; each other run would be compiled anew
    state = checkpoint.load_latest(folder)
    assert set(state["model"]) == set(torchvision.models.resnet50(num_classes=3).state_dict())
    resumed = engine.new_run(config, 3)
    resumed.load(state)
    steps(resumed, 5)
    for name, value in compiled.model.model.state_dict().items():
        assert torch.equal(resumed.model.model.state_dict()[name], value), name

    # From the same checkpoint, the same step without compile: equal but for rounding.
    eager = engine.new_run(dataclasses.replace(config, compile=False), 3)
    assert (eager.compiled, compiled.compiled is None) == (None, False)
    images, labels = next(data.train_batches(train_set, config, epoch=0))
    losses = []
    for run in (eager, compiled):
        run.load(state)
        run.model.train()
        losses.append(engine.train_step(run, images, labels, 1e-3).item())
    assert math.isclose(*losses, rel_tol=1e-4)
    for name, value in compiled.model.named_buffers():
        assert torch.allclose(eager.model.state_dict()[name], value, rtol=1e-3, atol=1e-4), name


def test_an_older_versions_optimizer_is_refused(settings: dict[str, object]) -> None:
    config = Config(**settings, optimizer="muon")
    run = engine.new_run(config, 3)
    state = run.state()
    run.load(state)
    (group,) = state["optimizer"]["param_groups"]
    without_key = {key: value for key, value in group.items() if key != "own_momentum"}
    first, *others = group["params"]
    apart = [{**group, "params": [first]}, {**group, "params": others}]
    for groups in ([without_key], [{**group, "params": others}], apart):
        with pytest.raises(UserError, match=r"older version.*--name"):
            run.load({**state, "optimizer": {**state["optimizer"], "param_groups": groups}})


def test_a_checkpoint_without_factors_of_the_learning_rate_goes_on(
    settings: dict[str, object],
) -> None:
    run = engine.new_run(Config(**settings), 3)
    state = run.state()
    for group in state["optimizer"]["param_groups"]:
        del group["lr_factor"]
    run.load(state)
    run.model.train()
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    engine.train_step(run, images, torch.zeros(8, dtype=torch.long), 0.1)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.1]


@pytest.mark.parametrize(("micro_batch_size", "parts"), [(0, [10]), (4, [4]), (5, [5, 5])])
def test_the_larger_parts_of_whole_batches_are_compiled(
    micro_batch_size: int,
    parts: list[int],
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the 3 and 3 beside 4, nor a smaller last batch."""
    seen = []

    def compiled(model: torch.nn.Module, _: torch.device) -> Callable[..., torch.Tensor]:
        def watched(images: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(images.shape))
            return model(images)

        return watched

    monkeypatch.setattr(engine, "compiled", compiled)
    sizes = {"batch_size": 10, "micro_batch_size": micro_batch_size, "compile": True}
    run = engine.new_run(Config(**{**settings, **sizes}), 3)
    for size, px in ((10, 32), (2, 32), (10, 64)):
        batch = torch.zeros((size, px, px, 3), dtype=torch.uint8)
        engine.train_step(run, batch, torch.zeros(size, dtype=torch.int64), 0.0)
    assert seen == [(part, 3, px, px) for px in (32, 64) for part in parts]


def test_counts_are_those_of_a_plain_count() -> None:
    torch.manual_seed(0)
    totals = engine.new_totals(torch.device("cpu"))
    logits, labels = torch.randn(50, 12), torch.randint(0, 12, (50,))
    for part in (slice(0, 32), slice(32, 50)):
        loss = torch.nn.functional.cross_entropy(logits[part], labels[part])
        engine.add_to_totals(totals, loss, logits[part], labels[part])
    ranks = [
        sorted(range(12), key=lambda c, row=row: -row[c]).index(label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    row = engine.read_totals(totals, "val")
    assert (row["val_correct1"], row["val_correct5"], row["val_images"]) == (
        sum(rank == 0 for rank in ranks),
        sum(rank < 5 for rank in ranks),
        50,
    )
    whole = torch.nn.functional.cross_entropy(logits, labels).item()
    assert math.isclose(row["val_loss"], whole, rel_tol=1e-6)


@pytest.mark.parametrize(("loss", "counted"), [(2.5, 0), (math.nan, 1), (math.inf, 1)])
def test_a_loss_without_end_is_no_number_either(loss: float, counted: int) -> None:
    trouble = engine.new_totals(torch.device("cpu"))["trouble"]
    engine.add_trouble(trouble, torch.tensor(loss), torch.tensor(False))
    assert trouble.tolist() == [0, 0, counted]


def test_the_step_is_sgd_as_torch_has_it(settings: dict[str, object]) -> None:
    """One train_step against the same step written out: loss, and every weight."""
    # Residual branches that start at zero: else a fresh network doubles every rounding error.
    config = Config(**{**settings, "weight_decay": 1.0, "zero_init_residual": True})
    run = engine.new_run(config, 3)
    plain = engine.new_run(config, 3).model.to(memory_format=torch.contiguous_format)
    torch.manual_seed(1)
    images = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8)
    labels = torch.randint(0, 3, (16,))
    run.model.train()
    loss = engine.train_step(run, images, labels, 0.1)

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    expected = torch.nn.functional.cross_entropy(plain.train()(inputs), labels)
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    trained = dict(run.model.named_parameters())
    for name, weight in plain.named_parameters():
        change = -0.1 * (weight.grad + 1.0 * weight)  # momentum begins at the gradient itself
        error = trained[name] - (weight + change)
        # The longest sums, those of the first layers, keep two or three digits in fp32.
        assert error.norm() <= 0.01 * change.norm() + 1e-7, name


def test_each_class_by_itself_is_as_written_out(settings: dict[str, object]) -> None:
    """BCE, smoothed, by its definition; at first each class has one chance in as many."""
    config = Config(**{**settings, "loss": "bce", "label_smoothing": 0.2})
    run = engine.new_run(config, 5)
    assert torch.allclose(run.model.model.fc.bias.sigmoid(), torch.full((5,), 0.2))
    torch.manual_seed(1)
    logits, labels = torch.randn(7, 5), torch.randint(0, 5, (7,))
    expected = 0.0
    for row, label in zip(logits.sigmoid().tolist(), labels.tolist(), strict=True):
        for place, present in enumerate(row):
            target = 0.2 / 5 + 0.8 * (place == label)
            expected -= target * math.log(present) + (1 - target) * math.log(1 - present)
    loss = engine.mean_loss(run, logits, labels, labels, None).item()
    assert math.isclose(loss, expected / 7, rel_tol=1e-5)


@pytest.mark.parametrize("decays_all", [False, True])
def test_smoothing_and_decay_are_as_written_out(
    settings: dict[str, object], decays_all: bool
) -> None:
    """Label smoothing as a sum over soft targets; BatchNorm and biases: faster, decayed or not."""
    smooth = {"label_smoothing": 0.2, "decay_norm_and_bias": decays_all, "weight_decay": 1.0}
    faster = {"norm_and_bias_lr": 4.0, "zero_init_residual": True}
    config = Config(**{**settings, **smooth, **faster})
    run, plain = engine.new_run(config, 3), engine.new_run(config, 3).model
    torch.manual_seed(1)
    images = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8)
    labels = torch.randint(0, 3, (16,))
    run.model.train()
    loss = engine.train_step(run, images, labels, 0.1)

    targets = torch.full((16, 3), 0.2 / 3)
    targets[range(16), labels] += 0.8
    logits = plain.train()(data.normalize(images))
    expected = -(targets * logits.log_softmax(1)).sum() / 16
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    trained = dict(run.model.named_parameters())
    for name, weight in plain.named_parameters():
        is_matrix = name == "model.fc.weight" or weight.ndim == 4
        change = -(0.1 if is_matrix else 0.4) * weight.grad
        if is_matrix or decays_all:
            change -= 0.1 * weight
        error = trained[name] - (weight + change)
        assert error.norm() <= 0.01 * change.norm() + 1e-7, name


def test_the_average_is_the_one_written_out(settings: dict[str, object]) -> None:
    """Weights and BatchNorm's statistics, in float64; it is what a run validates and keeps."""
    config = Config(**{**settings, "average_steps": 1})
    run = engine.new_run(config, 3)
    torch.manual_seed(1)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 3, (8,))
    expected = {name: value.double() for name, value in run.model.state_dict().items()}
    for step in range(1, 13):
        run.model.train()
        engine.train_step(run, images, labels, 0.01)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in run.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    assert decay == 0.5  # by now
    for name, value in run.kept.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name

    train({**settings, "average_steps": 2})
    state = checkpoint.load_latest(run_folder(settings) / "checkpoints")
    kept = torch.load(run_folder(settings) / "last.pt")
    for name, value in state["average"].items():
        assert torch.equal(kept[name], value), name
    assert not torch.equal(kept["fc.weight"], state["model"]["fc.weight"])


@pytest.mark.parametrize(("precision", "seed"), [("fp32", 3), ("bf16", 3), ("fp16", 4)])
def test_a_new_run_is_what_the_settings_say(
    settings: dict[str, object], precision: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the seed, channels last; loss scaling for fp16; Muon in bf16 but for fp32."""
    monkeypatch.setattr(engine, "choose_precision", lambda *_: precision)  # fp16 needs a GPU
    run = engine.new_run(Config(**{**settings, "optimizer": "muon", "seed": seed}), 3)
    assert run.scaler.is_enabled() == (precision == "fp16")
    assert run.optimizer.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    torch.manual_seed(seed)
    expected = torchvision.models.resnet50(num_classes=3).state_dict()
    for name, value in run.model.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.ndim != 4 or value.is_contiguous(memory_format=torch.channels_last)


def test_precision_and_device_are_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert engine.choose_precision(Config(precision="fp32"), cpu) == "fp32"
    assert engine.choose_precision(Config(), torch.device("cuda")) == "fp16"
    with pytest.raises(UserError, match="fp16, which needs a GPU"):
        engine.choose_precision(Config(precision="fp16"), cpu)
    for flags, expected in (("flags: sse avx512_bf16", "bf16"), ("flags: sse avx2", "fp32")):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: flags)
        assert engine.choose_precision(Config(), cpu) == expected


def test_a_run_begun_on_a_gpu_goes_on_without_loss_scaling(settings: dict[str, object]) -> None:
    run = engine.new_run(Config(**settings), 3)
    state = run.state()
    state["scaler"] = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    run.load(state)
    assert run.state()["scaler"] == {}
    scaled = dataclasses.replace(run, scaler=torch.amp.GradScaler("cpu", enabled=True))
    scaled.load(run.state())  # and the other way round


def test_what_a_run_has_taken_and_found_so_far_is_not_forgotten_at_a_stop(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """Seconds of the epoch and of the run, rows, and the best weights, of a start before."""
    config = Config(**settings)
    run = engine.new_run(config, 3)
    run.step, run.history, run.epoch_s, run.elapsed_s = 4, [{"epoch": 1}], 12.5, 100.25
    run.best = torch.arange(5, dtype=torch.uint8)
    checkpoint.save(tmp_path, run.state())
    resumed = engine.new_run(config, 3)
    resumed.load(checkpoint.load_latest(tmp_path))
    for name in ("step", "history", "epoch_s", "elapsed_s"):
        assert getattr(resumed, name) == getattr(run, name), name
    assert torch.equal(resumed.best, run.best)


def test_loss_scaling_goes_on_where_it_was(settings: dict[str, object]) -> None:
    """Else a resumed run would scale, and so round and skip, otherwise than one without a stop."""
    run = engine.new_run(Config(**settings), 3)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    run.scaler.load_state_dict({**run.scaler.state_dict(), "_growth_tracker": 1999})
    state = run.state()
    run.scaler = torch.amp.GradScaler("cpu")
    run.load(state)
    assert run.scaler.state_dict() == state["scaler"]
    assert (run.scaler.get_scale(), run.state()["scaler"]["_growth_tracker"]) == (512.0, 1999)


# ------------------------------------------------------------------------------ on a GPU

GPU = torch.device("cuda", 0)


class SharedMode(FakeTensorMode):
    """One that the copy of a model keeps."""

    def __deepcopy__(self, _: object) -> "SharedMode":
        return self


@pytest.fixture
def gpu_without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is not there: its tensors have a shape, a dtype and a device, but no values.

    What mixes devices is refused, and what waits for a value. PyTorch lacks a few parts of it: a
    module's `to`, the backward pass, for which each parameter gets a gradient of its own kind, and
    the kernel of the fused step.
    """

    def to(
        module: torch.nn.Module,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> torch.nn.Module:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    layout = memory_format if tensor.ndim == 4 else torch.preserve_format
                    moved = tensor.detach().to(device, memory_format=layout)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved) if is_weight else moved
        return module

    def fused_sgd(*lists: list[torch.Tensor], **options: object) -> None:
        told = [options.get("grad_scale"), options.get("found_inf")]
        tensors = [*itertools.chain(*lists), *(one for one in told if one is not None)]
        assert {tensor.device for tensor in tensors} == {torch.device("meta")}

    torch._C._ensureCUDADeviceGuardSet()  # which does nothing where there is no driver
    for owner, name, value in (
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.nn.Module, "to", to),
        (engine, "choose_device", lambda _: GPU),
        (data, "to_device", lambda batches, _: batches),
    ):
        monkeypatch.setattr(owner, name, value)
    data._scale_and_shift.cache_clear()
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library, SharedMode():
        library.impl("_fused_sgd_", fused_sgd)
        yield
    data._scale_and_shift.cache_clear()


def step_without_values(
    run: engine.Run,
    config: Config,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    labels_on: torch.device = GPU,
) -> torch.Tensor:
    """A train step on eight images of 64 px."""

    def backward(_: torch.Tensor) -> None:
        for parameter in run.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    images = torch.zeros(8, 64, 64, 3, dtype=torch.uint8, device=GPU)
    labels = torch.zeros(8, dtype=torch.int64, device=labels_on)
    mix = augment.draw_mix(config, 0, step, 64)
    return engine.train_step(run, images, labels, 0.1, mix=mix)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("reference", {}),
        ("reference", {"precision": "fp32", "micro_batch_size": 3, "loss": "bce"}),
        ("fast", {}),
        ("fast", {"precision": "bf16"}),
        ("accurate", {}),
        ("accurate", {"precision": "fp32", "average_steps": 2}),
    ],
)
def test_a_step_and_an_evaluation_on_a_gpu_mix_no_devices_and_wait_for_nothing(
    recipe: str,
    changes: dict[str, object],
    gpu_without_values: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(RECIPES[recipe].config, **changes)
    run = engine.new_run(config, 1000)
    assert run.precision == changes.get("precision", "fp16")
    assert run.scaler.is_enabled() == (run.precision == "fp16")
    mixes = {augment.draw_mix(config, 0, step, 64) is not None for step in range(3)}
    assert mixes == {recipe == "accurate"}
    run.model.train()
    for step in range(3):
        loss = step_without_values(run, config, step, monkeypatch)
        assert (loss.device, loss.dtype) == (GPU, torch.float32)
    assert {total.device for total in run.totals.values()} == {GPU}
    weight = run.model.model.layer1[0].conv1.weight
    assert (weight.device, weight.dtype) == (GPU, torch.float32)

    run.kept.eval()
    batch = torch.zeros(8, 64, 64, 3, dtype=torch.uint8, device=GPU), torch.zeros(8, device=GPU)
    batches = (each for each in [batch])
    ((logits, _),) = engine.logits_of(run.kept, batches, GPU, run.precision, bool)
    assert (logits.device, logits.dtype, logits.shape) == (GPU, torch.float32, (8, 1000))


def test_the_gpu_without_values_refuses_what_mixes_devices_or_waits(
    gpu_without_values: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RECIPES["reference"].config
    run = engine.new_run(config, 1000)
    with pytest.raises(DataDependentOutputException):
        engine.read_totals(run.totals, "train")
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        step_without_values(run, config, 0, monkeypatch, labels_on=torch.device("cpu"))

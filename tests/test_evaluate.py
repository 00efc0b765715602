"""Evaluation: its counts against a count by hand, every format, and what cannot be evaluated."""

import csv
import hashlib
import json
import math
import pickle
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import run_stage_command
from exports import BLUE, GREEN, MEAN, RED, STD, write_top_half_colour
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

import checkpoint
import engine
import error_analysis
import evaluate
import generate_trace_model
import utils
from error_analysis import Answers, Shown
from model import ResNet50Wrapper, load_weights
from utils import Config, UserError

CLASSES = tuple(f"kind_{letter}" for letter in "abcdefg")  # more than five: top-5 is not all
IMAGES = 6  # of a class
PX, RESIZE_PX = 32, 40


def transforms(px: int, resize_px: int) -> torchvision.transforms.Compose:
    return torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(resize_px),
            torchvision.transforms.CenterCrop(px),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.png"))


def prepared(files: Sequence[Path], px: int = PX, resize_px: int = RESIZE_PX) -> torch.Tensor:
    """The images as torchvision shows them to a model, with nothing of ours."""
    prepare = transforms(px, resize_px)
    return torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])


def write_pictures(folder: Path) -> None:
    """Noisy waves, each class with its own length of wave, in portrait and landscape."""
    draws = np.random.default_rng(3)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for image in range(IMAGES):
            height, width = (90, 120) if image % 2 else (110, 84)
            rows, columns = np.mgrid[:height, :width]
            waves = np.sin((rows + draws.uniform(-2, 2) * columns) / (2 + 2 * label))
            tint = draws.uniform(-60, 60, 3)
            noise = draws.normal(0, 30, (height, width, 3))
            pixels = (128 + waves[..., None] * tint + tint + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{image}.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose best weights answer differently to different pictures, and its pictures."""
    folder = tmp_path_factory.mktemp("runs")
    write_pictures(folder / "val")
    config = Config(
        name="tiny",
        train_folder_name=str(folder / "none"),
        val_folder_name=str(folder / "val"),
        val_px=PX,
        val_resize_px=RESIZE_PX,
        zero_init_residual=True,
    )
    torch.manual_seed(0)
    model = ResNet50Wrapper(len(CLASSES), zero_init_residual=True)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the statistics are those of all that was seen
    files = files_of(folder / "val")
    features = torch.nn.Sequential(*list(model.model.children())[:-1], torch.nn.Flatten())
    with torch.no_grad():
        features.train()(prepared(files))
        seen = features.eval()(prepared(files))
    # The last layer that gives each picture the seven logits 0, 1, ... 6 in an order of its own, of
    # which its class has the highest for two pictures of three.
    draws = np.random.default_rng(5)
    wanted = np.stack([draws.permutation(len(CLASSES)) for _ in files]).astype(np.float32)
    for index, row in enumerate(wanted):
        if index % 3:
            label, highest = index // IMAGES, row.argmax()
            row[[label, highest]] = row[[highest, label]]
    model.model.fc.weight.data = torch.linalg.lstsq(
        seen, torch.from_numpy(wanted), driver="gelsd"
    ).solution.T.contiguous()
    model.model.fc.bias.data.zero_()
    (folder / "tiny").mkdir()
    utils.save_config(folder / "tiny", config, CLASSES, {})
    utils.write_atomically(folder / "tiny/best.pt", checkpoint.encode(model.model.state_dict()))
    row = {"epoch": 1, "val_top1": 40.0, "val_top5": 90.0, "val_images": 42}
    utils.write_metrics(folder / "tiny/metrics.jsonl", [row])
    yield folder
    shutil.rmtree(folder)


def logits_by_hand(runs: Path, files: Sequence[Path], *size: int) -> torch.Tensor:
    with torch.no_grad():
        return load_weights(runs / "tiny/best.pt", len(CLASSES)).eval()(prepared(files, *size))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The stage in this process."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def result_of(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def counts_of(result: dict) -> tuple[int, int, int]:
    return result["val_correct1"], result["val_correct5"], result["val_images"]


def count_by_hand(logits: torch.Tensor, labels: Sequence[int]) -> tuple[int, int, int]:
    """Right answers, right among five, images: by sorting one picture's logits after another."""
    ranked = [sorted(range(len(row)), key=row.__getitem__)[::-1] for row in logits.tolist()]
    right1 = sum(row[0] == label for row, label in zip(ranked, labels, strict=True))
    right5 = sum(label in row[:5] for row, label in zip(ranked, labels, strict=True))
    return right1, right5, len(labels)


def labels_of(files: Sequence[Path]) -> list[int]:
    return [CLASSES.index(file.parent.name) for file in files]


# ------------------------------------------------------------------------------ the stage


def test_the_command_counts_as_a_count_by_hand(runs: Path, tmp_path: Path) -> None:
    out = runs / "tiny/evaluation"
    done = run_stage_command("evaluate.py", "--runs-folder", runs, "--val-batch-size", 5)
    assert (done.returncode, done.stderr) == (0, "")
    files = files_of(runs / "val")
    labels, logits = labels_of(files), logits_by_hand(runs, files)
    said = logits.argmax(dim=1).tolist()
    found = result_of(out)
    right1, right5, images = counts_of(found)
    assert (right1, right5, images) == count_by_hand(logits, labels) == (29, 38, 42)
    assert (found["val_top1"], found["val_top5"]) == (100 * 29 / 42, 100 * 38 / 42)
    powers = logits.exp()
    losses = -(powers[range(42), labels] / powers.sum(dim=1)).log()
    assert found["val_loss"] == pytest.approx(losses.mean().item(), abs=0.02)

    protocol = "shorter side to 40 px, centre crop 32 px, one view, fp32"
    assert found["protocol"] == protocol
    assert "evaluating the most recent run: tiny\n" in done.stdout
    assert f"protocol: {protocol}\ntop-1 69.05 % (29 of 42; 95 % interval 53." in done.stdout
    assert "top-5 90.48 % (38 of 42)\n" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        *("evaluation.json", "per_class.csv", "evaluation.png", "worst.png")
    }
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["hardware"]["cpu"]
    assert found["model_sha256"] == hashlib.sha256((runs / "tiny/best.pt").read_bytes()).hexdigest()

    with open(out / "per_class.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == list(CLASSES)
    for label, row in enumerate(table):
        mine = [answer for answer, true in zip(said, labels, strict=True) if true == label]
        assert (int(row["images"]), int(row["correct1"])) == (IMAGES, mine.count(label))
        wrong = Counter(answer for answer in mine if answer != label)
        times = wrong.get(CLASSES.index(row["mostly_taken_for"])) if wrong else 0
        assert times == int(row["times"]) == max(wrong.values(), default=0)
    pairs = Counter(pair for pair in zip(labels, said, strict=True) if pair[0] != pair[1])
    assert {
        (pair["class"], pair["said_class"]): pair["times"] for pair in found["confused_pairs"]
    } == {(CLASSES[true], CLASSES[answer]): times for (true, answer), times in pairs.items()}
    first = found["confused_pairs"][0]
    assert first["times"] == max(pairs.values())
    assert f"    {first['label']} → {first['said_label']}\n" in done.stdout

    # The pictures with the highest losses.
    worst = found["worst"]
    assert len(worst) == 24 and worst[0]["said"] != worst[0]["label"]
    by_loss = sorted(zip(losses.tolist(), map(str, files), strict=True), reverse=True)
    assert [one["loss"] for one in worst] == pytest.approx(
        [one[0] for one in by_loss[:24]], abs=0.1
    )
    assert {one["path"] for one in worst[:3]} <= {one[1] for one in by_loss[:8]}
    with Image.open(out / "worst.png") as sheet, Image.open(out / "evaluation.png") as overview:
        assert sheet.width > 2000 and sheet.height > 2000 and overview.size == (1800, 1200)


def test_the_trainer_counts_the_same(runs: Path, tmp_path: Path, monkeypatch) -> None:
    """As its last evaluation does, whose row result.json is."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's own setting
    run_main(monkeypatch, "--runs-folder", runs, "--output", tmp_path, "--worst", 0)
    assert not torch.backends.cudnn.allow_tf32  # a GPU's fp32 is one, too
    config, classes, _ = utils.read_run(runs / "tiny")
    val_set = evaluate.image_files.open_image_set(config.val_folder_name, "val")
    model = load_weights(runs / "tiny/best.pt", len(classes))
    batches = evaluate.data.val_batches(val_set, config)
    row = engine.evaluate(model, batches, torch.device("cpu"), "fp32", bool)
    found = result_of(tmp_path)
    assert {key: found[key] for key in row} == {**row, "val_loss": pytest.approx(row["val_loss"])}
    assert not (tmp_path / "worst.png").exists()


def test_picture_and_mirror_image_are_averaged(runs: Path, tmp_path: Path, monkeypatch) -> None:
    out = ("--output", tmp_path, "--worst", 42)
    run_main(monkeypatch, "--runs-folder", runs, *out, "--flip-average")
    files = files_of(runs / "val")
    labels = labels_of(files)
    model = load_weights(runs / "tiny/best.pt", len(CLASSES)).eval()
    images = prepared(files)
    with torch.no_grad():
        seen, mirrored = model(images).softmax(1), model(torch.flip(images, (-1,))).softmax(1)
    mean = (seen + mirrored) / 2
    found = result_of(tmp_path)
    assert found["protocol"] == (
        "shorter side to 40 px, centre crop 32 px, mean of softmax of image and mirror image, fp32"
    )
    assert counts_of(found) == count_by_hand(mean, labels)
    losses = {one["path"]: one["loss"] for one in found["worst"]}
    confidences = {one["path"]: one["confidence"] for one in found["worst"]}
    for index, file in enumerate(map(str, files)):
        assert confidences[file] == pytest.approx(mean[index].max().item(), abs=0.03)
        assert losses[file] == pytest.approx(-mean[index, labels[index]].log().item(), abs=0.1)
    # Neither of the two is it, nor the mean of the logits.
    for other in (seen, mirrored, (seen.log() + mirrored.log()).div(2).softmax(1)):
        its = -other[range(42), labels].log()
        assert (
            max(abs(losses[str(file)] - loss) for file, loss in zip(files, its, strict=True)) > 0.5
        )


def test_the_values_of_many_sizes_do_not_lie_on_each_other() -> None:
    """Steps of 16 px around the best one, as one asks for them on ImageNet."""
    top1 = (74.1, 74.9, 75.5, 75.9, 76.2, 76.4, 76.5, 76.5, 76.2, 75.6)
    rows = [
        {"val_px": px, **{f"val_{name}": value for name in ("top1", "top5")}}
        | {f"val_{name}_interval": [value - 0.4, value + 0.4] for name in ("top1", "top5")}
        for px, value in zip((*range(160, 257, 16), 288, 320, 352), top1, strict=True)
    ]
    figure = error_analysis.draw_sizes("best.pt", rows)
    FigureCanvasAgg(figure).draw()
    for panel in figure.axes:
        assert [text.get_text() for text in panel.texts] == ["74.10", "76.50", "75.60"]
        boxes = [text.get_window_extent() for text in panel.texts]
        assert not boxes[0].overlaps(boxes[1]) and not boxes[1].overlaps(boxes[2])


def test_accuracy_at_several_sizes(runs: Path, tmp_path: Path, monkeypatch) -> None:
    """The shorter side grows with the crop; the size of the run itself is among them."""
    run_main(monkeypatch, "--runs-folder", runs, "--output", tmp_path, "--sizes", 64, 48, 64)
    found = result_of(tmp_path)
    sizes = [(row["val_px"], row["val_resize_px"]) for row in found["sizes"]]
    assert sizes == [(32, 40), (48, 60), (64, 80)]
    files = files_of(runs / "val")
    for row in found["sizes"]:
        logits = logits_by_hand(runs, files, row["val_px"], row["val_resize_px"])
        labels = labels_of(files)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
        assert row["val_loss"] == pytest.approx(loss, rel=0.02)
        assert abs(row["val_correct1"] - count_by_hand(logits, labels)[0]) <= 2
    assert counts_of(found["sizes"][0]) == counts_of(found)
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.size == (1800, 900)
    # Another evaluation leaves nothing of this one.
    run_main(monkeypatch, "--runs-folder", runs, "--output", tmp_path, "--val-px", 48, "--worst", 0)
    alone = result_of(tmp_path)
    assert (alone["val_px"], alone["val_resize_px"], alone["sizes"]) == (48, 60, [])
    assert counts_of(alone) == counts_of(found["sizes"][1])
    assert not (tmp_path / "sizes.png").exists() and not (tmp_path / "worst.png").exists()


def test_all_sizes_are_shown_in_the_same_way(runs: Path, tmp_path: Path, monkeypatch) -> None:
    """With the mirror image too, where that is asked for."""
    out = ("--runs-folder", runs, "--output", tmp_path, "--worst", 0, "--flip-average")
    run_main(monkeypatch, *out, "--sizes", 48)
    row = result_of(tmp_path)["sizes"][1]
    run_main(monkeypatch, *out, "--val-px", 48)
    alone = result_of(tmp_path)
    assert (row["val_px"], counts_of(row)) == (48, counts_of(alone))
    assert row["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)


def test_some_of_the_models_classes(runs: Path, tmp_path: Path, monkeypatch) -> None:
    """Their labels are the model's, not their positions among themselves; it may say any class."""
    for name in ("kind_b", "kind_d", "kind_g"):
        shutil.copytree(runs / "val" / name, tmp_path / "some" / name)
    arguments = ("--runs-folder", runs, "--output", tmp_path / "out")
    run_main(monkeypatch, *arguments, "--val-folder-name", tmp_path / "some")
    found = result_of(tmp_path / "out")
    files = files_of(tmp_path / "some")
    assert counts_of(found) == count_by_hand(logits_by_hand(runs, files), labels_of(files))
    assert found["val_images"] == 18 and 8 < found["val_correct1"] < 18
    assert found["protocol"].endswith(
        "fp32; images of 3 of the model's 7 classes, matched by name, while it may answer with any"
    )
    assert [row["class"] for row in found["per_class"]] == ["kind_b", "kind_d", "kind_g"]


def test_a_store(runs: Path, tmp_path: Path, monkeypatch) -> None:
    for part in ("train", "val"):
        shutil.copytree(runs / "val", tmp_path / "source" / part)
    store = tmp_path / "store"
    done = run_stage_command("scripts/prepare_data.py", "pack", tmp_path / "source", store)
    assert done.returncode == 0, done.stderr
    arguments = ("--runs-folder", runs, "--output", tmp_path / "out")
    run_main(monkeypatch, *arguments, "--val-folder-name", store)
    assert counts_of(result_of(tmp_path / "out")) == (29, 38, 42)


# ------------------------------------------------------------------------------ exports


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    """The folder of the run's export in all formats."""
    with pytest.MonkeyPatch.context() as patch:
        options = ("--runs-folder", runs, "--app-folder", runs / "app", "--examples", 0)
        command = ("generate_trace_model.py", *options, "--formats", "torchscript", "onnx", "pt2")
        patch.setattr("sys.argv", list(map(str, command)))
        generate_trace_model.main()
    return runs / "tiny/export"


def test_all_formats_agree(runs: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    """The run is found by the file's place; each answers as the weights do."""
    logits = logits_by_hand(runs, files_of(runs / "val"))
    by_hand = count_by_hand(logits, labels_of(files_of(runs / "val")))
    losses, asked = {}, []
    choose = engine.choose_device
    monkeypatch.setattr(
        engine, "choose_device", lambda config: asked.append(kind) or choose(config)
    )
    for path, kind in (
        (runs / "tiny/best.pt", "weights"),
        (exported / "model.pt", "torchscript"),
        (exported / "model.onnx", "onnx"),
        (exported / "model.pt2", "pt2"),
    ):
        out = tmp_path / kind
        run_main(monkeypatch, "--model", path, "--output", out, "--worst", 0, "--val-batch-size", 9)
        found = result_of(out)
        assert found["kind"] == kind and counts_of(found) == by_hand
        losses[kind] = found["val_loss"]
    assert asked == ["weights", "torchscript", "pt2"]  # ONNX Runtime is the CPU's here
    assert list(losses.values()) == pytest.approx([losses["weights"]] * 4, abs=1e-3)
    assert len(set(losses.values())) > 1  # ONNX Runtime's arithmetic is another


def test_sizes_that_exports_take_and_refuse(
    runs: Path, exported: Path, tmp_path: Path, monkeypatch
) -> None:
    """TorchScript takes any; ONNX and .pt2 are for one."""
    out = ("--output", tmp_path, "--worst", 0)
    run_main(monkeypatch, "--model", exported / "model.pt", "--val-px", 64, *out)
    found = result_of(tmp_path)
    run_main(monkeypatch, "--runs-folder", runs, "--val-px", 64, *out)
    assert counts_of(result_of(tmp_path)) == counts_of(found)
    assert result_of(tmp_path)["val_loss"] == pytest.approx(found["val_loss"], abs=1e-3)
    for name, options in (("model.onnx", ("--sizes", 32, 64)), ("model.pt2", ("--val-px", 64))):
        said = rf"{name} takes pictures of 32 px, for which it was exported, not of 64: "
        with pytest.raises(UserError, match=said):
            run_main(monkeypatch, "--model", exported / name, *options, *out)


def test_an_export_away_from_its_run(tmp_path: Path, monkeypatch) -> None:
    """Sizes, classes, mean and deviation are its own; here a logit is a channel's mean."""
    (tmp_path / "export").mkdir()
    write_top_half_colour(tmp_path / "export")
    colours = {"n01": RED, "n02": GREEN, "n03": BLUE}
    for name, colour in colours.items():
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (60, 50), colour).save(tmp_path / "val" / name / "plain.png")
    Image.new("RGB", (60, 50), GREEN).save(tmp_path / "val/n01/green.png")
    run_main(
        *(monkeypatch, "--model", tmp_path / "export/model.onnx"),
        *("--val-folder-name", tmp_path / "val", "--output", tmp_path / "out"),
    )
    found = result_of(tmp_path / "out")
    assert counts_of(found) == (3, 4, 4)
    assert (found["val_px"], found["val_resize_px"]) == (32, 40)
    losses = []
    for label, colour in ((0, GREEN), (0, RED), (1, GREEN), (2, BLUE)):
        powers = [
            math.exp((value / 255 - mean) / std)
            for value, mean, std in zip(colour, MEAN, STD, strict=True)
        ]
        losses.append(-math.log(powers[label] / sum(powers)))
    assert found["val_loss"] == pytest.approx(sum(losses) / 4, abs=1e-3)
    assert [one["label"] for one in found["worst"]][:1] == ["red"]
    assert found["worst"][0]["path"].endswith("n01/green.png")
    assert [row["label"] for row in found["per_class"]] == ["red", "green", "blue"]


# ------------------------------------------------------------------------------ the numbers


def crafted(labels: list[int], said: list[int], confidences: list[float]) -> Answers:
    right = np.array(labels) == np.array(said)
    losses = -np.log(np.where(right, confidences, 0.05))
    return Answers(
        np.array(labels), np.array(said), right, losses, np.array(confidences, np.float32)
    )


def test_calibration_by_hand() -> None:
    """Three bins of 15: (0.2, 0.267], (0.6, 0.667] and (0.933, 1]."""
    answers = crafted(
        labels=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0],
        said=[1, 1, 0, 0, 1, 2, 0, 1, 2, 1],
        confidences=[0.25, 0.25, 0.21, 0.64, 0.66, 1.0, 0.95, 0.96, 0.99, 0.98],
    )
    found = error_analysis.calibration(answers)
    low = abs(1 / 3 - (0.25 + 0.25 + 0.21) / 3) * 3
    middle = abs(2 / 2 - (0.64 + 0.66) / 2) * 2
    high = abs(4 / 5 - (1 + 0.95 + 0.96 + 0.99 + 0.98) / 5) * 5
    assert found["expected_calibration_error"] == pytest.approx(
        100 * (low + middle + high) / 10, abs=1e-4
    )
    filled = [(place, row) for place, row in enumerate(found["bins"]) if row["images"]]
    assert [(place, row["images"], row["correct"]) for place, row in filled] == [
        *((3, 3, 1), (9, 2, 2), (14, 5, 4))
    ]
    assert len(found["bins"]) == 15
    assert [(row["above"], row["up_to"]) for row in found["bins"]][-1] == (100 * 14 / 15, 100)
    # An upper edge belongs to its bin.
    at_edge = error_analysis.calibration(crafted([0], [0], [0.2]))
    (row,) = [row for row in at_edge["bins"] if row["images"]]
    assert row["up_to"] == pytest.approx(20)


def test_classes_and_pairs_by_hand() -> None:
    classes, labels = ("a", "b", "c", "d"), ("ape", "bee", "cat", "dog")
    answers = crafted([0, 0, 0, 0, 1, 1, 3, 3, 3], [0, 1, 1, 3, 1, 0, 0, 0, 0], [0.5] * 9)
    pairs = error_analysis.confused_pairs(answers, classes, labels)
    assert [(pair["label"], pair["said_label"], pair["times"]) for pair in pairs] == [
        *(("dog", "ape", 3), ("ape", "bee", 2), ("ape", "dog", 1), ("bee", "ape", 1))
    ]
    rows = error_analysis.per_class(answers, classes, labels, pairs)
    assert [tuple(row.values()) for row in rows] == [
        ("a", "ape", 4, 1, 1, 25.0, 25.0, "bee", 2),
        ("b", "bee", 2, 1, 1, 50.0, 50.0, "ape", 1),
        ("d", "dog", 3, 0, 0, 0.0, 0.0, "ape", 3),
    ]
    assert [row["class"] for row in error_analysis.worst_first(rows)] == ["d", "a", "b"]


def test_the_first_answer_and_the_first_five_are_kept_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the numbers, and on the screen, which has the worst of the classes first."""
    answers = crafted([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0], [0.5] * 8)
    answers = answers._replace(in_top5=np.array([1, 1, 1, 1, 1, 1, 0, 0], bool))
    found = error_analysis.summary(answers)
    assert found["val_top1_interval"] == error_analysis.wilson_interval(4, 8)
    assert found["val_top5_interval"] == error_analysis.wilson_interval(6, 8)
    pairs = error_analysis.confused_pairs(answers, ("a", "b"), ("ape", "bee"))
    rows = error_analysis.per_class(answers, ("a", "b"), ("ape", "bee"), pairs)
    counts = [(row["correct1"], row["correct5"], row["top1"], row["top5"]) for row in rows]
    assert counts == [(3, 4, 75, 100), (1, 2, 25, 50)]
    result = {
        **found,
        **{"protocol": "one view", "calibration": error_analysis.calibration(answers)},
        **{"per_class": rows, "confused_pairs": pairs},
        "sizes": [{**found, "val_px": 32, "val_resize_px": 40}],
    }
    error_analysis.tell(result)
    told = capsys.readouterr().out.splitlines()
    assert told[told.index("the worst classes:") + 1 :] == [
        "   25.0 %  bee (1 of 4), mostly taken for ape",
        "   75.0 %  ape (3 of 4), mostly taken for bee",
        "most often confused:",
        "      3    bee → ape",
        "      1    ape → bee",
        "at 32 px, shorter side 40 px: top-1 50.00 % (4 of 8), top-5 75.00 % (6)",
    ]


def test_of_equally_bad_classes_that_with_more_images_is_the_worse() -> None:
    rows = [
        {"class": name, "top1": top1, "images": images}
        for name, top1, images in (("a", 50.0, 2), ("b", 0.0, 1), ("d", 50.0, 8), ("c", 50.0, 8))
    ]
    assert [row["class"] for row in error_analysis.worst_first(rows)] == ["b", "c", "d", "a"]


def test_wilsons_interval() -> None:
    """Values of Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for correct, images, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = error_analysis.wilson_interval(correct, images)
        assert found == pytest.approx([100 * low, 100 * high], abs=0.006)
    assert error_analysis.wilson_interval(20, 20)[1] == 100


# ------------------------------------------------------------------------------ the pictures


def assert_nothing_cut_off(figure: Figure) -> None:
    """All that is drawn, texts too, lies on the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())  # inches
    width, height = figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def heights(bars: BarContainer) -> list[float]:
    return [bar.get_height() for bar in bars]


def test_the_bars_are_what_was_counted() -> None:
    """Two classes of 26, which are too many for a bar each, never are right first."""
    labels = [f"kind {number}" for number in range(26)]
    said = [1, 1, 3, 2, *range(4, 26), *range(26)]
    answers = crafted([*range(26), *range(26)], said, [0.5] * 26 + [0.9] * 26)
    answers = answers._replace(in_top5=np.ones(52, bool))
    pairs = error_analysis.confused_pairs(answers, labels, labels)
    rows = error_analysis.per_class(answers, labels, labels, pairs)
    found = error_analysis.calibration(answers)
    result = {"model": "best.pt", **error_analysis.summary(answers)}
    figure = error_analysis.draw_overview({**result, "calibration": found, "per_class": rows})
    reliability, histogram, worst, confidence = (
        next(panel for panel in figure.axes if panel.get_label() == name)
        for name in ("reliability", "classes", "worst", "confidence")
    )
    bars = next(one for one in reliability.containers if isinstance(one, BarContainer))
    assert heights(bars) == pytest.approx([100 * 23 / 26, 100])
    right, wrong = confidence.containers
    filled = [place for place, row in enumerate(found["bins"]) if row["images"]]
    for container, counts, colour in (
        (right, [23, 26], error_analysis.RIGHT),
        (wrong, [3, 0], error_analysis.WRONG),
    ):
        assert [heights(container)[place] for place in filled] == counts
        assert all(same_color(bar.get_facecolor(), colour) for bar in container)
    (classes,) = histogram.containers
    assert (heights(classes)[10], heights(classes)[-1], sum(heights(classes))) == (3, 23, 26)
    names = [text.get_text() for text in worst.get_yticklabels()]
    assert names[:3] == ["kind 0", "kind 2", "kind 3"]
    assert [bar.get_width() for bar in worst.containers[0]][:4] == [50, 50, 50, 100]


def test_each_panel_of_sizes_has_its_own_accuracy() -> None:
    rows = [
        {
            "val_px": px,
            **{"val_top1": top1, "val_top1_interval": [top1 - 1, top1 + 2]},
            **{"val_top5": top1 + 20, "val_top5_interval": [top1 + 19, top1 + 22]},
        }
        for px, top1 in ((32, 40.0), (48, 55.0))
    ]
    figure = error_analysis.draw_sizes("best.pt", rows)
    for panel, said, more in zip(figure.axes, ("top-1", "top-5"), (0, 20), strict=True):
        assert panel.get_ylabel() == f"{said} accuracy (%)"
        (bars,) = panel.containers
        line, _, (intervals,) = bars.lines
        assert list(line.get_xdata()) == [32, 48]
        assert list(line.get_ydata()) == [40 + more, 55 + more]
        ends = [list(segment[:, 1]) for segment in intervals.get_segments()]
        assert ends == [[39 + more, 42 + more], [54 + more, 57 + more]]


def test_long_names_of_classes_can_be_told_apart() -> None:
    labels = ["n02105855_Shetland_sheepdog_Sheltie", "n02105856_Shetland_sheepdog_Sheltie"]
    answers = crafted([0, 1], [0, 1], [0.9, 0.9])
    pairs = error_analysis.confused_pairs(answers, labels, labels)
    rows = error_analysis.per_class(answers, labels, labels, pairs)
    panel = Figure().add_subplot()
    error_analysis.draw_classes(panel, rows)
    names = [text.get_text() for text in panel.get_yticklabels()]
    assert names == [f"{label[:25]}…" for label in labels]


def test_a_bin_of_few_images_shows_how_little_it_tells() -> None:
    # 2 of 3 right with a confidence of 0.5, and 1 of 1 with 0.9.
    answers = crafted([0, 0, 0, 1], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.9])
    panel = Figure().add_subplot()
    error_analysis.draw_reliability(panel, error_analysis.calibration(answers))
    (bars,) = [one for one in panel.containers if isinstance(one, ErrorbarContainer)]
    (lines,) = bars.lines[2]
    drawn = [[*line[:, 0], *line[:, 1]] for line in lines.get_segments()]
    assert drawn == [
        pytest.approx([50, 50, 20.766, 93.851], abs=2e-3),  # Wilson's interval
        pytest.approx([90, 90, 20.655, 100], abs=2e-3),
    ]


@pytest.mark.parametrize("count", [2, 10, 25, 1000])
def test_nothing_is_cut_off(count: int) -> None:
    names = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    labels = sorted(names, key=len)[-count:]  # the longest
    draws = np.random.default_rng(0)
    true = np.repeat(np.arange(count), 3)
    said = np.where(draws.random(len(true)) < 0.7, true, (true + 1) % count)
    answers = crafted(true.tolist(), said.tolist(), draws.uniform(1 / count, 1, len(true)).tolist())
    pairs = error_analysis.confused_pairs(answers, labels, labels)
    result = {
        "model": "/somewhere/far/from/here" * 5 + "/runs/with_a_long_name/best.pt",
        **error_analysis.summary(answers),
        "calibration": error_analysis.calibration(answers),
        "per_class": error_analysis.per_class(answers, labels, labels, pairs),
    }
    assert_nothing_cut_off(error_analysis.draw_overview(result))
    rows = [{**error_analysis.summary(answers), "val_px": px} for px in range(96, 321, 32)]
    assert_nothing_cut_off(error_analysis.draw_sizes(result["model"], rows))


def test_wide_names_stay_below_their_picture() -> None:
    grey = np.full((20, 20, 3), 128, np.uint8)
    names = ("END_OF_NO_PASSING_ZONE", "W" * 40, "$" * 30, "golden retriever and some more words")
    shown = [Shown("a.png", grey, name, name[::-1], 0.5, 1.0) for name in names]
    figure = error_analysis.draw_worst(shown)
    figure.draw_without_rendering()
    for text in figure.texts[1:]:  # all but the title
        assert text.get_window_extent().width <= figure.axes[0].get_window_extent().width + 2


def test_what_was_said_is_green_where_it_is_right() -> None:
    grey = np.full((20, 20, 3), 128, np.uint8)
    shown = [Shown("a.png", grey, "ant", said, 0.5, 1.0) for said in ("ant", "bee")]
    texts = {text.get_text(): text.get_color() for text in error_analysis.draw_worst(shown).texts}
    assert texts["is ant"] == texts["said ant"] == error_analysis.RIGHT
    assert texts["said bee"] == error_analysis.WRONG


def test_the_contact_sheet_shows_the_pictures_and_their_names(tmp_path: Path) -> None:
    """Each by its colour, with what it is and what was said below it."""
    draws = np.random.default_rng(0)
    colours = draws.integers(0, 256, (8, 3)).astype(np.uint8)
    long = "a label that is longer than any of ImageNet's $1,000 classes by some $ and words"
    shown = [
        Shown(f"{n}.png", np.full((20, 20, 3), colour), f"true {n}", f"said {n}", 0.5, 9.5 - n)
        for n, colour in enumerate(colours[:7])
    ]
    shown.append(Shown("7.png", np.full((20, 20, 3), colours[7]), long, long, 1.0, 2.5))
    figure = error_analysis.draw_worst(shown)
    assert_nothing_cut_off(figure)
    figure.savefig(tmp_path / "worst.png")
    pixels = np.asarray(Image.open(tmp_path / "worst.png").convert("RGB"))
    for place, (colour, panel) in enumerate(zip(colours, figure.axes, strict=True)):
        box = panel.get_window_extent()
        across, down = int(box.x0 + box.width / 2), int(len(pixels) - box.y0 - box.height / 2)
        assert (pixels[down, across] == colour).all()
        below = [
            text.get_text()
            for text in figure.texts
            if abs(text.get_window_extent().x0 - box.x0) < 4
            and 0 < box.y0 - text.get_window_extent().y1 < 190
        ]
        if place < 7:
            assert below == [
                *(f"is true {place}", f"said said {place}", f"with 50.0 %, loss {9.5 - place:.2f}")
            ]
        else:
            assert len(below) == 5 and below[3].endswith(" …")


# ------------------------------------------------------------------------------ what cannot be


@pytest.fixture(scope="module")
def broken(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place with a run, broken files and sets of images that do not fit."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "runs/other").mkdir(parents=True)
    shutil.copy(runs / "tiny/config.json", folder / "runs/other")
    (folder / "runs/cut").mkdir()
    shutil.copy(runs / "tiny/config.json", folder / "runs/cut")
    content = (runs / "tiny/best.pt").read_bytes()
    (folder / "runs/cut/best.pt").write_bytes(content[: len(content) // 2])
    (folder / "runs/cut/last.pt").write_bytes(content[:-5000] + b"x" * 10 + content[-4990:])
    torch.save(torch.nn.Linear(2, 2), folder / "runs/cut/whole.pt")
    torch.save({"state_dict": {}}, folder / "runs/cut/foreign.pt")
    (folder / "runs/cut/headless.pt").write_bytes(content[5000:])
    index = content.rindex(b"PK\1\2")
    (folder / "runs/cut/index.pt").write_bytes(content[:index] + b"X" + content[index + 1 :])
    (folder / "runs/cut/pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(folder / "runs/cut/letters.pt", "w") as file:
        file.writestr("letters.txt", "no weights")
    (folder / "runs/cut/model.h5").write_bytes(b"x")
    (folder / "lonely.pt").symlink_to(runs / "tiny/best.pt")
    for name in ("model.onnx", "lonely.pt2", "lonely.h5"):
        (folder / name).write_bytes(b"x")
    (folder / "foreign/kind_a").mkdir(parents=True)
    (folder / "foreign/kind_x").mkdir()
    for class_folder in (folder / "foreign").iterdir():
        Image.new("RGB", (40, 40)).save(class_folder / "1.png")
    shutil.copytree(folder / "foreign/kind_a", folder / "bad/kind_a")
    (folder / "bad/kind_a/2.png").write_bytes(b"no picture")
    yield folder
    shutil.rmtree(folder)


TINY = ("--runs-folder", "{runs}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--runs-folder", "empty"), "no run in empty/ yet"),
        (("--name", "none"), "no runs/none/config.json: name a run in runs/"),
        (("--name", "../tiny"), "is no name for a run"),
        (("--name", "other"), "no file runs/other/best.pt: train first, with python3 trainer.py"),
        (("--name", "cut"), "runs/cut/best.pt is damaged"),
        (("--name", "cut", "--weights", "last"), "runs/cut/last.pt is damaged"),
        (("--model", "runs/cut/whole.pt"), "whole.pt has not the weights of a ResNet-50 with 7"),
        (("--model", "runs/cut/foreign.pt"), "foreign.pt has not the weights of a ResNet-50"),
        (("--model", "runs/cut/pickle.pt"), "pickle.pt is damaged"),
        (("--model", "runs/cut/headless.pt"), "headless.pt is damaged"),
        (("--model", "runs/cut/index.pt"), "index.pt is damaged"),
        (("--model", "runs/cut/letters.pt"), "letters.pt has not the weights of a ResNet-50"),
        (("--model", "runs/cut/model.h5"), "model.h5 is none of .pt, .onnx and .pt2"),
        (("--model", "lonely.h5"), "lonely.h5 is none of .pt, .onnx and .pt2"),
        (("--model", "runs/cut/none.pt"), "no file runs/cut/none.pt: --model takes a file"),
        (("--model", "runs/cut"), "no file runs/cut: --model takes a file"),
        (
            ("--model", "lonely.pt", "--weights", "last"),
            "--weights last and --model are two models",
        ),
        (("--model", "lonely.pt"), "lonely.pt belongs to no run: name a folder with --output"),
        (("--model", "lonely.pt", "--output", "out"), "does not say what its classes are: name"),
        (("--model", "model.onnx", "--output", "out"), "name the images with --val-folder-name"),
        (
            ("--model", "model.onnx", "--output", "out", "--val-folder-name", "foreign"),
            "model.json is missing: export again with python3 generate_trace_model.py",
        ),
        (("--model", "model.onnx", "--output", "out", "--precision", "bf16"), "compute in fp32"),
        (("--model", "model.onnx", "--output", "out", "--device", "cuda"), "ONNX runs on the CPU"),
        ((*TINY, "--device", "cuda"), "device is cuda, but PyTorch sees no GPU"),
        ((*TINY, "--precision", "fp16"), "precision is fp16, which needs a GPU"),
        ((*TINY, "--val-folder-name", "none"), "no folder or store none"),
        ((*TINY, "--val-folder-name", "foreign"), "does not know 1 of the 2 classes in foreign: k"),
        ((*TINY, "--val-folder-name", "bad"), "leave them out with --skip-bad-images"),
        ((*TINY, "--sizes", "64", "-32"), "sizes has -32: each must be above 0"),
        ((*TINY, "--sizes", "0"), "sizes has 0: each must be above 0"),
        ((*TINY, "--val-px", "-1"), "val_px is -1: it must be above 0"),
        ((*TINY, "--val-resize-px", "16"), "val_resize_px is 16: it must be at least val_px, 32"),
        ((*TINY, "--val-batch-size", "0"), "val_batch_size is 0: it must be above 0"),
        ((*TINY, "--workers", "-1"), "workers is -1: it must be 0 or more"),
        ((*TINY, "--worst", "-1"), "worst is -1: it must be 0 to 200"),
        ((*TINY, "--output", "model.onnx/out"), "cannot write to model.onnx/out"),
    ],
)
def test_mistakes_are_told(
    runs: Path, broken: Path, monkeypatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    with pytest.raises(UserError) as error:
        run_main(monkeypatch, *(argument.format(runs=runs) for argument in arguments))
    assert said in str(error.value) and error.value.exit_code == 2
    assert [path for path in sorted(broken.rglob("*")) if path.name != ".image_index.npz"] == before


def test_a_mistake_ends_the_command_with_one_line(runs: Path, tmp_path: Path) -> None:
    done = run_stage_command("evaluate.py", "--runs-folder", runs, "--sizes", "-1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sizes has -1: each must be above 0\n"


def test_exports_that_are_not_what_model_json_says(
    exported: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(exported, tmp_path / "export")
    out = ("--output", tmp_path / "out", "--val-folder-name", exported.parent.parent / "val")
    path = tmp_path / "export/model.json"
    content = path.read_text()
    for change, said in (
        ({"labels": list("abcdef")}, "has not a label for each class"),
        (
            {"classes": list("abcdefgh"), "labels": list("abcdefgh")},
            "7 outputs, model.json 8 class",
        ),
        ({"classes": list(CLASSES[::-1])}, "in another order: the list of them beside"),
        ({"classes": list("abcdefg")}, "does not know 7 of the 7 classes in .*: kind_a, .*, …"),
        ({"formats": {}}, "does not describe model.pt"),
        ({"resize_px": 20}, "has a resize_px below its input_px"),
    ):
        path.write_text(json.dumps({**json.loads(content), **change}))
        with pytest.raises(UserError, match=said):
            run_main(monkeypatch, "--model", tmp_path / "export/model.pt", *out)
    path.write_text(content)
    for name in ("model.pt", "model.onnx", "model.pt2"):
        with open(tmp_path / "export" / name, "r+b") as file:
            file.seek(10_000_000)
            file.write(b"other weights")
        with pytest.raises(UserError, match=r"not the file that model\.json describes"):
            run_main(monkeypatch, "--model", tmp_path / "export" / name, *out)
    with open(tmp_path / "export/model.pt", "r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(UserError, match=r"model\.pt is damaged"):
        run_main(monkeypatch, "--model", tmp_path / "export/model.pt", *out)
    assert not (tmp_path / "out").exists()


def test_bad_images_are_left_out_when_asked(
    broken: Path, runs: Path, tmp_path: Path, monkeypatch
) -> None:
    arguments = ("--runs-folder", runs, "--output", tmp_path, "--skip-bad-images")
    run_main(monkeypatch, *arguments, "--val-folder-name", broken / "bad")
    found = result_of(tmp_path)
    assert found["val_images"] == 1
    assert "fp32; unreadable images left out: 1; images of 1 of the" in found["protocol"]


def test_a_file_that_is_replaced_meanwhile_is_not_named_in_its_place(
    runs: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(runs / "tiny", tmp_path / "runs/tiny")
    weights = tmp_path / "runs/tiny/best.pt"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()

    def replace_after(step: str) -> None:
        original = getattr(evaluate, step)

        def replacing(*arguments):
            done = original(*arguments)
            weights.write_bytes(weights.read_bytes() + b"newer")
            return done

        monkeypatch.setattr(evaluate, step, replacing)

    replace_after("ask")
    run_main(monkeypatch, "--runs-folder", tmp_path / "runs", "--output", tmp_path / "out")
    assert result_of(tmp_path / "out")["model_sha256"] == before
    weights.write_bytes((runs / "tiny/best.pt").read_bytes())
    replace_after("load_subject")
    with pytest.raises(UserError, match=r"best\.pt was replaced while it was read: try again"):
        run_main(monkeypatch, "--runs-folder", tmp_path / "runs", "--output", tmp_path / "out")


def test_answers_that_are_no_numbers_end_it(runs: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "spoilt").mkdir()
    shutil.copy(runs / "tiny/config.json", tmp_path / "spoilt")
    state = torch.load(runs / "tiny/best.pt", weights_only=True)
    state["fc.bias"][2] = math.nan
    torch.save(state, tmp_path / "spoilt/best.pt")
    with pytest.raises(UserError, match="no number as the loss of 42 of 42 images") as error:
        run_main(monkeypatch, "--runs-folder", tmp_path)
    assert error.value.exit_code == 1
    assert not (tmp_path / "spoilt/evaluation").exists()

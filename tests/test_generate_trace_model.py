"""The export: what is printed and written, and that nothing unequal leaves the stage."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from conftest import make_images, run_stage_command
from PIL import Image

import checkpoint
import engine
import generate_trace_model
import image_files
import utils
from model import ResNet50Wrapper, load_weights
from utils import Config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs with one in it, as the trainer would have left it after two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "images", classes=3, images=4)
    config = Config(
        name="tiny",
        train_folder_name=str(folder / "images/train"),
        val_folder_name=str(folder / "images/val"),
        val_px=64,
        val_resize_px=72,
    )
    run = engine.new_run(config, 3)
    run.model.train()
    for _ in range(3):  # statistics that are not BatchNorm's first ones
        run.model(torch.randn(8, 3, 64, 64))
    (folder / "tiny").mkdir()
    classes = sorted(path.name for path in (folder / "images/val").iterdir())
    utils.save_config(folder / "tiny", config, classes, {})
    for name in ("best", "last"):
        weights = checkpoint.encode(run.model.model.state_dict())
        utils.write_atomically(folder / f"tiny/{name}.pt", weights)
        run.model.model.fc.weight.data *= 2  # the last weights are others
    row = {"val_top5": 100.0, "val_images": 12}
    rows = [{"epoch": epoch + 1, "val_top1": top1, **row} for epoch, top1 in enumerate((40, 30))]
    utils.write_metrics(folder / "tiny/metrics.jsonl", rows)
    yield folder
    shutil.rmtree(folder)


def export(runs: Path, tmp_path: Path, *options: str):
    return run_stage_command(
        *("generate_trace_model.py", "--runs-folder", str(runs)),
        *("--app-folder", str(tmp_path / "app"), *options),
    )


def test_the_command_prints_and_writes_what_the_readme_says(runs: Path, tmp_path: Path) -> None:
    done = export(runs, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # TorchScript's deprecation is the README's to tell
    assert "exporting the most recent run: tiny, which is not finished\n" in done.stdout
    assert "DeploymentConfig(name='', " in done.stdout
    assert "Tracing model on device: cpu" in done.stdout
    assert "graph(%self.1 : __torch__.model.ResNet50Wrapper" in done.stdout
    assert "on 3 validation images" in done.stdout

    app, folder = tmp_path / "app", runs / "tiny/export"
    for place, files in ((app, {"model.onnx"}), (folder, {"model.pt", "model.onnx"})):
        assert {path.name for path in place.iterdir()} == {*files, "model.json", "examples"}
        metadata = json.loads((place / "model.json").read_text())
        for described in metadata["formats"].values():
            content = (place / described["file"]).read_bytes()
            assert described["sha256"] == hashlib.sha256(content).hexdigest()
        assert metadata["classes"] == metadata["labels"]
        assert (metadata["input_px"], metadata["resize_px"]) == (64, 72)
        assert metadata["mean"] == [0.485, 0.456, 0.406]
        assert metadata["std"] == [0.229, 0.224, 0.225]
        assert (metadata["epoch"], metadata["val_top1"]) == (1, 40)
        assert len(list((place / "examples").iterdir())) == 3

    # The file gives the model's own answers, and torchvision's with torchvision's preprocessing.
    traced = torch.jit.load(folder / "model.pt")
    model = load_weights(runs / "tiny/best.pt", 3).eval()
    batch = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        assert (traced(batch) - model(batch)).abs().max() <= 1e-5
    transforms = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(72),
            torchvision.transforms.CenterCrop(64),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(metadata["mean"], metadata["std"]),
        ]
    )
    for path in (tmp_path / "app/examples").iterdir():
        with torch.inference_mode():
            answer = traced(transforms(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
        said = re.search(rf"/class_{int(path.stem)}/.*: class_(\d), (\S+) %", done.stdout)
        # A grey level of rounding may separate the two ways to resize.
        assert abs(float(answer[int(said[1])]) - float(said[2]) / 100) < 0.005


def test_pt2_and_onnx_carry_what_model_json_says(runs: Path, tmp_path: Path) -> None:
    """Each runs by itself, for any number of pictures, and gives the answers of the weights."""
    done = export(runs, tmp_path, "--formats", "torchscript", "pt2", "onnx")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    differences = {
        kind: float(said)
        for kind, said in re.findall(
            r"(\w+) and eager outputs differ by at most (\S+)", done.stdout
        )
    }
    assert list(differences) == ["traced", "pt2", "onnx"]
    assert 0 < differences["onnx"] <= 1e-4  # another arithmetic did run
    folder = runs / "tiny/export"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("examples", "model.json", "model.onnx", "model.pt", "model.pt2")
    ]
    assert not {"model.pt2", "model.pt"} & {path.name for path in (tmp_path / "app").iterdir()}

    metadata = json.loads((folder / "model.json").read_text())
    formats = metadata.pop("formats")
    assert formats["onnx"].pop("opset") == 18
    for kind, file in (("torchscript", "model.pt"), ("pt2", "model.pt2"), ("onnx", "model.onnx")):
        content = (folder / file).read_bytes()
        assert formats[kind] == {"file": file, "sha256": hashlib.sha256(content).hexdigest()}
        for place in (str(Path(utils.__file__).parent), str(runs), "site-packages"):
            if kind != "torchscript":  # no folder of this computer is in it
                assert place.encode() not in content
    inside = metadata
    weights = (runs / "tiny/best.pt").read_bytes()
    assert inside["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (inside["labels"], inside["val_top1"]) == (["class_0", "class_1", "class_2"], 40)

    extra_files = {"model.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra_files).module()
    assert json.loads(extra_files["model.json"]) == inside
    proto = onnx.load(folder / "model.onnx")
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert set(properties) == set(inside)
    for key, value in inside.items():
        assert properties[key] == value or json.loads(properties[key]) == value
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [session.get_inputs()[0].name, *session.get_inputs()[0].shape] == [
        *("images", "batch", 3, 64, 64)
    ]
    model = load_weights(runs / "tiny/best.pt", 3).eval()
    for images in (1, 2, 7, 12):
        batch = torch.randn(images, 3, 64, 64)
        with torch.inference_mode():
            logits = model(batch)
            assert (program(batch) - logits).abs().max() <= 1e-5
        answer, maps = map(torch.from_numpy, session.run(None, {"images": batch.numpy()}))
        assert (answer - logits).abs().max() <= 1e-4
        assert maps.shape == (images, 3, 2, 2)
        means = maps.mean(dim=(2, 3)) + model.model.fc.bias
        assert (means - logits).abs().max() <= 1e-4


def test_every_format_keeps_blurpool() -> None:
    model, plain = ResNet50Wrapper(3, blurpool=True), ResNet50Wrapper(3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one batch makes the statistics
    model.train()(torch.randn(8, 3, 64, 64))
    weights = model.eval().model.state_dict()
    del weights["blurpool"]
    plain.model.load_state_dict(weights)
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected, unblurred = model(images), plain(images)
        assert (expected - unblurred).abs().max() > 0.01
        exports = [
            exporter(model, 64, {"name": "blurred"})
            for exporter in generate_trace_model.EXPORTERS.values()
        ]
        model.model.fc.bias += 1  # what is asked is the file, not the model that it was made of
        for export in exports:
            assert (export.run(images) - expected).abs().max() <= 1e-4, export.file


def test_weights_that_a_training_replaces_meanwhile_are_not_mixed_up(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("export"))
    weights, later = tmp_path / "tiny/best.pt", (tmp_path / "tiny/last.pt").read_bytes()
    earlier = weights.read_bytes()
    arguments = ["--runs-folder", str(tmp_path), "--app-folder", str(tmp_path / "app")]
    arguments += ["--formats", "torchscript"]
    monkeypatch.setattr("sys.argv", ["generate_trace_model.py", *arguments])

    def replaced_after(name: str) -> None:
        utils.write_atomically(weights, earlier)
        function = getattr(generate_trace_model, name)

        def replace(*given: object) -> object:
            result = function(*given)
            utils.write_atomically(weights, later)
            return result

        with monkeypatch.context() as patched:
            patched.setattr(generate_trace_model, name, replace)
            generate_trace_model.main()

    for name in ("measured_accuracy", "load_weights"):  # one is called before and after the other
        with pytest.raises(utils.UserError, match=r"best.pt was replaced .* same command again"):
            replaced_after(name)
        assert not (tmp_path / "tiny/export").exists()
    replaced_after("choose_examples")

    # The weights were replaced already, and the epoch's row follows a moment later.
    def load_and_add(*given: object) -> ResNet50Wrapper:
        rows = utils.read_metrics(tmp_path / "tiny/metrics.jsonl")
        added = {**rows[-1], "epoch": 3, "val_top1": 90.0}
        utils.write_metrics(tmp_path / "tiny/metrics.jsonl", [*rows, added])
        return load_weights(*given)

    monkeypatch.setattr(generate_trace_model, "load_weights", load_and_add)
    with pytest.raises(utils.UserError, match="was replaced while it was read"):
        generate_trace_model.main()
    written = json.loads((tmp_path / "tiny/export/model.json").read_text())
    assert written["weights_sha256"] == hashlib.sha256(earlier).hexdigest()


def test_what_pytorch_reads_back_can_be_moved_to_a_gpu() -> None:
    """No place of it says that it is for the CPU, on which it was made."""
    model = ResNet50Wrapper(3, blurpool=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.load(
            io.BytesIO(generate_trace_model.as_torchscript(model, 32, {}).content)
        )
    assert "Device = prim::Constant" not in str(traced.inlined_graph)
    content = generate_trace_model.as_pt2(model, 32, {}).content
    program = torch.export.load(io.BytesIO(content))
    assert "device" not in program.graph_module.code
    assert set(dict(program.named_buffers())) == set(dict(model.named_buffers()))


def test_without_onnx_the_app_keeps_what_it_has(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/model.onnx").write_bytes(b"an earlier one")
    (runs / "tiny/export").mkdir(exist_ok=True)
    (runs / "tiny/export/model.onnx").write_bytes(b"of other weights")
    done = export(runs, tmp_path, "--formats", "pt2")
    assert done.returncode == 0, done.stderr
    assert "Tracing" not in done.stdout
    assert [path.read_bytes() for path in (tmp_path / "app").iterdir()] == [b"an earlier one"]
    folder = runs / "tiny/export"
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "model.json", "examples"}
    metadata = json.loads((folder / "model.json").read_text())
    assert list(metadata["formats"]) == ["pt2"]


def test_options_that_cannot_be_used_are_told_first(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, said in (
        (("--formats",), "no --formats: name one or several of torchscript, onnx, pt2"),
        (("--formats", "onnx", "tflite"), "tflite"),
        (("--code-url", "javascript:alert(1)"), "--code-url 'javascript:alert.1.' is no address"),
        (("--examples", "-1"), "examples is -1: it must be 0 to 100"),
        (("--examples", "1000"), "examples is 1000: it must be 0 to 100"),
    ):
        arguments = ["--runs-folder", str(runs), "--app-folder", str(tmp_path / "app")]
        command = ["generate_trace_model.py", *arguments, *options]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(utils.UserError, match=said):
            generate_trace_model.main()
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "[]", "has not the settings and classes of a run"),
        ("config.json", '{"config": {"epoch_count": 5}, "classes": []}', "has not the settings"),
        ("config.json", '{"config": {"val_px": "64"}, "classes": []}', "has not the settings"),
        ("config.json", '{"config": {}, "classes": ["a"]}', "not the weights of a .* 1 classes"),
        ("config.json", '{"config": {}, "classes": [1, 2, 3]}', "has not the settings and classes"),
        ("metrics.jsonl", '{"epoch": 1}', "metrics.jsonl, line 1: val_top1 is missing or not a n"),
        ("metrics.jsonl", "[1]", "metrics.jsonl, line 1: not a JSON object"),
        ("result.json", '{"top1": 5}', "result.json lacks an epoch or its accuracy"),
        ("result.json", "[1]", "result.json lacks an epoch or its accuracy"),
    ],
)
def test_a_run_whose_files_were_altered_is_told(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str, said: str
) -> None:
    shutil.copytree(
        runs / "tiny", tmp_path / "runs/tiny", ignore=shutil.ignore_patterns("c*points")
    )
    (tmp_path / "runs/tiny" / file).write_text(content)
    arguments = ["--runs-folder", str(tmp_path / "runs"), "--app-folder", str(tmp_path / "app")]
    monkeypatch.setattr("sys.argv", ["generate_trace_model.py", *arguments])
    with pytest.raises(utils.UserError, match=said):
        generate_trace_model.main()


def test_examples_that_are_no_exports_are_not_removed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app/examples").mkdir(parents=True)
    (tmp_path / "app/examples/mine.txt").write_text("mine")
    arguments = ["--runs-folder", str(runs), "--app-folder", str(tmp_path / "app")]
    monkeypatch.setattr("sys.argv", ["generate_trace_model.py", *arguments])
    with pytest.raises(utils.UserError, match="it may be yours"):
        generate_trace_model.main()
    assert (tmp_path / "app/examples/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_other_formats_that_differ_are_refused_too(
    kind: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone each picture is answered rightly; in a batch of seven one logit is off."""

    def slightly_off(model: ResNet50Wrapper, *_: object) -> generate_trace_model.Export:
        def run(images: torch.Tensor) -> torch.Tensor:
            logits = model(images).clone()
            if len(images) == 7:
                logits[6, 2] += 5e-4
            return logits

        return generate_trace_model.Export("model", b"", run, {})

    monkeypatch.setitem(generate_trace_model.EXPORTERS, kind, slightly_off)
    arguments = ["--runs-folder", str(runs), "--app-folder", str(tmp_path / "app")]
    monkeypatch.setattr("sys.argv", ["generate_trace_model.py", *arguments, "--formats", kind])
    before = {path: path.stat().st_mtime_ns for path in sorted((runs / "tiny").rglob("*"))}
    with pytest.raises(utils.UserError, match=rf"{kind} and eager outputs differ by 0\.0005"):
        generate_trace_model.main()
    after = {path: path.stat().st_mtime_ns for path in sorted((runs / "tiny").rglob("*"))}
    assert after == before


def test_the_accuracy_told_is_that_of_the_weights(tmp_path: Path) -> None:
    """The last evaluation's, in fp32, where it was of these weights: not before more epochs."""
    counts = {"val_top5": 100.0, "val_images": 12}
    rows = [{"epoch": epoch, "val_top1": top1, **counts} for epoch, top1 in ((1, 40), (2, 50))]
    equal = [{"epoch": epoch, "val_top1": 40, **counts} for epoch in (1, 2)]
    utils.write_metrics(tmp_path / "metrics.jsonl", equal)
    for weights, epoch in (("best", 1), ("last", 2)):  # as the trainer keeps them
        assert generate_trace_model.measured_accuracy(tmp_path, weights)["epoch"] == epoch
    utils.write_metrics(tmp_path / "metrics.jsonl", rows)
    for epoch, expected in ((1, rows[1]), (2, {"epoch": 2, "val_top1": 51, **counts})):
        result = {"epoch": epoch, "val_top1": 51, **counts, "weights": "best.pt"}
        utils.write_json(tmp_path / "result.json", result)
        for weights in ("best", "last"):  # the same here
            assert generate_trace_model.measured_accuracy(tmp_path, weights) == expected


def test_a_run_is_called_unfinished_until_it_has_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")  # which ends it behind that line
    monkeypatch.setattr("sys.argv", ["generate_trace_model.py", "--runs-folder", str(tmp_path)])
    for said in ("tiny, which is not finished\n", "tiny\n"):
        with pytest.raises(utils.UserError, match="settings and classes"):
            generate_trace_model.main()
        assert capsys.readouterr().out == f"exporting the most recent run: {said}"
        (tmp_path / "tiny/result.json").write_text("{}")


def test_who_reads_an_earlier_export_reads_it_to_its_end(tmp_path: Path) -> None:
    first, second = (
        generate_trace_model.Export("model.onnx", 100_000 * letter, torch.relu, {})
        for letter in (b"1", b"2")
    )
    generate_trace_model.write_export(tmp_path, {"onnx": first}, {}, [])
    with open(tmp_path / "model.onnx", "rb") as model, open(tmp_path / "model.json") as described:
        begun = model.read(1)
        generate_trace_model.write_export(tmp_path, {"onnx": second}, {}, [])
        assert begun + model.read() == first.content
        digest = json.load(described)["formats"]["onnx"]["sha256"]
        assert digest == hashlib.sha256(first.content).hexdigest()
    assert (tmp_path / "model.onnx").read_bytes() == second.content


def test_each_example_is_told_to_be_right_or_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [
        generate_trace_model.Example(Path(f"{label}.jpg"), label, f"{label}.jpg", b"")
        for label in (0, 2)
    ]
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0]])
    generate_trace_model.show_predictions(
        lambda images: images, logits, ["ant", "bee", "cat"], examples
    )
    assert capsys.readouterr().out == (
        "  0.jpg: ant, 78.7 % (right)\n  2.jpg: bee, 78.7 % (wrong: it is cat)\n"
    )


def test_the_last_weights_are_exported_when_asked_for(runs: Path, tmp_path: Path) -> None:
    """In the place of another export, whose examples go; somebody's own stay."""
    examples = tmp_path / "app/examples"
    examples.mkdir(parents=True)
    (tmp_path / "app/model.json").write_text("{}")
    for name in ("0007.png", "0008.jpeg", "mine.png", "2026.06.jpg"):
        (examples / name).touch()
    done = export(
        *(runs, tmp_path, "--name", "tiny", "--weights", "last", "--examples", "2"),
        *("--card-url", "https://example.com/card"),
    )
    assert done.returncode == 0, done.stderr
    metadata = json.loads((tmp_path / "app/model.json").read_text())
    assert (metadata["weights"], metadata["epoch"], metadata["val_top1"]) == ("last", 2, 30)
    weights = runs / "tiny/last.pt"
    assert metadata["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    batch = torch.randn(2, 3, 64, 64)
    session = onnxruntime.InferenceSession(tmp_path / "app/model.onnx")
    (answer,) = session.run(["logits"], {"images": batch.numpy()})
    with torch.inference_mode():
        logits = load_weights(weights, 3).eval()(batch)
    assert (torch.from_numpy(answer) - logits).abs().max() <= 1e-4
    assert metadata["card_url"] == "https://example.com/card" and "code_url" not in metadata
    names = {path.name for path in examples.iterdir()}
    assert {"mine.png", "2026.06.jpg"} < names and len(names) == 4
    assert not {"0007.png", "0008.jpeg"} & names


def test_without_the_validation_images_it_still_exports(runs: Path, tmp_path: Path) -> None:
    (runs / "images").rename(runs / "away")
    try:
        done = export(runs, tmp_path)
    finally:
        (runs / "away").rename(runs / "images")
    assert done.returncode == 0, done.stderr
    assert "no example pictures" in done.stdout
    assert "on 2 pictures of noise" in done.stdout
    assert (tmp_path / "app/model.onnx").exists()
    assert not list((tmp_path / "app/examples").iterdir())


def test_examples_come_from_a_store_too(runs: Path, tmp_path: Path) -> None:
    """What it re-encoded is a JPEG by its old name; what no browser shows becomes a PNG."""
    for part in ("train", "val"):
        for label, (kind, side) in enumerate((("TIFF", 60), ("PNG", 90), ("TIFF", 90))):
            path = tmp_path / "source" / part / f"class_{label}" / f"1.{kind.lower()}"
            path.parent.mkdir(parents=True)
            Image.effect_noise((side, side), 40 + label).convert("RGB").save(path, kind)
    store = tmp_path / "store"
    done = run_stage_command(
        "scripts/prepare_data.py", "pack", tmp_path / "source", store, "--max-side", 80
    )
    assert done.returncode == 0, done.stderr
    config_path = runs / "tiny/config.json"
    content = config_path.read_text()
    record = json.loads(content)
    record["config"]["val_folder_name"] = str(store)
    config_path.write_text(json.dumps(record))
    try:
        done = export(runs, tmp_path)
    finally:
        config_path.write_text(content)
    assert done.returncode == 0, done.stderr
    assert "on 3 validation images" in done.stdout
    assert f"  {store}/val/class_1/1.png: class_" in done.stdout
    images = image_files.open_image_set(str(store), "val")
    for folder in (tmp_path / "app", runs / "tiny/export"):
        paths = sorted((folder / "examples").iterdir())
        assert [path.name for path in paths] == ["0000.png", "0001.jpg", "0002.jpg"]
        formats = [Image.open(path).format for path in paths]
        assert formats == ["PNG", "JPEG", "JPEG"]
        assert (
            Image.open(paths[0]).tobytes()
            == Image.open(tmp_path / "source/val/class_0/1.tiff").tobytes()
        )
        assert [path.read_bytes() for path in paths[1:]] == [
            bytes(images.read(index)[0]) for index in (1, 2)
        ]


def test_an_example_that_cannot_be_read_gives_way_to_the_next(tmp_path: Path) -> None:
    make_images(tmp_path, classes=2, images=2)
    first, second = sorted((tmp_path / "val/class_1").iterdir())
    first.write_bytes(b"no image")
    second.rename(second.with_suffix(".JPEG"))
    classes = ("class_0", "class_1", "class_9")  # the last has no pictures any more
    examples = generate_trace_model.choose_examples(str(tmp_path / "val"), classes, 3)
    assert [(example.label, example.file_name) for example in examples] == [
        (0, "0000.jpg"),
        (1, "0001.jpeg"),
    ]
    assert examples[1].content == second.with_suffix(".JPEG").read_bytes()
    assert generate_trace_model.choose_examples(str(tmp_path / "val"), classes, 0) == []


def test_examples_are_of_the_class_whose_number_they_bear(tmp_path: Path) -> None:
    """Also where the validation images lack a class before it."""
    make_images(tmp_path, classes=2, images=1)
    classes = ("class_0", "class_00", "class_1")
    examples = generate_trace_model.choose_examples(str(tmp_path / "val"), classes, 3)
    assert [(example.label, example.path.parent.name) for example in examples] == [
        *((0, "class_0"), (2, "class_1"))
    ]


def test_examples_are_spaced_from_the_first_class_to_the_last(tmp_path: Path) -> None:
    make_images(tmp_path, classes=5, images=1)
    classes = tuple(f"class_{label}" for label in range(5))
    for count, labels in ((0, []), (1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])):
        examples = generate_trace_model.choose_examples(str(tmp_path / "val"), classes, count)
        assert [example.label for example in examples] == labels


def test_a_class_may_have_any_name_that_a_folder_may_have(runs: Path, tmp_path: Path) -> None:
    """Bytes that are no text, and as long as a file system allows; what is written is text."""
    names = ["caf\udce9", 253 * "x"]
    copy = tmp_path / "runs/tiny"
    shutil.copytree(runs / "tiny", copy, ignore=shutil.ignore_patterns("export"))
    record = json.loads((copy / "config.json").read_text())
    record["config"]["val_folder_name"] = str(tmp_path / "val")
    record["classes"] = [*names, "class_2"]
    (copy / "config.json").write_text(json.dumps(record))
    for label, name in enumerate(names):
        shutil.copytree(runs / f"images/val/class_{label}", tmp_path / "val" / name)
    done = export(copy.parent, tmp_path, "--formats", "torchscript")
    assert done.returncode == 0, done.stderr
    described = json.loads((copy / "export/model.json").read_text())
    assert described["classes"] == record["classes"]
    assert described["labels"] == [r"caf\udce9", 253 * "x", "class_2"]
    examples = sorted(path.name for path in (copy / "export/examples").iterdir())
    assert examples == ["0000.jpg", "0001.jpg"]


def test_unequal_outputs_are_refused_and_nothing_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace_another(model: ResNet50Wrapper, px: int) -> torch.jit.ScriptModule:
        other = ResNet50Wrapper(3).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.model.fc.bias[1] += 1e-4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(other, torch.zeros(1, 3, px, px))

    monkeypatch.setattr(generate_trace_model, "trace", trace_another)
    arguments = ["--runs-folder", str(runs), "--app-folder", str(tmp_path / "app")]
    monkeypatch.setattr("sys.argv", ["generate_trace_model.py", *arguments])
    before = sorted((runs / "tiny").rglob("*"))
    with pytest.raises(utils.UserError, match=r"differ by 0\.0001") as error:
        generate_trace_model.main()
    assert error.value.exit_code == 1
    assert not (tmp_path / "app").exists()
    assert sorted((runs / "tiny").rglob("*")) == before


@pytest.mark.parametrize(
    ("off_alone", "off_together", "said"),
    [(0.0, 0.0, ""), (0.0, float("nan"), "differ by nan"), (1.0, 0.0, "differ by 1")],
)
def test_outputs_that_are_not_numbers_or_wrong_of_a_picture_alone_are_refused(
    off_alone: float, off_together: float, said: str
) -> None:
    def mean(images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def off(images: torch.Tensor) -> torch.Tensor:
        return mean(images) + (off_alone if len(images) == 1 else off_together)

    export = generate_trace_model.Export("model.pt", b"", off, {})
    with pytest.raises(utils.UserError, match=said) if said else contextlib.nullcontext():
        generate_trace_model.compare("torchscript", mean, export, torch.ones(2, 3, 8, 8), True)


@pytest.mark.parametrize(("kind", "share"), [("torchscript", 1e-5), ("pt2", 1e-5), ("onnx", 1e-4)])
@pytest.mark.parametrize("largest", [0.5, 1.0, 20.0])
def test_what_is_allowed_grows_with_logits_above_one(
    kind: str, share: float, largest: float
) -> None:
    images = torch.full((2, 3, 1, 1), -largest)
    for off, is_refused in ((0.8, False), (1.3, True)):
        difference = off * share * max(1.0, largest)
        export = generate_trace_model.Export("", b"", lambda x, by=difference: x + by, {})
        with pytest.raises(utils.UserError) if is_refused else contextlib.nullcontext():
            generate_trace_model.compare(kind, lambda x: x, export, images, True)

"""model.py: torchvision's ResNet-50 and no other, by its table, its weights and its outputs."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import run_stage_command

import checkpoint
import engine
from model import ResNet50Wrapper, human_names, load_weights
from utils import Config


@pytest.mark.parametrize(
    ("options", "first_px", "parameters"),
    [((), 112, "25,557,032"), (("--num-classes", "10", "--side-px", "32"), 16, "23,528,522")],
)
def test_prints_the_table_of_layers(
    options: tuple[str, ...], first_px: int, parameters: str
) -> None:
    done = run_stage_command("model.py", *options, from_nothing=bool(options))
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(r"^ *[A-Za-z0-9]+-(\d+) +(\[.*\]) +([\d,]+)$", done.stdout, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 175))
    assert rows[0][1] == f"[-1, 64, {first_px}, {first_px}]"
    assert f"{sum(int(count.replace(',', '')) for _, _, count in rows):,}" == parameters
    assert f"\nTotal params: {parameters}\n" in done.stdout
    assert f"\nTrainable params: {parameters}\n" in done.stdout


def test_a_picture_without_pixels_is_refused() -> None:
    done = run_stage_command("model.py", "--side-px", 0)
    assert (done.returncode, done.stderr) == (2, "error: side_px is 0: it must be 1 or more\n")


def test_its_weights_are_torchvisions(tmp_path: Path) -> None:
    ours = ResNet50Wrapper().eval()
    torch.save(ours.model.state_dict(), tmp_path / "weights.pt")
    theirs = torchvision.models.resnet50().eval()
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    theirs.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = ours(images)
        assert logits.shape == (2, 1000)
        assert torch.equal(logits, theirs(images))


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    saved = ResNet50Wrapper(num_classes=7).model.state_dict()
    torch.save(saved, tmp_path / "weights.pt")
    loaded = load_weights(tmp_path / "weights.pt", num_classes=7).model.state_dict()
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value) and loaded[name].device.type == "cpu"
    with pytest.raises(ValueError, match="has not the weights of a ResNet-50 with 8 classes"):
        load_weights(tmp_path / "weights.pt", num_classes=8)


@pytest.mark.parametrize("half_life", [0, 3])
def test_weights_of_a_checkpoint_are_those_that_are_kept(tmp_path: Path, half_life: int) -> None:
    config = Config(average_steps=half_life, precision="fp32", device="cpu")
    run = engine.new_run(config, num_classes=7)
    run.model.train()
    engine.train_step(run, torch.zeros((2, 32, 32, 3), dtype=torch.uint8), torch.arange(2), 0.1)
    (tmp_path / "checkpoints").mkdir()
    path = checkpoint.save(tmp_path / "checkpoints", {**run.state(), "config": {}, "images": {}})
    loaded = load_weights(path, num_classes=7).model.state_dict()
    kept, trained = run.kept.model.state_dict(), run.model.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in kept.items())
    assert torch.equal(kept["fc.weight"], trained["fc.weight"]) == (half_life == 0)
    torch.save({"optimizer": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has not the weights of a ResNet-50 with 7 classes"):
        load_weights(tmp_path / "other.pt", num_classes=7)


class Program:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_weights_are_not_run_as_a_program(tmp_path: Path) -> None:
    torch.save({"fc.bias": Program(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="has not the weights of a ResNet-50 with 7 classes"):
        load_weights(tmp_path / "weights.pt", num_classes=7)
    assert not (tmp_path / "ran").exists()


def test_a_bit_that_has_changed_among_the_weights_is_found(tmp_path: Path) -> None:
    """PyTorch would load it."""
    path = tmp_path / "weights.pt"
    torch.save(ResNet50Wrapper(num_classes=7).model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="is damaged: its content is not what was saved"):
        load_weights(path, num_classes=7)


def last_norms(model: ResNet50Wrapper) -> list[torch.Tensor]:
    """Weights of the last BatchNorm of every residual branch."""
    return [value for name, value in model.model.named_parameters() if "bn3.weight" in name]


def test_zero_init_begins_every_residual_branch_at_zero() -> None:
    zero = last_norms(ResNet50Wrapper(zero_init_residual=True))
    usual = last_norms(ResNet50Wrapper())
    assert len(zero) == len(usual) == 16
    assert all((weight == 0).all() for weight in zero)
    assert all((weight == 1).all() for weight in usual)


def test_blurpool_blurs_what_each_strided_convolution_but_the_first_looks_at() -> None:
    """Against torchvision's network, whose inputs a 3×3 filter blurs, in float64; odd sizes too."""
    ours = ResNet50Wrapper(num_classes=5, blurpool=True).double()
    theirs = torchvision.models.resnet50(num_classes=5).double()
    state = ours.model.state_dict()
    with pytest.raises(RuntimeError, match="blurpool"):
        theirs.load_state_dict(state)
    del state["blurpool"]
    theirs.load_state_dict(state)

    weights = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16

    def blur(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        channels = inputs[0].shape[1]
        kernel = weights.expand(channels, 1, 3, 3)
        return torch.nn.functional.conv2d(inputs[0], kernel, padding=1, groups=channels)

    blurred = [
        f"layer{stage}.0.{name}" for stage in (2, 3, 4) for name in ("conv2", "downsample.0")
    ]
    for name in blurred:
        theirs.get_submodule(name).register_forward_pre_hook(blur)
    for px in (64, 65, 96, 100):
        images = torch.randn(2, 3, px, px, dtype=torch.float64)
        torch.testing.assert_close(ours(images), theirs(images))


def test_weights_of_a_network_that_blurs_come_back_as_one(tmp_path: Path) -> None:
    saved = ResNet50Wrapper(num_classes=7, blurpool=True).eval()
    torch.save(saved.model.state_dict(), tmp_path / "weights.pt")
    loaded = load_weights(tmp_path / "weights.pt", num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), saved(images))


def test_labels_are_english_for_imagenets_folders() -> None:
    wnids = tuple(timm.data.ImageNetInfo().label_names())
    assert (len(wnids), wnids[0], wnids[999]) == (1000, "n01440764", "n15075141")
    labels = human_names(wnids)
    assert (labels[0], labels[999]) == ("tench", "toilet tissue")
    for others in ((*wnids[:999], "n15075142"), tuple(f"n{90_000_000 + k}" for k in range(1000))):
        assert human_names(others)[999] == others[999]
    imagenette = ("n01440764", "n02102040", "n03888257")
    assert human_names(imagenette) == [
        "tench",
        "English springer",
        "parachute",
    ]
    assert human_names(("0", "caf\udce9", "café")) == ["0", r"caf\udce9", "café"]

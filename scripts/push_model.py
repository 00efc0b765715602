"""A run's weights on a Hugging Face hub, with a model card, as torchvision and timm load them.

    python3 scripts/push_model.py runs/NAME USER/REPO --dry-run          lists the files, sends none
    python3 scripts/push_model.py runs/NAME USER/REPO --dry-run --to DIR and writes them to DIR
    python3 scripts/push_model.py runs/NAME USER/REPO                    into a private repo
    python3 scripts/push_model.py runs/NAME USER/REPO --public

Reads the run's config.json, metrics.jsonl, weights and, if there, result.json, cost.json or,
where that is newer, sessions.jsonl. The repo, which is made if it is not there, gets in one commit:

    model.safetensors     the weights, float32, under torchvision's names
    config.json           architecture, classes and preprocessing: what
                          timm.create_model("hf-hub:USER/REPO", pretrained=True) reads;
                          it has no network with this BlurPool, and is told so
    README.md             the model card, written from the run
    training_metrics.png  its curves

The token is the one of `hf auth login`, or HF_TOKEN; it has to be allowed to write. A repo that
has files already is asked about first (--yes does not ask), and the visibility of a repo that is
there is never changed. Files that the repo has as they are here are not sent again. What fails
leaves the repo's files as they were, or says that it has not.
"""

import dataclasses
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "gradio_deploy"))

import classifier
import cost_report
import pushing

import sessions
from generate_trace_model import measured_weights
from model import human_names, is_imagenet_1k, is_wordnet_id
from plot_metrics import draw, read_curves
from utils import (
    MEAN,
    RECIPES,
    REMOVE_IT,
    RESULT_SETTINGS,
    STD,
    Config,
    UserError,
    format_duration,
    parse_options,
    read_json,
    read_metrics,
    read_run,
    run_stage,
    total_epochs,
    write_atomically,
)

IMAGENETTE_CLASSES = 10
IMAGENET_IMAGES = 1_281_167, 50_000  # of training and of validation


@dataclasses.dataclass(frozen=True)
class PushOptions:
    """Which run goes where."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """the run's folder, such as runs/NAME"""
    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="USER/REPO")]
    """the model repo, of a user or an organization"""
    weights: Literal["best", "last"] = "best"
    """which weights of the run: those with the best validation top-1, or the last"""
    public: bool = False
    """make the repo public; a new one is private otherwise"""
    dry_run: bool = False
    """list the files with their sizes, and send nothing"""
    to: Path | None = None
    """folder to write the files into as well, a new one or that of an earlier push"""
    yes: bool = False
    """do not ask before a repo that has files already is changed"""


# ------------------------------------------------------------------------------ the files


def make_files(folder: Path, repo: str, weights: str) -> dict[str, bytes]:
    """The repo's files by their names; raises UserError if the run lacks something."""
    run = read_run(folder)
    path = folder / f"{weights}.pt"
    if run is None or not path.exists():
        raise UserError(f"no {path}: name a run's folder, such as runs/NAME, that has weights")
    config, classes, record = run
    for key in ("versions", "hardware"):
        if not isinstance(record.get(key), dict):
            raise UserError(f"{folder / 'config.json'} lacks its {key}: bring back a copy")
    model, _, accuracy = measured_weights(folder, weights, len(classes))
    picture = io.BytesIO()
    draw({folder.resolve().name: read_curves(folder)}, reference=False).savefig(
        picture, format="png"
    )
    about = timm_config(config, list(classes))
    return {
        "README.md": write_card(folder, repo, weights, record, accuracy).encode(),
        # Bytes of names that are no text become JSON's own escapes, which are read as they were.
        "config.json": (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"
        ),
        "model.safetensors": safetensors.torch.save(model.model.state_dict(), {"format": "pt"}),
        "training_metrics.png": picture.getvalue(),
    }


def timm_config(config: Config, classes: list[str]) -> dict[str, Any]:
    """What timm builds the model and its preprocessing from (timm/models/_hub.py).

    timm resizes the shorter side to floor(input size / crop_pct), bilinear by Pillow, and takes the
    centre: as validation does here.
    """
    crop_pct = config.val_px / config.val_resize_px
    if math.floor(config.val_px / crop_pct) < config.val_resize_px:  # rounded the wrong way
        crop_pct = math.nextafter(crop_pct, 0)
    labels = human_names(tuple(classes))
    described = {"label_descriptions": dict(zip(classes, labels, strict=True))}
    return {
        # timm would take its plain network, and whoever asks it for other classes or for features
        # would have these weights unblurred. A name that it does not know ends that.
        "architecture": "resnet50_blurpool" if config.blurpool else "resnet50",
        "num_classes": len(classes),
        "num_features": 2048,
        "global_pool": "avg",
        "label_names": classes,
        **(described if labels != classes else {}),
        "pretrained_cfg": {
            "input_size": [3, config.val_px, config.val_px],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "conv1",
            "classifier": "fc",
            "custom_load": False,
        },
    }


# ------------------------------------------------------------------------------ the card


def data_name(config: Config, classes: list[str], row: dict[str, Any]) -> str:
    """What the pictures are, as far as their classes and their number tell."""
    if is_imagenet_1k(classes):
        whole = (row["train_images"], row["val_images"]) == IMAGENET_IMAGES
        return "ImageNet-1k" if whole else "a part of ImageNet-1k"
    labels = human_names(tuple(classes))
    named = zip(labels, classes, strict=True)
    if all(is_wordnet_id(name) and label != name for label, name in named):
        return "Imagenette" if len(classes) == IMAGENETTE_CLASSES else "a part of Imagenette"
    if config.train_folder_name == RECIPES["quickstart"].config.train_folder_name:
        return "scikit-learn's handwritten digits"
    return "a data set of its own"


def write_card(
    folder: Path, repo: str, weights: str, record: dict[str, Any], accuracy: dict[str, Any]
) -> str:
    """The model card, Markdown under a head of YAML; every number comes from the run's files."""
    config, classes = Config(**record["config"]), record["classes"]
    row = read_metrics(folder / "metrics.jsonl", ("epoch", "train_images", "val_images"))[-1]
    data = data_name(config, classes, row)
    name = folder.resolve().name
    network = "ResNet-50 (v1.5, as in torchvision)"
    use = (
        f"## Use\n\nWith torchvision:\n\n```python\n{torchvision_example(repo, config, classes)}```"
    )
    if config.blurpool:
        network += (
            " with BlurPool: the inputs of its strided convolutions but the first are blurred"
        )
    else:
        use += f"\n\nWith timm:\n\n```python\n{timm_example(repo)}```"
    epochs = row["epoch"], total_epochs(config)
    state = f"{epochs[1]} epochs"
    if epochs[0] < epochs[1]:
        state = f"**unfinished: {epochs[0]} of {epochs[1]} epochs**"
    hardware = record["hardware"]
    machine = hardware.get("gpu") or hardware.get("cpu") or "a machine that was not recorded"
    parts = [
        card_head(name, data, accuracy, config.blurpool),
        f"# {classifier.as_text(name)}",
        f"{network}, trained from scratch on {data}: {state}, on "
        f"{machine}. `model.safetensors` has the weights of epoch {accuracy['epoch']} "
        f"({weights}), in float32 under torchvision's names.",
        results_section(folder, config, weights, accuracy),
        use,
        data_section(data, classes, row),
        recipe_section(config, record),
        *cost_section(folder),
        limits_section(classes),
    ]
    return "\n\n".join(parts) + "\n"


def card_head(name: str, data: str, accuracy: dict[str, Any], blurpool: bool) -> str:
    """What the hub's search and its table of results read; JSON strings are YAML."""
    known = "datasets:\n- imagenet-1k\n" if data == "ImageNet-1k" else ""
    kind = "imagenet-1k" if known else "custom"
    metrics = "".join(
        f"    - type: accuracy\n      name: top-{k} accuracy (%)\n      value: {value:.2f}\n"
        for k, value in ((1, accuracy["val_top1"]), (5, accuracy["val_top5"]))
    )
    library, tag = ("pytorch", "") if blurpool else ("timm", "- timm\n")
    return (
        f"---\nlicense: mit\nlibrary_name: {library}\npipeline_tag: image-classification\n{known}"
        f"tags:\n- image-classification\n{tag}- torchvision\n- resnet50\nmodel-index:\n"
        f"- name: {json.dumps(name)}\n  results:\n  - task:\n      type: image-classification\n"
        f"    dataset:\n      type: {kind}\n      name: {json.dumps(data)}\n"
        f"      split: validation\n    metrics:\n{metrics}---"
    )


def results_section(folder: Path, config: Config, weights: str, accuracy: dict[str, Any]) -> str:
    """The measured accuracy, how it was measured, and the curves."""
    result = read_json(folder / "result.json") or {}
    curves = ""
    if result.get("epoch") == accuracy["epoch"]:
        protocol = result.get("protocol", "not recorded")
        curves = " The curves have the validation after each epoch, in the training's arithmetic."
    else:
        protocol = (
            f"shorter side to {config.val_resize_px} px, centre crop {config.val_px} px, one view, "
            "in the training's arithmetic"
        )
    chosen = " The epoch was chosen by these same images." * (weights == "best")
    return (
        "## Results\n\n| validation images | top-1 | top-5 |\n|---|---|---|\n"
        f"| {accuracy['val_images']:,} | {accuracy['val_top1']:.2f} % | "
        f"{accuracy['val_top5']:.2f} % |\n\n"
        f"Protocol: {protocol}.{chosen}{curves}\n\n"
        "![Loss, accuracy and learning rate](training_metrics.png)"
    )


# BlurPool, for the program in a card, as model.ResNet50Wrapper has it but for a little speed.
BLUR = """\
def blur(convolution, inputs):
    pool = torch.nn.functional.avg_pool2d
    return pool(pool(inputs[0], 2, stride=1, padding=1), 2, stride=1)

model.register_buffer("blurpool", torch.tensor(1))  # the weights have it, to be known by
for stage in (model.layer2, model.layer3, model.layer4):
    for convolution in (stage[0].conv2, stage[0].downsample[0]):
        convolution.register_forward_pre_hook(blur)
"""


def torchvision_example(repo: str, config: Config, classes: list[str]) -> str:
    """A program that classifies photo.jpg with torchvision."""
    return f"""\
import json, safetensors.torch, torch, torchvision
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from torchvision import transforms

prepare = transforms.Compose([
    transforms.Resize({config.val_resize_px}), transforms.CenterCrop({config.val_px}),
    transforms.ToTensor(), transforms.Normalize({list(MEAN)}, {list(STD)}),
])
model = torchvision.models.resnet50(num_classes={len(classes)}).eval()
{BLUR * config.blurpool}weights = hf_hub_download("{repo}", "model.safetensors")
model.load_state_dict(safetensors.torch.load_file(weights))
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
white = Image.new("RGBA", photo.size, "white")  # behind what is transparent
photo = Image.alpha_composite(white, photo).convert("RGB")
logits = model(prepare(photo)[None])
about = json.load(open(hf_hub_download("{repo}", "config.json")))
name = about["label_names"][logits.argmax().item()]
print(about.get("label_descriptions", {{}}).get(name, name))
"""


def timm_example(repo: str) -> str:
    """The same with timm."""
    return f"""\
import timm
from PIL import Image, ImageOps

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
white = Image.new("RGBA", photo.size, "white")  # behind what is transparent
photo = Image.alpha_composite(white, photo).convert("RGB")
logits = model(prepare(photo)[None])
print(model.pretrained_cfg["label_names"][logits.argmax().item()])
"""


def data_section(data: str, classes: list[str], row: dict[str, Any]) -> str:
    """What it was trained and measured on."""
    labels = human_names(tuple(classes))
    some = ", ".join(map(classifier.as_text, labels[:20])) + ", …" * (len(labels) > 20)
    return (
        f"## Data\n\nTrained on {row['train_images']:,} images, measured on {row['val_images']:,} "
        f"others: {data}, {len(classes):,} classes ({some}). `config.json` names them all, in the "
        "order of the outputs."
    )


def recipe_section(config: Config, record: dict[str, Any]) -> str:
    """Every setting that has a part in the result, and the versions."""
    lines = [
        f"| {field.name} | {getattr(config, field.name)} |"
        for field in dataclasses.fields(Config)
        if field.name in RESULT_SETTINGS
    ]
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    precision = record["hardware"].get("precision")
    arithmetic = f" Arithmetic of the step: {precision}." if precision else ""
    commit = f" Code: commit {record['commit']}." if record.get("commit") else ""
    optimizer = {"sgd": "SGD with momentum", "muon": "Muon"}[config.optimizer]
    annealing = {"cos": "cosine", "linear": "linear"}[config.anneal_strategy]
    loss = {"cross_entropy": "cross-entropy", "bce": "binary cross-entropy"}[config.loss]
    return (
        f"## Recipe\n\n{optimizer}, OneCycle with {annealing} annealing, {loss}; training "
        "crops of random place, size and aspect.\n\n| setting | value |\n|---|---|\n"
        + "\n".join(lines)
        + f"\n\n{used}.{arithmetic}{commit}"
    )


def cost_section(folder: Path) -> list[str]:
    """Hours and dollars, from cost.json, or from sessions.jsonl if that is newer; else nothing."""
    path, lines = folder / "cost.json", sessions.read(folder)
    summary = read_json(path)
    if lines and (
        summary is None or path.stat().st_mtime < (folder / sessions.FILE).stat().st_mtime
    ):
        rows = read_metrics(folder / "metrics.jsonl", cost_report.FIELDS)
        summary = cost_report.summarize(lines, rows, None, time.time())
    if summary is None:
        return []
    try:
        stops = sum(summary["interruptions"].values())
        text = (
            f"{format_duration(summary['running_s'])} with a machine, {stops} "
            f"interruption{'s' * (stops != 1)}"
        )
        if summary["usd"]:
            text += f", {cost_report.dollars(summary['usd'])} for the machine"
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not what scripts/cost_report.py writes: {REMOVE_IT}") from None
    return [f"## Cost\n\n{text}."]


def limits_section(classes: list[str]) -> str:
    """What the model is not to be trusted with, and whose the data are."""
    is_imagenet = all(map(is_wordnet_id, classes))
    images = (
        "The images are ImageNet's, whose terms allow research and teaching without commerce; "
        "whether they bind who uses the weights is not for this card to say."
        if is_imagenet
        else "The images' own licence is not known to this card."
    )
    return (
        f"## Limits\n\nIt answers with one of its {len(classes):,} classes whatever the picture "
        "shows. Its probabilities have not been calibrated. It was measured on pictures from the "
        "source that it was trained on, and nowhere else: others, such as drawings, other cameras "
        "or other countries, may go worse. It is no ground for decisions about people.\n\n"
        f"## Licence\n\nThe weights are given under the MIT licence. {images}"
    )


# ------------------------------------------------------------------------------ the command


def _check_folder(folder: Path) -> None:
    """Raise UserError where files of another kind, such as a run's own, would be overwritten."""
    if not folder.exists():
        return
    try:  # what an earlier push wrote there may be written anew
        ours = not any(folder.iterdir()) or "architecture" in read_json(folder / "config.json")
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--to {folder} holds other files: name a new folder")


def main() -> None:
    """Make the files, list them, and send them."""
    options = parse_options(PushOptions, __doc__)
    pushing.check_repo(options.repo)
    if options.to:
        _check_folder(options.to)
    files = make_files(options.folder, options.repo, options.weights)
    pushing.list_files(files)
    if options.to:
        options.to.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(options.to / name, content)
        print(f"written to {options.to}")
    if options.dry_run:
        print(f"dry run: nothing was sent to {options.repo}")
        return
    message = f"ResNet-50, run {options.folder.resolve().name}"
    print(pushing.push(files, options.repo, message, public=options.public, yes=options.yes))


if __name__ == "__main__":
    run_stage(main)

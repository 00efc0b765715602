"""What every stage shares: settings, recipes, the run's folder, the log, how errors end.

Nothing here imports torch, so that a mistake on the command line is answered at once.
A stage is started with `python3 STAGE.py`, takes every field of `Config` as an option, and
leaves its results in `runs/<name>/`:

    config.json    the settings, beside the versions, the commit and the hardware they ran on
    train.log      what the trainer printed
    metrics.jsonl  one line an epoch
"""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import tyro

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Channel means and standard deviations of ImageNet's training images, on a scale of 0 to 1: what
# every ResNet-50 of torchvision and timm expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PX_STEP = 32  # ResNet-50 halves a picture five times

# Exit codes of a stage; also in the README.
EXIT_FAILED = 1  # training itself went wrong, for example a loss that is not a number
EXIT_USER_ERROR = 2  # nothing was started: a setting, a folder or an image is wrong
EXIT_INTERRUPTED = 75  # stopped by a signal with everything saved; the same command goes on
EXIT_BUDGET = 76  # the budget is spent, everything is saved; only a higher one goes on
EXIT_NOT_COPIED = 77  # finished, but the mirror lacks something; the same command completes it
EXIT_NO_MIRROR = 78  # not begun, since the mirror does not answer; the same command asks again
REMOVE_IT = "remove it, and run the command that wrote it again"  # what can be written again

# How pictures look: Okabe and Ito's palette without its yellow and black, told apart by the
# colour-blind too, and settings of matplotlib.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
STYLE = {
    "font.size": 13,  # 27 px in a picture of curves, and 13 where a README shows it 900 px wide
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}

# In a run's folder: it is a copy of the run on a rented machine, and may be copied over again.
FETCHED = ".fetched"

# System errors that a user can mend: a disk that is full or not theirs to write to, and a file or a
# name in the place of a folder.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
USERS_TO_MEND = {
    *FULL_DISK,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}

log = logging.getLogger("resnet50")


class UserError(Exception):
    """A mistake that its user can mend; the text is one clear line saying what, where and how."""

    def __init__(self, text: str, exit_code: int = EXIT_USER_ERROR) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the reference run's: 75.32 % top-1 in 50 epochs."""

    recipe: Literal["reference", "fast", "accurate", "quickstart"] = "reference"
    """the named set of defaults that the other options change"""
    name: str = "resnet50_imagenet_1k_onecycleLr"
    """the run's name and its folder under runs_folder; the same name again resumes it"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    train_folder_name: str = "/mnt/data/imagenetdata/train"
    """training images: a folder with a folder a class, or a store"""
    val_folder_name: str = "/mnt/data/imagenetdata/val"
    """validation images of the same classes: a folder, or a store"""
    epochs: int = 50
    """passes over the training images"""
    extra_epochs: int = 0
    """more epochs once these have ended, as a second, shorter OneCycle: extends a finished run"""
    batch_size: int = 448
    """images in a training step, over all processes"""
    micro_batch_size: int = 0
    """most images that a process computes at once, its share of a batch then in equal parts whose
    gradients are added up; 0: the whole share"""
    sync_batchnorm: bool = False
    """where several processes share a batch, normalise by the statistics of all its images that are
    computed at once, not by each process's own"""
    val_batch_size: int = 512
    """images in a batch of validation; the counts do not depend on it"""
    max_lr: float = 0.175
    """peak of the OneCycle learning rate, which goes with batch_size, whatever the number of
    processes; 0.175 made the reference run's table"""
    max_lr_from_finder: bool = False
    """take max_lr from the run's lr_finder.json"""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd; muon: SGD with Nesterov momentum, whose steps are orthogonalised but for BatchNorm's and
    biases'"""
    momentum: float = 0.9
    """momentum of the optimizer"""
    weight_decay: float = 1e-4
    """L2 penalty; with muon decoupled from the momentum, for all weights alike"""
    decay_norm_and_bias: bool = True
    """apply weight_decay to BatchNorm's parameters and to biases too"""
    norm_and_bias_lr: float = 1.0
    """learning rate of BatchNorm's parameters and of biases, over that of the other weights"""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """what training minimises, its loss in log and curves: cross entropy over the classes, which is
    validation's in any case; bce: of each class by itself, as present or not, with the last biases
    at first such that their probabilities add up to 1"""
    label_smoothing: float = 0.0
    """share of the target that is spread evenly over all classes, 0 to 1"""
    average_steps: float = 0.0
    """half-life, in steps, of the moving average of the weights that is validated and kept; 0: the
    weights themselves"""
    pct_start: float = 0.3
    """share of the steps in which the learning rate rises, 0 to 1"""
    div_factor: float = 25.0
    """max_lr over the first learning rate"""
    final_div_factor: float = 1e4
    """the first learning rate over the last"""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """shape of its rise and of its fall: half a cosine, or straight lines"""
    train_px: int = 224
    """side of a training crop, in pixels; where the size grows, that of the last epochs"""
    first_train_px: int = 0
    """side of a training crop in the first epochs, a multiple of 32, from which it grows to
    train_px; 0: train_px throughout"""
    px_ramp_start: float = 0.35
    """how far into the epochs the size begins to grow: 0 is the first of them, 1 the last"""
    px_ramp_end: float = 0.85
    """how far into the epochs it has reached train_px"""
    val_px: int = 224
    """side of a validation crop, in pixels"""
    val_resize_px: int = 256
    """shorter side that a validation image is resized to before the crop, in pixels"""
    crop_min_scale: float = 0.08
    """smallest share of an image's area that a training crop covers, 0 to 1"""
    flip: bool = True
    """mirror half of the training images"""
    trivial_augment: bool = False
    """change each training crop by one of 14 operations, drawn with its strength: TrivialAugment"""
    erase_probability: float = 0.0
    """share of the training crops, 0 to 1, in which a rectangle of 2 to 33 % of the area is painted
    over with ImageNet's mean colour: random erasing"""
    mixup_alpha: float = 0.0
    """blend pairs of training images and their labels, by shares drawn from Beta(alpha, alpha) for
    each batch: MixUp; training accuracy then counts the label with the larger share; 0: never"""
    cutmix_alpha: float = 0.0
    """the same with a rectangle of the other image in place of the blend: CutMix; with both above
    0, each batch has one of them, with equal chance; 0: never"""
    zero_init_residual: bool = False
    """start every residual branch at zero, so that deep blocks begin as the identity"""
    blurpool: bool = False
    """blur what each strided convolution but the first looks at: BlurPool; the weights are not
    those of a plain ResNet-50, which refuses them where it loads strictly"""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """arithmetic of the step; auto: fp16 with loss scaling on a GPU, bf16 on a CPU that has it in
    hardware, else fp32, whose convolutions are in TF32 on a GPU that has it"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where the model runs; auto: the GPU if there is one"""
    compile: bool = False
    """train the model through torch.compile, which needs a C++ compiler and time at each start"""
    seed: int = 0
    """seed of the first weights, and of all that is random about the images"""
    workers: int = 12
    """threads that decode images, in each process; 0 decodes in the training thread"""
    skip_bad_images: bool = False
    """decode every image before the first epoch and leave out those that cannot be read"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints inside an epoch; 0 saves after every step"""
    mirror: str = ""
    """where checkpoints are copied to as well, and fetched from where there are none here:
    s3://bucket/prefix, hf://datasets/user/repo, hf://user/repo or file:///folder"""
    log_interval_s: float = 10.0
    """seconds between two progress lines"""
    price_per_hour: float = 0.97
    """US dollars an hour of the machine, or of all machines of the run together, for the price in
    the progress line; 0 leaves it out"""
    budget_usd: float = 0.0
    """US dollars at which the run stops with everything saved; 0: no budget"""
    tensorboard: bool = False
    """write TensorBoard logs into the run's folder too"""


# Settings that change the result, which a resumed run must not; the next list has all others.
RESULT_SETTINGS = frozenset(
    {
        *("epochs", "extra_epochs", "batch_size", "max_lr", "momentum", "weight_decay"),
        *("optimizer", "decay_norm_and_bias", "norm_and_bias_lr", "label_smoothing"),
        *("pct_start", "div_factor", "final_div_factor", "anneal_strategy", "sync_batchnorm"),
        *("train_px", "first_train_px", "px_ramp_start", "px_ramp_end", "val_px", "val_resize_px"),
        *("average_steps", "crop_min_scale", "flip", "trivial_augment", "erase_probability"),
        *("mixup_alpha", "cutmix_alpha", "zero_init_residual", "blurpool", "precision", "seed"),
        *("loss", "skip_bad_images"),
    }
)

# Settings that a resumed run may change: they do not touch what the model learns, but that another
# device, or compiled code, adds up in another order, and `auto` may choose another precision there.
# Where the images lie is among them, since which images they are is compared by itself. So is
# micro_batch_size, which goes with the number of processes: after a change of either, BatchNorm may
# see other images together.
FREE_SETTINGS = frozenset(
    {
        "recipe",
        "name",
        "runs_folder",
        "train_folder_name",
        "val_folder_name",
        "max_lr_from_finder",
        "val_batch_size",
        "micro_batch_size",
        "device",
        "compile",
        "workers",
        "checkpoint_minutes",
        "mirror",
        "log_interval_s",
        "price_per_hour",
        "budget_usd",
        "tensorboard",
    }
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named set of settings, with what is claimed of it and why anyone may believe that."""

    config: Config
    claim: str
    source: str
    """where the settings come from"""
    run: str
    """the run of this code that supports the claim; empty while it is a target"""
    published_by: str = ""
    """who published accuracies of runs like it"""
    published: tuple[tuple[int, float], ...] = ()
    """their ImageNet top-1 in percent after so many epochs, in growing order"""


FFCV = (
    "libffcv/ffcv-imagenet, rn50 with BlurPool and label smoothing: crops of 160 to 192 px, "
    "validated at 256 px, flip-averaged"
)
FFCV_TOP1 = ((16, 73.8), (24, 75.6), (32, 76.6), (40, 77.2), (56, 78.0), (88, 78.4))

# Its plan: crops that grow, BlurPool, a learning rate that falls in a line. What differs are
# orthogonalised steps, BatchNorm's learning rate, its decay and larger crops, for which the trials
# on Imagenette speak, and label smoothing, for which they do not: it is left out.
FAST = Config(
    recipe="fast",
    name="resnet50_imagenet_1k_fast",
    epochs=24,
    batch_size=512,
    max_lr=0.05,
    pct_start=0.2,
    anneal_strategy="linear",
    optimizer="muon",
    weight_decay=0.01,
    norm_and_bias_lr=16.0,
    train_px=192,
    first_train_px=128,
    crop_min_scale=0.35,
    zero_init_residual=True,
    blurpool=True,
    price_per_hour=0.40,
)

RECIPES = {
    "reference": Recipe(
        Config(),
        claim="75.32 % top-1 and 92.59 % top-5 in 50 epochs on a g5.8xlarge spot instance, $26.41",
        source="the published run that this project reproduces",
        run="",
        published_by="the published run itself",
        published=((50, 75.32),),
    ),
    "fast": Recipe(
        FAST,
        claim="75.3 % top-1 for a tenth of the reference's price, on a g5.xlarge",
        source="libffcv/ffcv-imagenet, but for optimizer, rates, decay, smoothing and crops",
        run="",
        published_by=FFCV,
        published=FFCV_TOP1,
    ),
    # More epochs bear more augmentation. The crops of training stay smaller than those of
    # validation, in which objects would else look smaller (Touvron et al., arXiv 1906.06423).
    "accurate": Recipe(
        dataclasses.replace(
            FAST,
            recipe="accurate",
            name="resnet50_imagenet_1k_accurate",
            epochs=56,
            label_smoothing=0.1,
            average_steps=100.0,
            crop_min_scale=0.25,
            mixup_alpha=0.2,
            cutmix_alpha=1.0,
            erase_probability=0.1,
            trivial_augment=True,
        ),
        claim="78 % top-1 for a quarter of the reference's price, on a g5.xlarge",
        source="fast, with augmentation, smoothing and averaging of torchvision's newer recipe",
        run="",
        published_by=FFCV,
        published=FFCV_TOP1,
    ),
    # A digit fills its picture and is not its own mirror image: hence large crops and no flips.
    "quickstart": Recipe(
        Config(
            recipe="quickstart",
            name="quickstart",
            train_folder_name="data/digits/train",
            val_folder_name="data/digits/val",
            epochs=8,
            batch_size=32,
            val_batch_size=64,
            max_lr=0.03,
            weight_decay=5e-4,
            train_px=48,
            val_px=48,
            val_resize_px=48,
            crop_min_scale=0.8,
            flip=False,
            zero_init_residual=True,
            workers=2,
            price_per_hour=0.0,
        ),
        claim="97 % top-1 on the embedded digits, the whole path in minutes on two CPU cores",
        source="this project",
        run="benchmarks/quickstart",
    ),
}


@dataclasses.dataclass(frozen=True)
class DeploymentConfig:
    """What `generate_trace_model.py` exports, and where to."""

    name: str = ""
    """the run to export; the most recent one if empty"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    weights: Literal["best", "last"] = "best"
    """which weights of the run: those with the best validation top-1, or the last"""
    app_folder: str = "gradio_deploy"
    """folder of the app, which gets a copy of the exported files"""
    formats: tuple[Literal["torchscript", "onnx", "pt2"], ...] = ("torchscript", "onnx")
    """files to write: TorchScript, ONNX, torch.export's .pt2; app and AWS Lambda read ONNX"""
    examples: int = 6
    """validation images to check the export on and to offer in the app as examples"""
    card_url: str = ""
    """address of the model's card, which the app links to"""
    code_url: str = ""
    """address of the code that trained it, which the app links to"""


# ------------------------------------------------------------------------------ command line

# The type of a stage's field `config`: its settings become options of the stage itself.
ConfigOptions = tyro.conf.OmitArgPrefixes[Config]
Options = TypeVar("Options")


def parse_options(
    options_class: type[Options], description: str = "", arguments: Sequence[str] | None = None
) -> Options:
    """The command line as an instance of a dataclass: an option a field, its docstring the help.

    Where the class has a field `config: Config`, `--recipe NAME` chooses the defaults. A value of
    the wrong type or an unknown option ends the program with one line and exit code 2.
    """
    words = sys.argv[1:] if arguments is None else arguments
    # Names may be typed as they stand in Config (--max_lr) or as is usual (--max-lr).
    keywords: dict[str, Any] = {"description": description, "args": arguments}
    if "config" in {field.name for field in dataclasses.fields(options_class)}:
        keywords["default"] = options_class(config=RECIPES[_recipe_named(words)].config)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options_class, **keywords)
    except SystemExit as stop:
        if stop.code:
            raise UserError(_one_line(complaint.getvalue())) from None
        raise


def _recipe_named(arguments: list[str]) -> str:
    """The recipe that the command line asks for last; a wrong name is left for tyro to refuse."""
    recipe = "reference"
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--recipe":
            recipe = value if equals else "".join(arguments[position + 1 : position + 2])
    return recipe if recipe in RECIPES else "reference"


def lr_settings(config: Config) -> dict[str, Any]:
    """The settings that the best learning rate depends on most."""
    names = ("batch_size", "optimizer", "loss", "norm_and_bias_lr")
    return {"train_px": train_px(config, epoch=0)} | {name: getattr(config, name) for name in names}


def as_arguments(config: Config) -> list[str]:
    """The arguments that give a stage these settings: the recipe, and what differs from it."""
    default = RECIPES[config.recipe].config
    arguments = [f"--recipe={config.recipe}"]
    for field in dataclasses.fields(Config):
        value, option = getattr(config, field.name), field.name.replace("_", "-")
        if value == getattr(default, field.name):
            continue
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments.append(f"--{option}={value}")
    return arguments


def _one_line(box: str) -> str:
    """tyro's framed complaint without the frame, up to the first rule below the message."""
    # The frame is in ASCII, with a rule below the title, where the output is not in UTF-8.
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        is_rule = line and not line.strip("─-")
        if is_rule and message:
            break
        if not is_rule:
            message.append(line)
    script = os.path.relpath(sys.argv[0])
    if script.startswith(".."):
        script = sys.argv[0]
    return f"{' '.join(message).strip()} (python3 {script} --help lists the options)"


def check_config(config: Config) -> None:
    """Refuse settings that no run could use; raises UserError naming the field and its value."""
    positive = ("epochs", "batch_size", "val_batch_size", "max_lr", "norm_and_bias_lr")
    more = ("div_factor", "final_div_factor", "log_interval_s")
    for field in (*positive, *more, "train_px", "val_px"):
        value = getattr(config, field)
        if not 0 < value < math.inf:
            raise UserError(f"{field} is {value}: it must be above 0")
    if config.batch_size == 1:
        raise UserError("batch_size is 1: it must be 2 or more, for BatchNorm's statistics")
    not_negative = ("extra_epochs", "momentum", "weight_decay", "workers", "checkpoint_minutes")
    more = ("label_smoothing", "micro_batch_size", "average_steps", "price_per_hour", "budget_usd")
    for field in (*not_negative, *more, "erase_probability", "mixup_alpha", "cutmix_alpha"):
        value = getattr(config, field)
        if not 0 <= value < math.inf:
            raise UserError(f"{field} is {value}: it must be 0 or more")
    if not 0 < config.pct_start < 1:
        raise UserError(f"pct_start is {config.pct_start}: it must lie between 0 and 1")
    for field in ("momentum", "label_smoothing"):
        if getattr(config, field) >= 1:
            raise UserError(f"{field} is {getattr(config, field)}: it must be below 1")
    if config.erase_probability > 1:
        raise UserError(f"erase_probability is {config.erase_probability}: it must be at most 1")
    if not 0 < config.crop_min_scale <= 1:
        raise UserError(f"crop_min_scale is {config.crop_min_scale}: it must be above 0, at most 1")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}: it must be 0 or more, below 2^63")
    _check_choices(config)
    _check_px(config)
    _check_budget(config)
    run_folder(config.runs_folder, config.name)


def changed_settings(
    before: Mapping[str, Any], config: Config, names: Collection[str]
) -> list[str]:
    """In words, each of the named settings that is not as before.

    What that lacks is newer, and was as by default: which changes nothing in a run.
    """
    before = {**dataclasses.asdict(Config()), **before}
    return [
        f"{name} was {before[name]}, is {value}"
        for name, value in dataclasses.asdict(config).items()
        if name in names and before[name] != value
    ]


def _check_choices(config: Config) -> None:
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        if choices and value not in choices:
            raise UserError(f"{field.name} is {value!r}: it must be one of {', '.join(choices)}")


def _check_px(config: Config) -> None:
    first_px = config.first_train_px
    if first_px % PX_STEP or not 0 <= first_px <= config.train_px:
        raise UserError(
            f"first_train_px is {first_px}: it must be 0, or a multiple of {PX_STEP} that is at "
            f"most train_px, {config.train_px}"
        )
    if not 0 <= config.px_ramp_start < config.px_ramp_end <= 1:
        raise UserError(
            f"px_ramp_start is {config.px_ramp_start} and px_ramp_end {config.px_ramp_end}: they "
            "must lie between 0 and 1, the start below the end"
        )
    if config.val_resize_px < config.val_px:
        raise UserError(
            f"val_resize_px is {config.val_resize_px}: it must be at least val_px, {config.val_px}"
        )


def _check_budget(config: Config) -> None:
    if config.budget_usd and not config.price_per_hour:
        raise UserError(
            f"budget_usd is {config.budget_usd} and price_per_hour 0: give --price-per-hour, by "
            "which the price is counted"
        )


def run_stage(main: Callable[[], None]) -> None:
    """Call a stage's main; a mistake of its user ends it with one line on stderr, no traceback."""
    if sys.stdout is None:  # it was closed before the start
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    # For names that are no UTF-8, and where the terminal's encoding lacks their letters.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # What is left of the output would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end("nobody reads this output any more", EXIT_FAILED)
    except OSError as error:
        if error.errno not in USERS_TO_MEND:
            raise
        advice = ": make room, and give the same command again" * (error.errno in FULL_DISK)
        _end(f"{error.filename or 'the disk'}: {error.strerror}{advice}", EXIT_USER_ERROR)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # PyTorch's
            _end(
                "there is too little main memory: use smaller batches or pictures (--batch-size, "
                "--val-batch-size, --train-px, --val-px), or end what else runs on the machine",
                EXIT_USER_ERROR,
            )
        if not is_out_of_memory(error):
            raise
        _end(
            "the GPU has too little memory: use a smaller --micro-batch-size, --batch-size, "
            "--val-batch-size or --train-px, or end what else runs on it (see nvidia-smi)",
            EXIT_USER_ERROR,
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU had too little memory, by PyTorch's own class or in its libraries' words.

    Where all of cuDNN's ways to compute a convolution need more than is left, it finds no engine.
    """
    words = ("out of memory", "unable to find an engine", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError"  # PyTorch is not imported here
        or any(some in str(error) for some in words)
    )


def _end(text: str, exit_code: int) -> None:
    if text:  # else another process of the run says it
        _say_error(text)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # of torchrun's, see distributed.py
        end_at_once(exit_code)
    sys.exit(exit_code)


def end_at_once(exit_code: int) -> None:
    """End this process without what is registered for its end."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(exit_code)


def _say_error(text: str) -> None:
    line = f"error: {' '.join(text.split())}"
    with contextlib.suppress(OSError):  # a full disk may hold this output too
        print(line, file=sys.stderr, flush=True)
    for handler in log.handlers:  # the run's train.log, if it is open, tells the end too
        if isinstance(handler, logging.FileHandler):
            with contextlib.suppress(OSError):
                handler.stream.write(line + "\n")
                handler.flush()


# ------------------------------------------------------------------------------ the run's folder


def run_folder(runs_folder: str, name: str) -> Path:
    """`runs_folder/name`, not created; raises UserError for a name that would lead elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise UserError(
            f"{name!r} is no name for a run: use up to 100 letters, digits, dots, dashes and "
            "underscores, not beginning with a dot or a dash"
        )
    return Path(runs_folder) / name


def shortened(name: str) -> str:
    """As much of a run's name as a picture's title has room for."""
    return name if len(name) <= 60 else f"{name[:59]}…"


def check_writable(folder: Path, option: str) -> Path:
    """Try to write where a folder is or will be made; raises UserError naming the option to change.

    Returns the nearest folder that is there already, and leaves nothing in it.
    """
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            return existing
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}: choose another {option}"
        ) from None


def latest_run(runs_folder: str) -> str:
    """Name of the run that was started last; raises UserError if there is none."""
    configs = sorted(Path(runs_folder).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UserError(f"no run in {runs_folder}/ yet: start one with python3 trainer.py")
    return configs[-1].parent.name


def stale_export(folder: Path, export: dict[str, Any]) -> str:
    """A complaint if a run's weights are others than those that model.json says were exported.

    Empty too where either is not known.
    """
    weights, sha256 = folder / f"{export.get('weights')}.pt", export.get("weights_sha256")
    if not sha256 or not weights.is_file():
        return ""
    if hashlib.sha256(weights.read_bytes()).hexdigest() == sha256:
        return ""
    options = f"--name {folder.name} --weights {export['weights']}"
    return f"{weights} is not what was exported: python3 generate_trace_model.py {options}"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a crash leaves either the old or the new content, on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise OSError(error.errno, error.strerror, str(path)) from error
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_png(figure: "Figure", path: Path) -> None:
    """Write the picture whole or not at all; raises UserError if it cannot be written there."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    try:
        write_atomically(path, png.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl: a JSON object a line, an epoch a line, always the whole file.

    The rows live in the checkpoint; writing them all each time keeps the file free of half lines,
    holes and repeats whatever interrupted the run before.
    """
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_metrics(path: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, in order of epochs, all of which have a number in these fields.

    Only a loss may be beyond all numbers, or none. Raises UserError naming the line that is wrong.
    """
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: bring back a copy")
        for field in fields:
            value = row.get(field)
            if not (is_number(value) or (field.endswith("loss") and isinstance(value, float))):
                raise UserError(
                    f"{path}, line {number}: {field} is missing or not a number: bring back a copy"
                )
        rows.append(row)
    return rows


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number, and no integer beyond those of a float."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def read_json(path: Path, advice: str = REMOVE_IT) -> Any:
    """The value in a JSON file, None if there is no such file; UserError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:  # bytes that are no text are one too
        raise UserError(f"{path} is damaged: {advice}") from None


def read_run(folder: Path) -> tuple[Config, tuple[str, ...], dict[str, Any]] | None:
    """Settings, classes and the whole of a run's config.json; None if there is none.

    Raises UserError if it is damaged, or of no run that this code knows.
    """
    path = folder / "config.json"
    record = read_json(path)
    if record is None:
        return None
    try:
        config, classes = Config(**record["config"]), tuple(record["classes"])
        check_config(config)
        "".join(classes)  # all are text
    except (KeyError, TypeError):
        raise UserError(
            f"{path} has not the settings and classes of a run: bring back a copy"
        ) from None
    return config, classes, record


def save_config(
    folder: Path, config: Config, classes: Sequence[str], hardware: dict[str, Any]
) -> None:
    """Write config.json: settings, classes in the order of the outputs, versions, hardware."""
    record = {
        "config": dataclasses.asdict(config),
        "classes": list(classes),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "config.json", record)


def versions(more_packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    packages = ("torch", "torchvision", "numpy", "simplejpeg", "opencv-python-headless", "pillow")
    found = {"python": platform.python_version()}
    for package in (*packages, "zlib-ng", *more_packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe_computer() -> dict[str, Any]:
    """What the CPU is called, its cores that this process may use, and the memory in bytes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def commit() -> str:
    """The commit of this checkout, `-dirty` where files differ from it; empty outside git."""
    with contextlib.suppress(OSError):
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        return answer.stdout.strip()
    return ""


def on_terminal() -> bool:
    """Whether a bar can be drawn: on a terminal that is there, and says how wide it is."""
    with contextlib.suppress(OSError):
        return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
    return False


def write_nowhere(descriptor: int) -> None:
    """Let what is written there go nowhere from now on, since nobody can read it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _Screen(logging.StreamHandler):
    """The screen, until nobody reads it any more; what is said still goes into the log file."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        write_nowhere(self.stream.fileno())


def start_log(path: Path | None) -> None:
    """Send the log to the screen and, where a path is given, to the end of that file."""
    log.setLevel(logging.DEBUG)
    handlers: list[logging.Handler] = [_Screen(sys.stdout)]
    # Lines of progress are debug messages: a terminal shows a bar in their place.
    handlers[0].setLevel(logging.INFO if on_terminal() else logging.DEBUG)
    if path is not None:
        # As run_stage sets the screen: a picture's name may be no UTF-8.
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = handlers


# ------------------------------------------------------------------------------ small arithmetic


def total_epochs(config: Config) -> int:
    """Epochs after which the run is finished."""
    return config.epochs + config.extra_epochs


def steps_per_epoch(config: Config, images: Sized) -> int:
    """Optimizer steps in an epoch of these images; the last one may have a smaller batch."""
    return math.ceil(len(images) / config.batch_size)


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0 over the whole run.

    A function of the step alone: nothing to save, and nothing for a resumed run to get wrong.
    Past the last step it stays where it ended. Extra epochs are a OneCycle of their own.
    """
    total_steps = config.epochs * steps_per_epoch
    if config.extra_epochs and step >= total_steps:
        return one_cycle(config, step - total_steps, config.extra_epochs * steps_per_epoch)
    return one_cycle(config, step, total_steps)


def train_px(config: Config, epoch: int) -> int:
    """Side in pixels of the training crops of epoch `epoch`, counted from 0.

    From first_train_px it grows in a straight line, in multiples of 32, to train_px, which the last
    epoch has in any case (progressive resizing, as in FFCV's recipes). Like the learning rate it is
    a function of nothing but the epoch. Extra epochs stay at train_px.
    """
    first, last = config.first_train_px, config.train_px
    if not first or epoch >= config.epochs - 1:
        return last
    start, end = config.px_ramp_start, config.px_ramp_end
    done = (epoch / (config.epochs - 1) - start) / (end - start)
    if done >= 1:
        return last
    px = first + max(0.0, done) * (last - first)
    return min(last, PX_STEP * math.floor(px / PX_STEP + 0.5))


def one_cycle(config: Config, step: int, total_steps: int) -> float:
    """OneCycle (Smith and Topin, arXiv 1708.07120).

    It rises from max_lr / div_factor to max_lr over pct_start of the steps, then falls to
    max_lr / div_factor / final_div_factor at the last step, as torch.optim.lr_scheduler.OneCycleLR
    has it; the momentum stays as it is.
    """
    first = config.max_lr / config.div_factor
    last = first / config.final_div_factor
    peak_step = config.pct_start * total_steps - 1
    step = min(step, total_steps - 1)
    if step < peak_step:
        start, end, done = first, config.max_lr, step / peak_step
    else:
        start, end = config.max_lr, last
        done = (step - peak_step) / (total_steps - 1 - peak_step)
    left = 1 - done if config.anneal_strategy == "linear" else (1 + math.cos(math.pi * done)) / 2
    return end + (start - end) * left


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch or step; elsewhere, do nothing.

    By itself it gives large blocks back to the system, which fills them with zeros again, page by
    page, for each picture that is decoded and at every step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: `41 s`, `7 min 5 s`, `14 h 20 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"

"""ResNet-50, as every stage uses it.

python3 model.py        prints the layer table at 3x224x224: 174 rows, 25,557,032 parameters
"""

import dataclasses
import errno
import hashlib
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torchsummary

from utils import UserError, parse_options, run_stage

# Of the names of ImageNet-1k's 1,000 folders, sorted, a line feed between them.
IMAGENET_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class ResNet50Wrapper(torch.nn.Module):
    """torchvision's ResNet-50 (v1.5: the stride sits in the 3x3 convolution), held as `.model`.

    Input (N, 3, H, W) normalised with ImageNet's mean and deviation; output (N, num_classes)
    logits. He et al., arXiv 1512.03385. With zero_init_residual the last BatchNorm of every
    residual branch starts at zero (Goyal et al., arXiv 1706.02677). With blurpool the input of each
    strided convolution but the first is blurred, as in FFCV's recipe (after Zhang, arXiv
    1904.11486, who blurs what a convolution of stride 1 gives, and maximum pooling too).
    """

    def __init__(
        self, num_classes: int = 1000, zero_init_residual: bool = False, blurpool: bool = False
    ) -> None:
        super().__init__()
        import torchvision  # takes a second or more, in which a mistake is answered already

        self.model = torchvision.models.resnet50(
            num_classes=num_classes, zero_init_residual=zero_init_residual
        )
        if blurpool:
            self._blur_before_strides()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        return self.model(images)

    def _blur_before_strides(self) -> None:
        # Among the weights, so that nobody takes them for those of a network that does not blur.
        self.model.register_buffer("blurpool", torch.tensor(1))
        for module in self.model.modules():
            if module is not self.model.conv1 and getattr(module, "stride", None) == (2, 2):
                module.register_forward_pre_hook(_blur)
                if module.kernel_size[0] == 1:  # what is blurred and not looked at need not be
                    module.stride = (1, 1)


def _blur(convolution: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """(N, C, H, W) → each place's 3×3 neighbours in the mean, weighted 1-2-1 both ways.

    As two means over 2×2, with zeros around. For a 1×1 convolution of every second place only.
    """
    (images,) = inputs
    corners = torch.nn.functional.avg_pool2d(images, 2, stride=1, padding=1)
    stride = 2 if convolution.kernel_size[0] == 1 else 1
    return torch.nn.functional.avg_pool2d(corners, 2, stride=stride)


def names_in(path: Path, check: bool = False) -> list[str]:
    """The names in a file of torch.save's; with `check` after a look at its checksums.

    PyTorch does not look at them. Raises ValueError if it is damaged, and OSError.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if not check or file.testzip() is None:
                return file.namelist()
    except Exception as error:  # a broken archive raises errors of many kinds
        # It may also point to a place before its beginning, which is no error of the disk.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
    raise ValueError(f"{path} is damaged: its content is not what was saved")


def load_weights(path: Path, num_classes: int) -> ResNet50Wrapper:
    """A model with the weights of a file, which bear torchvision's own names; on the CPU.

    With BlurPool, if they are of a network that has it. Of a checkpoint, those that are validated
    and kept: averaged, where the run averages.
    Raises ValueError if the file is damaged, or is of another model or number of classes.
    """
    names_in(path, check=True)
    try:  # what holds more than tensors is not unpickled, for it may be a program
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "optimizer" in state:
            state = state["average"] or state["model"]
        model = ResNet50Wrapper(num_classes, blurpool="blurpool" in state)
        model.model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, KeyError, pickle.UnpicklingError):
        classes = f"a ResNet-50 with {num_classes} classes"
        raise ValueError(f"{path} has not the weights of {classes}") from None
    return model


def human_names(classes: tuple[str, ...]) -> list[str]:
    """Names that a person reads: ImageNet's for its folders, else the folders' own.

    Bytes of a folder's name that are no text are written out.
    """
    import torchvision  # late, as above

    if is_imagenet_1k(classes):
        return list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    imagenette = torchvision.datasets.Imagenette._WNID_TO_CLASS
    return [
        imagenette[name][0]
        if name in imagenette
        else name.encode(errors="backslashreplace").decode()
        for name in classes
    ]


def is_imagenet_1k(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet-1k's folders; other parts of ImageNet-21k have names like them."""
    names = "\n".join(classes).encode(errors="replace")
    return hashlib.sha256(names).hexdigest() == IMAGENET_SHA256


def is_wordnet_id(name: str) -> bool:
    """Whether a class has the name of one of ImageNet's folders."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


@dataclasses.dataclass(frozen=True)
class SummaryOptions:
    """What is summarised."""

    num_classes: int = 1000
    """number of classes"""
    side_px: int = 224
    """side of the input picture, in pixels"""


def main() -> None:
    """Print torchsummary's table of the layers."""
    options = parse_options(SummaryOptions, __doc__)
    for field, value in dataclasses.asdict(options).items():
        if value < 1:
            raise UserError(f"{field} is {value}: it must be 1 or more")
    side_px = options.side_px
    model = ResNet50Wrapper(options.num_classes)
    torchsummary.summary(model.model, (3, side_px, side_px), device="cpu")


if __name__ == "__main__":
    run_stage(main)

"""What a model's answers to a validation set tell: counts, calibration, mix-ups, in numbers and
in pictures. evaluate.py collects the answers; PyTorch is not needed here.
"""

import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import PercentFormatter

from utils import COLOURS, STYLE

BINS = 15  # of confidence, equally wide, as in Guo et al., arXiv 1706.04599
Z_95 = 1.959964  # 95 % of a normal distribution lie within so many deviations
PAIRS_KEPT = 100  # the most frequent ones; ImageNet may have 50,000
TOLD = 5  # classes and pairs on the screen
NAMED_CLASSES = 25  # up to so many, each has its bar
WORST_CLASSES = 12  # have one where there are more
COLUMNS = 6  # of the contact sheet
SIDE = 2.4  # of a picture there, in inches
NAMES_SIZE = 11.5  # of the letters below it, in points
RIGHT, WRONG = COLOURS[2], COLOURS[1]

# A class name in a script that matplotlib's font lacks is drawn as boxes.
warnings.filterwarnings("ignore", r"Glyph .* missing from font")


class Answers(NamedTuple):
    """What a model said to each image, in arrays of (images,)."""

    labels: np.ndarray  # int64
    said: np.ndarray  # the likeliest class, int64
    in_top5: np.ndarray  # whether the label is among the five likeliest
    losses: np.ndarray  # minus the natural logarithm of the label's probability
    confidences: np.ndarray  # probability of the likeliest class, 0 to 1


class Shown(NamedTuple):
    """A picture of the contact sheet."""

    path: str
    pixels: np.ndarray  # uint8 (px, px, 3), as the model saw it
    label: str
    said: str
    confidence: float  # probability of what was said
    loss: float


# ------------------------------------------------------------------------------ numbers


def without_pixels(shown: Shown) -> dict[str, Any]:
    """What is written of a picture."""
    return {key: value for key, value in shown._asdict().items() if key != "pixels"}


def wilson_interval(correct: int, images: int) -> list[float]:
    """The 95 % interval of an accuracy, in percent (Wilson, JASA 22, 1927)."""
    share, z2 = correct / images, Z_95**2 / images
    middle = share + z2 / 2
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return [100 * max(0.0, (middle - half) / (1 + z2)), 100 * min(1.0, (middle + half) / (1 + z2))]


def summary(answers: Answers) -> dict[str, Any]:
    """Mean loss, accuracy in percent and the counts, as the trainer's result.json has them."""
    images = len(answers.labels)
    correct1 = int((answers.said == answers.labels).sum())
    correct5 = int(answers.in_top5.sum())
    return {
        "val_loss": float(answers.losses.mean(dtype=np.float64)),
        "val_top1": 100 * correct1 / images,
        "val_top5": 100 * correct5 / images,
        "val_correct1": correct1,
        "val_correct5": correct5,
        "val_images": images,
        "val_top1_interval": wilson_interval(correct1, images),
        "val_top5_interval": wilson_interval(correct5, images),
    }


def calibration(answers: Answers) -> dict[str, Any]:
    """Expected calibration error, and in each bin of confidence what came true; in percent.

    The error is the mean over the images of |accuracy - mean confidence| of their bins, of which
    bin m holds confidences above (m - 1) / BINS, up to m / BINS.
    """
    edges = (np.arange(1, BINS) / BINS).astype(answers.confidences.dtype)
    bins = np.searchsorted(edges, answers.confidences, side="left")
    right = answers.said == answers.labels
    rows, error = [], 0.0
    for place in range(BINS):
        here = bins == place
        row: dict[str, Any] = {
            "above": 100 * place / BINS,
            "up_to": 100 * (place + 1) / BINS,
            "images": int(here.sum()),
            "correct": int(right[here].sum()),
        }
        if row["images"]:
            row["accuracy"] = 100 * row["correct"] / row["images"]
            row["confidence"] = 100 * float(answers.confidences[here].mean(dtype=np.float64))
            share = row["images"] / len(right)
            error += share * abs(row["accuracy"] - row["confidence"])
        rows.append(row)
    return {"expected_calibration_error": error, "bins": rows}


def confused_pairs(
    answers: Answers, classes: Sequence[str], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """How often each wrong class was said to each class, the most frequent first."""
    wrong = answers.said != answers.labels
    codes = answers.labels[wrong] * len(classes) + answers.said[wrong]
    pairs, times = np.unique(codes, return_counts=True)
    rows = []
    for place in np.argsort(-times, kind="stable").tolist():
        true, said = divmod(int(pairs[place]), len(classes))
        rows.append(
            {
                "class": classes[true],
                "label": labels[true],
                "said_class": classes[said],
                "said_label": labels[said],
                "times": int(times[place]),
            }
        )
    return rows


def per_class(
    answers: Answers,
    classes: Sequence[str],
    labels: Sequence[str],
    pairs: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The counts of each class that has images, in the classes' order; accuracies in percent."""
    right = answers.said == answers.labels
    images, correct1, correct5 = (
        np.bincount(answers.labels[which], minlength=len(classes)).tolist()
        for which in (slice(None), right, answers.in_top5)
    )
    mostly: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        mostly.setdefault(pair["class"], pair)
    rows = []
    for place in np.flatnonzero(images).tolist():
        pair = mostly.get(classes[place], {})
        rows.append(
            {
                "class": classes[place],
                "label": labels[place],
                "images": images[place],
                "correct1": correct1[place],
                "correct5": correct5[place],
                "top1": 100 * correct1[place] / images[place],
                "top5": 100 * correct5[place] / images[place],
                "mostly_taken_for": pair.get("said_label", ""),
                "times": pair.get("times", 0),
            }
        )
    return rows


def worst_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes by their accuracy; of equal ones, those with more images first."""
    return sorted(rows, key=lambda row: (row["top1"], -row["images"], row["class"]))


# ------------------------------------------------------------------------------ on the screen


def tell(result: dict[str, Any]) -> None:
    """Print the result, with the worst of the classes."""
    images, (low, high) = f"{result['val_images']:,}", result["val_top1_interval"]
    error = result["calibration"]["expected_calibration_error"]
    print(f"protocol: {result['protocol']}")
    print(
        f"top-1 {result['val_top1']:.2f} % ({result['val_correct1']:,} of {images}; 95 % interval "
        f"{low:.2f} to {high:.2f} %)\n"
        f"top-5 {result['val_top5']:.2f} % ({result['val_correct5']:,} of {images})\n"
        f"loss {result['val_loss']:.4f}, expected calibration error {error:.2f} %"
    )
    print("the worst classes:")
    for row in worst_first(result["per_class"])[:TOLD]:
        taken = f", mostly taken for {row['mostly_taken_for']}" * bool(row["times"])
        counts = f"{row['correct1']:,} of {row['images']:,}"
        print(f"  {row['top1']:5.1f} %  {row['label']} ({counts}){taken}")
    print("most often confused:" if result["confused_pairs"] else "nothing was confused")
    for pair in result["confused_pairs"][:TOLD]:
        print(f"  {pair['times']:5,}    {pair['label']} → {pair['said_label']}")
    for row in result["sizes"]:
        print(
            f"at {row['val_px']} px, shorter side {row['val_resize_px']} px: top-1 "
            f"{row['val_top1']:.2f} % ({row['val_correct1']:,} of {images}), top-5 "
            f"{row['val_top5']:.2f} % ({row['val_correct5']:,})"
        )


# ------------------------------------------------------------------------------ pictures


def name_of(model: str) -> str:
    """A path that a title has room for."""
    return model if len(model) <= 70 else f"…{model[-69:]}"


def draw_overview(result: dict[str, Any]) -> Figure:
    """Calibration, and the accuracy of the classes: 1800 x 1200 px."""
    rcParams.update(STYLE)
    figure = Figure(figsize=(12, 8), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    rows = result["per_class"]
    many = len(rows) > NAMED_CLASSES
    panels = figure.subplot_mosaic(
        [["reliability", "classes" if many else "worst"], ["confidence", "worst"]],
        height_ratios=(2.2, 1) if not many else (1.25, 1),
        width_ratios=(1, 1.12),
    )
    bins = result["calibration"]["bins"]
    draw_reliability(panels["reliability"], result["calibration"])
    draw_confidences(panels["confidence"], bins)
    if many:
        draw_histogram(panels["classes"], [row["top1"] for row in rows])
    shown = worst_first(rows)[: WORST_CLASSES if many else NAMED_CLASSES]
    draw_classes(panels["worst"], shown)
    panels["worst"].set_title("the worst classes" if many else "the classes", fontsize=14)
    title = f"{name_of(result['model'])}: top-1 {result['val_top1']:.2f} %"
    figure.suptitle(title, fontsize=16, parse_math=False)
    return figure


def draw_reliability(panel: Axes, found: dict[str, Any]) -> None:
    """Accuracy over confidence, with what chance does to a bin of few images; what a calibrated
    model would have is the diagonal."""
    filled = [row for row in found["bins"] if row["images"]]
    intervals = [wilson_interval(row["correct"], row["images"]) for row in filled]
    panel.bar(
        [row["above"] for row in filled],
        [row["accuracy"] for row in filled],
        width=100 / BINS,
        align="edge",
        color=COLOURS[4],
        edgecolor="white",
    )
    panel.plot([0, 100], [0, 100], color="0.35", linestyle="--", label="calibrated")
    panel.errorbar(
        [row["confidence"] for row in filled],
        [row["accuracy"] for row in filled],
        # Of 0 and of all the interval ends at the accuracy, but for rounding.
        np.maximum(
            0.0,
            [
                [row["accuracy"] - low, high - row["accuracy"]]
                for row, (low, high) in zip(filled, intervals, strict=True)
            ],
        ).T,
        color=COLOURS[0],
        marker="o",
        markersize=6,
        linestyle="none",
        elinewidth=1,
        capsize=3,
        label="accuracy, 95 % interval",
    )
    panel.set(xlim=(0, 100), ylim=(0, 118), ylabel="accuracy", xlabel="confidence")
    panel.set_yticks(range(0, 101, 20))
    panel.legend(fontsize=11, loc="upper left", ncols=2)
    error = found["expected_calibration_error"]
    panel.set_title(f"expected calibration error {error:.2f} %", fontsize=14)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))


def draw_confidences(panel: Axes, bins: Sequence[dict[str, Any]]) -> None:
    """How many images have which confidence."""
    images = np.array([row["images"] for row in bins])
    correct = np.array([row["correct"] for row in bins])
    starts = [row["above"] for row in bins]
    style = {"width": 100 / BINS, "align": "edge", "edgecolor": "white"}
    panel.bar(starts, correct, color=RIGHT, label="right", **style)
    panel.bar(starts, images - correct, bottom=correct, color=WRONG, label="wrong", **style)
    panel.set(xlim=(0, 100), ylabel="images", xlabel="confidence")
    panel.set_ylim(top=1.35 * images.max())  # room for the legend
    panel.legend(fontsize=11, ncols=2, loc="upper left")
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def draw_histogram(panel: Axes, accuracies: Sequence[float]) -> None:
    """How many classes have which accuracy."""
    panel.hist(accuracies, bins=np.arange(0, 101, 5), color=COLOURS[4], edgecolor="white")
    middle = float(np.median(accuracies))
    panel.axvline(middle, color=COLOURS[0], linewidth=2.5, label=f"median {middle:.1f} %")
    panel.set(xlim=(0, 100), xlabel="top-1 accuracy of the class", ylabel="classes")
    panel.set_title(f"{len(accuracies):,} classes", fontsize=14)
    panel.set_ylim(top=1.2 * panel.get_ylim()[1])
    panel.legend(fontsize=11, loc="upper left")
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))


def draw_classes(panel: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """A bar a class, the worst at the top, with its counts."""
    places = np.arange(len(rows))
    size = 12 if len(rows) <= 16 else 10
    panel.barh(places, [row["top1"] for row in rows], color=COLOURS[4], height=0.75)
    for place, row in enumerate(rows):
        inside = row["top1"] > 50  # the numbers stand inside a long bar
        panel.text(
            row["top1"] + (-1.5 if inside else 1.5),
            place,
            f"{row['top1']:.1f} %  ({row['correct1']:,} of {row['images']:,})",
            horizontalalignment="right" if inside else "left",
            verticalalignment="center",
            fontsize=size,
        )
    labels = [row["label"] for row in rows]
    names = [label if len(label) <= 26 else f"{label[:25].rstrip()}…" for label in labels]
    panel.set_yticks(places, names, fontsize=size, parse_math=False)
    panel.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xlabel="top-1 accuracy")
    panel.grid(axis="y", visible=False)
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))


def draw_worst(shown: Sequence[Shown]) -> Figure:
    """The contact sheet: each picture, what it is, and what was said."""
    rcParams.update(STYLE)
    columns = min(COLUMNS, max(3, len(shown)))  # three are as wide as the title
    rows = math.ceil(len(shown) / columns)
    side, text, gap, head = SIDE, 1.25, 0.2, 0.6  # inches
    width, height = columns * (side + gap) + gap, rows * (side + text) + head
    figure = Figure(figsize=(width, height), dpi=150)
    title = "the highest losses, and the pictures as the model saw them"
    figure.text(gap / width, 1 - 0.5 * head / height, title, fontsize=16, va="center")
    for place, one in enumerate(shown):
        row, column = divmod(place, columns)
        left = gap + column * (side + gap)
        bottom = height - head - row * (side + text) - side
        panel = figure.add_axes((left / width, bottom / height, side / width, side / height))
        panel.imshow(one.pixels)
        panel.set_axis_off()
        colour = RIGHT if one.said == one.label else WRONG
        loss = f"{one.loss:.2f}" if one.loss < 1e4 else f"{one.loss:.1e}"  # of a run that diverged
        lines = (
            *((line, RIGHT) for line in wrapped(f"is {one.label}")),
            *((line, colour) for line in wrapped(f"said {one.said}")),
            (f"with {100 * one.confidence:.1f} %, loss {loss}", "0.3"),
        )
        for number, (line, its_colour) in enumerate(lines):
            figure.text(
                left / width,
                (bottom - 0.08 - 0.21 * number) / height,
                line,
                color=its_colour,
                fontsize=NAMES_SIZE,
                va="top",
                parse_math=False,
            )
    return figure


def wrapped(text: str) -> list[str]:
    """A text in at most two lines of the width of a picture."""
    for letters in range(27, 5, -1):
        lines = textwrap.wrap(text, letters)
        if len(lines) > 2:
            lines = [lines[0], f"{lines[1][: letters - 2].rstrip()} …"]
        if all(width_points(line) <= 72 * SIDE for line in lines):
            break
    return lines


def width_points(line: str) -> float:
    """The width of a line of the contact sheet, in points."""
    font = FontProperties(size=NAMES_SIZE)
    return TextToPath().get_text_width_height_descent(line, font, ismath=False)[0]


def draw_sizes(model: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against the side of the crop, with its 95 % interval: 1800 x 900 px."""
    rcParams.update(STYLE)
    figure = Figure(figsize=(12, 6), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    sides = [row["val_px"] for row in rows]
    for panel, quantity, colour in zip(
        figure.subplots(1, 2), ("top1", "top5"), COLOURS, strict=False
    ):
        values = np.array([row[f"val_{quantity}"] for row in rows])
        ends = np.array([row[f"val_{quantity}_interval"] for row in rows]).T
        panel.errorbar(
            sides, values, np.abs(ends - values), color=colour, marker="o", linewidth=2.2, capsize=4
        )
        told = range(len(values))
        if len(values) > 6:  # for more there is no room
            told = {0, int(values.argmax()), len(values) - 1}
        for place, (side, value) in enumerate(zip(sides, values, strict=True)):
            if place not in told:
                continue
            falls_to = place > 0 and values[place - 1] > value
            rises_from = place + 1 < len(values) and values[place + 1] > value
            offset, side_of_point = {  # where neither line nor interval is
                (False, False): ((0, 5), "center"),
                (False, True): ((-6, 10), "right"),
                (True, False): ((6, 10), "left"),
                (True, True): ((6, -16), "left"),
            }[falls_to, rises_from]
            panel.annotate(
                f"{value:.2f}",
                (side, value if falls_to or rises_from else ends[1, place]),
                offset,
                textcoords="offset points",
                horizontalalignment=side_of_point,
                fontsize=12,
            )
        panel.set(xlabel="side of the centre crop (px)", ylabel=f"top-{quantity[-1]} accuracy (%)")
        panel.set_xticks(sides, sides, rotation=45 if len(sides) > 8 else 0)
        panel.margins(x=0.18, y=0.12)  # room for the numbers
    figure.suptitle(name_of(model), fontsize=16, parse_math=False)
    return figure

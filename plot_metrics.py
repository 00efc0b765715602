"""Draw the curves of one or several runs: loss, top-1, top-5 and learning rate over the epochs.

    python3 plot_metrics.py                                the most recent run
    python3 plot_metrics.py --names A B --reference        two runs and the published one

Reads `runs/<name>/metrics.jsonl` (a JSON object an epoch, accuracies in percent) and writes
`runs/<name>/training_metrics.png`; several runs share `comparison.png` in the folder of the first.
It needs neither torch nor a display, and may run while the training does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils import (
    COLOURS,
    STYLE,
    Config,
    UserError,
    latest_run,
    parse_options,
    read_metrics,
    run_folder,
    run_stage,
    shortened,
    write_png,
)

Curves = dict[str, Sequence[float]]  # a field of metrics.jsonl -> its values, one an epoch

FIELDS = (
    "epoch", "train_loss", "train_top1", "train_top5",
    "learning_rate", "val_loss", "val_top1", "val_top5",
)  # fmt: skip
# Published values of the reference run (50 epochs on one A10G, OneCycle up to 0.175) at epochs 1,
# 5, ... 50, in the order of FIELDS; the epochs between were not published.
PUBLISHED = (
    (1, 5.88, 3.94, 11.55, 0.00884, 59.80, 0.10, 0.50),
    (5, 2.91, 37.51, 62.82, 0.04900, 3.05, 33.81, 60.30),
    (10, 2.33, 48.03, 72.79, 0.13300, 2.22, 48.82, 74.79),
    (15, 2.15, 51.32, 75.63, 0.17500, 2.07, 51.98, 77.18),
    (20, 2.05, 53.34, 77.26, 0.16633, 1.93, 54.10, 79.69),
    (25, 1.97, 54.91, 78.41, 0.14205, 1.93, 54.42, 79.80),
    (30, 1.90, 56.40, 79.51, 0.10697, 1.89, 55.23, 80.12),
    (35, 1.79, 58.61, 81.06, 0.06803, 1.67, 59.65, 83.54),
    (40, 1.60, 62.35, 83.60, 0.03294, 1.45, 63.96, 86.56),
    (45, 1.29, 69.10, 87.69, 0.00866, 1.19, 70.27, 89.88),
    (48, 1.07, 74.09, 90.36, 0.00141, 1.02, 74.11, 91.99),
    (50, 1.00, 75.65, 91.12, 0.0000007, 0.97, 75.29, 92.56),
)
REFERENCE: Curves = dict(zip(FIELDS, zip(*PUBLISHED, strict=True), strict=True))

# The dots keep a run of a single epoch visible.
TRAIN = {"linestyle": (0, (4, 1.5)), "linewidth": 1.4, "marker": ".", "markersize": 6}
VALIDATION = {"linestyle": "-", "linewidth": 2.2, "marker": ".", "markersize": 8}
REFERENCE_NAME = "reference run (published, A10G)"
REFERENCE_TRAIN = {**TRAIN, "color": "#B0B0B0", "zorder": 1.8}  # the zorders: below the runs
REFERENCE_VALIDATION = {**VALIDATION, "linestyle": "--", "color": "#707070", "zorder": 1.9}
PANELS = {
    "loss": "loss",
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True)
class PlotOptions:
    """What to draw, and where to."""

    names: tuple[str, ...] = ()
    """runs to draw in one picture, at most 6; the most recent one if none is given"""
    runs_folder: str = Config.runs_folder
    """folder that holds the runs"""
    reference: bool = False
    """draw the published curve of the reference run too"""
    output: Path | None = None
    """PNG file to write; in the first run's folder if not given"""


def main() -> None:
    """The stage: options, curves, picture."""
    options = parse_options(PlotOptions, description="Draw the curves of one or several runs.")
    names = options.names
    if not names:
        names = (latest_run(options.runs_folder),)
        print(f"plotting the most recent run: {names[0]}")
    if len(names) > len(COLOURS):
        raise UserError(f"{len(names)} runs in one picture: only {len(COLOURS)} have a colour each")
    output = options.output
    if output is not None and not output.is_dir() and output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: the picture is a PNG, so name it something.png")
    folders = {name: run_folder(options.runs_folder, name) for name in names}
    runs = {name: read_curves(folder) for name, folder in folders.items()}
    file_name = "training_metrics.png" if len(runs) == 1 else "comparison.png"
    output = output or folders[names[0]] / file_name
    write_png(draw(runs, options.reference), output)
    print(output)


def read_curves(folder: Path) -> Curves:
    """The curves in a run's metrics.jsonl; raises UserError naming the line that is wrong."""
    if not folder.is_dir():
        raise UserError(f"no such run: there is no folder {folder}")
    path = folder / "metrics.jsonl"
    if not path.exists() or not path.read_bytes().strip():
        raise UserError(f"no epoch has finished yet: {path} is missing or empty")
    rows = [[row[field] for field in FIELDS] for row in read_metrics(path, FIELDS)]
    return dict(zip(FIELDS, zip(*rows, strict=True), strict=True))


def draw(runs: dict[str, Curves], reference: bool) -> Figure:
    """Loss, top-1, top-5 and learning rate over the epochs: four panels on 1800 x 1200 px.

    A single run has one colour for training and one for validation; of several, each has its own.
    """
    rcParams.update(STYLE)
    figure = Figure(figsize=(12, 8), dpi=150, layout="constrained")  # Agg: needs no display
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))

    shown = []
    for position, (name, curves) in enumerate(runs.items()):
        colour = COLOURS[position]
        train_colour = COLOURS[1] if len(runs) == 1 else colour
        train_style, val_style = {**TRAIN, "color": train_colour}, {**VALIDATION, "color": colour}
        shown.append((name, curves, train_style, val_style))
    if reference:
        shown.append((REFERENCE_NAME, REFERENCE, REFERENCE_TRAIN, REFERENCE_VALIDATION))

    for _, curves, train_style, val_style in shown:
        panels["learning_rate"].plot(curves["epoch"], curves["learning_rate"], **val_style)
        for quantity in ("loss", "top1", "top5"):
            panels[quantity].plot(curves["epoch"], curves[f"train_{quantity}"], **train_style)
            panels[quantity].plot(curves["epoch"], curves[f"val_{quantity}"], **val_style)
            mark_best(panels[quantity], curves, quantity, val_style)
    clip_loss(
        panels["loss"],
        [(curves, train["color"], validation["color"]) for _, curves, train, validation in shown],
    )

    last_epoch = max(curves["epoch"][-1] for _, curves, _, _ in shown)
    pad = min(0.5 + last_epoch / 100, 0.9)  # below 1: there is no epoch 0
    for quantity, panel in panels.items():
        panel.set(xlabel="epoch", ylabel=PANELS[quantity], xlim=(1 - pad, last_epoch + pad))
        top = panel.get_ylim()[1]
        if quantity != "loss":  # clip_loss has set that one's
            top = max(top, 1.03 * panel.dataLim.y1)
        panel.set_ylim(-0.02 * top, top)  # so that points at 0 and at the top are seen whole
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if quantity != "learning_rate":  # placed by matplotlib where the fewest points are
            panel.legend(fontsize=12 if len(shown) < 4 else 10, handletextpad=0.3)

    # Names stand below the panels: inside, those of several runs would cover the curves.
    named, kinds = shown, ({**TRAIN, "color": "black"}, {**VALIDATION, "color": "black"})
    if len(runs) == 1:
        named, kinds = shown[1:], shown[0][2:]
    styles = [(name, val_style) for name, _, _, val_style in named]
    styles += zip(("training", "validation"), kinds, strict=True)
    name_below(figure, [Line2D([], [], label=label, **style) for label, style in styles])
    top1, name = max((max(curves["val_top1"]), name) for name, curves in runs.items())
    name = shortened(name)
    title = f"{name}: best top-1 {top1:.2f} %"
    if len(runs) > 1:
        title = f"{len(runs)} runs: best top-1 {top1:.2f} % ({name})"
    figure.suptitle(title, fontsize=16, parse_math=False)
    return figure


def name_below(figure: Figure, handles: list[Artist]) -> None:
    """A legend below the panels, in as many columns as fit side by side: about 120 letters."""
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, 120 // (widest + 6))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    for text in legend.get_texts():  # of a folder that may be called anything
        text.set_parse_math(False)


def mark_best(panel: Axes, curves: Curves, quantity: str, style: dict[str, Any]) -> None:
    """A ring around the best validation value, the first of equals; its value in the legend."""
    pick, text = (min, "lowest {:.2f}") if quantity == "loss" else (max, "best {:.2f} %")
    points = zip(curves[f"val_{quantity}"], curves["epoch"], strict=True)
    numbers = [point for point in points if not math.isnan(point[0])]
    if numbers:
        value, epoch = pick(numbers, key=lambda point: point[0])
        ring = {"marker": "o", "markersize": 9, "markerfacecolor": "white", "markeredgewidth": 2}
        label = f"{text.format(value)} (epoch {epoch})"
        panel.plot(epoch, value, label=label, **{**style, **ring, "linestyle": "none"})


def clip_loss(panel: Axes, shown: list[tuple[Curves, str, str]]) -> None:
    """End the loss axis where the curves are; a triangle at its edge stands for a point above.

    `shown`: curves, and the colours of training and validation. The validation loss of a first
    epoch can be ten times all others (the reference run's is 59.8), and training that diverges a
    million times. So the lower 90 % of the validation losses of all runs set the scale, and the
    training losses up to twenty times their own lower 90 %; what is above 1.5 times the highest of
    these is off it. The lines keep all their points; the legend gives the highest that is off the
    scale.
    """
    points = [
        (loss, epoch, colour, part)
        for curves, *colours in shown
        for part, colour in zip(("train", "val"), colours, strict=True)
        for loss, epoch in zip(curves[f"{part}_loss"], curves["epoch"], strict=True)
        if not math.isnan(loss)
    ]
    points.sort()
    usual = []
    for part, factor in (("train", 20), ("val", 1)):
        losses = [point[0] for point in points if point[3] == part]
        highest = losses[int(0.9 * (len(losses) - 1))] if losses else math.nan
        usual += [loss for loss in losses if loss <= factor * highest]
    limit = 1.5 * max(filter(math.isfinite, usual), default=math.inf)
    off_scale = [point for point in points if point[0] > limit]
    top = 1.05 * max((point[0] for point in points if point[0] <= limit), default=math.inf)
    if math.isfinite(top):
        panel.set_ylim(top=top)  # with room for the ring around a best point at the top
    if off_scale:
        losses, epochs, colours, _ = zip(*off_scale, strict=True)
        label = f"off the scale: {losses[-1]:,.1f} (epoch {epochs[-1]})"
        if len(losses) > 1:
            label = f"off the scale: {len(losses)} points, up to {losses[-1]:,.1f}"
        triangles = {"marker": "^", "s": 80, "clip_on": False, "zorder": 3}
        panel.scatter(epochs, [top] * len(epochs), c=colours, label=label, **triangles)


if __name__ == "__main__":
    run_stage(main)

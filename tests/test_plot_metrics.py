"""plot_metrics.py: the real command on small runs, and what its curves are made of."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plot_metrics import FIELDS, PUBLISHED, draw, read_curves  # noqa: E402
from utils import write_png  # noqa: E402


def make_row(epoch: int, **changed: float) -> dict:
    """A row of metrics.jsonl; no two fields have the same values, so none passes for another."""
    values = {field: place + epoch / 16 for place, field in enumerate(FIELDS)}
    return {**values, "epoch": epoch, "val_s": 60.0, **changed}


def make_run(runs_folder: Path, name: str, rows: list[dict], started: int = 0) -> Path:
    folder = runs_folder / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (started, started))
    return folder


def plot(runs_folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "plot_metrics.py", "--runs-folder", str(runs_folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def drawn(figure: Figure, panel: Axes, label: str) -> list[Line2D]:
    """The curves in a panel that look as the legend below the panels says `label` does."""
    handles = {line.get_label(): line for line in figure.legends[0].get_lines()}
    return [
        line
        for line in panel.lines
        if same_color(line.get_color(), handles[label].get_color())
        and line.get_linestyle() == handles[label].get_linestyle()
    ]


def test_writes_a_picture_of_the_data_and_says_where(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "first", [make_row(1), make_row(2)])
    done = plot(tmp_path, "--names", "first")
    assert (done.returncode, done.stderr) == (0, "")
    path = folder / "training_metrics.png"
    assert done.stdout == f"{path}\n"
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (1800, 1200))
        pixels = picture.tobytes()
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "training_metrics.png",
    }  # fmt: skip

    # No text shows a training loss: only the curve can make this picture another.
    rows = [make_row(1), make_row(2, train_loss=1.5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / "other.png"
    assert plot(tmp_path, "--names", "first", "--output", str(other)).returncode == 0
    with Image.open(other) as picture:
        assert picture.tobytes() != pixels
    with Image.open(path) as picture:
        assert picture.tobytes() == pixels, "--output left the picture in the run's folder alone"


def test_who_looks_at_an_earlier_picture_sees_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(100_000 * b"an earlier picture")
    with path.open("rb") as earlier:
        begun = earlier.read(1)
        write_png(Figure(), path)
        assert begun + earlier.read() == 100_000 * b"an earlier picture"
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def test_takes_the_most_recent_run_and_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, "new", [make_row(1)], started=2_000_000)
    make_run(tmp_path, "old", [make_row(1)], started=1_000_000)
    done = plot(tmp_path)
    assert done.stdout.splitlines()[0] == "plotting the most recent run: new"
    assert (tmp_path / "new" / "training_metrics.png").exists()
    assert not (tmp_path / "old" / "training_metrics.png").exists()


def test_several_runs_share_one_picture(tmp_path: Path) -> None:
    for name in ("a", "_b"):
        make_run(tmp_path, name, [make_row(1), make_row(2)])
    done = plot(tmp_path, "--names", "a", "_b", "--reference")
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "a" / "comparison.png") as picture:
        assert picture.size == (1800, 1200)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    make_run(tmp_path, "a", [make_row(1)])
    code = "import sys, runpy; runpy.run_path('plot_metrics.py', run_name='__main__'); "
    code += "assert 'matplotlib' in sys.modules; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--runs-folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_drawn_as_logged_beside_the_reference(tmp_path: Path) -> None:
    rows = [make_row(epoch) for epoch in (1, 2, 3)]
    figure = draw({"a": read_curves(make_run(tmp_path, "a", rows))}, reference=True)
    loss, top1, top5, learning_rate = figure.axes
    reference = "reference run (published, A10G)"
    for panel, field, label in (
        (loss, "train_loss", "training"), (loss, "val_loss", "validation"),
        (top1, "train_top1", "training"), (top1, "val_top1", "validation"),
        (top5, "train_top5", "training"), (top5, "val_top5", "validation"),
        (learning_rate, "learning_rate", "validation"),
    ):  # fmt: skip
        (line,) = drawn(figure, panel, label)
        assert list(line.get_xdata()) == [1, 2, 3]
        assert list(line.get_ydata()) == [row[field] for row in rows]
        if label == "validation":
            (line,) = drawn(figure, panel, reference)
            assert list(line.get_xdata()) == [1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 48, 50]
            assert list(line.get_ydata()) == [row[FIELDS.index(field)] for row in PUBLISHED]
    assert top1.get_ylabel() == "top-1 accuracy (%)"
    assert all(tick == int(tick) for tick in loss.get_xticks())


def test_the_reference_is_as_it_was_published() -> None:
    """Epoch, training loss, top-1 and top-5, learning rate, validation loss, top-1 and top-5."""
    published = """
        1  5.88  3.94 11.55 0.00884   59.80  0.10  0.50
        5  2.91 37.51 62.82 0.04900    3.05 33.81 60.30
       10  2.33 48.03 72.79 0.13300    2.22 48.82 74.79
       15  2.15 51.32 75.63 0.17500    2.07 51.98 77.18
       20  2.05 53.34 77.26 0.16633    1.93 54.10 79.69
       25  1.97 54.91 78.41 0.14205    1.93 54.42 79.80
       30  1.90 56.40 79.51 0.10697    1.89 55.23 80.12
       35  1.79 58.61 81.06 0.06803    1.67 59.65 83.54
       40  1.60 62.35 83.60 0.03294    1.45 63.96 86.56
       45  1.29 69.10 87.69 0.00866    1.19 70.27 89.88
       48  1.07 74.09 90.36 0.00141    1.02 74.11 91.99
       50  1.00 75.65 91.12 0.0000007  0.97 75.29 92.56
    """
    rows = [tuple(map(float, line.split())) for line in published.strip().splitlines()]
    assert list(PUBLISHED) == rows


def test_runs_are_told_apart_by_colour(tmp_path: Path) -> None:
    rows = {"a": [make_row(1), make_row(2)], "_b": [make_row(1, val_top1=9.5)]}
    runs = {name: read_curves(make_run(tmp_path, name, rows[name])) for name in rows}
    figure = draw(runs, reference=False)
    for name, logged in rows.items():
        (line,) = drawn(figure, figure.axes[1], name)
        assert list(line.get_ydata()) == [row["val_top1"] for row in logged]
    assert figure.get_suptitle() == "2 runs: best top-1 9.50 % (_b)"


def test_a_run_named_like_a_line_is_in_the_legend(tmp_path: Path) -> None:
    names = ("training", "b")
    runs = {name: read_curves(make_run(tmp_path, name, [make_row(1)])) for name in names}
    (legend,) = draw(runs, reference=False).legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["training", "b", "training", "validation"]


def test_the_best_epoch_is_named_the_first_of_equals(tmp_path: Path) -> None:
    top1_percent = (75.2, 75.294, 75.294, 75.0)
    rows = [make_row(epoch, val_top1=top1) for epoch, top1 in enumerate(top1_percent, start=1)]
    figure = draw({"a": read_curves(make_run(tmp_path, "a", rows))}, reference=False)
    _, top1, _, _ = figure.axes
    assert [text.get_text() for text in top1.get_legend().get_texts()] == ["best 75.29 % (epoch 2)"]
    assert figure.get_suptitle() == "a: best top-1 75.29 %"
    (ring,) = [line for line in top1.lines if line.get_label().startswith("best")]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([2], [75.294])


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    runs = {
        name: read_curves(make_run(tmp_path, name, [make_row(1)])) for name in ("$\\frac$", "b")
    }
    draw(runs, reference=False).draw_without_rendering()


def test_a_long_name_leaves_the_title_on_the_picture(tmp_path: Path) -> None:
    name = "resnet50_imagenet_1k_accurate_" * 4
    runs = {name: read_curves(make_run(tmp_path, name, [make_row(1, val_top1=12.5)]))}
    figure = draw(runs, reference=False)
    assert figure.get_suptitle() == f"{name[:59]}…: best top-1 12.50 %"
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert figure.bbox.xmin <= box.xmin < box.xmax <= figure.bbox.xmax


def test_the_ring_around_the_only_loss_is_whole(tmp_path: Path) -> None:
    row = make_row(1, train_loss=1.9, val_loss=2.3)
    figure = draw({"a": read_curves(make_run(tmp_path, "a", [row]))}, reference=False)
    top = figure.axes[0].get_ylim()[1]
    assert 2.3 * 1.04 < top < 2.3 * 1.1


@pytest.mark.parametrize(
    ("part", "outlier", "shown"),
    [
        ("val_loss", 59.8, "59.8"),
        ("val_loss", math.inf, "inf"),
        ("train_loss", 1e6, "1,000,000.0"),
        ("train_loss", math.inf, "inf"),
    ],
)
def test_an_outlier_leaves_the_loss_readable(
    tmp_path: Path, part: str, outlier: float, shown: str
) -> None:
    rows = [make_row(epoch, train_loss=6.0 / epoch, val_loss=5.0 / epoch) for epoch in range(1, 7)]
    rows[1][part] = outlier
    rows[0]["val_loss"] = rows[3]["val_loss"] = math.nan
    figure = draw({"a": read_curves(make_run(tmp_path, "a", rows))}, reference=False)
    loss = figure.axes[0]
    assert 6 < loss.get_ylim()[1] < 7
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert texts == ["lowest 0.83 (epoch 6)", f"off the scale: {shown} (epoch 2)"]
    (triangle,) = loss.collections
    handles = {line.get_label(): line for line in figure.legends[0].get_lines()}
    its = handles["training" if part == "train_loss" else "validation"]
    assert same_color(triangle.get_facecolor()[0], its.get_color())
    assert triangle.get_offsets()[0].tolist() == pytest.approx([2, loss.get_ylim()[1]])
    figure.savefig(tmp_path / "picture.png")


def test_a_training_loss_that_falls_fast_is_shown_whole(tmp_path: Path) -> None:
    rows = [make_row(epoch, train_loss=7 * 0.2**epoch, val_loss=0.5) for epoch in range(8)]
    figure = draw({"a": read_curves(make_run(tmp_path, "a", rows))}, reference=False)
    assert figure.axes[0].get_ylim()[1] > 7


def test_a_loss_that_grows_steadily_is_shown_whole(tmp_path: Path) -> None:
    rows = [make_row(epoch, train_loss=1 / epoch, val_loss=float(epoch)) for epoch in range(1, 31)]
    figure = draw({"a": read_curves(make_run(tmp_path, "a", rows))}, reference=False)
    assert figure.axes[0].get_ylim()[1] > 30


def test_the_ring_around_a_hundred_per_cent_is_whole(tmp_path: Path) -> None:
    rows = [
        make_row(1, val_top5=86.0, train_top5=90.0),
        make_row(2, val_top5=100.0, train_top5=97.0),
    ]
    figure = draw({"a": read_curves(make_run(tmp_path, "a", rows))}, reference=False)
    top5 = figure.axes[2]
    figure.savefig(tmp_path / "picture.png")
    ring_px = 9 / 72 * figure.dpi / 2
    assert top5.transData.transform((2, 100))[1] + ring_px < top5.bbox.ymax


def test_a_single_epoch_leaves_a_mark(tmp_path: Path) -> None:
    figure = draw({"a": read_curves(make_run(tmp_path, "a", [make_row(1)]))}, reference=False)
    figure.canvas.draw()
    for panel in figure.axes:
        assert [tick for tick in panel.get_xticks() if 0 < tick < 2] == [1]
        assert all(line.get_marker() not in ("", "None") for line in panel.lines)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no epoch has finished yet: {path} is missing or empty"),
        ("", "no epoch has finished yet: {path} is missing or empty"),
        ('{row}\n{"epoch": 2, "tr', "{path}, line 2: not a JSON object"),
        ("{row}\n\n{row}\n", "{path}, line 2: not a JSON object"),
        ("[1, 2]\n", "{path}, line 1: not a JSON object"),
        ('{row}\n{"epoch": 2}\n', "{path}, line 2: train_loss is missing or not a number"),
        ('{"epoch": "1"}\n', "{path}, line 1: epoch is missing or not a number"),
        ('{"epoch": NaN}\n', "{path}, line 1: epoch is missing or not a number"),
        (
            '{"epoch": 1, "train_loss": 1%s}' % ("0" * 400),  # beyond all floats
            "{path}, line 1: train_loss is missing or not a number",
        ),
    ],
)
def test_a_bad_log_is_refused(tmp_path: Path, content: str | None, complaint: str) -> None:
    path = make_run(tmp_path, "a", []) / "metrics.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content.replace("{row}", json.dumps(make_row(1))))
    done = plot(tmp_path, "--names", "a")
    assert (done.returncode, done.stdout) == (2, "")
    remedy = ": bring back a copy" * (", line " in complaint)
    assert done.stderr == f"error: {complaint.format(path=path)}{remedy}\n"
    assert not (tmp_path / "a" / "training_metrics.png").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--names", "b"], "no such run: there is no folder {folder}/b"),
        (["--names", "../a"], "'../a' is no name for a run"),
        (["--names", "a", "--output", "{folder}/none/x.png"], "cannot write {folder}/none/x.png"),
        (["--names", "a", "--output", "{folder}/x.jpg"], "the picture is a PNG, so name it som"),
        (["--names", "a", "--output", "{folder}"], "cannot write {folder}: it is a folder"),
        (["--names", *"aaaaaaa"], "7 runs in one picture: only 6 have a colour each"),
        (["--smooth"], "--smooth"),
    ],
)
def test_a_bad_option_is_refused(tmp_path: Path, options: list[str], complaint: str) -> None:
    make_run(tmp_path, "a", [make_row(1)])
    done = plot(tmp_path, *[option.format(folder=tmp_path) for option in options])
    assert done.returncode == 2
    assert complaint.format(folder=tmp_path) in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    done = plot(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run in") and done.stderr.count("\n") == 1


def test_the_longest_run_is_seen_to_its_end(tmp_path: Path) -> None:
    lengths = {"short": 2, "long": 9}
    runs = {
        name: read_curves(make_run(tmp_path, name, [make_row(n + 1) for n in range(epochs)]))
        for name, epochs in lengths.items()
    }
    for figure, last in ((draw(runs, reference=False), 9), (draw(runs, reference=True), 50)):
        for panel in figure.axes:
            assert panel.get_xlim()[0] < 1 and last < panel.get_xlim()[1] < last + 1

"""What a run cost: hours, dollars, interruptions, and the price of each accuracy on the way.

    python3 scripts/cost_report.py runs/NAME
    python3 scripts/cost_report.py runs/NAME --price-per-hour 0.42
    python3 scripts/cost_report.py runs/NAME --spot-prices prices.json

Reads the run's sessions.jsonl (sessions.py says what is in it, and what is not) and metrics.jsonl,
also while the run trains. Prints a table and writes it as cost.md, with all numbers as cost.json,
and draws top-1 against dollars as cost.png, all into the run's folder. The published reference run
stands beside it, computed by the same functions from its published figures.

Each session costs its hours times the price per hour that it was started with, or another one.
Where a spot price changed while a session ran, each price counts for its hours. The file is what
this prints, for one instance type in one zone:

    aws ec2 describe-spot-price-history --instance-types g5.xlarge \\
        --product-descriptions Linux/UNIX --availability-zone us-east-1a \\
        --start-time 2026-11-24T08:00:00Z > prices.json

AWS keeps these prices for 90 days. With `--spot-prices aws --availability-zone us-east-1a` the
command is run from here.
"""

import collections
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib import rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

sys.path.insert(0, str(Path(__file__).parent.parent))

import sessions
from plot_metrics import (
    REFERENCE,
    REFERENCE_NAME,
    REFERENCE_VALIDATION,
    VALIDATION,
    name_below,
)
from utils import (
    COLOURS,
    STYLE,
    UserError,
    format_duration,
    parse_options,
    read_metrics,
    read_run,
    run_stage,
    shortened,
    write_atomically,
    write_json,
    write_png,
)

FIELDS = ("epoch", "val_top1", "train_images", "train_s", "val_s")  # of metrics.jsonl
TOP1_PERCENT = (25, 50, 60, 70, 75, 76, 77, 78)
MONTH_S = 730 * 3600  # of a volume's price, as AWS's calculator has it
UNDER_WAY_S = 5 * sessions.BEAT_S  # since the last line
UNDER_WAY, KILLED, UNKNOWN = "under way", "killed", "not recorded"
UNRECORDED = "unrecorded"  # the name of a session that left no lines
NO_INTERRUPTIONS = (sessions.FINISHED, UNDER_WAY, UNKNOWN)

# The reference run's published figures: about 27 h, 35 min an epoch, $0.97 an hour, $26.41 in all.
REFERENCE_USD_PER_HOUR, REFERENCE_HOURS = 0.97, 27.2268
REFERENCE_NOTE = (
    "The reference run's published figures do not agree to the cent: 27 h at $0.97 are $26.19, 50 "
    "epochs of 35 min are 29.17 h and $28.29, but $26.41 was paid. Here it is 27.2268 h at $0.97, "
    "which are $26.41, as one session without interruption in 50 equal epochs, of which 12 were "
    "published: where it reached an accuracy between two of these, the later one counts. Its last "
    "evaluation gave 75.32 %."
)

Line = dict[str, Any]  # of sessions.jsonl
# Prices in US dollars an hour, each with the moment, in seconds since 1970, from which on it holds.
Prices = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Which run, and what its hours are to cost."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """the run's folder, such as runs/NAME"""
    price_per_hour: float | None = None
    """US dollars an hour, in place of the price that each session was started with"""
    spot_prices: Annotated[str, tyro.conf.arg(metavar="JSON|aws")] = ""
    """spot prices over time: a file that `aws ec2 describe-spot-price-history` has printed, or
    `aws` to ask it now"""
    availability_zone: str = ""
    """of the instance, such as us-east-1a, for `--spot-prices aws`"""
    instance_type: str = ""
    """such as g5.xlarge, for `--spot-prices aws`; the one that the sessions have, if not given"""
    storage_usd_per_month: float = 0.0
    """price of the volumes a month, which are paid from the first start to the end, the hours
    without a machine included; 0: leave them out"""


# ------------------------------------------------------------------------------ arithmetic


def price_usd(began: float, ended: float, prices: Prices) -> float:
    """Price of the time between two moments, in seconds since 1970: each price for its hours."""
    ends = [start for start, _ in prices[1:]] + [math.inf]
    return sum(
        price * max(0.0, min(ended, end) - max(began, start)) / 3600
        for (start, price), end in zip(prices, ends, strict=True)
    )


def summarize(
    lines: list[Line], rows: list[dict[str, Any]], prices: Prices | None, now: float = math.inf
) -> dict[str, Any]:
    """All numbers of a run, from the lines of its sessions and the rows of its metrics.

    `prices` stands in place of those of the sessions; `now`, in seconds since 1970, tells a session
    under way from one that was killed.
    """
    by_session: dict[str, list[Line]] = {}
    # A mirror's lines stand before those that only this machine has, which may be older.
    for line in sorted(lines, key=lambda line: sessions.seconds(line["began"])):
        by_session.setdefault(line["session"], []).append(line)
    table: list[dict[str, Any]] = []
    usd_after: dict[int, float] = {}  # by epoch, of the last time that it was finished
    for its in by_session.values():
        spent_usd = sum(session["usd"] for session in table)
        furthest_step = max((session["last_step"] for session in table), default=0)
        for epoch, usd in epoch_ends(its, prices):
            usd_after[epoch] = spent_usd + usd
        table.append(summarize_session(its, prices, furthest_step))
    # Its machine's clock may be a little ahead of this one's.
    if (
        table[-1]["ended"] == KILLED
        and abs(now - sessions.seconds(table[-1]["last_alive"])) < UNDER_WAY_S
    ):
        table[-1]["ended"] = UNDER_WAY

    began, ended = (
        [sessions.seconds(session[key]) for session in table] for key in ("began", "last_alive")
    )
    # Two machines may have trained the run at once.
    away_s = sum(
        max(0.0, later - earlier)
        for earlier, later in zip(itertools.accumulate(ended, max), began[1:], strict=False)
    )
    sums = {
        key: sum(session[key] for session in table)
        for key in ("running_s", "startup_s", "gpu_s", "steps_twice", "twice_s", "twice_usd", "usd")
    }
    train_s = sum(row.get("train_s", 0.0) for row in rows)
    ends = collections.Counter(session["ended"] for session in table)
    return {
        "ended": table[-1]["ended"],
        "wall_s": max(ended) - min(began),
        "away_s": away_s,
        **sums,
        "img_per_s": sum(row["train_images"] for row in rows) / train_s if train_s else None,
        "interruptions": {why: ends[why] for why in ends if why not in NO_INTERRUPTIONS},
        "best_top1": max((row["val_top1"] for row in rows), default=None),
        "usd_to_top1": usd_to_top1(rows, usd_after),
        "curve": [
            {"epoch": row["epoch"], "usd": usd_after[row["epoch"]], "val_top1": row["val_top1"]}
            for row in rows
            if row["epoch"] in usd_after
        ],
        "sessions": table,
    }


def summarize_session(its: list[Line], prices: Prices | None, furthest_step: int) -> dict[str, Any]:
    """The numbers of a session from its lines; `furthest_step` is that of all sessions before."""
    first, last = its[0], its[-1]
    steps_twice = max(0, min(furthest_step, last["step"]) - first["first_step"])
    again_until_s = reached_s(its, first["first_step"] + steps_twice)
    return {
        "began": first["began"],
        "last_alive": sessions.utc(sessions.seconds(first["began"]) + last["alive_s"]),
        "ended": last["ended"] or KILLED,
        "first_step": first["first_step"],
        "last_step": last["step"],
        "running_s": last["alive_s"],
        "startup_s": first["startup_s"],
        "gpu_s": last["alive_s"] - first["startup_s"],
        "steps_twice": steps_twice,
        "twice_s": again_until_s - first["startup_s"],
        "twice_usd": session_usd(first, first["startup_s"], again_until_s, prices),
        "usd": session_usd(first, 0.0, last["alive_s"], prices),
        "machine": first["instance_type"] or first["gpu"] or first["cpu"],
    }


def session_usd(line: Line, from_s: float, until_s: float, prices: Prices | None) -> float:
    """Price of a part of a session, in seconds from its beginning."""
    began = sessions.seconds(line["began"])
    its_own = [(-math.inf, line["price_per_hour"])]
    return price_usd(began + from_s, began + until_s, prices or its_own)


def epoch_ends(its: list[Line], prices: Prices | None) -> Iterator[tuple[int, float]]:
    """The epochs that a session finished, each with the session's price by then."""
    for before, line in itertools.pairwise(its):
        for epoch in range(before["epochs"] + 1, line["epochs"] + 1):
            yield epoch, session_usd(line, 0.0, line["alive_s"], prices)


def reached_s(its: list[Line], step: int) -> float:
    """Seconds from a session's beginning to a step that it reached.

    Between two of its lines the steps are taken to be equally long.
    """
    points = [(its[0]["first_step"], its[0]["startup_s"])]
    points += [(line["step"], line["alive_s"]) for line in its]
    for (step_before, s_before), (step_after, s_after) in itertools.pairwise(points):
        if step_before < step <= step_after:
            share = (step - step_before) / (step_after - step_before)
            return s_before + share * (s_after - s_before)
    return points[0][1]


def usd_to_top1(rows: list[dict[str, Any]], usd_after: dict[int, float]) -> dict[str, Any]:
    """By percentage of validation top-1: the first epoch that reached it, and the price by then."""
    found = {}
    for percent in TOP1_PERCENT:
        epoch = next((row["epoch"] for row in rows if row["val_top1"] >= percent), None)
        if epoch in usd_after:
            found[str(percent)] = {"epoch": epoch, "usd": usd_after[epoch]}
    return found


# ------------------------------------------------------------------------------ without a record


def one_session(
    name: str, ends_s: dict[int, float], price_per_hour: float, began: float
) -> list[Line]:
    """Lines of a session that left none, from when each of its epochs ended, in s."""
    line = {
        **{"session": name, "began": sessions.utc(began), "price_per_hour": price_per_hour},
        **{"first_step": 0, "step": 0, "startup_s": 0.0, "epochs": 0, "alive_s": 0.0},
        **{"gpu": None, "cpu": None, "instance_type": None, "ended": UNKNOWN},
    }
    return [line, *({**line, "epochs": epoch, "alive_s": s} for epoch, s in ends_s.items())]


def summarize_reference() -> dict[str, Any]:
    """The published run, from 27.2268 h at $0.97: see REFERENCE_NOTE."""
    ends_s = {epoch: epoch / 50 * REFERENCE_HOURS * 3600 for epoch in range(1, 51)}
    lines = one_session(REFERENCE_NAME, ends_s, REFERENCE_USD_PER_HOUR, began=0.0)
    pairs = zip(REFERENCE["epoch"], REFERENCE["val_top1"], strict=True)
    rows = [{"epoch": epoch, "val_top1": top1} for epoch, top1 in pairs]
    return summarize(lines, rows, None)


def unrecorded(
    folder: Path, rows: list[dict[str, Any]], options: ReportOptions, until: float
) -> list[Line]:
    """One session for epochs from before there were sessions: as long as they say that they took.

    It ends at a moment, in seconds since 1970. Raises UserError if its price is not known.
    """
    ends_s = dict(
        zip(
            (row["epoch"] for row in rows),
            itertools.accumulate(row["train_s"] + row["val_s"] for row in rows),
            strict=True,
        )
    )
    if not ends_s:
        return []
    price_per_hour = options.price_per_hour
    if price_per_hour is None:
        run = read_run(folder)
        if run is None:
            raise UserError(f"{folder} has no config.json with the price: give --price-per-hour")
        price_per_hour = run[0].price_per_hour
    return one_session(UNRECORDED, ends_s, price_per_hour, until - max(ends_s.values()))


# ------------------------------------------------------------------------------ spot prices


def read_spot_prices(text: str, source: str, first_s: float) -> tuple[Prices, str]:
    """Prices from what `aws ec2 describe-spot-price-history` prints, in order of time, and of what.

    Raises UserError if it is something else, mixes machines, or begins after `first_s`.
    """
    try:
        history = json.loads(text)["SpotPriceHistory"]
        prices = sorted(
            (sessions.seconds(entry["Timestamp"]), float(entry["SpotPrice"])) for entry in history
        )
        keys = ("InstanceType", "AvailabilityZone", "ProductDescription")
        kinds = sorted({", ".join(str(entry.get(key)) for key in keys) for entry in history})
        if not all(0 < price < math.inf for _, price in prices):
            raise ValueError("a price that is none")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{source} is not what `aws ec2 describe-spot-price-history` prints as JSON"
        ) from None
    if len(kinds) > 1:
        raise UserError(
            f"{source} has the prices of several machines ({'; '.join(kinds)}): ask for one "
            "instance type, one product and one availability zone"
        )
    if not prices or prices[0][0] > first_s:
        begins = f"begins at {sessions.utc(prices[0][0])}" if prices else "is empty"
        raise UserError(
            f"{source} {begins}, the run at {sessions.utc(first_s)}: ask for the prices with "
            f"--start-time {sessions.utc(first_s)}, which AWS keeps for 90 days, or give "
            "--price-per-hour"
        )
    return prices, kinds[0]


def first_began(lines: list[Line]) -> str:
    """When the first start was, by clocks that may have been set between two of them."""
    return min((line["began"] for line in lines), key=sessions.seconds)


def ask_aws(options: ReportOptions, lines: list[Line]) -> str:
    """What the AWS CLI says of the spot prices since the first session began; raises UserError."""
    types = {line["instance_type"] for line in lines}
    kind = options.instance_type or (types.pop() if len(types) == 1 else None)
    if not kind or not options.availability_zone:
        missing = "--availability-zone" if kind else "--instance-type"
        raise UserError(f"--spot-prices aws needs {missing}: the sessions do not tell it")
    command = [
        *("aws", "ec2", "describe-spot-price-history", "--output", "json"),
        *("--instance-types", kind, "--product-descriptions", "Linux/UNIX"),
        *("--availability-zone", options.availability_zone, "--start-time", first_began(lines)),
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--spot-prices aws needs the AWS CLI: install it, or name a file") from None
    if answer.returncode:
        raise UserError(f"`aws ec2 describe-spot-price-history` failed: {answer.stderr.strip()}")
    return answer.stdout


# ------------------------------------------------------------------------------ the page


def dollars(usd: float) -> str:
    """A price for people; below ten cents with four digits."""
    return f"${usd:.2f}" if usd >= 0.1 or usd == 0 else f"${usd:.4f}"


def hours(total_s: float) -> str:
    """Seconds as hours, and as a person says them."""
    return f"{total_s / 3600:.2f} h ({format_duration(total_s)})"


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """The lines of the page's first table, by what each is."""
    reasons = ", ".join(f"{count} {why}" for why, count in summary["interruptions"].items())
    count = sum(summary["interruptions"].values())
    rate, best = summary["img_per_s"], summary["best_top1"]
    found = {
        "from the first start to the end": hours(summary["wall_s"]),
        "with a machine": hours(summary["running_s"]),
        "without one": hours(summary["away_s"]),
        "starting up": hours(summary["startup_s"]),
        "training and validation": hours(summary["gpu_s"]),
        "training images a second": f"{rate:.0f}" if rate else "–",
        "interruptions": f"{count}: {reasons}" if count else "0",
        "work done twice": f"{summary['steps_twice']} steps, "
        f"{format_duration(summary['twice_s'])}, {dollars(summary['twice_usd'])}",
        "price of the machine": dollars(summary["usd"]),
    }
    if "storage_usd" in summary:
        found["price of the volumes"] = dollars(summary["storage_usd"])
        found["both"] = dollars(summary["usd"] + summary["storage_usd"])
    found["best top-1"] = "–" if best is None else f"{best:.2f} %"
    for percent in TOP1_PERCENT:
        reached = summary["usd_to_top1"].get(str(percent))
        text = "–"
        if reached is not None:
            # Nothing was free: by then no start had a price that is known.
            usd = dollars(reached["usd"]) if reached["usd"] > 0 else "not known"
            text = f"{usd} (epoch {reached['epoch']})"
        found[f"machine, to {percent} % top-1"] = text
    if summary["ended"] == UNKNOWN:  # what nobody wrote down is not 0
        hidden = ("without one", "starting up", "interruptions", "work done twice")
        found |= dict.fromkeys(hidden, "–")
    return found


def write_page(name: str, summary: dict[str, Any], notes: list[str]) -> str:
    """The report as Markdown."""
    ours, reference = facts(summary), facts(summarize_reference())
    cells = [("", name, REFERENCE_NAME)]
    cells += [(row, text, reference.get(row, "–")) for row, text in ours.items()]
    widths = [max(len(row[place]) for row in cells) for place in range(3)]
    cells.insert(1, tuple("-" * width for width in widths))
    lines = [f"# What run {name} cost", ""]
    for row in cells:
        padded = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    lines += [
        "",
        "| start | began (UTC) | took | of it starting up | steps | done twice | price | machine "
        "| ended |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    began = [  # of an unrecorded one nobody knows
        "–" if session["ended"] == UNKNOWN else session["began"][:19].replace("T", " ")
        for session in summary["sessions"]
    ]
    lines += [
        f"| {number} | {began[number - 1]} "
        f"| {format_duration(session['running_s'])} | {format_duration(session['startup_s'])} "
        f"| {session['first_step']} to {session['last_step']} | {session['steps_twice']} "
        f"| {dollars(session['usd'])} | {session['machine'] or '–'} | {session['ended']} |"
        for number, session in enumerate(summary["sessions"], start=1)
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


# ------------------------------------------------------------------------------ the picture


def draw(name: str, summary: dict[str, Any]) -> Figure:
    """Validation top-1 against dollars with the interruptions, beside the reference run's curve."""
    rcParams.update(STYLE)
    figure = Figure(figsize=(12, 6.75), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots()
    shown = {
        REFERENCE_NAME: (summarize_reference()["curve"], REFERENCE_VALIDATION),
        shortened(name): (summary["curve"], {**VALIDATION, "color": COLOURS[0]}),
    }
    handles: list[Artist] = []
    for run_name, (curve, style) in shown.items():
        usd, top1 = ([point[key] for point in curve] for key in ("usd", "val_top1"))
        label = f"{run_name}: best {max(top1):.2f} %, {dollars(usd[-1])} by the last epoch"
        handles += axes.plot(usd, top1, label=label, **style)
    stops = interruptions_usd(summary)
    for (why, stops_usd), colour in zip(stops.items(), COLOURS[1:], strict=False):
        for usd in stops_usd:
            axes.axvline(usd, color=colour, linewidth=1.2, linestyle=":", zorder=1)
        label = f"interruption: {why}" + f" ({len(stops_usd)})" * (len(stops_usd) > 1)
        handles += [axes.scatter(
            stops_usd, [1.0] * len(stops_usd), transform=axes.get_xaxis_transform(),
            marker="v", s=110, color=colour, clip_on=False, zorder=4, label=label,
        )]  # fmt: skip
    points = [point for curve, _ in shown.values() for point in curve]
    scale_dollars(axes, [point["usd"] for point in points] + list(itertools.chain(*stops.values())))
    axes.set(ylabel="validation top-1 (%)", ylim=(0, 1.08 * max(p["val_top1"] for p in points)))
    name_below(figure, handles)
    so_far = " so far" * (summary["ended"] not in (sessions.FINISHED, UNKNOWN))
    figure.suptitle(
        f"{shortened(name)}: {dollars(summary['usd'])}{so_far}", fontsize=16, parse_math=False
    )
    return figure


def interruptions_usd(summary: dict[str, Any]) -> dict[str, list[float]]:
    """The run's price at each interruption, by the reasons."""
    stops: dict[str, list[float]] = {}
    totals = itertools.accumulate(session["usd"] for session in summary["sessions"])
    for session, usd in zip(summary["sessions"], totals, strict=True):
        if session["ended"] in summary["interruptions"]:
            stops.setdefault(session["ended"], []).append(usd)
    return stops


def scale_dollars(axes: Axes, values: list[float]) -> None:
    """An axis on which equal distances are equal factors, for a run may cost a tenth of another."""
    axes.set_xscale("log")
    values = [usd for usd in values if usd > 0]  # hours without a price stand nowhere
    low, high = min(values) / 1.4, max(values) * 1.4
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    factors = (1, 2, 5) if len(decades) < 4 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    axes.set_xticks(ticks, [f"${tick:.2f}" if 0.01 <= tick < 1 else f"${tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlim=(low, high), xlabel="price of the machine so far (logarithmic)")


# ------------------------------------------------------------------------------ the command


def choose_prices(options: ReportOptions, lines: list[Line]) -> tuple[Prices | None, str]:
    """What stands in place of the sessions' own prices, None for nothing, and a note about it."""
    if options.price_per_hour is not None and options.spot_prices:
        raise UserError("--price-per-hour and --spot-prices are two prices: give one of them")
    if options.price_per_hour is not None:
        if not 0 < options.price_per_hour < math.inf:
            raise UserError(f"price_per_hour is {options.price_per_hour}: it must be above 0")
        return [
            (-math.inf, options.price_per_hour)
        ], f"At {dollars(options.price_per_hour)} an hour."
    if options.spot_prices:
        if lines[0]["session"] == UNRECORDED:
            raise UserError(
                f"{options.folder / sessions.FILE} does not tell all the hours when it trained, "
                "which --spot-prices needs: give --price-per-hour"
            )
        if options.spot_prices == "aws":
            text, source = ask_aws(options, lines), "what AWS answers"
        else:
            source = options.spot_prices
            text = read_text(Path(source))
        prices, kind = read_spot_prices(text, source, sessions.seconds(first_began(lines)))
        note = f"At the spot prices in {source}, of {kind}."
        others = {line["instance_type"] for line in lines} - {kind.partition(",")[0], None}
        if others:
            note += (
                f" But some starts were on {' and '.join(sorted(others))}, which has another price."
            )
        return prices, note
    paid = sorted({line["price_per_hour"] for line in lines})
    note = "At {} an hour, as the trainer was told.".format(" and ".join(map(dollars, paid)))
    if paid == [0]:
        note = "No price is known: give --price-per-hour."
    elif paid[0] == 0:
        note += " Where it was told $0.00 no price was known, and the sums lack it."
    return None, note


def collect_notes(lines: list[Line], summary: dict[str, Any], price_note: str) -> list[str]:
    """What a reader has to know about the numbers."""
    notes = [price_note]
    epochs = max(line["epochs"] if line["session"] == UNRECORDED else 0 for line in lines)
    if epochs:
        notes.append(
            f"Of the first {epochs} epochs there is no {sessions.FILE}: their hours are those of "
            "training and validation in metrics.jsonl; start-ups, interruptions and work done "
            "twice are not known."
        )
    notes.append(
        "A start counts from its process's beginning to its last line: the machine's own start and "
        "the last copies to a mirror are not in it."
    )
    if KILLED in summary["interruptions"]:
        notes.append(
            "Where a start was killed, its last minute may be missing; where another machine went "
            "on from a mirror, all since the last checkpoint, the work that was done twice with it."
        )
    return [*notes, REFERENCE_NOTE]


def read_text(path: Path) -> str:
    """A file's text; raises UserError if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def main() -> None:
    """The report, on the screen and in the run's folder."""
    options = parse_options(ReportOptions, __doc__)
    folder = options.folder
    if not folder.is_dir():
        raise UserError(f"no such run: there is no folder {folder}")
    if not 0 <= options.storage_usd_per_month < math.inf:
        raise UserError(
            f"storage_usd_per_month is {options.storage_usd_per_month}: it must be 0 or more"
        )
    metrics = folder / "metrics.jsonl"
    rows = read_metrics(metrics, FIELDS) if metrics.exists() else []
    lines = sessions.read(folder)
    began = sessions.seconds(first_began(lines)) if lines else time.time()
    lines = (
        unrecorded(
            folder, rows[: min(line["epochs"] for line in lines)] if lines else rows, options, began
        )
        + lines
    )
    if not lines:
        raise UserError(
            f"{folder} has neither {sessions.FILE} nor a finished epoch: nothing to tell"
        )
    prices, price_note = choose_prices(options, lines)
    summary = summarize(lines, rows, prices, time.time())
    if options.storage_usd_per_month:
        summary["storage_usd"] = options.storage_usd_per_month * summary["wall_s"] / MONTH_S

    name = folder.resolve().name
    notes = collect_notes(lines, summary, price_note)
    page = write_page(name, summary, notes)
    print(page)
    picture = folder / "cost.png"
    if summary["usd"] and summary["curve"]:
        page += "\n![Top-1 against dollars](cost.png)\n"
        write_png(draw(name, summary), picture)
    else:
        picture.unlink(missing_ok=True)  # of a report before this one
    write_atomically(folder / "cost.md", page.encode())
    record = {"run": name, **summary, "notes": notes, "reference": summarize_reference()}
    write_json(folder / "cost.json", record)
    print(f"{folder}/cost.md, cost.json" + ", cost.png" * bool(summary["usd"] and summary["curve"]))


if __name__ == "__main__":
    run_stage(main)

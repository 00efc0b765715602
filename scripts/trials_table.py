"""The table of a log of scripts/trials.py, and what the spread of its runs can tell apart."""

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import Config, format_duration


def top1(line: dict[str, Any]) -> float:
    """Accuracy of a finished run in percent."""
    return 100 * line["correct1"] / line["images"]


def pooled_deviation(groups: list[list[float]]) -> tuple[float, int]:
    """Standard deviation within the groups, all taken together, and its degrees of freedom."""
    groups = [group for group in groups if group]
    squares = sum(sum((x - statistics.fmean(group)) ** 2 for x in group) for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def alike(groups: list[list[float]]) -> list[list[float]]:
    """The groups without those that spread far more than the others do, by an F test at 0.1 %."""
    spread = sorted((group for group in groups if len(group) > 1), key=statistics.variance)
    while len(spread) > 1:
        others, freedom = pooled_deviation(spread[:-1])
        ratio = statistics.variance(spread[-1]) / others**2 if others else 0.0
        if stats.f.sf(ratio, len(spread[-1]) - 1, freedom) > 0.001:
            break
        spread.pop()
    return spread


def interval(pair: list[list[float]], others: list[list[float]]) -> float | None:
    """Half the 95 % interval of the difference between two means; None if nothing is known.

    Other variants' seeds may part by more, or by less: they stand in only where one of the two has
    a single run. Where one of the two parts by far more than the others do, Welch's interval,
    which takes the two for unlike.
    """
    if min(map(len, pair)) > 1 and not all(group in others for group in pair):
        parts = [statistics.variance(group) / len(group) for group in pair]
        degrees = [len(group) - 1 for group in pair]
        freedom = sum(parts) ** 2 / sum(p**2 / d for p, d in zip(parts, degrees, strict=True))
        return stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    deviation, freedom = pooled_deviation(pair if min(map(len, pair)) > 1 else others)
    if not freedom:
        return None
    return (
        stats.t.ppf(0.975, freedom) * deviation * math.sqrt(sum(1 / len(group) for group in pair))
    )


def table(
    title: str, names: list[str], lines: list[dict[str, Any]], goals: Sequence[float] = ()
) -> str:
    """The log as a table in Markdown, with what its spread can tell apart.

    `goals` are accuracies in percent, of which a second table says when they were reached.
    """
    finished = {
        name: [line for line in lines if line["variant"] == name and line["ended"] == "finished"]
        for name in names
    }
    results = {name: [top1(line) for line in runs] for name, runs in finished.items()}
    usual = alike([*results.values()])
    parts = [
        f"# {title}",
        "",
        "| variant | top-1 of the last epoch | runs | each | against the first | epochs | training "
        "| img/s | settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        runs, group = finished[name], results[name]
        failures = sum(line["variant"] == name and line["ended"] != "finished" for line in lines)
        if not group:
            parts.append(f"| {_cell(name)} | none finished, {failures} failed | 0 | | | | | | |")
            continue
        mean = statistics.fmean(group)
        spread = f" ± {statistics.stdev(group):.2f}" if len(group) > 1 else ""
        against = ""
        if name != names[0] and results[names[0]]:
            against = f"{round(mean - statistics.fmean(results[names[0]]), 2) + 0.0:+.2f}"
            reach = interval([group, results[names[0]]], usual)
            if reach is not None:
                against += f" ± {reach:.2f}"
        commits = {line["commit"][:7] for line in runs if "commit" in line}
        several = f", commits {' '.join(sorted(commits))}" * (len(commits) > 1)
        seconds = statistics.fmean(line["train_s"] for line in runs)
        rate = sum(line["train_images"] for line in runs) / sum(line["train_s"] for line in runs)
        epochs = "/".join(sorted({str(line["epochs"]) for line in runs}))
        parts.append(
            f"| {_cell(name)} | {mean:.2f} %{spread} | {len(group)}"
            + f", {failures} failed" * bool(failures)
            + f" | {', '.join(f'{value:.2f}' for value in group)} | {against} | {epochs} "
            f"| {format_duration(seconds)} | {rate:.0f} | {_differences(runs, lines)}{several} |"
        )
    parts += ["", _statement(results, lines), ""]
    if goals:
        parts += [*_times_to_reach(finished, goals), ""]
    return "\n".join(parts)


def train_s_to_reach(line: dict[str, Any], goal: float) -> float | None:
    """Seconds of training before the first epoch's end with a top-1 of `goal` percent or more."""
    seconds = itertools.accumulate(line["epochs_train_s"])
    for elapsed, correct in zip(seconds, line["epochs_correct1"], strict=True):
        if 100 * correct >= goal * line["images"]:
            return elapsed
    return None


def _times_to_reach(runs: dict[str, list[dict[str, Any]]], goals: Sequence[float]) -> list[str]:
    """The lines of a table of the training that each variant needed for each accuracy."""
    parts = [
        "Training before the first validation with such a top-1, in the mean of the runs that "
        "reached it:",
        "",
        f"| variant | {' | '.join(f'{goal:g} %' for goal in goals)} |",
        "|---" * (len(goals) + 1) + "|",
    ]
    for name, lines in runs.items():
        cells = []
        for goal in goals:
            # Logs were once without the epochs' figures.
            known = [line for line in lines if "epochs_train_s" in line]
            times = [train_s_to_reach(line, goal) for line in known]
            reached = [time for time in times if time is not None]
            mean = format_duration(statistics.fmean(reached)) if reached else "never"
            cells.append(f"{mean} ({len(reached)} of {len(times)})" if known else "not logged")
        parts.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return parts


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _differences(runs: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    """The settings of a variant's runs that not all runs have alike."""
    names = {name for other in lines for name in other["settings"]} - {"seed"}
    default = dataclasses.asdict(Config())

    def values(of: list[dict[str, Any]], name: str) -> list[str]:
        return sorted({str(line["settings"].get(name, default.get(name))) for line in of})

    return _cell(
        ", ".join(
            f"{name} {'/'.join(values(runs, name))}"
            for name in sorted(names)
            # A setting that is gone has no default.
            if len(values(lines, name)) > 1 and values(runs, name) != ["None"]
        )
    )


def _statement(results: dict[str, list[float]], lines: list[dict[str, Any]]) -> str:
    """What the spread can tell apart, and what the number of validation images adds."""
    groups = alike([*results.values()])
    deviation, freedom = pooled_deviation(groups)
    wide = [name for name, group in results.items() if len(group) > 1 and group not in groups]
    images = {line["images"] for line in lines if line["ended"] == "finished"}
    finished = [value for group in results.values() for value in group]
    if not finished:
        return "No run has finished: there is nothing to compare."
    share = statistics.fmean(finished) / 100
    counting = 100 * math.sqrt(share * (1 - share) / min(images))
    text = (
        f"Against other validation images an accuracy is uncertain by {counting:.2f} points "
        f"(one standard deviation, {min(images):,} images); "
        + (
            "all variants share that."
            if len(images) == 1
            else "not all runs had the same ones, and what differs may be theirs."
        )
    )
    if not freedom:
        return f"One run each: what differs may be the seed's doing. {text}"
    fewest = min(len(group) for group in results.values() if group)
    least = stats.t.ppf(0.975, freedom) * deviation * math.sqrt(2 / fewest)
    return (
        f"Seeds part by {deviation:.2f} points (standard deviation within variants, {freedom} "
        f"degree{'s' * (freedom > 1)} of freedom"
        + f"; without {', '.join(wide)}, which part by far more"
        * bool(wide)
        + f"). Between variants of {fewest} "
        f"run{'s' * (fewest > 1)} each, differences below {least:.2f} points cannot be told from "
        "chance (95 %, one comparison at a time). The interval beside a difference is that of the "
        "two variants' own spread, where each has two runs or more, else of that of all. "
        f"{text}"
    )

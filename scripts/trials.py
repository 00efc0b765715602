"""Train variants of a recipe, several seeds each, and say what their spread can tell apart.

    python3 scripts/trials.py PLAN.toml --seeds 0 1
    python3 scripts/trials.py PLAN.toml --report

A plan is a TOML file: [common] has settings of every run, each [variants.NAME] those in which the
variant differs. An equal number of epochs is one budget; equal time is another, for which each
variant has `epochs` of its own: the table has the time that each took. With top1_to_reach, a list
of percentages, a second table says how long each had trained when it first validated as well.

Every run is `trainer.py` in a process of its own, one after another, seed by seed, so that a trial
that is broken off has as many of each variant as of the others. The same command goes on where it
was, inside a run too, and several may share a plan's variants or seeds. Each run's end, failures
included, is a line of the log beside the plan, PLAN.jsonl: settings, counts, time, commit, versions
and hardware. The table beside it, PLAN.md, is made from the log: top-1 of the last epoch (not of
the best, which would favour the noisy), its mean and standard deviation, and the difference from
the first variant with its 95 % interval.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from trials_table import table

from utils import (
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_COPIED,
    EXIT_USER_ERROR,
    RECIPES,
    RESULT_SETTINGS,
    Config,
    UserError,
    as_arguments,
    changed_settings,
    check_config,
    commit,
    is_number,
    parse_options,
    read_json,
    read_metrics,
    read_run,
    run_folder,
    run_stage,
    write_atomically,
)

# Of a finished run's line in the log, and of metrics.jsonl.
NEEDED = ("correct1", "images", "train_s", "train_images")
FIELDS = (
    *("val_correct1", "val_correct5", "val_images", "val_loss"),
    *("train_s", "val_s", "train_images"),
)
TRAINER = Path(__file__).parent.parent / "trainer.py"
# Settings that a trial chooses itself; and a plan says what the learning rate is.
OURS = {"name", "seed", "runs_folder", "max_lr_from_finder"}
# Runs in which one of these differs are not of the same variant.
FINISHED = (0, EXIT_NOT_COPIED)  # the second without all that belongs into its mirror
OF_A_VARIANT = (RESULT_SETTINGS | {"train_folder_name", "val_folder_name"}) - OURS


@dataclasses.dataclass(frozen=True)
class TrialOptions:
    """Which trials."""

    plan: tyro.conf.Positional[Path]
    """TOML file with the variants"""
    seeds: tuple[int, ...] = (0, 1)
    """a run of every variant for each"""
    variants: tuple[str, ...] = ()
    """only these of the plan; all, if none is named"""
    runs_folder: Path = Path("runs/trials")
    """folder that holds the runs"""
    report: bool = False
    """train nothing: make the table from the log"""


# ------------------------------------------------------------------------------ the plan


def read_plan(path: Path) -> dict[str, Config]:
    """The settings of every variant, in the plan's order; raises UserError naming what is wrong."""
    try:
        plan = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no plan {path}") from None
    except ValueError as error:  # no text is one too
        raise UserError(f"{path} is no TOML file: {error}") from None
    unknown = plan.keys() - {"title", "top1_to_reach", "common", "variants"}
    common, variants = plan.get("common", {}), plan.get("variants")
    if (
        unknown
        or not isinstance(variants, dict)
        or not variants
        or not all(isinstance(settings, dict) for settings in (common, *variants.values()))
    ):
        raise UserError(
            f"{path} needs [variants.NAME] for each variant, and may have title, top1_to_reach and "
            "[common]" + f", not {', '.join(sorted(unknown))}" * bool(unknown)
        )
    wanted = plan.get("top1_to_reach", [])
    if not isinstance(wanted, list) or not all(type(one) in (int, float) for one in wanted):
        raise UserError(f"{path}: top1_to_reach is {wanted!r}, and must be a list of percentages")
    folders: dict[str, str] = {}
    for name in variants:
        try:
            run_folder("", run_name(name, 0))
        except UserError as error:
            raise UserError(f"{path}, variant {name!r}: {error}") from None
        if (other := folders.setdefault(run_name(name, 0), name)) != name:
            raise UserError(
                f"{path}: the runs of variants {other} and {name} would share a folder: name one "
                "with other letters or digits"
            )
    return {
        name: _config(f"{path}, variant {name}", {**common, **settings})
        for name, settings in variants.items()
    }


def _config(where: str, settings: dict[str, Any]) -> Config:
    """A recipe's settings with others in their places; raises UserError."""
    settings = dict(settings)
    recipe = settings.pop("recipe", "reference")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise UserError(f"{where}: no recipe {recipe}: there are {', '.join(RECIPES)}")
    known = {field.name: field.type for field in dataclasses.fields(Config)}
    for name, value in settings.items():
        if name not in known or name in OURS:
            raise UserError(f"{where}: {name} is no setting that a plan may have")
        allowed = {float: (float, int)}.get(known[name], (known[name],))
        if isinstance(known[name], type) and type(value) not in allowed:
            raise UserError(f"{where}: {name} is {value!r}, and must be a {known[name].__name__}")
    config = dataclasses.replace(RECIPES[recipe].config, **settings)
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def title_and_goals(path: Path) -> tuple[str, list[float]]:
    """The plan's title, or its file's name, and the accuracies in percent to be reached."""
    plan = tomllib.loads(path.read_text())
    return str(plan.get("title", path.stem)), plan.get("top1_to_reach", [])


def run_name(variant: str, seed: int) -> str:
    """A name for the folder of a run, of the characters that such a name may have."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', variant).strip('_')}-seed{seed}"


# ------------------------------------------------------------------------------ the runs


def train(config: Config) -> tuple[int, bool]:
    """The trainer's exit code, and whether a signal asked for an end, which it may have been at.

    Its output goes to the run's own train.log and the screen.
    """
    command = [sys.executable, str(TRAINER), *as_arguments(config)]
    is_asked = False

    def pass_on(*_: object) -> None:
        nonlocal is_asked
        is_asked = True
        process.terminate()

    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            while True:
                try:
                    return process.wait(), is_asked
                except KeyboardInterrupt:  # Ctrl-C reaches the trainer too, which saves
                    is_asked = True
        finally:
            signal.signal(signal.SIGTERM, before)


def check_commit(config: Config) -> None:
    """Raises UserError if the run has begun at another commit: it would be a run of neither."""
    folder = run_folder(config.runs_folder, config.name)
    record = read_json(folder / "config.json")
    if record is None:
        return
    begun = record.get("commit") if isinstance(record, dict) else None
    begun, here = (str(text or "").removesuffix("-dirty") for text in (begun, commit()))
    if begun != here:
        raise UserError(
            f"{folder} was begun at commit {begun or 'unknown'}, and this is {here or 'unknown'}: "
            "go on with it there, or remove it"
        )


def outcome(config: Config, seed: int, variant: str, exit_code: int) -> dict[str, Any]:
    """A line of the log: what a run was, and what came of it.

    Raises UserError where the run in its folder was, and ended, as another one.
    """
    folder = run_folder(config.runs_folder, config.name)
    run = read_run(folder)  # None of one that was refused
    before, record = (vars(run[0]), run[2]) if run else (vars(config), {})
    if different := changed_settings(before, config, OF_A_VARIANT):
        raise UserError(
            f"{folder} holds another run ({'; '.join(different)}): remove it, or choose another "
            "--runs-folder"
        )
    path = folder / "metrics.jsonl"
    rows = read_metrics(path, FIELDS) if path.exists() else []
    differing = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value != getattr(Config(), name) and name not in {"name", "runs_folder"}
    }
    line: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "ended": "finished" if exit_code in FINISHED else f"failed with exit code {exit_code}",
        "epochs": len(rows),
        "settings": differing,
    }
    if rows:
        last = rows[-1]
        line |= {
            "correct1": last["val_correct1"],
            "correct5": last["val_correct5"],
            "images": last["val_images"],
            "val_loss": last["val_loss"],
            "train_s": sum(row["train_s"] for row in rows),
            "val_s": sum(row["val_s"] for row in rows),
            "train_images": sum(row["train_images"] for row in rows),
            "epochs_train_s": [row["train_s"] for row in rows],
            "epochs_correct1": [row["val_correct1"] for row in rows],
        }
    kept = ("commit", "versions", "hardware", "started")
    return line | {name: record[name] for name in kept if name in record}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; raises UserError naming the one that is damaged."""
    lines = []
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        if not text:  # where one was removed
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not is_whole(line):
            raise UserError(f"{path}, line {number} is damaged: mend or remove it")
        lines.append(line)
    return lines


def is_whole(line: Any) -> bool:
    """Whether a value from a log is what `outcome` makes, as far as the table needs it."""
    try:
        done = line["ended"] == "finished"
        numbers = [line[name] for name in ("seed", "epochs", *NEEDED * done)]
        epochs = [line.get(name, []) for name in ("epochs_train_s", "epochs_correct1")]
        return (
            isinstance(line["settings"], dict)
            and all(isinstance(line[name], str) for name in ("variant", "ended"))
            and isinstance(line.get("commit", ""), str)
            and all(map(is_number, itertools.chain(numbers, *epochs)))
            and all(line[name] > 0 for name in ("images", "train_s") * done)
            and len(epochs[0]) == len(epochs[1])
        )
    except (KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def alone(plan: Path) -> Iterator[None]:
    """Keeps other trials of a plan from writing its log and its table meanwhile."""
    with plan.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def logged(path: Path, variant: str, seed: int, settings: Config) -> dict[str, Any] | None:
    """The line of a run; raises UserError if it is of other settings than the plan has by now."""
    for line in read_log(path):
        if (line["variant"], line["seed"]) == (variant, seed):
            if different := changed_settings(line["settings"], settings, OF_A_VARIANT):
                raise UserError(
                    f"{variant}, seed {seed} is in {path} with other settings "
                    f"({'; '.join(different)}): name the variant otherwise, or remove that line "
                    "and the run's folder"
                )
            return line
    return None


def run_trials(options: TrialOptions, plan: dict[str, Config], log_path: Path) -> int:
    """Train what the log does not have yet.

    The exit code: 1 if a run has failed, 75 if one was interrupted, 76 if its budget is spent.
    """
    failed = False
    for variant, settings in plan.items():  # before any is trained
        for seed in options.seeds:
            check_config(dataclasses.replace(settings, seed=seed))
            logged(log_path, variant, seed, settings)
    for seed, (variant, settings) in itertools.product(options.seeds, plan.items()):
        if line := logged(log_path, variant, seed, settings):
            failed = failed or line["ended"] != "finished"
            continue
        config = dataclasses.replace(
            settings,
            name=run_name(variant, seed),
            seed=seed,
            runs_folder=str(options.runs_folder / log_path.stem),
        )
        check_commit(config)
        print(f"\n{variant}, seed {seed}", flush=True)
        exit_code, is_asked = train(config)
        if exit_code in {EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM}:
            return EXIT_INTERRUPTED
        if exit_code == EXIT_USER_ERROR:  # which is the user's to mend, and no result
            raise UserError(f"{variant}, seed {seed} did not run: the line above says why")
        if exit_code == EXIT_BUDGET:  # with everything saved
            return EXIT_BUDGET
        if exit_code < 0:
            raise UserError(
                f"{variant}, seed {seed} was ended by signal {-exit_code} "
                f"({signal.Signals(-exit_code).name}), from outside or for want of memory: the "
                "same command goes on",
                EXIT_FAILED,
            )
        line = outcome(config, seed, variant, exit_code)
        with alone(options.plan):
            if not logged(log_path, variant, seed, settings):  # by trials that share the plan
                lines = [*read_log(log_path), line]
                content = "".join(json.dumps(one) + "\n" for one in lines)
                write_atomically(log_path, content.encode())
        failed = failed or exit_code not in FINISHED
        if is_asked:
            return EXIT_INTERRUPTED
    return EXIT_FAILED if failed else 0


# ------------------------------------------------------------------------------ the command


def choose(path: Path, plan: dict[str, Config], names: tuple[str, ...]) -> dict[str, Config]:
    """The named variants of a plan, or all; raises UserError for a name that it has not."""
    for name in names:
        if name not in plan:
            known = ", ".join(f'"{variant}"' for variant in plan)  # some have commas of their own
            raise UserError(f'{path} has no variant "{name}": it has {known}')
    return {name: plan[name] for name in names or plan}


def main() -> None:
    """Train what is missing, then make the table."""
    options = parse_options(TrialOptions, __doc__)
    if options.plan.suffix != ".toml":  # its log and its table have its name
        raise UserError(f"{options.plan} is no plan: it must be called something.toml")
    plan = read_plan(options.plan)
    chosen = choose(options.plan, plan, options.variants)
    log_path = options.plan.with_suffix(".jsonl")
    exit_code = 0 if options.report else run_trials(options, chosen, log_path)
    title, goals = title_and_goals(options.plan)
    with alone(options.plan):
        text = table(title, list(plan), read_log(log_path), goals)
        write_atomically(options.plan.with_suffix(".md"), text.encode())
    print(f"\n{text}")
    sys.exit(exit_code)


if __name__ == "__main__":
    run_stage(main)

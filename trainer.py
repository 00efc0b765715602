"""Train ResNet-50 on a folder of images, from random weights to the last evaluation.

    nohup python3 trainer.py > train.log 2>&1 &       the reference recipe, on ImageNet-1k
    python3 trainer.py --recipe fast                  75.3 % for a tenth of the price: a target
    python3 trainer.py --recipe quickstart            the embedded digits, minutes on a CPU
    python3 trainer.py --dry-run                      the settings, the schedule, time and price
    torchrun --standalone --nproc_per_node=4 trainer.py      the same run on four GPUs

The reference recipe's target is the published run's 75.32 % top-1 and 92.59 % top-5 in 50 epochs
on one A10G for $26.41; this code has not been run on ImageNet yet.

Reads a folder of training and one of validation images. Writes into runs/<name>/: config.json,
metrics.jsonl, train.log, checkpoints/, best.pt and last.pt (weights under torchvision's names) and
result.json; sessions.jsonl tells what each start cost. The same command again goes on where the run
was. Exit code 75 says that a signal, or EC2's notice that it takes the instance, stopped it with
everything saved, 76 that its budget is spent, 77 that it is finished but its mirror not complete,
78 that it has not begun, since its mirror does not answer.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import tqdm

import augment
import checkpoint
import data
import distributed
import engine
import image_files
import interruption
import mirror
import preflight
import sessions
from model import ResNet50Wrapper, load_weights
from utils import (
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_COPIED,
    EXIT_USER_ERROR,
    FETCHED,
    Config,
    ConfigOptions,
    UserError,
    check_config,
    format_duration,
    is_number,
    is_out_of_memory,
    learning_rate,
    log,
    lr_settings,
    on_terminal,
    parse_options,
    read_json,
    run_folder,
    run_stage,
    save_config,
    start_log,
    steps_per_epoch,
    total_epochs,
    train_px,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """What the trainer is asked to do."""

    config: ConfigOptions
    dry_run: bool = False
    """train nothing: print settings, schedule, what was checked (GPU, disks, mirror, clock, budget)
    and an estimate of time, memory and price; exit code 2 if there is a problem"""


# ------------------------------------------------------------------------------ an epoch


def train_epoch(
    run: engine.Run, config: Config, train_set: image_files.ImageSet, heed: distributed.Heed
) -> None:
    """Train what is left of the epoch under way; calls `heed` before and after each step."""
    epoch, steps = len(run.history), steps_per_epoch(config, train_set)
    first_step = run.step - epoch * steps
    batches = data.train_batches(train_set, config, epoch, first_step, run.device.type == "cuda")
    run.model.train()
    clock = time.monotonic()
    with (
        Progress(run, config, train_set) as progress,
        contextlib.closing(data.to_device(batches, run.device)) as batches,
    ):
        for images, labels in distributed.heeded(batches, heed):
            batch = run.step - epoch * steps
            batch_size = min(config.batch_size, len(train_set) - batch * config.batch_size)
            rate = learning_rate(config, run.step, steps)
            mix = augment.draw_mix(config, epoch, batch, images.shape[1])
            engine.train_step(run, images, labels, rate, batch_size, mix)
            now = time.monotonic()
            run.epoch_s += now - clock
            run.elapsed_s += now - clock
            clock = now
            progress.tell(now)
    if run.device.type == "cuda":
        torch.cuda.synchronize()  # the steps still under way belong to this epoch's time
        run.epoch_s += time.monotonic() - clock
        run.elapsed_s += time.monotonic() - clock


def train_epochs(
    run: engine.Run,
    config: Config,
    folder: Path,
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
    save: Callable[[], None],
    heed: distributed.Heed,
) -> None:
    """Train and validate the epochs that are left, each saved at its end."""
    while len(run.history) < total_epochs(config):
        train_epoch(run, config, train_set, heed)
        finish_epoch(run, config, val_set, heed)
        save()
        if config.tensorboard:
            distributed.in_main(write_tensorboard, folder, run.history)


class Progress:
    """Says every few seconds how an epoch is going: a bar on a terminal, else a line in the log."""

    def __init__(self, run: engine.Run, config: Config, train_set: image_files.ImageSet) -> None:
        self.run, self.config, self.train_set = run, config, train_set
        self.steps = steps_per_epoch(config, train_set)
        self.epoch = len(run.history)
        self.first_step = run.step
        self.told_at, self.told_step = time.monotonic(), run.step

    def __enter__(self) -> "Progress":
        done = self.run.step - self.epoch * self.steps
        title = f"epoch {self.epoch + 1}/{total_epochs(self.config)}"
        hidden = not on_terminal() or not distributed.is_main()
        self.bar = tqdm.tqdm(
            total=self.steps, initial=done, desc=title, disable=hidden, file=sys.stdout, leave=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def tell(self, now: float) -> None:
        """Write a line if one is due; the only place in an epoch that waits for the device.

        Loss and top-1 are those of the main process's images, for which it waits for no other.
        """
        run, config = self.run, self.config
        self.bar.update()
        if config.compile and run.step == self.first_step + 1:
            # Compiling took most of it, which is no rate to reckon with.
            self.told_at, self.told_step = now, run.step
            return
        if now - self.told_at < config.log_interval_s or not distributed.is_main():
            return
        totals = engine.read_totals(run.totals, "train")
        step_s = (now - self.told_at) / (run.step - self.told_step)
        self.told_at, self.told_step = now, run.step
        val_s = run.history[-1]["val_s"] if run.history else 0.0
        left_epochs = total_epochs(config) - self.epoch
        left_s = steps_left(config, self.epoch, run.step, self.steps) * step_s
        left_s += left_epochs * val_s
        parts = [
            f"loss {totals['train_loss']:.2f}",
            f"top-1 {totals['train_top1']:.1f} %",
            f"lr {learning_rate(config, run.step, self.steps):.3g}",
            f"{config.batch_size / step_s:.0f} img/s",
            f"ETA {format_duration(left_s)}",
        ]
        if config.price_per_hour:
            whole = run.spent_usd + config.price_per_hour * left_s / 3600
            parts.append(f"${run.spent_usd:.2f} of ${whole:.2f}")
        self.bar.set_postfix_str("  ".join(parts))
        where = f"epoch {self.epoch + 1}/{total_epochs(config)}"
        log.debug(
            "%s  step %d/%d  %s",
            where,
            run.step - self.epoch * self.steps,
            self.steps,
            "  ".join(parts),
        )


def finish_epoch(
    run: engine.Run, config: Config, val_set: image_files.ImageSet, heed: distributed.Heed
) -> None:
    """Validate, and add the epoch's row to the history and the screen."""
    totals = engine.totals_of_all(run.totals)
    train, trouble = engine.read_totals(totals, "train"), totals["trouble"].tolist()
    with distributed.agreed():
        engine.refuse_trouble(run, trouble)
    distributed.copy_from_main(run.model.buffers())
    if run.average:
        distributed.copy_from_main(run.average.model.buffers())
    started = time.monotonic()
    val_batches = data.val_batches(val_set, config, pin=run.device.type == "cuda")
    run.model.eval()  # an error of memory asks whether it was in training
    val = engine.evaluate(run.kept, val_batches, run.device, run.precision, heed)
    val_s = time.monotonic() - started
    steps = run.step // (len(run.history) + 1)
    # At the end of a OneCycle that of its end, though another one may follow.
    is_extra = len(run.history) >= config.epochs
    cycle = config if is_extra else dataclasses.replace(config, extra_epochs=0)
    row = {
        "epoch": len(run.history) + 1,
        **train,
        **val,
        "learning_rate": learning_rate(cycle, run.step, steps),
        "train_px": train_px(config, len(run.history)),
        "skipped_steps": trouble[0],
        "train_s": run.epoch_s,
        "val_s": val_s,
        "img_per_s": train["train_images"] / run.epoch_s,
    }
    improved = row["val_top1"] > max((row["val_top1"] for row in run.history), default=-1.0)
    if improved:
        # In one piece, since many small ones would stay between what is freed.
        run.best = torch.frombuffer(
            bytearray(checkpoint.encode(run.kept.model.state_dict())), dtype=torch.uint8
        )
    run.history.append(row)
    run.elapsed_s += val_s
    run.epoch_s = 0.0
    for total in run.totals.values():
        total.zero_()
    run.totals["trouble"][1] = trouble[1]  # a row of skipped steps may go on in the next epoch
    log.info(
        "epoch %d/%d  train loss %.4f top-1 %.2f %% top-5 %.2f %%  val loss %.4f top-1 %.2f %% "
        "top-5 %.2f %%  lr %.7f  %.0f s + %.0f s  %.0f img/s%s%s",
        row["epoch"], total_epochs(config), row["train_loss"], row["train_top1"],
        row["train_top5"], row["val_loss"], row["val_top1"], row["val_top5"],
        row["learning_rate"], row["train_s"], val_s, row["img_per_s"], "  best" * improved,
        f"  {trouble[0]} steps skipped by fp16's loss scaling" * bool(trouble[0]),
    )  # fmt: skip


# ------------------------------------------------------------------------------ before training


def open_images(
    config: Config, state: dict[str, Any] | None
) -> tuple[image_files.ImageSet, image_files.ImageSet, list[str]]:
    """As image_files.open_images; the main process checks the files for all others."""
    with distributed.agreed():
        known = state and state["images"]["skipped"]
        opened = distributed.in_main(image_files.open_images, config, known)
    skipped = distributed.from_main(lambda: opened[2])
    with distributed.agreed():
        return opened if distributed.is_main() else image_files.open_images(config, skipped)


def steps_left(config: Config, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Steps from `step`, in `epoch`, to the end of the run, as so many of that epoch's size.

    A step takes as long as it has pixels, so that later, larger ones count for more than one.
    """
    px = train_px(config, epoch)
    later = range(epoch + 1, total_epochs(config))
    shares = sum((train_px(config, other) / px) ** 2 for other in later)
    return (epoch + 1) * steps_per_epoch - step + shares * steps_per_epoch


def take_max_lr(config: Config, folder: Path, state: dict[str, Any] | None) -> Config:
    """The settings with the LR finder's max_lr, where that was asked for.

    A run that has begun keeps the one that it began with, whatever was found since.
    """
    if not config.max_lr_from_finder:
        return config
    if state is not None:
        return dataclasses.replace(config, max_lr=state["config"]["max_lr"])
    path = folder / "lr_finder.json"
    found = read_json(path)
    rate = found.get("suggested_max_lr") if isinstance(found, dict) else None
    if not is_number(rate):
        what = f"no {path}" if found is None else f"{path} has no suggested_max_lr"
        raise UserError(f"{what}: run python3 lr_finder.py first, with the settings of this run")
    settings = found.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: run python3 lr_finder.py again")
    other = [
        f"{name} {settings[name]} instead of {value}"
        for name, value in lr_settings(config).items()
        if settings.get(name, value) != value
    ]
    if other:
        raise UserError(
            f"{path} is of {', '.join(other)}: run python3 lr_finder.py again, with the settings "
            "of this run"
        )
    config = dataclasses.replace(config, max_lr=rate)
    check_config(config)
    return config


def resume(run: engine.Run, state: dict[str, Any], folder: Path) -> None:
    """Take a run to where its checkpoint was saved."""
    run.load(state)
    distributed.in_main(checkpoint.write_results, folder, state)  # they may be of a lost attempt
    log.info("resumed after %d epochs and %d steps", len(run.history), run.step)
    if state["precision"] != run.precision:
        log.warning("it began in %s: its results will differ a little", state["precision"])


def dry_run(
    run: engine.Run,
    config: Config,
    folder: Path,
    state: dict[str, Any] | None,
    images: dict[str, Any],
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
) -> NoReturn:
    """Check and estimate all that can be before training, and end with the exit code for it."""
    steps = steps_per_epoch(config, train_set)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        mix = augment.draw_mix(config, 0, run.step, images.shape[1])
        rate = learning_rate(config, run.step, steps)
        engine.train_step(run, images, labels, rate, mix=mix).item()

    run.model.train()
    try:
        sys.exit(
            preflight.dry_run(config, folder, run.device, state, images, train_set, val_set, step)
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # By now the error is gone, and with it the memory of the step that failed.
    raise UserError(advise_batch_size(run, config, "batch_size", begun=state is not None))


# ------------------------------------------------------------------------------ too little memory


def advise_batch_size(run: engine.Run, config: Config, setting: str, begun: bool) -> str:
    """What to do about a setting of a batch, for which the GPU's memory is too small.

    Tries ever smaller batches, each an eighth smaller, with this run, which is over. One that had
    `begun` before keeps its batch_size.
    """
    size = asked = getattr(config, setting)
    # The last evaluation is in fp32.
    precision = "fp32" if len(run.history) == total_epochs(config) else run.precision
    px = config.val_px if setting == "val_batch_size" else config.train_px
    while size > 2:
        size = max(2, size * 7 // 8)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            images = torch.zeros(size, px, px, 3, dtype=torch.uint8, device=run.device)
            labels = torch.zeros(size, dtype=torch.int64, device=run.device)
            if setting != "val_batch_size":
                engine.train_step(run, images, labels, 0.0).item()
            else:
                engine.evaluate(run.model, iter([(images, labels)]), run.device, precision, bool)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        option = "micro_batch_size" if setting == "batch_size" and begun else setting
        advice = f"--{option.replace('_', '-')} {size} would, as was tried just now"
        if option == "batch_size":
            advice += f", with --max-lr {config.max_lr * size / asked:.3g} to go with it"
        elif option != setting:
            advice += ", and goes on with this run, its batches in parts"
        break
    else:
        advice = "no smaller one would either: see what else uses the memory"
    return f"{setting} is {asked}: it does not fit into the GPU's memory at {px} px; {advice}"


# ------------------------------------------------------------------------------ after training


def report(
    run: engine.Run,
    config: Config,
    folder: Path,
    val_set: image_files.ImageSet,
    heed: distributed.Heed,
) -> None:
    """Evaluate the best weights once more, as read from the disk and in fp32; write result.json."""
    log.info("evaluating best.pt once more, in fp32")

    def load() -> ResNet50Wrapper:
        try:
            return load_weights(folder / "best.pt", len(val_set.classes))
        except (ValueError, FileNotFoundError) as error:
            reason = "it is not there" if isinstance(error, FileNotFoundError) else error
            raise UserError(
                f"the last evaluation needs {folder / 'best.pt'} ({reason}): give the same "
                "command again, which writes it from the last checkpoint",
                EXIT_FAILED,
            ) from None

    model = distributed.from_main(load)
    model = model.to(run.device, memory_format=torch.channels_last)
    val_batches = data.val_batches(val_set, config, pin=run.device.type == "cuda")
    torch.backends.cudnn.allow_tf32 = False  # which a GPU would otherwise take for fp32
    val = engine.evaluate(model, val_batches, run.device, "fp32", heed)
    best = max(run.history, key=lambda row: row["val_top1"])  # the first of equals, as saved
    result = {
        "epochs": total_epochs(config),
        "weights": "best.pt",
        "epoch": best["epoch"],
        **val,
        "protocol": f"shorter side to {config.val_resize_px} px, centre crop {config.val_px} px, "
        "one view, fp32",
        "elapsed_s": run.elapsed_s,
        "price_usd": run.spent_usd,
    }
    distributed.in_main(write_json, folder / "result.json", result)
    log.info(
        "finished in %s%s: best.pt, of epoch %d, has loss %.4f, top-1 %.2f %% and top-5 %.2f %% on "
        "%s validation images",
        format_duration(run.elapsed_s), f" for ${run.spent_usd:.2f}" * bool(run.spent_usd),
        best["epoch"],
        val["val_loss"], val["val_top1"], val["val_top5"], f"{val['val_images']:,}",
    )  # fmt: skip


def write_tensorboard(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole history as TensorBoard's scalars, in a file that takes former files' place.

    Those stay: of a file that is gone, TensorBoard's slower loader never reads the next one.
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and rarely asked for

    with SummaryWriter(folder / "tensorboard", purge_step=1) as writer:
        for row in history:
            for key, value in row.items():
                writer.add_scalar(key.replace("_", "/", 1), value, row["epoch"])


def say_interrupted(
    run: engine.Run, config: Config, requests: interruption.Requests, session: sessions.Session
) -> int:
    """Say and note why the run stops, and that it is saved; returns the exit code."""
    epoch = min(len(run.history) + 1, total_epochs(config))
    saved = f"in epoch {epoch}, everything is saved after step {run.step}"
    if not requests.stop:
        session.ending = sessions.BUDGET
        log.info(
            "the budget of $%.2f is spent, with $%.2f, %s: a higher --budget-usd goes on",
            config.budget_usd, run.spent_usd, saved,
        )  # fmt: skip
        return EXIT_BUDGET
    session.ending = sessions.EC2_NOTICE if requests.notice else sessions.SIGNAL
    interruption.tell_saved(requests)
    log.info("interrupted %s: the same command goes on", saved)
    return EXIT_INTERRUPTED


# ------------------------------------------------------------------------------ saving and stopping


class Interrupted(Exception):
    """The run was asked to stop, and the step under way has ended, or changed nothing yet."""


@contextlib.contextmanager
def stopped_in_compiler(requests: interruption.Requests) -> Iterator[None]:
    """Take it for the stop that it is where the signal, as Ctrl-C does, reached the compiler too.

    Of several processes, the others would wait for this step.
    """
    try:
        yield
    except RuntimeError as error:
        if requests.stop and distributed.processes() == 1 and engine.is_of_compiler(error):
            raise Interrupted from None
        raise


class Keeper:
    """Saves a run when that is due or asked for, and stops it when it has to end."""

    def __init__(
        self,
        run: engine.Run,
        config: Config,
        identity: dict[str, Any],
        requests: interruption.Requests,
        session: sessions.Session,
        saver: checkpoint.BackgroundSaver,
    ) -> None:
        """`identity`: what a checkpoint holds beside the run's state, the same in each."""
        self.run, self.config, self.identity = run, config, identity
        self.requests, self.session, self.saver = requests, session, saver
        self.saved_step, self.saved_at = run.step, time.monotonic()

    def save(self) -> None:
        """Hand the state as it is now to the background saver."""
        run = self.run
        state = run.state()
        # What a GPU has counted but not yet told; the copies of the state wait for it too.
        engine.refuse_trouble(run, state["totals"]["trouble"].tolist())
        self.session.beat(run.step, len(run.history), now=True)
        self.saver.save({**state, **self.identity})
        self.saved_step, self.saved_at = run.step, time.monotonic()

    def heed(self, failure: Exception | None) -> None:
        """Raise what some process ran into; stop or save, as asked or due: all at the same step."""
        run, config, requests = self.run, self.config, self.requests
        try:
            self.saver.check()
            engine.refuse_trouble(run, engine.trouble_seen(run))
        except (UserError, OSError) as error:
            failure = failure or error
        run.spent_usd = self.session.beat(run.step, len(run.history)) or 0.0
        over_budget = 0 < config.budget_usd <= run.spent_usd
        seconds = time.monotonic() - self.saved_at
        due = run.step > self.saved_step and seconds >= 60 * config.checkpoint_minutes
        failed, stop, over_budget, asked, due = distributed.any_of(
            failure is not None, requests.stop, over_budget, requests.save, due
        )
        if failed:
            distributed.raise_in_all(failure)
        requests.stop |= stop
        if stop or over_budget:
            raise Interrupted
        if asked:
            requests.save = False  # before saving: a request that comes meanwhile is another one
            started = time.monotonic()
            self.save()
            self.saver.wait()
            seconds = time.monotonic() - started
            log.info("saved after step %d, as asked, in %.1f s", run.step, seconds)
        elif due:
            self.save()


# ------------------------------------------------------------------------------ the stage


def load_state(folder: Path, options: TrainerOptions) -> dict[str, Any] | None:
    """The run's newest checkpoint, if there is one; raises UserError as `checkpoint.load_latest`.

    A dry run fetches nothing from a mirror, and goes on without what a start would fetch.
    """
    try:
        return checkpoint.load_latest(folder / "checkpoints", tidy=not options.dry_run)
    except UserError as error:
        if not (options.dry_run and options.config.mirror):
            raise
        log.warning("%s; without --dry-run the mirror's is fetched, if it has one", error)
        return None


def over(config: Config, folder: Path, state: dict[str, Any] | None) -> int | None:
    """The exit code of a run that may not go on, finished or out of budget, and says so; or None.

    Raises UserError for settings that differ from its checkpoint's, and where that is lost.
    """
    preflight.refuse_lost_checkpoints(folder, state)
    if state is not None:
        checkpoint.check_settings(state, config)
        finished = preflight.tell_finished(folder, config, state)
        if finished:
            log.info("%s", finished)
            return 0
    return EXIT_BUDGET if sessions.budget_is_spent(folder, config) else None


def ended(exit_code: int, copies: mirror.Mirror) -> int:
    """The exit code at the end: that of a finished run tells whether its mirror is complete.

    Where it is not, this machine may have the only copy. Out of budget, the budget comes first: to
    try again costs money too.
    """
    return EXIT_NOT_COPIED if exit_code == 0 and not copies.is_complete() else exit_code


def main() -> None:
    """Train a run to its end, from wherever it stands."""
    requests = interruption.note_signals(nothing_to_save=True)
    distributed.start()
    in_main, from_main = distributed.in_main, distributed.from_main
    with distributed.agreed():
        options = parse_options(TrainerOptions, __doc__)
        start_log(None)
        check_config(options.config)
        distributed.refuse_several("--dry-run", options.dry_run)
        device = engine.choose_device(options.config)
        engine.choose_precision(options.config, device)
        if not options.dry_run:  # which tells all that it finds
            preflight.refuse_lost_gpu(options.config, device)
        folder = run_folder(options.config.runs_folder, options.config.name)
        copies = in_main(mirror.start, "" if options.dry_run else options.config.mirror, folder)

    state = from_main(load_state, folder, options)
    config = from_main(take_max_lr, options.config, folder, state)
    exit_code = None if options.dry_run else from_main(over, config, folder, state)
    if exit_code is not None:
        copies.finish(mirror.COMPLETED_S)
        sys.exit(from_main(ended, exit_code, copies))
    train_set, val_set, skipped = open_images(config, state)
    with distributed.agreed():
        train, val = train_set.fingerprint(), val_set.fingerprint()
        images = {"train": train, "val": val, "skipped": skipped}
    # Before the model, which each would wait for the others to build.
    distributed.check_same(images=images, precision=engine.choose_precision(config, device))
    with distributed.agreed():
        if state is not None and not options.dry_run:
            checkpoint.check_images(state, images)
        distributed.check_shares(config, len(train_set))
    with distributed.agreed():
        run = engine.new_run(config, len(train_set.classes))
    hardware = preflight.describe_hardware(run.device, run.precision)
    if options.dry_run:
        preflight.describe_run(config, hardware, train_set, val_set, skipped)
        dry_run(run, config, folder, state, images, train_set, val_set)

    with distributed.agreed():
        preflight.check_open_files(config.workers)
        sizes = preflight.WEIGHTS_BYTES, preflight.checkpoint_bytes(config)
        in_main(checkpoint.prepare_folder, folder, *sizes)
        lock = in_main(checkpoint.lock, folder)
        checkpoint.check_newest(folder / "checkpoints", state)  # nor may another machine's be newer
        in_main((folder / FETCHED).unlink, True)  # if there: from here on it is nobody's copy
        in_main(start_log, folder / "train.log")
        in_main(save_config, folder, config, train_set.classes, hardware)
    preflight.describe_run(config, hardware, train_set, val_set, skipped)
    if state is not None:
        resume(run, state, folder)

    distributed.once_a_machine(interruption.watch_ec2, requests)
    stands = run.step, len(run.history)
    session = in_main(sessions.Session, folder, config.price_per_hour, hardware, *stands)
    run.spent_usd = session.beat(*stands) or 0.0
    copies.copy()  # what the last start did not come to copy
    saver = in_main(checkpoint.BackgroundSaver, folder, copies.copy)
    identity = {"config": dataclasses.asdict(config), "images": images, "precision": run.precision}
    keeper = Keeper(run, config, identity, requests, session, saver)

    requests.nothing_to_save = False
    short_of_memory = False
    exit_code = 0
    last_copies_s = mirror.INTERRUPTED_S
    with contextlib.ExitStack() as at_end:  # each is called, whatever the others raise
        at_end.callback(lock.close)
        at_end.callback(lambda: copies.finish(last_copies_s))
        at_end.callback(session.end)
        at_end.callback(saver.wait)
        try:
            with stopped_in_compiler(requests):
                train_epochs(run, config, folder, train_set, val_set, keeper.save, keeper.heed)
            run.model.eval()
            with distributed.agreed():
                saver.wait()
            report(run, config, folder, val_set, keeper.heed)
            last_copies_s = mirror.FINISHED_S
            session.ending = sessions.FINISHED
        except Interrupted:
            with distributed.agreed():
                keeper.save()
                saver.wait()
            last_copies_s = mirror.last_copies_s(requests)
            exit_code = say_interrupted(run, config, requests, session)
        except UserError as error:
            if error.exit_code == EXIT_USER_ERROR:  # an image; the run goes on once it is mended
                keeper.save()
            raise
        except RuntimeError as error:
            distributed.refuse_lost(error)
            # Of several processes, the others wait for this step.
            if not is_out_of_memory(error) or distributed.processes() > 1:
                raise
            short_of_memory = True
            if not run.model.training:  # in validation; a step broken off would be half done
                keeper.save()
    if short_of_memory:  # by now the error is gone, and with it the memory of the step that failed
        setting = "micro_batch_size" if config.micro_batch_size else "batch_size"
        setting = setting if run.model.training else "val_batch_size"
        begun = state is not None or run.step > 0
        raise UserError(advise_batch_size(run, config, setting, begun))
    # This waits for all: torchrun ends the main process if another ends before it.
    sys.exit(from_main(ended, exit_code, copies))


if __name__ == "__main__":
    run_stage(main)

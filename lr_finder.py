"""Find a learning rate: train a fresh model while the rate grows, and look where the loss falls.

    python3 lr_finder.py                              for the reference recipe
    python3 lr_finder.py --recipe quickstart          for the embedded digits, half a minute
    python3 trainer.py --max-lr-from-finder           trains with the suggestion

The LR range test (Smith, arXiv 1506.01186) with the trainer's own step, images and settings. The
rate grows by the same factor from step to step; the test ends once the loss has risen again by
half of what it had fallen. Writes lr_finder.json and lr_finder.png into runs/<name>/, or, where the
curve gives no suggestion, lr_finder_refused.png alone, and touches nothing else there. Where the
training crops grow, it tests at the size of the first epochs.
"""

import contextlib
import dataclasses
import itertools
import math
import shlex
import statistics
from collections.abc import Iterator

import tqdm
from matplotlib.figure import Figure

import augment
import data
import distributed
import engine
import image_files
import preflight
from utils import (
    Config,
    ConfigOptions,
    UserError,
    as_arguments,
    check_config,
    check_writable,
    log,
    lr_settings,
    on_terminal,
    parse_options,
    run_folder,
    run_stage,
    shortened,
    start_log,
    steps_per_epoch,
    train_px,
    write_json,
    write_png,
)

SMOOTHING = 0.9  # weight of the past in the moving average of the loss
SETTLING = 10  # steps until the moving average means something
RISE = 0.1  # share of the loss by which it must at least rise to have diverged
FALL = 0.02  # share of the loss by which it must at least fall to suggest anything
FALL_ERRORS = 8  # and so many standard errors of the smoothed loss: noise alone falls by four


@dataclasses.dataclass(frozen=True)
class FinderOptions:
    """The settings of the run, and the range to test."""

    config: ConfigOptions
    first_lr: float = 1e-4
    """learning rate of the first step"""
    last_lr: float = 10.0
    """learning rate of the last step"""
    steps: int = 100
    """steps of the whole range"""


def range_test(
    run: engine.Run, batches: Iterator[data.Batch], options: FinderOptions, epoch_steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Learning rates, losses, smoothed losses: a value a step, until the end, divergence, or a loss
    that is no number.

    The batches are those of epochs of `epoch_steps` each, one after another.
    """
    growth = (options.last_lr / options.first_lr) ** (1 / max(1, options.steps - 1))
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    bar = tqdm.trange(options.steps, desc="LR range test", disable=not on_terminal())
    run.model.train()
    for step, (images, labels) in zip(bar, batches, strict=False):
        rate = options.first_lr * growth**step
        mix = augment.draw_mix(options.config, *divmod(step, epoch_steps), images.shape[1])
        loss = engine.train_step(run, images, labels, rate, mix=mix)
        loss = loss.item()  # waits: every loss counts here
        if not math.isfinite(loss):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        rates.append(rate)
        losses.append(loss)
        smoothed.append(average / (1 - SMOOTHING ** (step + 1)))  # of a start at zero, corrected
        if diverged(smoothed):
            break
    bar.close()
    return rates, losses, smoothed


def lowest_step(smoothed: list[float]) -> int:
    """The step at which the smoothed loss is lowest, once it means something."""
    return min(range(SETTLING, len(smoothed)), key=smoothed.__getitem__)


def diverged(smoothed: list[float]) -> bool:
    """Whether the loss has risen from its lowest value by half of what it had fallen until there.

    No multiple of the lowest loss would do: BatchNorm lets a network survive any rate, at a loss
    little above that of guessing, from which it may fall again at absurd rates.
    """
    if len(smoothed) <= SETTLING:
        return False
    start, lowest = smoothed[SETTLING], smoothed[lowest_step(smoothed)]
    return smoothed[-1] > lowest + max(0.5 * (start - lowest), RISE * start)


def suggest(
    rates: list[float], losses: list[float], smoothed: list[float], breaks_off: bool = False
) -> float:
    """The rate at which the smoothed loss is lowest: the largest one that still trains.

    OneCycle takes a third of the run to climb to its peak and leaves it at once, so it bears what
    a fresh network just bears (Smith and Topin, arXiv 1708.07120). Raises UserError where the loss
    never falls by more than its noise does, or falls until the end. `breaks_off`: the loss that
    would come next is no number.
    """
    no_number = UserError(
        f"beyond a rate of {max(rates, default=0):.2g} the loss is no number: try a lower "
        "--last-lr, or more --steps"
    )
    if len(smoothed) <= SETTLING:
        raise no_number
    lowest = lowest_step(smoothed)
    falls = smoothed[lowest] < (1 - FALL) * smoothed[SETTLING]
    if breaks_off and not (falls and lowest < len(smoothed) - 1):
        raise no_number
    if not falls:
        other = "lower --first-lr" if diverged(smoothed) else "higher --last-lr"
        raise UserError(
            f"the loss does not fall anywhere in this range: try a {other}, or more --steps"
        )
    # Batches differ; of that, a moving average keeps the share under the root.
    steps = [later - earlier for earlier, later in itertools.pairwise(losses[: lowest + 1])]
    noise = statistics.pstdev(steps) / math.sqrt(2)
    error = noise * math.sqrt((1 - SMOOTHING) / (1 + SMOOTHING))
    fall = smoothed[SETTLING] - smoothed[lowest]
    if fall < FALL_ERRORS * error:
        raise UserError(
            f"the loss falls by {fall:.2g}, which the batches' differences ({noise:.2g} each) can "
            "do: try more --steps, or a larger --batch-size"
        )
    if lowest == len(smoothed) - 1:
        raise UserError(f"the loss still falls at {rates[lowest]:.2g}: try a higher --last-lr")
    return rates[lowest]


def draw(
    config: Config,
    rates: list[float],
    losses: list[float],
    smoothed: list[float],
    suggestion: float | None,
) -> Figure:
    """The curve with the suggestion, if there is one, drawn in."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.75", linewidth=1, label="loss of the batch")
    axes.plot(rates, smoothed, color="#0072b2", linewidth=2.5, label="smoothed")
    if suggestion is not None:
        axes.axvline(
            suggestion,
            color="#d55e00",
            linestyle="--",
            linewidth=2,
            label=f"suggested max_lr: {suggestion:.3g}",
        )
    axes.set_xscale("log")
    low, high = min(smoothed), max(smoothed[0], sorted(losses)[len(losses) * 4 // 5])
    if high > low:  # a refused test may have a single loss
        axes.set_ylim(low - 0.2 * (high - low), high + 0.4 * (high - low))
    axes.set_xlabel("learning rate", fontsize=13)
    axes.set_ylabel("training loss", fontsize=13)
    title = f"LR range test of {shortened(config.name)}\nbatch size {config.batch_size}"
    axes.set_title(title, fontsize=14, parse_math=False)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12)
    return figure


def main() -> None:
    """Test the range, suggest a rate, write both files."""
    distributed.start()
    with distributed.agreed():  # one of them says it
        distributed.refuse_several("the LR finder", is_asked=True)
    options = parse_options(FinderOptions, __doc__)
    config = options.config
    check_config(config)
    if not 0 < options.first_lr < options.last_lr < math.inf or options.steps < 20:
        raise UserError(
            f"first_lr {options.first_lr}, last_lr {options.last_lr}, steps {options.steps}: the "
            "first rate must be above 0 and below the last, the last finite, over at least 20 steps"
        )
    start_log(None)
    device = engine.choose_device(config)
    engine.choose_precision(config, device)  # refused before any folder
    preflight.refuse_lost_gpu(config, device)
    first_px = train_px(config, epoch=0)
    if first_px != config.train_px:
        log.info("the range is tested at the first epoch's %d px", first_px)
        config = dataclasses.replace(config, train_px=first_px, first_train_px=0)
    train_set, _, _ = image_files.open_images(config)
    distributed.check_shares(config, len(train_set))
    folder = run_folder(config.runs_folder, config.name)
    check_writable(folder, "--runs-folder")
    folder.mkdir(parents=True, exist_ok=True)
    run = engine.new_run(config, len(train_set.classes))
    on_gpu = run.device.type == "cuda"
    # As many epochs as it takes, one after another.
    epochs = (
        data.train_batches(train_set, config, epoch, pin=on_gpu) for epoch in itertools.count()
    )
    with contextlib.closing(
        data.to_device(itertools.chain.from_iterable(epochs), run.device)
    ) as batches:
        rates, losses, smoothed = range_test(
            run, batches, options, steps_per_epoch(config, train_set)
        )
    breaks_off = len(rates) < options.steps and not diverged(smoothed)
    refused = folder / "lr_finder_refused.png"
    try:
        suggestion = suggest(rates, losses, smoothed, breaks_off)
    except UserError as error:
        if not rates:
            raise
        write_png(draw(config, rates, losses, smoothed, None), refused)
        raise UserError(f"{error}; the curve is {refused}") from None
    refused.unlink(missing_ok=True)  # if there: it was of an earlier try
    write_png(draw(config, rates, losses, smoothed, suggestion), folder / "lr_finder.png")
    write_json(
        folder / "lr_finder.json",
        {
            "suggested_max_lr": suggestion,
            "steps": len(rates),
            "settings": lr_settings(config),
            "learning_rate": rates,
            "loss": losses,
            "smoothed_loss": smoothed,
        },
    )
    log.info("suggested max_lr: %.3g (%s)", suggestion, folder / "lr_finder.png")
    log.info(
        "train with it: python3 trainer.py %s --max-lr-from-finder",
        shlex.join(as_arguments(options.config)),
    )


if __name__ == "__main__":
    run_stage(main)

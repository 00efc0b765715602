"""What a run costs: its sessions, each one start of the trainer, in runs/<name>/sessions.jsonl.

A line is written when training begins, once a minute, at each checkpoint and at the end. Every line
tells the whole session as it stood then, so that the last whole one is enough: neither a kill nor a
torn line takes anything with it.

    session                    a random number, the same in all lines of a session
    began                      when its process started (UTC, by the machine's clock)
    alive_s                    seconds from then to this line, by a clock that nobody sets
    startup_s                  those of them before the first step; the others are GPU time
    first_step, step           optimizer steps of the run: when the session began, and now
    epochs                     finished epochs of the run, now
    price_per_hour             US dollars of the machine
    gpu, cpu, instance_type    what the machine is; null where that is not known
    ended                      why it ended; null while it runs, and for ever if it was killed

Not in it: the time before the trainer is started, and after its last line, when the last copies go
to a mirror; starts that end before training begins; of one that was killed its last minute, after a
power cut half a minute more, and where another machine goes on from a mirror, all since the last
checkpoint. scripts/cost_report.py adds it all up.
"""

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

from utils import Config, is_number, log

FILE = "sessions.jsonl"
BEAT_S = 60.0
COUNTS = ("first_step", "step", "epochs")
NUMBERS = ("alive_s", "startup_s", "price_per_hour")
TEXTS = ("session", "began", "gpu", "cpu", "instance_type", "ended")
FINISHED, SIGNAL, EC2_NOTICE, BUDGET, FAILED = (
    "finished", "signal", "EC2's notice", "budget", "failed",
)  # fmt: skip


class Session:
    """The session under way, which begins to train."""

    def __init__(
        self, folder: Path, price_per_hour: float, hardware: dict[str, Any], step: int, epochs: int
    ) -> None:
        self.path = folder / FILE
        self.before_usd = price_usd(read(folder))
        self.ending = FAILED  # unless somebody knows better
        self._started = _process_started()
        self._complained = False
        alive_s = self._alive_s()
        self.line = {
            "session": os.urandom(4).hex(),
            "began": utc(time.time() - alive_s),
            "alive_s": alive_s,
            "startup_s": alive_s,
            "first_step": step,
            "step": step,
            "epochs": epochs,
            "price_per_hour": price_per_hour,
            **{key: hardware.get(key) for key in ("gpu", "cpu", "instance_type")},
            "ended": None,
        }
        self._write()

    def beat(self, step: int, epochs: int, now: bool = False) -> float:
        """Note where the run is, once a minute or now; the run's price so far, US dollars.

        Never raises OSError: a disk that is full stops the run when it saves, and not before.
        """
        self.line.update(alive_s=self._alive_s(), step=step, epochs=epochs)
        if now or self.line["alive_s"] - self._written_s >= BEAT_S:
            self._write()
        return self.before_usd + price_usd([self.line])

    def end(self) -> None:
        """Write the last line, with why it ended."""
        self.line.update(alive_s=self._alive_s(), ended=self.ending)
        self._write()

    def _alive_s(self) -> float:
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - self._started, 3)

    def _write(self) -> None:
        self._written_s = self.line["alive_s"]
        try:
            with open(self.path, "ab") as file:
                # The line's end comes before the next line, which thus is whole after a torn one.
                file.write(b"\n" * bool(file.tell()) + json.dumps(self.line).encode())
                if self.line["ended"]:  # the machine may go now; the beats can wait for the system
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning(
                    "%s cannot be written (%s): the run's price will lack something",
                    self.path, error.strerror,
                )  # fmt: skip


def read(folder: Path, mirrored: bytes = b"") -> list[dict[str, Any]]:
    """All whole lines of a run's sessions, in order, and those of a mirror's copy of them."""
    path = folder / FILE
    content = path.read_bytes() if path.exists() else b""
    lines = []
    for text in merged(mirrored, content).splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # torn
            continue
        if isinstance(line, dict) and _is_whole(line):
            lines.append(line)
    return lines


def _is_whole(line: dict[str, Any]) -> bool:
    try:
        utc(seconds(line["began"]) + line["alive_s"])
        return (
            isinstance(line["session"], str)
            and all(line[key] is None or isinstance(line[key], str) for key in TEXTS)
            and all(isinstance(line[key], int) for key in COUNTS)
            and all(is_number(line[key]) and line[key] >= 0 for key in (*NUMBERS, *COUNTS))
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def price_usd(lines: list[dict[str, Any]]) -> float:
    """Price of all sessions up to the last line of each, in US dollars."""
    last = {line["session"]: line for line in lines}.values()
    return sum(line["alive_s"] / 3600 * line["price_per_hour"] for line in last)


def merged(first: bytes, second: bytes) -> bytes:
    """Two copies of one file, of which each may have lines that the other has not."""
    return b"\n".join(filter(None, dict.fromkeys(first.splitlines() + second.splitlines())))


def budget_is_spent(folder: Path, config: Config) -> bool:
    """Whether nothing may be trained any more; says so, and what would go on."""
    spent_usd = price_usd(read(folder))
    if not 0 < config.budget_usd <= spent_usd:
        return False
    log.info(
        "run %s has cost $%.2f, its budget is $%.2f: nothing is trained; a higher --budget-usd "
        "goes on",
        config.name, spent_usd, config.budget_usd,
    )  # fmt: skip
    return True


def _process_started() -> float:
    """When this process began, by CLOCK_BOOTTIME; proc(5), /proc/pid/stat, field 22."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def utc(moment_s: float) -> str:
    """Seconds since 1970 as ISO 8601, such as 2026-11-24T08:22:00.123Z."""
    moment = datetime.datetime.fromtimestamp(moment_s, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(moment: str) -> float:
    """An ISO 8601 time in seconds since 1970; UTC where it names no zone."""
    parsed = datetime.datetime.fromisoformat(moment)
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()

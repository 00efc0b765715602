"""What the app does with hostile files and with a crowd: bad answers end with exit code 1.

    python3 scripts/stress_app.py hostile --count 1000
    python3 scripts/stress_app.py crowd --clients 50 --seconds 60

Starts gradio_deploy/app.py, which needs an export beside it, and talks to it over HTTP on loopback.
`hostile` sends damaged, truncated, fuzzed and mislabelled files, bombs, odd modes, names that try
to leave the folder, and handmade requests, with good pictures in between, which must get the same
answer each time. Everything else must get an answer or one sentence, without a traceback or a path
of the server. `crowd` is a number of people who upload and ask without a pause; all that they may
be told beside an answer is that the queue is full. Both report the app's peak memory; --output
takes the figures with hardware and versions.
"""

import contextlib
import dataclasses
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import (
    EXIT_FAILED,
    UserError,
    describe_computer,
    parse_options,
    run_stage,
    versions,
    write_json,
)

START_LIMIT_S = 120
ANSWER_LIMIT_S = 120
MAX_PEAK_BYTES = 3 << 30  # far below what a free Space has, 16 GB
GOOD_EVERY = 10
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# What no answer may hold: a traceback, or what stands in the files that were asked for.
LEAK = re.compile(r"Traceback|File \"|site-packages|root:x|import gradio|val_top1")
FULL = "Queue is full"
SETTINGS = {"hostile": ("count", "seed"), "crowd": ("clients", "seconds")}


@dataclasses.dataclass(frozen=True)
class StressOptions:
    """What is sent to the app."""

    kind: tyro.conf.Positional[Literal["hostile", "crowd"]]
    """hostile: files and requests made to break it; crowd: many people at once"""
    app_folder: str = "gradio_deploy"
    """folder of the app and its export"""
    count: int = 1000
    """hostile files and requests, a good picture among every ten"""
    seed: int = 0
    """seed of the hostile files"""
    clients: int = 50
    """people at once"""
    seconds: float = 60
    """how long they keep asking"""
    output: Path | None = None
    """JSON file to write the figures into"""


class App(NamedTuple):
    """A running app."""

    port: int
    pid: int


class Answer(NamedTuple):
    """What came back: an HTTP status, and the event's name and data where there was one."""

    status: int
    event: str
    text: str


# ------------------------------------------------------------------------------ talking to the app


def request(app: App, method: str, path: str, body: bytes | None, kind: str) -> tuple[int, str]:
    """Status and text of one HTTP exchange; an event stream is read to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=ANSWER_LIMIT_S)
    try:
        connection.request(method, path, body, {"Content-Type": kind} if body else {})
        reply = connection.getresponse()
        return reply.status, reply.read().decode(errors="replace")
    finally:
        connection.close()


def upload(app: App, name: str, content: bytes) -> tuple[int, str]:
    """Status and text of an upload; the text is a JSON list of the path where the file lies."""
    quoted = name.replace("\\", "\\\\").replace('"', '\\"').encode()
    head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="' + quoted
    body = head + b'"\r\nContent-Type: image/png\r\n\r\n' + content + b"\r\n--edge--\r\n"
    return request(app, "POST", "/gradio_api/upload", body, "multipart/form-data; boundary=edge")


def ask(app: App, data: object) -> Answer:
    """The endpoint's answer to the inputs `data`."""
    call = "/gradio_api/call/classify"
    body = json.dumps({"data": data}).encode()
    status, text = request(app, "POST", call, body, "application/json")
    if status != 200:
        return Answer(status, "", text)
    status, text = request(app, "GET", f"{call}/{json.loads(text)['event_id']}", None, "")
    events = re.findall(r"event: (\w+)\ndata: (.*)", text)
    return Answer(status, *events[-1]) if events else Answer(status, "", text)


def classify(app: App, name: str, content: bytes) -> Answer:
    """Upload a file and ask what it shows, as a visitor's browser does."""
    status, text = upload(app, name, content)
    if status != 200:
        return Answer(status, "", text)
    return ask(app, [{"path": json.loads(text)[0], "meta": {"_type": "gradio.FileData"}}])


# ------------------------------------------------------------------------------ what is sent


def picture(
    rng: random.Random, form: str = "JPEG", size: tuple[int, int] = (160, 120), mode: str = "RGB"
) -> bytes:
    """A picture file of coarse noise."""
    small = Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3))
    file = io.BytesIO()
    small.resize(size).convert(mode).save(file, form)
    return file.getvalue()


def png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims width x height px, with the compressed `data` and more chunks before it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def truncated(rng: random.Random) -> bytes:
    """A picture that ends too soon."""
    content = picture(rng, rng.choice(FORMATS))
    return content[: rng.randrange(len(content))]


def fuzzed(rng: random.Random) -> bytes:
    """A picture with random bytes in its first 64, or anywhere."""
    content = bytearray(picture(rng, rng.choice(FORMATS)))
    reach = rng.choice((64, len(content)))
    for _ in range(rng.choice((1, 4, 16))):
        content[rng.randrange(min(reach, len(content)))] = rng.randrange(256)
    return bytes(content)


def spliced(rng: random.Random) -> bytes:
    """The head of one format and the tail of another."""
    one, other = (picture(rng, rng.choice(FORMATS)) for _ in range(2))
    return one[: rng.randrange(len(one))] + other[rng.randrange(len(other)) :]


def odd(rng: random.Random) -> bytes:
    """A whole picture in a mode, a shape or a turn that is rare."""
    form, mode = rng.choice(
        [
            *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
            *(("TIFF", mode) for mode in ("1", "L", "CMYK", "LAB", "F", "I", "YCbCr", "RGBA")),
            *(("JPEG", mode) for mode in ("L", "CMYK")),
            *(("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "1"), ("AVIF", "RGBA")),
        ]
    )
    size = rng.choice(((1, 1), (2, 199), (640, 7), (333, 500)))
    small = Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3)).resize(size)
    if mode == "LAB":
        image = Image.frombytes("LAB", size, small.tobytes())
    else:
        image = (small if mode in ("CMYK", "YCbCr") else small.convert("L")).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(12)
    file = io.BytesIO()
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        image.save(file, form, exif=exif)
    else:
        image.save(file, form)
    return file.getvalue()


def directory(tags: list[tuple[int, int, int, int]]) -> bytes:
    """The head of a TIFF file, or of EXIF data: (tag, type, count, value or place) in order."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)


def with_exif(form: str, exif: bytes) -> bytes:
    """A picture file of a format with this EXIF data, of any length."""
    size = (64, 48)
    if form == "PNG":
        return png(*size, zlib.compress(bytes((3 * size[0] + 1) * size[1])), (b"eXIf", exif))
    file = io.BytesIO()
    if form != "JPEG":
        Image.new("RGB", size).save(file, form, exif=exif)
        return file.getvalue()
    Image.new("RGB", size).save(file, form)
    pieces = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    content = file.getvalue()
    return content[:2] + b"".join(map(exif_segment, pieces)) + content[2:]


def exif_segment(data: bytes) -> bytes:
    """A segment of a JPEG; what comes in several is joined."""
    return b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data


def shared_tags(form: str, tags: int = 4000, size: int = 1_000_000) -> bytes:
    """A picture whose tags all have the same data, of which each may get a copy."""
    data = directory([(1000 + tag, 1, size, 0) for tag in range(tags)]) + bytes(size)
    return data if form == "TIFF" else with_exif(form, data)


def long_tiles(length: int = 1_000_000, tiles: int = 60) -> bytes:
    """A TIFF of 16 rows whose tiles have so many."""
    tile = zlib.compress(bytes(min(16 * length, 1 << 24)), 9)
    places = struct.pack("<I", 1000) * tiles + struct.pack("<I", len(tile)) * tiles
    tags = [(256, 4, 1, 16 * tiles), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8)]
    tags += [(262, 3, 1, 1), (277, 3, 1, 1), (322, 4, 1, 16), (323, 4, 1, length)]
    tags += [(324, 4, tiles, 1000 + len(tile)), (325, 4, tiles, 1000 + len(tile) + 4 * tiles)]
    return directory(tags).ljust(1000, b"\0") + tile + places


def many_parts(form: str, parts: int) -> bytes:
    """A JPEG of so many pieces of EXIF data, or a GIF of so many comments, which are joined."""
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(file, form)
    content = file.getvalue()
    if form == "JPEG":
        return content[:2] + exif_segment(bytes(10)) * parts + content[2:]
    start = content.index(b",", 13 + 3 * 2)  # behind a head and two colours or more
    return content[:start] + b"\x21\xfe\x01x\0" * parts + content[start:]


def fill_bytes(count: int) -> bytes:
    """A JPEG of many scans, at whose beginning is a run of fill bytes that leads to nothing."""
    return b"\xff\xd8" + b"\xff" * count + b"\0" + b"\xff\xda\0\2" * 65


def bomb(rng: random.Random) -> bytes:
    """A small file that would be large in memory, or slow."""
    kind = rng.randrange(7)
    zeros = zlib.compress(bytes(50_000_000), 9)
    if kind == 0:
        return png(*rng.choice(((30_000, 30_000), (9_500, 9_500), (2**31 - 1, 1))), zeros)
    if kind == 1:  # just below the limit, and whole
        rows = zlib.compress(bytes((7_000 * 3 + 1) * 7_000), 1)
        return png(7_000, 7_000, rows)
    if kind in (2, 3):
        chunk = (b"zTXt", b"Comment\0\0") if kind == 2 else (b"iCCP", b"profile\0\0")
        return png(64, 64, zeros, (chunk[0], chunk[1] + zeros))
    if kind == 4:
        return b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + picture(rng, "GIF")[10:]
    if kind == 5:  # a progressive JPEG whose last scan comes a thousand times
        file = io.BytesIO()
        image = Image.frombytes("RGB", (8, 6), rng.randbytes(8 * 6 * 3)).resize((2_000, 2_000))
        image.save(file, "JPEG", progressive=True)
        content = file.getvalue()
        scan = content[content.rindex(b"\xff\xda") : -2]
        return content[:-2] + scan * 1000 + content[-2:]
    head = struct.pack("<2sHIH", b"II", 42, 8, 65_535)  # a TIFF that claims 65,535 tags
    return head + struct.pack("<HHII", 0x0100, 4, 2**32 - 1, 8) * 65_535


def costly(rng: random.Random) -> bytes:
    """A file of a few MB at most that Pillow alone would take gigabytes or many seconds for."""
    return rng.choice(
        [
            lambda: shared_tags(rng.choice(("JPEG", "PNG", "WEBP", "TIFF"))),
            long_tiles,
            lambda: many_parts("JPEG", 100_000),
            lambda: many_parts("GIF", 200_000),
            lambda: fill_bytes(300_000),
        ]
    )()


def other(rng: random.Random) -> bytes:
    """What is no picture, or none that is read."""
    return rng.choice(
        [
            b"",
            b"\0" * 1000,
            rng.randbytes(5000),
            b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
            b"<!doctype html><script>alert(1)</script>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
            b"%PDF-1.7\n1 0 obj\n",
            b"PK\3\4" + bytes(100),
            b"\x7fELF" + bytes(100),
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + rng.randbytes(400),
            b"P6 60000 60000 255\n" + bytes(100),
            b"8BPS\0\1" + bytes(100),
        ]
    )


NAMES = (
    *("photo.png", "photo.jpg", "photo", "../../../../etc/passwd", "..\\..\\x.py", "/etc/passwd"),
    *("%2e%2e%2fx.py", "x" * 300 + ".png", ".hidden", "..", "фото 📷.png", "a;b|c&d$(id).png"),
    *("<img src=x onerror=alert(1)>.png", "nul.png", 'quo"te.png', "settings.py"),
)


def hostile_file(rng: random.Random, app: App) -> Answer:
    """The answer to a file of a random kind, sometimes with a hostile name."""
    makers = {truncated: 5, fuzzed: 8, spliced: 3, odd: 4, bomb: 1, costly: 1, other: 3}
    make = rng.choices(list(makers), list(makers.values()))[0]
    name = rng.choice(NAMES) if rng.random() < 0.3 else "photo.png"
    return classify(app, name, make(rng))


def handmade(rng: random.Random, app: App) -> Answer:
    """A request that no browser makes."""
    folder = os.path.realpath(f"/proc/{app.pid}/cwd")
    place = rng.choice(
        ("/etc/passwd", f"{folder}/app.py", f"{folder}/model.json", "app.py", "../app.py", "/", "")
    )
    if rng.random() < 0.3:
        quoted = place.replace("/", rng.choice(("/", "%2f")))
        way = rng.choice(("file=", "file/", "file=..%2f..%2f", "file=./", "file=/proc/self/cwd/"))
        status, text = request(app, "GET", f"/gradio_api/{way}{quoted}", None, "")
        return Answer(status, "", text)
    meta = {"_type": "gradio.FileData"}
    return ask(
        app,
        rng.choice(
            [
                *([{"path": place, "meta": meta}], [{"path": place}], [{"path": "\0"}], [place]),
                *([{"path": 5}], [{"url": "file:///etc/passwd"}], [{}], [[]], [None], [5], []),
                *({}, None, "x", [{"path": place, "url": f"file://{place}", "meta": meta}]),
                *([{"path": "http://127.0.0.1:1/x.png", "meta": meta}], ["x" * 2_000_000]),
            ]
        ),
    )


# ------------------------------------------------------------------------------ the two drills


def peak_bytes(app: App) -> int:
    """The most memory that the app and those of its processes that are there have had so far."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # ended meanwhile
            text = status.read_text(encoding="ascii", errors="replace")
            ids = re.findall(r"^P(?:id|Pid):\s+(\d+)$", text, re.M)
            if str(app.pid) in ids and (peak := re.search(r"VmHWM:\s+(\d+) kB", text)):
                total += int(peak[1]) * 1024
    return total


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median, the 95th percentile and the longest."""
    cuts = statistics.quantiles(seconds, n=20) if len(seconds) > 1 else seconds * 19
    found = {"p50_s": cuts[9], "p95_s": cuts[18], "longest_s": max(seconds)}
    return {name: round(value, 3) for name, value in found.items()}


def top_class(answer: Answer) -> str | None:
    """The likeliest class, where the app gave one."""
    return json.loads(answer.text)[0]["label"] if answer.event == "complete" else None


def wrong_with(answer: Answer, is_file: bool) -> str | None:
    """What a hostile file or request must not be answered with."""
    if leak := LEAK.search(answer.text):
        return f"the answer holds {leak[0]!r}"
    if answer.status >= 500:
        return f"HTTP {answer.status}"
    if answer.event == "error" and is_file and not answer.text.startswith('{"error": "'):
        return f"no sentence but {answer.text[:80]}"
    if answer.status == 200 and is_file and answer.event not in ("complete", "error"):
        return "no answer"
    return None


Drill = tuple[dict[str, Any], list[str]]  # figures, and what went wrong


def hostile(app: App, count: int, seed: int) -> Drill:
    """Send `count` hostile files and requests, four at a time."""
    good = picture(random.Random(seed), "PNG")
    expected = top_class(classify(app, "good.png", good))
    if expected is None:
        raise UserError("the app does not answer a good picture", EXIT_FAILED)
    before, begun = peak_bytes(app), time.perf_counter()

    def one(index: int) -> tuple[str, float, str | None]:
        """Outcome, seconds, and what is wrong with it."""
        rng = random.Random(f"{seed}/{index}")
        start = time.perf_counter()
        if index % GOOD_EVERY == 0:
            answer = classify(app, "good.png", good)
            found = top_class(answer)
            problem = None if found == expected else f"a good picture is {found}, not {expected}"
            return "good pictures answered", time.perf_counter() - start, problem
        is_file = rng.random() < 0.8
        try:
            answer = (hostile_file if is_file else handmade)(rng, app)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return "no reply", time.perf_counter() - start, repr(error)
        outcome = "answered" if answer.event == "complete" else "refused"
        kind = "hostile files" if is_file else "handmade requests"
        return f"{kind} {outcome}", time.perf_counter() - start, wrong_with(answer, is_file)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, range(count)))
    peak = peak_bytes(app)
    figures = {
        "outcomes": dict(sorted(Counter(outcome for outcome, _, _ in results).items())),
        "took_s": round(time.perf_counter() - begun, 1),
        **percentiles([seconds for _, seconds, _ in results]),
        "peak_mb": round(peak / 1e6),
        "peak_before_mb": round(before / 1e6),
    }
    problems = [f"{seed}/{i}: {problem}" for i, (_, _, problem) in enumerate(results) if problem]
    if peak > MAX_PEAK_BYTES:
        problems.append(f"peak memory {peak / 1e6:.0f} MB")
    return figures, problems


def crowd(app: App, clients: int, seconds: float) -> Drill:
    """Ask from `clients` threads for so long."""
    end = time.perf_counter() + seconds
    answered: list[float] = []
    full: list[int] = []
    problems: list[str] = []

    def person(number: int) -> None:
        rng = random.Random(number)
        content = picture(rng, "JPEG", (500, 375))
        while time.perf_counter() < end:
            start = time.perf_counter()
            try:
                answer = classify(app, "photo.jpg", content)
            except (OSError, ValueError, http.client.HTTPException) as error:
                problems.append(repr(error))
                continue
            if answer.event == "complete":
                answered.append(time.perf_counter() - start)
            elif answer.status == 503 and FULL in answer.text:
                full.append(number)
                time.sleep(rng.uniform(0.5, 1.5))  # then they try again
            else:
                problems.append(str(answer))

    threads = [threading.Thread(target=person, args=(number,)) for number in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    if not answered:
        return {}, [*problems, "nobody got an answer"]
    figures = {
        "answers": len(answered),
        "took_s": round(took, 1),
        "answers_per_s": round(len(answered) / took, 2),
        **percentiles(answered),
        "told_that_the_queue_is_full": len(full),
        "peak_mb": round(peak_bytes(app) / 1e6),
    }
    return figures, problems


# ------------------------------------------------------------------------------ the command


@contextlib.contextmanager
def start_app(folder: Path) -> Iterator[App]:
    """Run the app of `folder` on a free port; its temporary files go when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as elsewhere, tempfile.TemporaryFile("w+") as log:
        address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
        process = subprocess.Popen(
            [sys.executable, folder.resolve() / "app.py"],
            cwd=folder,
            env={**os.environ, **address, "TMPDIR": elsewhere},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            app, deadline = App(port, process.pid), time.monotonic() + START_LIMIT_S
            while not is_up(app):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise UserError(f"the app does not start: {log.read().strip()[-500:]}")
                time.sleep(0.2)
            yield app
            if process.poll() is not None:
                raise UserError(f"the app ended with exit code {process.poll()}", EXIT_FAILED)
            log.seek(0)
            errors = Counter(re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b", log.read(), re.M))
            if errors:
                print(f"  in the app's log: {dict(errors)}")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_up(app: App) -> bool:
    """Whether the page is served already."""
    try:
        return request(app, "GET", "/", None, "")[0] == 200
    except OSError:
        return False


def main() -> None:
    """Start the app, send what was asked for, say what went wrong."""
    options = parse_options(StressOptions, __doc__)
    for name in SETTINGS[options.kind]:
        if name != "seed" and getattr(options, name) <= 0:
            raise UserError(f"{name} is {getattr(options, name)}: it must be above 0")
    if not (Path(options.app_folder) / "app.py").is_file():
        raise UserError(f"no app.py in {options.app_folder}: name another --app-folder")
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"no folder for --output {options.output}")
    with start_app(Path(options.app_folder)) as app:
        drill: Callable[[], Drill] = {
            "hostile": lambda: hostile(app, options.count, options.seed),
            "crowd": lambda: crowd(app, options.clients, options.seconds),
        }[options.kind]
        figures, problems = drill()
    for name, figure in figures.items():
        print(f"  {name.replace('_', ' ')}: {figure}")
    if options.output:
        settings = {key: str(value) for key, value in dataclasses.asdict(options).items()}
        packages = ("gradio", "onnxruntime")
        write_json(
            options.output,
            {
                "settings": {key: settings[key] for key in SETTINGS[options.kind]},
                **figures,
                "wrong": len(problems),
                "hardware": describe_computer(),
                "versions": versions(packages),
            },
        )
    for problem in problems[:20]:
        print(f"  WRONG {problem}")
    if problems:
        raise UserError(f"{len(problems)} answers were wrong, listed above", EXIT_FAILED)


if __name__ == "__main__":
    run_stage(main)

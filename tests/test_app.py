"""The web app as a visitor meets it: its own process, real Chromium, nothing but loopback.

The model is one whose answers can be worked out by hand: the mean colour of the top half of what
it is shown. Chromium or Chrome must be installed; the app itself is started as a user starts it.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlsplit

import gradio_client
import numpy as np
import pytest
import torch
from conftest import run_stage_command
from PIL import Image, ImageChops
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import stress_app

APP_FOLDER = Path(__file__).resolve().parent.parent / "gradio_deploy"
START_LIMIT_S = 90  # importing torch and Gradio on a busy machine
STOP_LIMIT_S = 10
ANSWER_LIMIT_MS = 20_000
INPUT_PX, RESIZE_PX = 32, 40
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)  # unequal, so that a mix-up of channels shows
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CHROMIUM_FLAGS = (
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


# ------------------------------------------------------------------------------ helpers


class TopHalf(torch.nn.Module):
    """Twice the normalised channels in the upper half, nothing in the lower half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (N, 3, INPUT_PX, INPUT_PX) → the same."""
        weight = torch.zeros(INPUT_PX, 1)
        weight[: INPUT_PX // 2] = 2
        return images * weight


class TopHalfColour(torch.nn.Module):
    """Logits are the mean of each normalised channel over the top half of the picture.

    Built of the parts that torchvision's ResNet has, so that the app can explain its answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            setattr(self.model, name, torch.nn.Dropout())  # in eval(), its input
        self.model.layer4 = TopHalf()
        self.model.fc = torch.nn.Linear(3, 3)
        with torch.no_grad():
            self.model.fc.weight.copy_(torch.eye(3))
            self.model.fc.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (N, 3, INPUT_PX, INPUT_PX) → (N, 3)."""
        resnet = self.model
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            images = getattr(resnet, name)(images)
        return resnet.fc(images.mean(dim=(2, 3)))


def make_deployment(folder: Path) -> Path:
    """A copy of the app in `folder` with an export of TopHalfColour and two examples."""
    shutil.copytree(
        APP_FOLDER, folder, ignore=shutil.ignore_patterns("model.*", "examples", "__pycache__")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        example = torch.zeros(1, 3, INPUT_PX, INPUT_PX)
        torch.jit.trace(TopHalfColour().eval(), example).save(folder / "model.pt")
    description = {
        "format": 1,
        "name": "top_half_colour",
        "file": "model.pt",
        "sha256": hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest(),
        "classes": ["n01", "n02", "n03"],
        "labels": ["red", "green", "blue"],
        "input_px": INPUT_PX,
        "resize_px": RESIZE_PX,
        "mean": MEAN,
        "std": STD,
        "resize_rule": "shorter side to resize_px, bilinear, antialiased; centre crop",
        "weights": "best",
        "epoch": 7,
        "val_top1": 81.25,
        "val_top5": 100.0,
        "val_images": 1234,
    }
    (folder / "model.json").write_text(json.dumps(description))
    (folder / "examples").mkdir()
    Image.new("RGB", (60, 50), BLUE).save(folder / "examples" / "sea.JPEG")
    Image.new("RGB", (60, 50), GREEN).save(folder / "examples" / "meadow.png")
    (folder / "examples" / "notes.txt").write_text("not an example")
    return folder


class App(NamedTuple):
    """A running app: its address, the folder that it runs in, its process."""

    url: str
    folder: Path
    pid: int


@contextlib.contextmanager
def start_app(folder: Path) -> Iterator[App]:
    """Run the app of `folder` on a free port until the block ends.

    Its current folder and its temporary files lie outside `folder`, as they may for any user.
    Fails if it does not answer, or if it left a traceback or a warning on stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "TMPDIR": str(elsewhere),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "CODE_URL": "https://example.com/code",
    }
    log = folder.parent / f"{folder.name}.stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, folder / "app.py"],
            cwd=elsewhere,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not answers(url):
            assert process.poll() is None, f"the app ended at its start:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no answer from the app in {START_LIMIT_S} s"
            time.sleep(0.1)
        yield App(url, folder, process.pid)
        assert process.poll() is None, f"the app ended by itself:\n{log.read_text()}"
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_LIMIT_S)
    noise = log.read_text()
    assert "Traceback" not in noise and "Warning" not in noise, noise


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def open_page(browser: Browser, url: str, **how: object) -> Iterator[Page]:
    """The app's page in a fresh browser profile; fails if it asks for anything off loopback."""
    strangers = []

    def keep_to_loopback(route: Route) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", None):  # None: blob:, data:
            route.continue_()
        else:
            strangers.append(route.request.url)
            route.abort()

    how = {"viewport": {"width": 1280, "height": 800}, **how}
    context = browser.new_context(service_workers="block", **how)
    context.set_default_timeout(ANSWER_LIMIT_MS)
    context.route("**/*", keep_to_loopback)
    try:
        page = context.new_page()
        page.goto(url)
        page.get_by_role("button", name="Classify").wait_for()
        yield page
    finally:
        context.close()
    assert not strangers, f"the page asked for {strangers}"


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def expect_answer(page: Page, label: str) -> None:
    """Wait until the class on top is `label`."""
    expect(page.get_by_test_id("label-output-value")).to_have_text(label, timeout=ANSWER_LIMIT_MS)


def expect_text(page: Page, text: str | re.Pattern[str]) -> None:
    expect(page.get_by_text(text)).to_be_visible(timeout=ANSWER_LIMIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [path for path in map(shutil.which, names) if path and not path.startswith("/snap/")]
    executable = next(iter(found), None)  # None: the one that Playwright installed
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable, args=CHROMIUM_FLAGS, timeout=START_LIMIT_S * 1000
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory.mktemp("app") / "gradio_deploy")


@pytest.fixture(scope="module")
def app(deployment: Path) -> Iterator[App]:
    with start_app(deployment) as running:
        yield running


@pytest.fixture
def page(browser: Browser, app: App) -> Iterator[Page]:
    with open_page(browser, app.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(app: App) -> gradio_client.Client:
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    return gradio_client.Client(app.url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def module(deployment: Path) -> ModuleType:
    """The app's functions, without starting it."""
    spec = importlib.util.spec_from_file_location("gradio_deploy_app", deployment / "app.py")
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    return imported


def save(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> Path:
    Image.new("RGB", size, color).save(path)
    return path


# ------------------------------------------------------------------------------ the page


def test_a_red_picture_is_red(page: Page, tmp_path: Path) -> None:
    upload(page, save(tmp_path / "poppy.png", RED))
    expect_answer(page, "red")
    expect_text(
        page,
        re.compile(
            r"^Answered in \d+ ms: \d+ ms to read .* \d+ ms in the model, .* speak for red\.$"
        ),
    )
    bars = page.get_by_test_id("Likeliest classes").or_(page.locator(".confidence-set"))
    expect(bars).to_have_count(3)


def test_the_page_says_what_was_measured(page: Page) -> None:
    expect(page.get_by_role("heading", name="top_half_colour")).to_be_visible()
    expect_text(page, re.compile(r"which of 3 classes.*1,234 validation pictures.*81\.25 %"))
    expect(page.get_by_text("first five")).to_have_count(0)  # of three classes: always right


def test_an_exif_rotated_picture_is_turned(page: Page, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), BLUE)
    picture.paste(RED, (0, 0, 32, 64))  # stored: left red, right blue; seen: top red, bottom blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(tmp_path / "as_stored.png")
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upload(page, tmp_path / "as_stored.png")
    expect_answer(page, "blue")  # blue has the smallest mean and deviation, so it wins a tie
    page.reload()
    upload(page, tmp_path / "turned.jpg")
    expect_answer(page, "red")


def test_a_text_file_gets_a_message_and_the_app_lives_on(page: Page, tmp_path: Path) -> None:
    upload(page, save(tmp_path / "poppy.png", RED))
    expect_answer(page, "red")
    (tmp_path / "notes.jpg").write_text("milk, eggs, flour")
    page.get_by_role("button", name="Remove Image").click()
    expect(page.get_by_test_id("label-output-value")).to_have_count(0)  # no answer without picture
    upload(page, tmp_path / "notes.jpg")
    expect_text(page, "notes.jpg is not a picture that can be read. Try a JPEG, PNG or WebP file.")
    expect(page.get_by_text("Drop Image Here")).to_be_visible()
    upload(page, save(tmp_path / "leaf.webp", GREEN))
    expect_answer(page, "green")


def test_a_file_over_the_limit_is_not_taken(page: Page, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    upload(page, tmp_path / "large.png")
    expect_text(page, re.compile("exceed the maximum allowed size of 20"))
    upload(page, save(tmp_path / "leaf.png", GREEN))
    expect_answer(page, "green")


def test_classify_without_a_picture_asks_for_one(page: Page) -> None:
    page.get_by_role("button", name="Classify").click()
    expect_text(page, "Choose a picture first.")


def test_examples_can_be_clicked(page: Page) -> None:
    examples = page.locator("button.gallery-item")
    expect(examples).to_have_count(2)  # notes.txt is none
    for image in examples.locator("img").all():  # drawn, not broken
        page.wait_for_function("image => image.naturalWidth == 60", arg=image.element_handle())
    examples.nth(0).click()  # in the order of their names
    expect_answer(page, "green")
    examples.nth(1).click()
    expect_answer(page, "blue")
    picture = page.get_by_test_id("image").locator("img")
    expect(picture).to_have_attribute("src", re.compile(r"sea\.JPEG"))


def test_the_heat_map_shows_the_class_that_is_chosen(page: Page, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), GREEN)
    picture.paste(BLUE, (0, 0, 20, 40))
    picture.save(tmp_path / "shore.png")
    heat = page.locator("#heat img")
    expect(heat).to_have_count(0)
    upload(page, tmp_path / "shore.png")
    expect_answer(page, "green")
    expect_text(page, re.compile(r"speak for green\.$"))
    first = heat.get_attribute("src")
    page.locator(".confidence-set").filter(has_text="blue").click()
    expect_text(page, re.compile(r"speak for blue\.$"))
    expect(heat).not_to_have_attribute("src", first)
    expect_answer(page, "green")
    page.get_by_role("button", name="Remove Image").click()
    expect(heat).to_have_count(0)


def test_a_webcams_picture_is_answered(page: Page) -> None:
    page.get_by_role("button", name="Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.locator("#picture video").wait_for()
    page.get_by_role("button", name="capture photo").click()
    expect_text(page, re.compile(r"^Answered in "))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_phone(browser: Browser, app: App, scheme: str, tmp_path: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with open_page(browser, app.url, **phone, color_scheme=scheme) as page:
        page.locator("button.gallery-item").first.tap()
        expect_answer(page, "green")
        expect(page.locator("#heat img")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour)[:3])) < 60) == (scheme == "dark")
        assert page.get_by_role("button", name="Classify").bounding_box()["y"] < 844


def test_it_links_to_what_is_known(page: Page) -> None:
    expect(page.get_by_role("link", name="Code")).to_have_attribute(
        "href", "https://example.com/code"
    )
    expect(page.get_by_role("link", name="Model card")).to_have_count(0)


# ------------------------------------------------------------------------------ the endpoint


def test_the_endpoint_gives_the_probabilities_of_the_model(
    client: gradio_client.Client, tmp_path: Path
) -> None:
    path = save(tmp_path / "leaf.png", GREEN)
    answer, took, heat = client.predict(gradio_client.handle_file(path), api_name="/classify")
    logits = [(value - m) / s for value, m, s in zip((0, 1, 0), MEAN, STD, strict=True)]
    total = sum(map(math.exp, logits))
    expected = {
        c: math.exp(x) / total for c, x in zip(("red", "green", "blue"), logits, strict=True)
    }
    found = {entry["label"]: entry["confidence"] for entry in answer["confidences"]}
    assert answer["label"] == "green" and took.startswith("Answered in ")
    assert found == pytest.approx(expected, abs=1e-5)
    with Image.open(heat) as image:
        assert image.size == (640, 480)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims width x height px in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty.jpg", "empty.jpg is not a picture that can be read."),
        ("page.eps", "page.eps is not a picture that can be read."),
        ("cut.jpg", "cut.jpg is damaged or incomplete."),
        ("cut.png", "cut.png is damaged or incomplete."),
        ("poster.png", "poster.png has more than 89 million pixels."),
        ("bomb.png", "bomb.png has more than 89 million pixels."),
        ("line.png", "line.png is more than 100 times as long as wide."),
        ("phone.heic", "phone.heic is a HEIC photo, which this page does not read."),
        ("scans.jpg", "scans.jpg would take too long to read."),
    ],
)
def test_a_picture_that_cannot_be_used_gets_a_sentence(
    client: gradio_client.Client, tmp_path: Path, name: str, sentence: str
) -> None:
    path = tmp_path / name
    if name.startswith("cut"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif name == "line.png":
        save(path, RED, size=(1, 20_000))
    else:
        path.write_bytes(
            {
                "empty.jpg": b"",
                "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
                "scans.jpg": b"\xff\xd8" + 70 * b"\xff\xda\0\0",
                "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
                "poster.png": png_of_size(10_000, 10_000),  # where Pillow itself only warns
                "bomb.png": png_of_size(30_000, 30_000),
            }[name]
        )
    with pytest.raises(gradio_client.exceptions.AppError, match=re.escape(sentence)):
        client.predict(gradio_client.handle_file(path), api_name="/classify")


def test_a_request_cannot_name_a_file_of_the_server(app: App, tmp_path: Path) -> None:
    secret = save(tmp_path / "secret.png", RED)  # neither uploaded nor an example
    call = f"{app.url}/gradio_api/call/classify"
    request = urllib.request.Request(
        call,
        data=json.dumps({"data": [{"path": str(secret)}]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=20) as reply:
        result = reply.read().decode()
    assert "event: error" in result and "Choose a picture first." in result


def test_a_crowd_gets_answers_or_is_told_that_the_queue_is_full(
    app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    running = stress_app.App(urlsplit(app.url).port, app.pid)
    assert stress_app.crowd(running, clients=50, seconds=3) == []
    assert re.search(r"\d+ answers in .* told [1-9]\d* times", capsys.readouterr().out, re.DOTALL)


def test_sixty_hostile_files_and_requests(deployment: Path) -> None:
    done = run_stage_command(
        "scripts/stress_app.py", "hostile", "--count", 60, "--app-folder", deployment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "good pictures answered: 6\n" in done.stdout
    assert re.search(r"hostile files refused: [1-9]", done.stdout)


def test_the_stress_notices_a_leak_and_a_missing_sentence() -> None:
    for answer in (
        stress_app.Answer(200, "error", '{"error": "Traceback (most recent call last)"}'),
        stress_app.Answer(200, "complete", "root:x:0:0"),
        stress_app.Answer(500, "", "Internal Server Error"),
        stress_app.Answer(200, "error", "null"),
        stress_app.Answer(200, "", ""),
    ):
        assert stress_app.wrong_with(answer, is_file=True)
    assert not stress_app.wrong_with(stress_app.Answer(200, "error", '{"error": "x"}'), True)


def test_nothing_is_written_beside_the_app(app: App) -> None:
    names = {path.name for path in app.folder.iterdir()} - {"__pycache__"}
    shipped = {path.name for path in APP_FOLDER.iterdir()} - {"__pycache__"}
    assert names == shipped | {"model.pt", "model.json", "examples"}
    assert len(list((app.folder / "examples").iterdir())) == 3


# ------------------------------------------------------------------------------ refusing to start


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def describe(**changes: object):
    """Change keys of model.json; None removes one."""

    def change(folder: Path) -> None:
        export = {**json.loads((folder / "model.json").read_text()), **changes}
        export = {key: value for key, value in export.items() if value is not None}
        (folder / "model.json").write_text(json.dumps(export))

    return change


REFUSALS = {
    "no model.json": (remove("model.json"), "model.json is missing"),
    "no model.pt": (remove("model.pt"), "model.pt is missing"),
    "broken model.json": (lambda f: (f / "model.json").write_text("{"), "is not JSON"),
    "another format": (describe(format=2), "is not of format 1"),
    "a key is missing": (describe(mean=None), "has no mean"),
    "another model.pt": (lambda f: (f / "model.pt").write_bytes(b"x"), "its sha256 differs"),
    "another model.json": (describe(name="x"), "is not the one that MODEL_JSON_SHA256 names"),
    "a label too few": (describe(labels=["red", "green"]), "3 outputs, model.json has 2 labels"),
}


@pytest.fixture
def spoiled(deployment: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployment, tmp_path / "gradio_deploy"))


def check_refusal(case: str, exit_code: int, out: str, err: str) -> None:
    assert exit_code == 2 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and REFUSALS[case][1] in line
    assert line.endswith(": run `python3 generate_trace_model.py` first")


@pytest.mark.parametrize("case", REFUSALS)
def test_a_spoiled_deployment_is_refused_in_one_line(
    module: ModuleType,
    spoiled: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case == "another model.json":
        content = (spoiled / "model.json").read_bytes()
        monkeypatch.setenv("MODEL_JSON_SHA256", hashlib.sha256(content).hexdigest())
    REFUSALS[case][0](spoiled)
    monkeypatch.setattr(module, "FOLDER", spoiled)
    with pytest.raises(SystemExit) as ended:
        module.main()
    check_refusal(case, ended.value.code, *capsys.readouterr())


# The first ends before the model is loaded, the second after it has run.
@pytest.mark.parametrize("case", ["no model.json", "a label too few"])
def test_the_command_itself_refuses_in_one_line(spoiled: Path, case: str) -> None:
    REFUSALS[case][0](spoiled)
    ended = subprocess.run(
        [sys.executable, spoiled / "app.py"],
        cwd=spoiled.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
    )
    check_refusal(case, ended.returncode, ended.stdout, ended.stderr)


# ------------------------------------------------------------------------------ the pixels


@pytest.mark.parametrize(
    ("size", "resize_px", "input_px"),
    [((500, 375), 256, 224), ((333, 500), 256, 224), ((61, 47), 40, 32), ((57, 91), 35, 32)],
)
def test_preprocess_is_the_validation_rule(
    module: ModuleType, size: tuple[int, int], resize_px: int, input_px: int
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    export = {"resize_px": resize_px, "input_px": input_px, "mean": MEAN, "std": STD}
    rule = transforms.Compose(
        [
            transforms.Resize(resize_px),
            transforms.CenterCrop(input_px),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    (found, box), expected = module.preprocess(picture, export), rule(picture)[None]
    assert found.shape == expected.shape and found.dtype == torch.float32
    grey_levels = (found - expected).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255
    assert grey_levels.max() <= 1
    middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    assert middle == pytest.approx([side / 2 for side in size], abs=1.5)
    assert box[2] - box[0] == pytest.approx(min(size) * input_px / resize_px, abs=1.5)


def test_every_kind_of_picture_becomes_the_rgb_that_a_person_sees(
    module: ModuleType, tmp_path: Path
) -> None:
    ramp = np.arange(256, dtype=np.uint16).repeat(4).reshape(32, 32)
    clear_red = Image.new("RGBA", (32, 32), (*RED, 0))
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([*BLUE, *RED])
    expected = {
        "grey16.png": Image.fromarray(ramp.astype(np.uint8)).convert("RGB"),
        "clear.png": Image.new("RGB", (32, 32), "white"),
        "half.png": Image.new("RGB", (32, 32), (255, 127, 127)),
        "palette.png": Image.new("RGB", (32, 32), "white"),
        "first.gif": Image.new("RGB", (32, 32), RED),
        "ink.tiff": Image.new("RGB", (32, 32), "white"),
    }
    Image.fromarray(ramp * 257).save(tmp_path / "grey16.png")  # 65,535 is white
    clear_red.save(tmp_path / "clear.png")
    Image.new("RGBA", (32, 32), (*RED, 128)).save(tmp_path / "half.png")
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("RGB", (32, 32), RED).save(
        tmp_path / "first.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), BLUE)]
    )
    Image.new("CMYK", (32, 32), 0).save(tmp_path / "ink.tiff")
    for name, picture in expected.items():
        found = module.open_picture(tmp_path / name, 8)
        assert found.mode == "RGB", name
        difference = ImageChops.difference(found, picture).getextrema()
        assert max(high for _, high in difference) <= 1, (name, difference)


def test_a_phones_48_megapixels_are_read_small_and_alike(
    module: ModuleType, tmp_path: Path
) -> None:
    small = np.random.default_rng(2).integers(0, 256, (63, 47, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    large = Image.fromarray(small).resize((6048, 8064), Image.Resampling.BICUBIC)
    large.save(tmp_path / "phone.jpg", exif=exif, quality=90)
    found = module.open_picture(tmp_path / "phone.jpg", 256)
    assert found.size == (2016, 1512)
    turned = large.transpose(Image.Transpose.ROTATE_270)
    difference = np.subtract(
        *(np.asarray(p.resize((341, 256), Image.Resampling.BILINEAR), int) for p in (found, turned))
    )
    assert np.abs(difference).mean() < 1 and np.abs(difference).max() <= 8


def test_the_heat_map_adds_up_to_the_logit(module: ModuleType, deployment: Path) -> None:
    model, export = module.load_export(deployment)
    assert module.can_explain(model, export["input_px"])
    images = torch.rand(1, 3, INPUT_PX, INPUT_PX)  # positive, so that nothing is clipped
    features = module.last_features(model, images)
    evidence = module.activation_map(model, features, 1)
    largest = features[0, 1].max().item()
    assert evidence.max() == pytest.approx(1)
    assert evidence.mean() * largest == pytest.approx(model(images)[0, 1].item(), abs=1e-5)
    assert evidence[INPUT_PX // 2 :].max() == 0
    box = (10, 0, 90, 80)
    painted = np.asarray(module.paint(Image.new("RGB", (100, 80), "white"), evidence, box))
    assert painted.shape == (512, 640, 3)
    assert (painted[:, :60] == 102).all() and (painted[:, 580:] == 102).all()  # darkened
    assert (painted[270:, 70:570] > 250).all()  # nothing spoke for it there
    assert painted[:250, 70:570].mean() < 240


def test_a_model_that_is_built_otherwise_is_not_explained(module: ModuleType) -> None:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    class Squared(TopHalfColour):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) ** 2

    for model in (Mean(), Squared().eval()):
        assert not module.can_explain(model, INPUT_PX)


def test_labels_that_classes_share_are_told_apart(module: ModuleType) -> None:
    export = {
        "labels": ["crane", "kite", "crane"],
        "classes": ["n02012849", "n01608432", "n03126707"],
    }
    assert module.class_names(export) == ["crane (n02012849)", "kite", "crane (n03126707)"]

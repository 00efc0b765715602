"""The web app as a visitor meets it: its own process, real Chromium, nothing but loopback.

The model is one whose answers can be worked out by hand: the mean colour of the top half of what
it is shown. Chromium or Chrome must be installed; the app itself is started as a user starts it.
"""

import contextlib
import hashlib
import http.client
import http.server
import importlib.util
import io
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlsplit

import gradio_client
import numpy as np
import pytest
from conftest import run_stage_command
from exports import BLUE, GREEN, INPUT_PX, MEAN, NAME, RED, STD, write_top_half_colour
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import stress_app

APP_FOLDER = Path(__file__).resolve().parent.parent / "gradio_deploy"
START_LIMIT_S = 90  # importing torch and Gradio on a busy machine
STOP_LIMIT_S = 10
ANSWER_LIMIT_MS = 20_000
CHROMIUM_FLAGS = (
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


# ------------------------------------------------------------------------------ helpers


def make_deployment(folder: Path, with_maps: bool = True) -> Path:
    """A copy of the app in `folder` with an export whose answers can be worked out by hand."""
    shutil.copytree(
        APP_FOLDER, folder, ignore=shutil.ignore_patterns("model.*", "examples", "__pycache__")
    )
    write_top_half_colour(folder, with_maps)
    return folder


class App(NamedTuple):
    """A running app: its address, the folder that it runs in, its process."""

    url: str
    folder: Path
    pid: int


@contextlib.contextmanager
def start_app(folder: Path, **variables: str) -> Iterator[App]:
    """Run the app of `folder` on a free port until the block ends, with more of an environment.

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
        **variables,
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
    # Where there is no GPU, the package of a Space on ZeroGPU says so.
    noise = re.sub(r".*UserWarning: Error while reading infos from Nvidia.*", "", log.read_text())
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
    sys.path.insert(0, str(APP_FOLDER))  # where it finds classifier.py
    spec = importlib.util.spec_from_file_location("gradio_deploy_app", deployment / "app.py")
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    return imported


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(file, "PNG")
    return file.getvalue()


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
    expect(page.get_by_role("heading", name=NAME, exact=True)).to_be_visible()
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
    expect_text(page, "This is not a picture that can be read: send a JPEG, PNG or WebP file.")
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
    page.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    page.get_by_role("button", name="capture photo").click()
    expect_text(page, re.compile(r"^Answered in "))


def test_a_late_answer_does_not_end_the_webcam(page: Page, tmp_path: Path) -> None:
    upload(page, save(tmp_path / "leaf.png", GREEN))
    expect_answer(page, "green")
    late: list[Route] = []
    opened = False
    page.route("**/queue/join*", lambda route: route.continue_() if opened else late.append(route))
    page.get_by_role("button", name="Capture from camera").click()  # it removes the leaf
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    video = page.locator("#picture video").element_handle()
    opened = True
    for route in late:
        route.continue_()
    expect(page.get_by_test_id("label-output-value")).to_have_count(0, timeout=ANSWER_LIMIT_MS)
    expect(page.get_by_text("Choose a picture first.")).to_have_count(0)
    assert video.evaluate("video => video.isConnected && video.videoWidth > 0")
    page.get_by_role("button", name="capture photo").click()
    expect_text(page, re.compile(r"^Answered in "))


def test_a_picture_put_in_while_another_one_is_refused_is_answered(
    page: Page, tmp_path: Path
) -> None:
    held: list[Route] = []
    opened = False
    page.route("**/queue/join*", lambda route: route.continue_() if opened else held.append(route))
    (tmp_path / "notes.jpg").write_text("milk, eggs, flour")
    with page.expect_request("**/queue/join*"):
        upload(page, tmp_path / "notes.jpg")
    page.get_by_role("button", name="Remove Image").click()
    upload(page, save(tmp_path / "leaf.png", GREEN))
    picture = page.get_by_test_id("image").locator("img")
    expect(picture).to_have_attribute("src", re.compile(r"leaf\.png"))
    opened = True
    for route in held:
        route.continue_()
    expect_text(page, "This is not a picture that can be read: send a JPEG, PNG or WebP file.")
    expect_answer(page, "green")
    expect(picture).to_have_attribute("src", re.compile(r"leaf\.png"))


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


def test_a_link_is_the_exports_or_the_environments_and_never_a_program(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODEL_CARD_URL", "CODE_URL"):
        monkeypatch.delenv(name, raising=False)
    export = {"card_url": "https://a.b/card", "code_url": "https://a.b/code"}
    both = "[Model card](https://a.b/card) [Code](https://a.b/code)"
    assert (module.links(export), module.links({})) == (both, "")
    monkeypatch.setenv("MODEL_CARD_URL", "http://c.d/card")
    assert module.links(export) == both.replace("https://a.b/card", "http://c.d/card")
    for url in ("javascript:alert(1)", "https://a.b/) <b>", "card", 5):
        assert module.links({"code_url": url}) == "[Model card](http://c.d/card)"


def test_of_more_than_five_classes_it_says_how_often_one_of_five_was_right(
    module: ModuleType, deployment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing of it goes to Gradio's makers."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    session, export = module.classifier.load_export(deployment)
    seven = {"classes": list("abcdefg"), "labels": list("abcdefg"), "val_top5": 93.5}
    page = module.make_page(session, {**export, **seven}, deployment)
    texts = [block.value for block in page.blocks.values() if isinstance(block, module.gr.Markdown)]
    assert (
        "Says which of 7 classes a picture shows. On 1,234 validation pictures its first answer "
        "was right for **81.25 %**, one of its first five for **93.50 %** (best weights, epoch 7)."
    ) in texts[0]
    assert page.analytics_enabled is False


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


def test_a_picture_that_cannot_be_used_gets_a_sentence(
    client: gradio_client.Client, tmp_path: Path
) -> None:
    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(gradio_client.exceptions.AppError, match="This is a HEIC photo"):
        client.predict(gradio_client.handle_file(path), api_name="/classify")


def test_a_request_can_name_an_upload_only(app: App, tmp_path: Path) -> None:
    secret = save(tmp_path / "secret.png", RED)  # neither uploaded nor an example
    running = stress_app.App(urlsplit(app.url).port, app.pid)
    answer = stress_app.ask(running, [{"path": str(secret)}])
    assert answer.event == "error" and "Choose a picture first." in answer.text
    meta = {"_type": "gradio.FileData"}
    for address in (f"{app.url}/theme.css", "https://192.0.2.1/x.png"):
        answer = stress_app.ask(running, [{"path": address, "meta": meta}])
        assert answer.event == "error" and "not its address" in answer.text, address


def test_a_path_that_leads_out_of_the_uploads_is_refused(
    module: ModuleType, tmp_path: Path
) -> None:
    uploads = tmp_path / "uploads"
    for name in ("uploads/a.png", "uploads-of-others/a.png", "secret.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, RED)
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    found = module.uploaded_file({"path": f"{uploads}/a.png"}, uploads)
    assert found == uploads / "a.png"
    for path in ("uploads-of-others/a.png", "uploads/../secret.png", "uploads/link.png"):
        with pytest.raises(module.gr.Error, match="Choose a picture first"):
            module.uploaded_file({"path": f"{tmp_path}/{path}"}, uploads)


def test_of_its_own_folder_it_serves_the_examples_alone(app: App) -> None:
    running = stress_app.App(urlsplit(app.url).port, app.pid)
    for name, status in (
        *(("examples/sea.JPEG", 200), ("app.py", 403), ("model.onnx", 403), ("model.json", 403)),
        ("examples/../app.py", 403),
    ):
        path = f"/gradio_api/file={app.folder}/{name}"
        assert stress_app.request(running, "GET", path, None, "")[0] == status, name


def test_a_crowd_gets_answers_or_is_told_that_the_queue_is_full(app: App) -> None:
    running = stress_app.App(urlsplit(app.url).port, app.pid)
    figures, problems = stress_app.crowd(running, clients=50, seconds=3)
    assert problems == []
    assert figures["answers"] > 0 and figures["told_that_the_queue_is_full"] > 0


def test_sixty_hostile_files_and_requests(deployment: Path, tmp_path: Path) -> None:
    done = run_stage_command(
        *("scripts/stress_app.py", "hostile", "--count", 60, "--app-folder", deployment),
        *("--output", tmp_path / "hostile.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "hostile.json").read_text())
    assert figures["outcomes"]["good pictures answered"] == 6
    assert figures["outcomes"]["hostile files refused"] > 0 and figures["wrong"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("hostile", "--count", 0), "count is 0: it must be above 0"),
        (("crowd", "--clients", -3), "clients is -3: it must be above 0"),
        (("crowd", "--app-folder", "nowhere"), "no app.py in nowhere: name another --app-folder"),
        (("crowd", "--output", "nowhere/x.json"), "no folder for --output nowhere/x.json"),
    ],
)
def test_what_cannot_be_stressed_is_told(options: tuple[object, ...], said: str) -> None:
    done = run_stage_command("scripts/stress_app.py", *options)
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")


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


def send(app: App, path: str, body: bytes, **headers: str) -> int:
    """Status of a POST whose body goes in pieces, without its length, unless a header tells it."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(app.url).port, timeout=30)
    pieces = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    chunked = "Content-Length" not in headers
    try:
        kind = {"Content-Type": "application/json", **headers}
        connection.request("POST", path, pieces, kind, encode_chunked=chunked)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_request_that_is_no_upload_is_short(app: App) -> None:
    call = "/gradio_api/call/classify"
    body = json.dumps({"data": ["x" * 2_000_000]}).encode()
    assert send(app, call, b"", **{"Content-Length": "0"}) != 413
    assert send(app, call, body[:100], **{"Content-Length": str(len(body))}) == 413
    assert send(app, f"{call}/upload", body[:100], **{"Content-Length": "30000000"}) == 413
    assert send(app, call, body) >= 400  # not announced


def test_one_picture_is_read_at_a_time_and_no_refused_one_keeps_an_answer(
    module: ModuleType, deployment: Path
) -> None:
    page = module.make_page(*module.classifier.load_export(deployment), deployment)
    asking = {
        number: fn for number, fn in page.fns.items() if fn.name.startswith(("classify", "explain"))
    }
    assert sorted(fn.name for fn in asking.values()) == [
        *("classify", "classify_put_in", "classify_put_in", "explain")
    ]
    assert {fn.concurrency_id for fn in asking.values()} == {"model"}
    blanking = [fn for fn in page.fns.values() if fn.trigger_only_on_failure]
    taking_out = [fn for fn in page.fns.values() if fn.name == "take_out"]
    assert len(taking_out) == 1
    assert not any(fn.queue for fn in (*blanking, *taking_out))  # a full queue may be what failed
    blanked = {fn.trigger_after for fn in blanking}
    answering = {number for number, fn in asking.items() if fn.name != "explain"}
    assert blanked == answering


def test_nobody_is_told_how_often_it_was_asked(app: App) -> None:
    running = stress_app.App(urlsplit(app.url).port, app.pid)
    for path in ("/monitoring", "/monitoring/summary"):
        assert stress_app.request(running, "GET", path, None, "")[0] == 403, path
    assert stress_app.request(running, "GET", "/gradio_api/runs", None, "")[0] == 404


def test_nothing_is_written_beside_the_app(app: App) -> None:
    names = {path.name for path in app.folder.iterdir()} - {"__pycache__"}
    shipped = {path.name for path in APP_FOLDER.iterdir()} - {"__pycache__"}
    assert names == shipped | {"model.onnx", "model.json", "examples"}
    assert len(list((app.folder / "examples").iterdir())) == 3


# ------------------------------------------------------------------------------ what it leaves


def test_uploads_are_gone_once_the_app_was_ended(deployment: Path, tmp_path: Path) -> None:
    """By SIGTERM, which systemd and containers send."""
    folder = shutil.copytree(deployment, tmp_path / "app")
    with start_app(folder) as app:
        client = gradio_client.Client(app.url, verbose=False)
        photo = gradio_client.handle_file(save(tmp_path / "photo.png", RED))
        client.predict(photo, api_name="/classify")
        uploads = tmp_path / "app-elsewhere" / f"gradio-classifier-{os.getuid()}"
        assert list(uploads.rglob("photo.png"))
    assert not list(uploads.rglob("photo.png"))


@pytest.mark.parametrize("there", ["nothing", "own", "link", "readable", "another's"])
def test_the_uploads_lie_in_no_folder_of_another_user(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    me = os.getuid() + (there == "another's")
    monkeypatch.setattr(os, "getuid", lambda: me)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    usual, elsewhere = tmp_path / f"gradio-classifier-{me}", tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    if there == "link":
        usual.symlink_to(elsewhere)
    elif there != "nothing":
        usual.mkdir(0o750 if there == "readable" else 0o700)
    folder = module.own_folder()
    assert (folder == usual) == (there in ("nothing", "own"))
    assert folder.parent == tmp_path and folder.resolve() == folder != elsewhere
    assert folder.stat().st_mode & 0o777 == 0o700


def test_old_files_are_deleted_and_those_that_are_kept_stay(
    module: ModuleType, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("a/upload.png", "b/example.png", "tmp1234", "c/new.png")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
    for file in files[:3]:
        file.write_bytes(b"x")
    (tmp_path / "a/dangling").symlink_to(tmp_path / "nothing")
    time.sleep(1)
    files[3].write_bytes(b"x")
    for _ in range(2):
        module.delete_old_files(tmp_path, [str(files[1]), str(tmp_path / "gone.png")], 0.9, 10**9)
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
        assert left == ["b/example.png", "c/new.png"]
        assert not (tmp_path / "tmp1234").exists() and not (tmp_path / "a/dangling").is_symlink()


def test_uploads_are_kept_for_an_hour_and_2_gb_and_looked_through_every_three_minutes(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    swept = []
    monkeypatch.setattr(module, "delete_old_files", lambda *limits: swept.append(limits))

    def sleep(seconds: float) -> None:
        swept.append(seconds)
        if len(swept) == 4:
            raise InterruptedError

    monkeypatch.setattr(module.time, "sleep", sleep)
    kept = types.SimpleNamespace(keep_in_cache={"/examples/leaf.png"})
    with pytest.raises(InterruptedError):
        module.keep_deleting_old_files(types.SimpleNamespace(blocks={1: kept}))
    assert swept == [(tmp_path, ["/examples/leaf.png"], 3600, 2 * 10**9), 180] * 2


def test_an_empty_folder_goes_once_it_is_old(module: ModuleType, tmp_path: Path) -> None:
    """Not before: an upload's is empty for a moment."""
    for name in ("empty", "used", "outer/inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "used/upload.png").write_bytes(b"x")
    module.delete_old_files(tmp_path, [], 0.9, 10**9)
    folders = [tmp_path / name for name in ("empty", "outer", "outer/inner", "used")]
    assert all(folder.is_dir() for folder in folders)
    time.sleep(1)
    (tmp_path / "used/upload.png").touch()
    module.delete_old_files(tmp_path, [], 0.9, 10**9)
    # The outer one has changed just now, since it lost the inner one.
    assert [folder.is_dir() for folder in folders] == [False, True, False, True]
    time.sleep(1)
    module.delete_old_files(tmp_path, [], 0.9, 10**9)
    time.sleep(1)
    module.delete_old_files(tmp_path, [], 0.9, 10**9)
    assert list(tmp_path.iterdir()) == []  # and the folder itself stays


def test_the_oldest_files_beyond_a_total_go(module: ModuleType, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        file.write_bytes(bytes(100))
        time.sleep(0.05)
    module.delete_old_files(tmp_path, [str(files[0])], 3600, 250)
    assert [file.exists() for file in files] == [True, False, False, True]


def test_an_old_upload_goes_while_the_app_runs_and_its_examples_stay(
    deployment: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(deployment, tmp_path / "gradio_deploy"))
    code = (folder / "app.py").read_text()
    for name, seconds in (("KEEP_FILES_S", 3), ("SWEEP_S", 0.2)):
        code, count = re.subn(rf"^{name} = \d+", f"{name} = {seconds}", code, flags=re.M)
        assert count == 1
    (folder / "app.py").write_text(code)
    with start_app(folder) as app:
        running = stress_app.App(urlsplit(app.url).port, app.pid)
        assert stress_app.top_class(stress_app.classify(running, "a.png", png(GREEN))) == "green"
        too_large = bytes(20 * 2**20 + 5)  # Gradio leaves what has come of it
        assert stress_app.upload(running, "large.png", too_large)[0] == 413
        (uploads,) = (tmp_path / "gradio_deploy-elsewhere").glob("gradio-classifier-*")

        def names() -> set[str]:
            return {path.name for path in uploads.rglob("*") if path.is_file()}

        assert {"a.png", "meadow.png"} < names()
        deadline = time.monotonic() + 20
        while names() != {"meadow.png", "sea.JPEG"}:
            assert time.monotonic() < deadline, names()
            time.sleep(0.2)


# ------------------------------------------------------------------------------ refusing to start


def test_without_an_export_it_ends_with_one_line(deployment: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(deployment, tmp_path / "gradio_deploy"))
    (folder / "model.onnx").unlink()
    ended = subprocess.run(
        [sys.executable, folder / "app.py"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and f"{folder / 'model.onnx'} is missing" in line
    assert line.endswith(": run `python3 generate_trace_model.py` first")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"GRADIO_SERVER_PORT": "http"}, "error: GRADIO_SERVER_PORT is no number"),
        ({"GRADIO_SERVER_PORT": "99999"}, "must be 0-65535.): set another GRADIO_SERVER_NAME, GR"),
        ({"GRADIO_SERVER_NAME": "name.invalid"}, "set another GRADIO_SERVER_NAME, GRADIO_SERVER"),
        ({"GRADIO_TEMP_DIR": "/proc/none"}, "'/proc/none'): set another GRADIO_SERVER_NAME, GRA"),
    ],
    ids=["no number", "port", "name", "temp dir"],
)
def test_where_it_cannot_be_served_it_ends_with_one_line(
    deployment: Path, variables: dict[str, str], told: str
) -> None:
    ended = subprocess.run(
        [sys.executable, deployment / "app.py"],
        env={**os.environ, **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and told in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("pinned", ["right", "wrong"])
def test_the_export_can_be_pinned(
    module: ModuleType,
    deployment: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pinned: str,
) -> None:
    digest = hashlib.sha256((deployment / "model.json").read_bytes()).hexdigest()
    monkeypatch.setenv("MODEL_JSON_SHA256", f" {digest.upper() if pinned == 'right' else 'f' * 64}")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    launched = []
    monkeypatch.setattr(module.gr.Blocks, "launch", lambda *_, **__: launched.append(True))
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)  # this process keeps its own
    with contextlib.nullcontext() if pinned == "right" else pytest.raises(SystemExit, match="2"):
        module.main()
    assert bool(launched) == (pinned == "right")


def test_a_space_on_zerogpu_hears_that_it_has_started(deployment: Path, tmp_path: Path) -> None:
    """Without this report of the package `spaces`, Hugging Face ends the program."""
    reports = []

    class ZeroGpu(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reports.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ZeroGpu)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    folder = Path(shutil.copytree(deployment, tmp_path / "gradio_deploy"))
    try:
        with start_app(folder, SPACES_ZERO_GPU="true", SPACES_ZERO_DEVICE_API_URL=address) as app:
            running = stress_app.App(urlsplit(app.url).port, app.pid)
            path = save(tmp_path / "poppy.png", RED)
            answer = stress_app.classify(running, path.name, path.read_bytes())
            assert stress_app.top_class(answer) == "red"
    finally:
        server.shutdown()
        server.server_close()
    assert reports == ["/startup-report"]


# ------------------------------------------------------------------------------ the heat map


def test_the_heat_map_adds_up_to_the_logit(module: ModuleType, deployment: Path) -> None:
    session, _ = module.classifier.load_export(deployment)
    images = np.random.default_rng(0).random((1, 3, INPUT_PX, INPUT_PX), np.float32)  # nothing < 0
    logits, maps = session.run(None, {"images": images})
    evidence = module.activation_map(maps, 1)
    assert evidence.max() == pytest.approx(1)
    assert evidence.mean() * maps[0, 1].max() == pytest.approx(logits[0, 1], abs=1e-5)
    assert evidence[INPUT_PX // 2 :].max() == 0
    box = (10, 0, 90, 80)
    painted = np.asarray(module.paint(Image.new("RGB", (100, 80), "white"), evidence, box))
    assert painted.shape == (512, 640, 3)
    assert (painted[:, :60] == 102).all() and (painted[:, 580:] == 102).all()  # darkened
    assert (painted[270:, 70:570] > 250).all()  # nothing spoke for it there
    assert painted[:250, 70:570].mean() < 240


def test_without_maps_there_is_an_answer_and_no_heat_map(browser: Browser, tmp_path: Path) -> None:
    folder = make_deployment(tmp_path / "gradio_deploy", with_maps=False)
    with start_app(folder) as app, open_page(browser, app.url) as page:
        upload(page, save(tmp_path / "poppy.png", RED))
        expect_answer(page, "red")
        expect_text(page, re.compile(r"^Answered in .* for the rest\.$"))
        expect(page.locator("#heat")).to_have_count(0)

"""decoder.py: what hostile files cannot do to the process that asks, and that nothing else changes.

The files are those that scripts/stress_app.py sends to the app.
"""

import importlib.util
import io
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import ORIENTATIONS, encode, jpeg, scene, turned
from PIL import Image, PngImagePlugin
from test_classifier import pictures

import image_files

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gradio_deploy"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import decoder
import stress_app
from decoder import Decoder, RefusedError

GOOD = jpeg(scene(60, 80))


@pytest.fixture
def process() -> Iterator[Decoder]:
    one = Decoder()
    yield one
    one.end()


def impatient(folder: Path) -> Decoder:
    """A decoder that gives a picture one second."""
    source = Path(decoder.__file__).read_text()
    changed = re.sub(r"^MAX_PICTURE_S = \d+", "MAX_PICTURE_S = 1", source, flags=re.M)
    assert changed != source
    (folder / "impatient.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("impatient", folder / "impatient.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Decoder()


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.05)


# ------------------------------------------------------------------------------ honest pictures


def test_the_pixels_are_those_of_pillow_in_this_process(process: Decoder) -> None:
    odd = {
        "line": encode(scene(3, 300), "PNG"),
        "column": encode(scene(300, 3), "PNG"),
        "point": encode(scene(1, 1), "PNG"),
        "many bands": encode(scene(1201, 1003), "BMP"),
    }
    for name, content in {**pictures(), **odd}.items():
        found, expected = process.decode(content), decoder.decode(content)
        assert (found.mode, found.size) == ("RGB", expected.size), name
        assert found.tobytes() == expected.tobytes(), name


def test_sixteen_bits_become_eight_of_the_same_grey() -> None:
    values = np.concatenate([np.arange(-70_000, 70_000), [2**31 - 1, -(2**31)]]).astype(np.int32)
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for image in (
        Image.fromarray(values[None]),
        Image.fromarray(ramp),
        Image.frombytes("I;16B", ramp.shape, ramp.astype(">u2").tobytes()),
    ):
        expected = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        found = np.asarray(decoder.as_rgb(image))
        assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2)), image.mode


def with_xmp(picture: Image.Image, kind: str, exif: Image.Exif, xmp: str) -> bytes:
    options: dict[str, object] = {"exif": exif}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    elif kind == "TIFF":
        exif[0x02BC] = xmp.encode()
    else:
        options["xmp"] = xmp.encode()
    content = encode(picture, kind, **options)
    assert b"Orientation" in content
    return content


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_turns_and_xmp_does_not(orientation: int, kind: str) -> None:
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'
    bare, other = Image.Exif(), Image.Exif()
    other[0x010F] = "a camera's maker"
    other[0x0112] = 9  # no turn, and XMP does not count beside it either
    picture = scene(30, 40)
    expected = decoder.decode(encode(picture, kind))
    for exif in (bare, other):
        content = with_xmp(picture, kind, exif, xmp)
        assert decoder.decode(content).tobytes() == expected.tobytes()
        assert image_files.decode_with_pillow(content).tobytes() == expected.tobytes()
    for endian in "<>":
        stored, exif = turned(picture, orientation)
        exif.endian = endian
        content = encode(stored, kind, exif=exif)
        assert kind == "TIFF" or {"<": b"II*\0", ">": b"MM\0*"}[endian] in content
        with Image.open(io.BytesIO(content)) as image:
            if kind != "TIFF":  # which Pillow turns by itself
                assert decoder.exif_turn(image) == decoder.TURNS.get(image.getexif().get(0x0112))
        assert decoder.decode(content).size == (40, 30)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_picture_is_seen_as_it_was_taken(orientation: int) -> None:
    picture = scene(30, 40)
    stored, exif = turned(picture, orientation)
    found = decoder.decode(encode(stored, "PNG", exif=exif))
    assert (found.size, found.tobytes()) == (picture.size, picture.tobytes())


# ------------------------------------------------------------------------------ hostile ones


def test_fill_bytes_lead_to_the_same_markers_in_no_time() -> None:
    rng = random.Random(0)
    with_fill_bytes = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
    for _ in range(3000):
        content = bytes(rng.choices((0xFF, 0, 0xD0, 0xDA, 0xC0, 7), k=rng.randrange(30)))
        for start in range(len(content)):
            found = decoder.JPEG_MARKER.search(content, start)
            expected = with_fill_bytes.search(content, start)
            assert (found and (found.end(), found[1])) == (
                expected and (expected.end(), expected[1])
            )
    start = time.process_time()
    assert decoder.has_many_scans(stress_app.fill_bytes(100_000))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "make",
    [
        *(lambda form=form: stress_app.shared_tags(form) for form in ("JPEG", "PNG", "WEBP")),
        lambda: stress_app.shared_tags("TIFF"),
        lambda: stress_app.long_tiles(100_000_000, tiles=1),
    ],
)
def test_what_would_take_gigabytes_is_refused(process: Decoder, make: Callable[[], bytes]) -> None:
    with pytest.raises(RefusedError) as error:
        process.decode(make())
    assert (error.value.status, str(error.value)) == (422, decoder.DAMAGED)
    limits = resource.prlimit(process.process.pid, resource.RLIMIT_DATA)
    assert limits == (decoder.MAX_DATA_BYTES, decoder.MAX_DATA_BYTES)
    assert process.decode(GOOD).size == (80, 60)


def test_what_takes_too_long_is_refused(tmp_path: Path) -> None:
    process = impatient(tmp_path)
    try:
        assert process.decode(GOOD).size == (80, 60)
        for content in (
            stress_app.long_tiles(),
            stress_app.many_parts("JPEG", 400_000),
            stress_app.many_parts("GIF", 1_000_000),
        ):
            start = time.monotonic()
            with pytest.raises(Exception, match="damaged or incomplete") as error:
                process.decode(content)
            assert error.value.status == 422
            assert time.monotonic() - start < 10
            assert process.decode(GOOD).size == (80, 60)
    finally:
        process.end()


# ------------------------------------------------------------------------------ the process


def test_one_that_has_ended_is_replaced_unseen(process: Decoder) -> None:
    process.decode(GOOD)
    first = process.process.pid
    process.process.kill()
    process.process.wait()
    assert process.decode(GOOD).size == (80, 60)
    assert process.process.pid != first


def test_it_waits_for_the_next_picture_as_long_as_it_takes(tmp_path: Path) -> None:
    process = impatient(tmp_path)
    try:
        process.decode(GOOD)
        first = process.process.pid
        time.sleep(1.5)  # longer than a picture may take
        process.decode(GOOD)
        assert process.process.pid == first
    finally:
        process.end()


def test_what_breaks_in_leaves_no_answer_to_the_next_picture(
    process: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    process.decode(GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(decoder.json, "loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            process.decode(encode(scene(10, 10), "PNG"))
    assert process.decode(GOOD).size == (80, 60)


def test_pictures_that_come_at_once_get_their_own_answers(process: Decoder) -> None:
    process.decode(GOOD)
    together, found = threading.Barrier(8), []

    def ask(side: int, content: bytes) -> None:
        together.wait()
        for _ in range(5):
            found.append((side, process.decode(content).size))

    sides = range(300, 308)
    threads = [
        threading.Thread(target=ask, args=(side, encode(scene(side, 2 * side), "PNG")), daemon=True)
        for side in sides
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    assert sorted(found) == [(side, (2 * side, side)) for side in sides for _ in range(5)]


def test_it_knows_no_secrets_and_hears_no_ctrl_c(
    process: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIsecret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere/lib")
    process.decode(GOOD)
    pid = process.process.pid
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert not [one for one in variables if b"wJalr" in one]
    assert b"LD_LIBRARY_PATH=/somewhere/lib" in variables  # some Pythons do not start without
    assert os.getsid(pid) == pid
    open_files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert len(open_files) == 3, open_files


def test_it_ends_with_its_parent() -> None:
    program = (
        "import decoder, sys, time; one = decoder.Decoder(); "
        "one.decode(sys.stdin.buffer.read()); print(one.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(decoder.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with parent:
        parent.stdin.write(GOOD)
        parent.stdin.close()
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        wait_for_end(pid)
        assert parent.stderr.read() == b""


def test_one_that_cannot_start_is_no_damaged_picture(
    process: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "__file__", "/nowhere/decoder.py")
    with pytest.raises(RuntimeError, match="does not start"):
        process.decode(GOOD)

"""scripts/verifying.py: damaged and odd files of many kinds, in `verify` and in the trainer."""

import base64
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command
from pictures import (
    EXACT,
    JPEG,
    ROUNDING,
    SCENE,
    assert_close,
    encode,
    jpeg,
    pixels,
    scene,
    turned,
    write_set,
)
from PIL import Image, ImageOps

import data
import image_files
from utils import Config, UserError

SCRIPT = REPOSITORY / "scripts" / "prepare_data.py"
sys.path.insert(0, str(SCRIPT.parent))

import verifying  # noqa: E402

GREY = SCENE.convert("L")
ALPHA = np.tile(np.linspace(0, 255, 84).astype(np.uint8), (60, 1))
PALETTE = SCENE.quantize(64)
# A picture of 60 x 84 px as it is: its centre of 60 x 60 in validation, of 60 x 80 in training,
# since no crop of all its area is within the ratios.
CONFIG = Config(
    batch_size=2, val_batch_size=2, train_px=60, val_px=60, val_resize_px=60,
    crop_min_scale=1.0, flip=False, workers=2,
)  # fmt: skip


# ------------------------------------------------------------------------------ odd pictures


def with_alpha() -> Image.Image:
    image = SCENE.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


def on_white(image: Image.Image, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return share * pixels(image) + (1 - share) * 255


def ycck() -> bytes:
    """As Photoshop saves CMYK: inverted, and the first three of the channels as YCC."""
    ycc = ImageOps.invert(SCENE).convert("YCbCr").split()
    # Pillow inverts what it writes, and takes it for CMYK: so do its numbers, but not the flag.
    channels = [*map(ImageOps.invert, ycc), Image.new("L", SCENE.size, 0)]
    content = bytearray(encode(Image.merge("CMYK", channels), "JPEG", quality=95))
    flag = content.index(b"Adobe") + 11
    assert content[flag] == 0
    content[flag] = 2
    return bytes(content)


def animated() -> bytes:
    others = [PALETTE.rotate(180), PALETTE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return encode(PALETTE, "GIF", save_all=True, append_images=others, duration=100)


def odd_exif() -> bytes:
    """Exif data that promises more than it holds, of which Pillow warns."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 1
    segment = exif.tobytes()[:-14]
    plain = jpeg(SCENE, dpi=(72, 72))
    return plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]


# scene(24, 32) at quality 90 through `jpegtran -arithmetic` of libjpeg-turbo 2.1.5.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsL"
    "EBYQERMUFRUVDA8XGBYUGBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU"
    "FBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAYACADAREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDSaY2X"
    "VGCYt7bE7hqAExM9c78TwLNvn8bg+Z3ybgvkh/8AVFqm9wzCa8vMrofweCM5hVyVL9WPcQ/gnrIU6naQL2MCwe+QtZQl"
    "w0i4AGWtBBVkkQFT4FCgMpBXb6mTv+pPaKYnTFQKVzWCoTjKc26X+tZ14nEGimPt8qzziYcfji6tQ87+COX/AOXj5llj"
    "fauiaaxP8JkPc3J0hLdA09/kmBxmb67DNSFraYsUIG3L+hAk40GI4VQJSY//AJUIBJuDBjFNoo0LG5rkQUkCM2FpX6eV"
    "dgJIDbWhp8zDBMbHHVcFx/NupSSyUxj6zC5fBaXSgJWzNKSWabcDLJJ6zypQQssGILRWxsDDO6OaQPfSRe9SN7VCeaGj"
    "2UxcQkovcla3/qjeBNxTwqeRtkrG/X5BKgJIMS1bIkZiAhlw+mJSoUO8V83VysCLoGQ3VT5EEudBKRapry9926sMENXs"
    "19PadKwS0IlQkODKB2NNTfeo4bkrt5+zaQ8+k+Ms4+nQKsWTORLczt276Lh8juyLA261b0lp4w2Q/9k="
)
DEEP = np.asarray(SCENE).astype(np.uint16) * 257  # 16 bits a value

ODD: dict[str, tuple[bytes, np.ndarray, tuple[float, float]]] = {
    "a_png_named.JPEG": (encode(SCENE, "PNG"), pixels(SCENE), EXACT),
    "cmyk.JPEG": (jpeg(SCENE.convert("CMYK")), pixels(SCENE), JPEG),
    "ycck.jpg": (ycck(), pixels(SCENE), JPEG),
    "rgb.jpg": (jpeg(SCENE, keep_rgb=True), pixels(SCENE), JPEG),
    "grey.jpg": (jpeg(GREY), pixels(GREY), JPEG),
    "progressive.jpg": (jpeg(SCENE, progressive=True), pixels(SCENE), JPEG),
    "restarts.jpg": (jpeg(SCENE, restart_marker_blocks=3), pixels(SCENE), JPEG),
    "arithmetic.jpg": (ARITHMETIC, pixels(scene(24, 32)), (20, 4)),
    "turned.jpg": (jpeg(turned(SCENE, 6)[0], exif=turned(SCENE, 6)[1]), pixels(SCENE), JPEG),
    "odd_exif.jpg": (odd_exif(), pixels(SCENE), JPEG),
    "16_bit_grey.png": (
        encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
        pixels(GREY),
        EXACT,
    ),
    "16_bit_rgb.png": (
        cv2.imencode(".png", DEEP[..., ::-1])[1].tobytes(),
        pixels(SCENE),
        EXACT,
    ),
    "alpha.png": (encode(with_alpha(), "PNG"), on_white(SCENE, ALPHA), ROUNDING),
    "palette.png": (
        encode(PALETTE, "PNG", transparency=5),
        on_white(PALETTE, np.where(np.asarray(PALETTE) == 5, 0, 255)),
        EXACT,
    ),
    "animated.gif": (animated(), pixels(PALETTE), EXACT),
    "trailing.jpg": (jpeg(SCENE) + bytes(3000), pixels(SCENE), JPEG),
    "trailing.png": (encode(SCENE, "PNG") + b"and more", pixels(SCENE), EXACT),
}


def only(image_set: image_files.ImageSet, part: str) -> np.ndarray:
    """The one picture of a set as the trainer's own loader hands it out: uint8 (60, 60, 3)."""
    if part == "train":
        ((images, _),) = data.train_batches(image_set, CONFIG, epoch=0)
    else:
        ((images, _),) = data.val_batches(image_set, CONFIG)
    return images[0].numpy()


@pytest.mark.filterwarnings("ignore:::PIL")  # of odd Exif data; the stages themselves are silent
@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_the_right_one_in_the_trainer(name: str, tmp_path: Path) -> None:
    content, expected, tolerance = ODD[name]
    image_set = write_set(tmp_path, {f"a/{name}": content})
    assert image_files.find_bad_images(image_set, 1, decode_all=False) == {}
    assert_close(image_files.decode(content), expected, tolerance)
    if expected.shape != (60, 84, 3):  # the arithmetic-coded one is resized: no pixel is its own
        assert image_files.decode(content).shape == expected.shape
        return
    assert_close(only(image_set, "val"), expected[:, 12:72], tolerance)
    narrower = cv2.resize(expected[:, 2:82].astype(np.float32), (60, 60))
    assert_close(only(image_set, "train"), narrower, (tolerance[0] + 1, tolerance[1] + 0.5))


# ------------------------------------------------------------------------------ damaged pictures


def cut(content: bytes, end: bytes = b"") -> bytes:
    return content[: len(content) // 2] + end


def hole(content: bytes, zeros: int = 0) -> bytes:
    """Zeros in the middle, as a crash leaves a block that was never written; both ends are whole.

    By default as much as leaves a JPEG with too little data, whatever it holds.
    """
    zeros = zeros or len(content) // 3
    start = len(content) // 2
    return content[:start] + bytes(zeros) + content[start + zeros :]


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def bomb_png() -> bytes:
    """A kilobyte that says it is 60,000 x 60,000 px."""
    content = bytearray(encode(SCENE, "PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = (verifying.zlib_ng.crc32(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def bomb_jpeg() -> bytes:
    content = jpeg(SCENE)
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + b"\xff\xdc\xff\xdc" + content[at + 4 :]


PAGE = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
END = b"\xff\xd9"  # of a JPEG
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "the file is empty"),
    "cut_short.jpg": (cut(jpeg(SCENE)), "cut short"),
    "cut_short_but_ended.jpg": (cut(jpeg(SCENE), END), "damaged inside or cut short"),
    "cut_short_progressive.jpg": (cut(jpeg(SCENE, progressive=True)), "cut short"),
    "zeros_at_the_end.jpg": (cut(jpeg(SCENE), bytes(3000)), "cut short"),
    "zeros_inside_cmyk.jpg": (hole(jpeg(SCENE.convert("CMYK"))), "damaged inside"),
    "zeros_inside_turned.jpg": (
        hole(jpeg(turned(SCENE, 6)[0], exif=turned(SCENE, 6)[1])),
        "damaged inside",
    ),
    "cut_short_arithmetic.jpg": (cut(ARITHMETIC), "cut short"),
    "a_marker_lost.jpg": (
        jpeg(SCENE, restart_marker_blocks=3).replace(b"\xff\xd3", b"\xff\xd6", 1),
        "damaged inside",
    ),
    "text.jpg": (b"n01440764 1 2 3 4\n" * 40, "not an image"),
    "page.jpg": (PAGE, "not an image"),
    "zeros.jpg": (bytes(5000), "not an image"),
    "cut_short.png": (cut(encode(SCENE, "PNG")), "cut short"),
    "flipped.png": (flip(encode(SCENE, "PNG"), 4000), "a checksum of the PNG is wrong"),
    "flipped_16_bit.png": (
        flip(encode(Image.fromarray(DEEP[..., 0]), "PNG"), 3000),
        "a checksum of the PNG is wrong",
    ),
    "cut_short.gif": (cut(animated()[:4000]), ""),
    "cut_short.webp": (cut(encode(SCENE, "WEBP")), ""),
    "bomb.png": (bomb_png(), "exceeds limit"),
    "bomb.jpg": (bomb_jpeg(), "exceeds limit"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_picture_stops_the_loader_with_its_path(
    part: str, name: str, tmp_path: Path
) -> None:
    content, reason = DAMAGED[name]
    image_set = write_set(tmp_path, {f"a/{name}": content})
    with pytest.raises(UserError) as stop:
        only(image_set, part)
    text = str(stop.value)
    assert text.startswith(f"cannot read {tmp_path / 'a' / name} (")
    assert reason in text and "put a good copy there" in text


def verify(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return run_stage_command(SCRIPT, "verify", *arguments, **options)


def told(output: str) -> dict[str, str]:
    """Problems that were told on the screen, by path."""
    return dict(re.findall(r"  problem: (\S+): (.*)", output))


def good_set(folder: Path, **files: bytes) -> Path:
    """A data set of one class, with more files in train where they are given."""
    write_set(folder / "train", {"a/good.jpg": jpeg(SCENE), **files})
    write_set(folder / "val", {"a/good.jpg": jpeg(SCENE, quality=90)})
    return folder


def test_every_damaged_picture_is_told_and_no_other(tmp_path: Path) -> None:
    files = {f"a/{name}": content for name, (content, _) in DAMAGED.items()}
    files |= {f"a/{name}": content for name, (content, _, _) in ODD.items()}
    good_set(tmp_path / "set", **files)
    done = verify(tmp_path / "set", "--output", tmp_path / "report.json")
    problems = told(done.stdout)
    folder = tmp_path / "set" / "train" / "a"
    assert problems.keys() == {str(folder / name) for name in DAMAGED}
    for name, (_, reason) in DAMAGED.items():
        assert reason in problems[str(folder / name)]
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()  # nor does a library write there
    first = min(DAMAGED)
    assert line.startswith(
        f"error: {len(DAMAGED)} problems in {tmp_path / 'set'}, listed above, the first "
        f"{folder / first}: "
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert {problem["path"]: problem["problem"] for problem in report["problems"]} == problems
    assert report["parts"]["train"]["unreadable"] == len(DAMAGED)
    assert not (tmp_path / "set" / "train" / image_files.INDEX_NAME).exists()


def test_odd_pictures_are_noted_and_all_is_well(tmp_path: Path) -> None:
    files = {f"a/{name}": content for name, (content, _, _) in ODD.items()}
    large = Image.new("RGB", (6000, 5000), "red")
    files |= {"a/large.jpg": jpeg(large), "a/tiny.png": encode(SCENE.resize((1, 40)), "PNG")}
    good_set(tmp_path / "set", **files)
    done = verify(tmp_path / "set", "--output", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{tmp_path / 'set'}: all is well\n")
    notes = json.loads((tmp_path / "report.json").read_text())["notes"]
    folder = f"{tmp_path / 'set' / 'train' / 'a'}/"
    names = {kind: [path.removeprefix(folder) for path in paths] for kind, paths in notes.items()}
    assert names == {
        "a PNG by another name": ["a_png_named.JPEG"],
        "CMYK, shown as RGB": ["cmyk.JPEG", "ycck.jpg"],
        "turned upright, as EXIF data asks for": ["turned.jpg"],
        "animated, of which the first picture is shown": ["animated.gif"],
        "above 25 million pixels": ["large.jpg"],
        "below 32 px": ["arithmetic.jpg", "tiny.png"],
    }
    assert f"noted: CMYK, shown as RGB: 2 ({folder}cmyk.JPEG, {folder}ycck.jpg)" in done.stdout
    numbers = json.loads((tmp_path / "report.json").read_text())["parts"]["train"]
    assert numbers["formats"] == {"JPEG": 10, "PNG": 7, "CMYK JPEG": 2, "GIF": 1}
    assert (numbers["pictures"], numbers["unreadable"]) == (20, 0)
    assert numbers["least_width_px"] == 1 and numbers["most_width_px"] == 6000
    assert numbers["least_height_px"] == 24 and numbers["most_height_px"] == 5000
    assert (numbers["median_height_px"], numbers["median_width_px"]) == (60, 84)


@pytest.mark.parametrize("name", ["left_over.jpg", "zeros_inside.jpg", "left_over_turned.jpg"])
def test_what_may_be_damaged_is_told_with_its_path(name: str, tmp_path: Path) -> None:
    stored, exif = turned(SCENE, 6)
    plain, junk = jpeg(SCENE), b"left over" + END
    contents = {
        "left_over.jpg": plain[:-2] + junk,
        "zeros_inside.jpg": hole(plain),
        "left_over_turned.jpg": jpeg(stored, exif=exif)[:-2] + junk,
    }
    if name != "zeros_inside.jpg":
        assert_close(image_files.decode(contents[name]), pixels(SCENE), JPEG)
    make_images(tmp_path, classes=3, images=3)
    path = tmp_path / "train" / "class_0" / name
    path.write_bytes(contents[name])
    done = verify(tmp_path)
    assert done.returncode == 0
    assert f"noted: perhaps damaged: libjpeg complains of it: 1 ({path})" in done.stdout
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        rf"perhaps damaged, but shown: {path} \(Corrupt JPEG data: \d+ extraneous", done.stdout
    )
    assert done.stdout.count("perhaps damaged") == 1


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    """A folder, a link to nowhere, and a file that may not be read, each named as a picture."""
    good_set(tmp_path)
    folder = tmp_path / "train" / "a"
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    (folder / "closed.jpg").write_bytes(jpeg(SCENE))
    (folder / "closed.jpg").chmod(0)
    reasons = {
        "closed.jpg": "Permission denied",
        "folder.jpg": "Is a directory",
        "link.jpg": "No such file or directory",
    }

    def without_rights() -> None:
        # Those of root, to read whatever it likes: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
        for right in (1, 2):
            ctypes.CDLL(None).prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP; others have none

    def run(stage: object, *options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(REPOSITORY / stage), *map(str, options)],
            env=COMMAND_ENVIRONMENT,
            preexec_fn=without_rights,
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run(SCRIPT, "verify", tmp_path)
    assert done.returncode == 2
    assert told(done.stdout) == {str(folder / name): reasons[name] for name in reasons}
    done = run("trainer.py", *trainer_options(tmp_path))
    assert done.returncode == 2
    for name, reason in reasons.items():
        assert re.search(f"cannot be read: {folder / name} \\(.*{reason}", done.stdout)
    assert done.stderr.startswith("error: 3 of 5 images cannot be read")
    (folder / "closed.jpg").unlink()
    for name in ("folder.jpg", "link.jpg"):
        others = {f"a/{other}" for other in (*reasons, "good.jpg") if other != name}
        image_set = image_files.list_folder(folder.parent)
        with pytest.raises(UserError, match=f"cannot read {folder / name} .*{reasons[name]}"):
            only(image_set.without(others), "train")


def trainer_options(folder: Path) -> list[object]:
    return [
        *("--train-folder-name", folder / "train", "--val-folder-name", folder / "val"),
        *("--runs-folder", folder / "runs", "--name", "run", "--epochs", 1, "--batch-size", 2),
        *("--train-px", 32, "--val-px", 32, "--val-resize-px", 32, "--workers", 1),
        *("--precision", "fp32", "--max-lr", 0.01),
    ]


def train(folder: Path) -> subprocess.CompletedProcess[str]:
    return run_stage_command("trainer.py", *trainer_options(folder))


def test_damage_that_the_check_at_the_start_does_not_see_brings_a_run_down(tmp_path: Path) -> None:
    make_images(tmp_path, classes=2, images=3)
    path = tmp_path / "train" / "class_1" / "train_2.jpg"
    path.write_bytes(cut(path.read_bytes(), END))
    done = train(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot read {path} (damaged inside")
    assert told(verify(tmp_path).stdout).keys() == {str(path)}


# ------------------------------------------------------------------------------ after a clean one


def settled(folder: Path) -> None:
    """Class folders that changed a minute ago: an index is kept of what does not change now."""
    for class_folder in folder.glob("*/*/"):
        then_ns = time.time_ns() - 60 * 10**9
        os.utime(class_folder, ns=(then_ns, then_ns))


def overwrite(path: Path, content: bytes) -> None:
    """In the same file, of which its folder knows nothing."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


def unnoticed_flip(content: bytes) -> bytes:
    """A JPEG with another bit somewhere in its middle, at which no decoder takes offence."""
    expected = image_files.decode(content)
    for at in range(len(content) // 2, len(content)):
        changed = flip(content, at)
        try:
            different = not np.array_equal(image_files.decode(changed), expected)
        except (ValueError, OSError):
            continue
        if not image_files.take_complaint() and different:
            return changed
    raise AssertionError


def test_a_verified_folder_is_checked_no_more_and_knows_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    make_images(tmp_path, classes=2, images=3)
    settled(tmp_path)
    assert verify(tmp_path).returncode == 0
    for part in ("train", "val"):
        opened = image_files.open_image_set(str(tmp_path / part), part)
        assert opened.checked == image_files.DECODED
        crcs = [verifying.zlib_ng.crc32(opened.path(i).read_bytes()) for i in range(6)]
        assert opened.crcs.tolist() == crcs
        assert opened.without(["class_0/train_1.jpg"]).crcs.tolist() == (
            [crcs[0], *crcs[2:]] if part == "train" else crcs
        )

    # One bit, which changes the picture, and which the file itself does not tell.
    path = tmp_path / "train" / "class_1" / "train_2.jpg"
    content = path.read_bytes()
    overwrite(path, unnoticed_flip(content))
    done = train(tmp_path)
    assert done.returncode == 2
    assert "checking" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: cannot read {path} (its bytes are not those that were verified; `python3 "
        "scripts/prepare_data.py verify` finds all such files): put a good copy there"
    )
    # The advice at its end is a way out, though the folder counts as checked.
    config = dataclasses.replace(
        CONFIG,
        train_folder_name=str(tmp_path / "train"),
        val_folder_name=str(tmp_path / "val"),
        batch_size=3,
        skip_bad_images=True,
    )
    assert image_files.open_images(config)[2] == ["train/class_1/train_2.jpg"]
    for _ in range(2):  # what it was is not forgotten
        done = verify(tmp_path)
        assert done.returncode == 2
        assert told(done.stdout) == {
            str(path): "its bytes are not those that were last verified: bring back a copy or, if "
            "it is meant to be so, remove .image_index.npz above its class folder and verify again"
        }
    # From now on the trainer looks at the files itself again, and leaves this one out if told so.
    assert image_files.open_images(config)[2] == ["train/class_1/train_2.jpg"]
    # Nor where another file has been replaced since, of which its folder knows.
    other = tmp_path / "train" / "class_1" / "train_0.jpg"
    shutil.copy(other, tmp_path / "copy")
    os.replace(tmp_path / "copy", other)
    assert told(verify(tmp_path).stdout).keys() == {str(path)}
    overwrite(path, content)
    settled(tmp_path)
    assert verify(tmp_path).returncode == 0
    assert train(tmp_path).returncode == 0
    image_files.open_image_set(str(tmp_path / "train"), "train")
    assert "since it was verified" not in caplog.text
    other.unlink()
    assert image_files.open_image_set(str(tmp_path / "train"), "train").crcs is None
    assert "added, removed or replaced since it was verified" in caplog.text


def test_a_copy_keeps_the_checksums_of_the_same_names(tmp_path: Path) -> None:
    make_images(tmp_path / "set", classes=2, images=3)
    settled(tmp_path / "set")
    assert verify(tmp_path / "set").returncode == 0
    original = image_files.open_image_set(str(tmp_path / "set/train"), "train")
    subprocess.run(["cp", "-a", tmp_path / "set", tmp_path / "copy"], check=True)
    train = tmp_path / "copy/train"
    assert image_files.read_index(train) is None
    opened = image_files.open_image_set(str(train), "train")
    assert opened.checked == image_files.DECODED
    assert opened.crcs.tolist() == original.crcs.tolist()
    assert image_files.read_index(train).crcs.tolist() == original.crcs.tolist()
    overwrite(opened.path(4), original.path(5).read_bytes())
    with pytest.raises(ValueError, match="not those that were verified"):
        opened.read(4)
    # With another name in it, it is no copy.
    before = (train / "class_0").stat().st_mtime_ns
    (train / "class_0/train_0.jpg").rename(train / "class_0/other.jpg")
    os.utime(train / "class_0", ns=(before, before))
    opened = image_files.open_image_set(str(train), "train")
    assert opened.file(0) == "class_0/other.jpg" and opened.crcs is None


def test_a_copy_by_tar_keeps_the_checksums_too(tmp_path: Path) -> None:
    """It keeps times in whole seconds."""
    make_images(tmp_path / "set", classes=2, images=3)
    settled(tmp_path / "set")
    assert verify(tmp_path / "set").returncode == 0
    (tmp_path / "copy").mkdir()
    command = "tar cf - -C set . | tar xf - -C copy"
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, check=True)
    opened = image_files.open_image_set(str(tmp_path / "copy/train"), "train")
    assert opened.checked == image_files.DECODED and opened.crcs is not None


def test_pictures_that_have_gone_or_moved_since_are_noted(tmp_path: Path) -> None:
    make_images(tmp_path, classes=2, images=3)
    settled(tmp_path)
    assert verify(tmp_path).returncode == 0
    train = tmp_path / "train"
    (train / "class_0/train_0.jpg").unlink()
    (train / "class_0/train_1.jpg").rename(train / "class_1/moved.jpg")
    settled(tmp_path)
    done = verify(tmp_path)
    assert done.returncode == 0, done.stderr
    gone = ", ".join(str(train / f"class_0/train_{number}.jpg") for number in (0, 1))
    assert f"noted: no longer there since the last verification: 2 ({gone})\n" in done.stdout
    assert "no longer there" not in verify(tmp_path).stdout  # what is there now was verified


def test_checksums_outlive_a_start_after_files_were_added(tmp_path: Path) -> None:
    make_images(tmp_path, classes=2, images=3)
    settled(tmp_path)
    assert verify(tmp_path).returncode == 0
    first, last = (tmp_path / f"train/class_0/train_{number}.jpg" for number in (0, 2))
    shutil.copy(first, tmp_path / "train/class_1/added.jpg")
    settled(tmp_path)
    config = dataclasses.replace(
        CONFIG,
        train_folder_name=str(tmp_path / "train"),
        val_folder_name=str(tmp_path / "val"),
        batch_size=7,
    )
    assert len(image_files.open_images(config)[0]) == 7
    content = last.read_bytes()
    overwrite(last, unnoticed_flip(content))
    assert told(verify(tmp_path).stdout).keys() == {str(last)}
    overwrite(last, content)
    assert verify(tmp_path).returncode == 0
    opened = image_files.open_image_set(str(tmp_path / "train"), "train")
    assert len(opened.crcs) == 7


def test_a_folder_that_is_no_longer_clean_is_checked_again(tmp_path: Path) -> None:
    good_set(tmp_path)
    settled(tmp_path)
    assert verify(tmp_path).returncode == 0
    overwrite(tmp_path / "train" / "a" / "good.jpg", b"")
    done = verify(tmp_path)
    assert told(done.stdout) == {str(tmp_path / "train/a/good.jpg"): "the file is empty"}
    opened = image_files.open_image_set(str(tmp_path / "train"), "train")
    assert opened.checked == image_files.NOT_CHECKED and opened.crcs is not None
    assert image_files.open_image_set(str(tmp_path / "val"), "val").checked == image_files.DECODED


# ------------------------------------------------------------------------------ stores


def test_a_store_is_verified_with_its_checksums(tmp_path: Path) -> None:
    make_images(tmp_path / "set", classes=2, images=3)
    store = tmp_path / "store"
    assert run_stage_command(SCRIPT, "pack", tmp_path / "set", store).returncode == 0
    whole = store.read_bytes()
    done = verify(store, "--output", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    of_folder = tmp_path / "folder.json"
    assert verify(tmp_path / "set", "--output", of_folder).returncode == 0
    reports = [json.loads(path.read_text()) for path in (tmp_path / "report.json", of_folder)]
    assert reports[0]["parts"] == reports[1]["parts"]  # the pictures are kept as they were

    picture = (tmp_path / "set" / "val" / "class_1" / "val_0.jpg").read_bytes()
    at = whole.index(picture) + len(picture) // 2
    store.write_bytes(flip(whole, at))
    done = verify(store)
    assert done.returncode == 2
    problems = told(done.stdout)
    assert problems.keys() == {f"{store}/val/class_1/val_0.jpg"}
    assert "was changed after it was packed" in problems[f"{store}/val/class_1/val_0.jpg"]
    store.write_bytes(whole[:-1])
    done = verify(store)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {store} is damaged")


# ------------------------------------------------------------------------------ sets


def test_classes_duplicates_and_what_is_left_aside_are_told(tmp_path: Path) -> None:
    pictures = [jpeg(SCENE, quality=quality) for quality in range(50, 80)]
    train = {f"{name}/{number}.jpg": pictures.pop() for name in "abc" for number in range(3)}
    val = {f"{name}/{number}.jpg": pictures.pop() for name in "abx" for number in range(2)}
    train["c/again.jpg"] = train["a/1.jpg"]
    val["b/in_both.jpg"] = train["b/2.jpg"]
    others = {"a/readme.txt": b"", "a/1.jpg.part": b"", "b/deeper/1.jpg": b"", "loose.jpg": b""}
    write_set(tmp_path / "train", train | others | {"a/.hidden.jpg": b"", ".cache/x": b""})
    write_set(tmp_path / "val", val)
    (tmp_path / "val" / "c").mkdir()
    path = tmp_path / "made" / "for it" / "report.json"
    done = verify(tmp_path, "--output", path)
    report = json.loads(path.read_text())
    assert told(done.stdout) == {
        f"{tmp_path}/val/c": "no picture in it",
        f"{tmp_path}/train/x": "missing, is in val/",
    }
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: 2 problems in {tmp_path}, listed above, the first ")
    assert report["parts"]["train"]["classes"] == {"a": 3, "b": 3, "c": 4}
    assert report["parts"]["val"]["classes"] == {"a": 2, "b": 3, "c": 0, "x": 2}
    assert report["notes"] == {
        "left aside, no picture of a class": [
            *(f"{tmp_path}/train/{name}" for name in ("a/1.jpg.part", "a/readme.txt")),
            *(f"{tmp_path}/train/{name}" for name in ("b/deeper", "loose.jpg")),
        ],
        "the same picture again": [[f"{tmp_path}/train/{name}.jpg" for name in ("a/1", "c/again")]],
        "the same picture in train and val": [
            [f"{tmp_path}/train/b/2.jpg", f"{tmp_path}/val/b/in_both.jpg"]
        ],
    }
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["train", "10", "3", "3", "to", "4", "0.000", "10", "JPEG"] in rows
    assert [row for row in rows if len(row) == 3][:5] == [
        ["class", "train", "val"],
        ["x", "0", "2"],
        ["a", "3", "2"],
        ["b", "3", "3"],
        ["c", "4", "0"],
    ]


def test_names_that_are_no_text_are_told(tmp_path: Path) -> None:
    good_set(tmp_path, **{"\udcff/\udcfe.jpg": b""})
    write_set(tmp_path / "val", {"\udcff/1.jpg": jpeg(SCENE, quality=80)})
    done = verify(tmp_path, "--output", tmp_path / "report.json")
    assert done.returncode == 2
    assert f"problem: {tmp_path}/train/\\udcff/\\udcfe.jpg: the file is empty" in done.stdout
    assert done.stderr.count("\n") == 1
    (problem,) = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert problem["path"] == f"{tmp_path}/train/\udcff/\udcfe.jpg"


def test_files_of_one_checksum_are_compared(tmp_path: Path) -> None:
    """Two of the same size and CRC-32, with other pixels: no duplicates."""
    plain = encode(SCENE, "BMP")
    other = bytearray(plain)
    # CRC-32 is linear: changing these bits together changes nothing in it.
    polynomial = 0x1_04C1_1DB7
    for bit in range(33):
        if polynomial >> (32 - bit) & 1:
            other[1000 + bit // 8] ^= 1 << bit % 8
    assert bytes(other) != plain
    assert verifying.zlib_ng.crc32(bytes(other)) == verifying.zlib_ng.crc32(plain)
    good_set(tmp_path, **{"a/one.bmp": plain, "a/other.bmp": bytes(other)})
    done = verify(tmp_path)
    assert done.returncode == 0
    assert "the same picture" not in done.stdout


def test_what_is_said_of_a_damaged_picture_is_not_said_of_the_next(tmp_path: Path) -> None:
    """A byte of its Huffman tables is lost: libjpeg complains of it, and Pillow gives up."""
    content = jpeg(SCENE)
    at = content.index(b"\xff\xc4") + 30
    good_set(tmp_path, **{"a/0_lost.jpg": content[:at] + content[at + 1 :]})
    done = verify(tmp_path)
    assert told(done.stdout).keys() == {f"{tmp_path}/train/a/0_lost.jpg"}
    assert "perhaps damaged" not in done.stdout


@pytest.mark.parametrize(
    ("height", "width", "notes"),
    [
        (31, 40, ["below 32 px"]),
        (40, 32, []),
        (5000, 5000, []),
        (5000, 5001, ["above 25 million pixels"]),
    ],
)
def test_sizes_are_odd_beyond_the_limits_told(height: int, width: int, notes: list[str]) -> None:
    content = jpeg(Image.new("RGB", (width, height)))
    found = verifying.inspect("a.jpg", image_files.encoded(content))
    assert found == (height, width, "JPEG", notes)


def test_a_photo_with_its_preview_is_not_animated() -> None:
    """Such as cameras write, turned: only then does Pillow look at it."""
    stored, exif = turned(SCENE, 6)
    content = encode(stored, "MPO", save_all=True, append_images=[GREY.reduce(2)], exif=exif)
    *size, kind, notes = verifying.inspect("photo.jpg", image_files.encoded(content))
    assert (*size, kind) == (60, 84, "MPO")
    assert notes == ["turned upright, as EXIF data asks for"]


def test_a_part_is_described_by_its_names_and_its_readable_pictures() -> None:
    def part(names: bytes) -> verifying.Part:
        images = image_files.ImageSet(Path("train"), ("a",), names, np.zeros(3, np.int64))
        sides = np.array([[0, 0], [60, 84], [40, 100]], np.int32)
        return verifying.Part(images, np.ones(3, np.int64), np.ones(3, np.uint32), sides, None)

    numbers = verifying.describe(part(b"a/1.jpg\na/2.jpg\na/3.jpg"))
    assert (numbers["least_height_px"], numbers["least_width_px"]) == (40, 84)
    other = verifying.describe(part(b"a/1.jpg\na/2.jpg\na/4.jpg"))
    assert numbers["fingerprint"] != other["fingerprint"]


def test_no_checksums_are_kept_of_a_part_with_an_empty_class(tmp_path: Path) -> None:
    good_set(tmp_path, **{"b/good.jpg": jpeg(SCENE, quality=80)})
    (tmp_path / "val" / "b").mkdir()
    settled(tmp_path)
    assert told(verify(tmp_path).stdout) == {f"{tmp_path}/val/b": "no picture in it"}
    assert (tmp_path / "train" / image_files.INDEX_NAME).exists()
    assert not (tmp_path / "val" / image_files.INDEX_NAME).exists()


def imagenet(train: int, val: dict[str, int]) -> dict[str, verifying.Part]:
    """Parts of 1,000 classes, the training pictures shared out among them."""
    classes = tuple(f"n{number:08d}" for number in range(1000))
    labels = {
        "train": np.arange(train) % 1000,
        "val": np.repeat(np.arange(1000), [val.get(name, 50) for name in classes]),
    }
    return {
        part: verifying.Part(
            image_files.ImageSet(Path(part), classes, b"", labels[part]), *[np.empty(0)] * 3, None
        )
        for part in labels
    }


def test_the_counts_of_imagenet_are_known() -> None:
    assert verifying.unlike_imagenet(imagenet(1_281_167, {})) == []
    parts = imagenet(1_281_166, {"n00000007": 49, "n00000009": 51})
    assert verifying.unlike_imagenet(parts) == [
        ("train", "1,281,166 pictures, ImageNet-1k has 1,281,167"),
        ("val/n00000007", "49 pictures, ImageNet-1k has 50"),
        ("val/n00000009", "51 pictures, ImageNet-1k has 50"),
    ]


def test_names_that_only_begin_as_imagenets_are_others() -> None:
    parts = imagenet(2000, {})
    assert verifying.is_imagenet(parts)
    for part in parts.values():
        classes = tuple(f"{name}_small" for name in part.images.classes)
        part.images = dataclasses.replace(part.images, classes=classes)
    assert not verifying.is_imagenet(parts)
    assert verifying.unlike_imagenet(parts) == []


def test_what_looks_like_imagenet_is_compared_with_it(tmp_path: Path) -> None:
    content = jpeg(SCENE.resize((20, 14)))
    names = [f"n{number:08d}" for number in range(1000)]
    for part in ("train", "val"):
        write_set(tmp_path / part, {f"{name}/{part}_{name}.JPEG": content for name in names})
    done = verify(tmp_path, "--output", tmp_path / "report.json")
    problems = told(done.stdout)
    assert problems[f"{tmp_path}/train"] == "1,000 pictures, ImageNet-1k has 1,281,167"
    assert problems[f"{tmp_path}/val"] == "1,000 pictures, ImageNet-1k has 50,000"
    assert len(problems) == 1002
    assert "the 1,000 classes are named as ImageNet-1k's; the counts are not its own" in done.stdout
    assert "990 between the smallest and the largest" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["imagenet_1k"] and len(report["parts"]["train"]["classes"]) == 1000
    (tmp_path / "train" / names[0]).rename(tmp_path / "train" / "other")
    (tmp_path / "val" / names[0]).rename(tmp_path / "val" / "other")
    assert verify(tmp_path).returncode == 0


# ------------------------------------------------------------------------------ refusals and ends


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "half" / "train", {"a/good.jpg": jpeg(SCENE)})
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    (tmp_path / "notes.txt").write_text("no store")
    for arguments, text in (
        (
            [tmp_path / "half"],
            f"{tmp_path / 'half'} has no val/: name a folder with train/<class>/",
        ),
        ([tmp_path / "nowhere"], "has no train/ and no val/"),
        ([tmp_path / "empty"], "empty/train has no class folders"),
        ([tmp_path / "notes.txt"], "is no store of pictures"),
        ([tmp_path / "half", "--workers", 0], "workers is 0: it must be 1 to 1,024"),
        ([tmp_path / "half", "--output", tmp_path / "notes.txt" / "x"], "choose another --output"),
        ([tmp_path / "half", "--output", tmp_path], f"--output {tmp_path} is a folder"),
    ):
        done = verify(*arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and text in line


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    large = good_set(tmp_path) / "train" / "a" / "good.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large)
    for number in range(3000):  # which take minutes
        os.link(large, large.with_name(f"link_{number}.jpg"))
    settled(tmp_path)
    often = (  # a line of progress every second instead of every ten
        "import prepare_data, packing, utils; packing.LOG_INTERVAL_S = 1;"
        "utils.run_stage(prepare_data.main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", often, "verify", tmp_path, "--output", tmp_path / "report.json"],
        cwd=SCRIPT.parent,
        env=COMMAND_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert re.search(r"verifying [\d,]+/3,002  \d+ pictures/s  .* ETA ", line)
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (75, "error: interrupted\n")
    assert not (tmp_path / "report.json").exists()
    assert not list(tmp_path.glob(f"*/{image_files.INDEX_NAME}"))

"""image_files.py: which images there are, and what each shows; on files made here."""

import dataclasses
import errno
import io
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from pictures import (
    EXACT,
    JPEG,
    ORIENTATIONS,
    ROUNDING,
    SCENE,
    assert_close,
    encode,
    jpeg,
    pixels,
    turned,
    write_set,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import image_files
from store import StoreWriter
from utils import Config, UserError

CONFIG = Config(batch_size=5, val_batch_size=5, train_px=32, val_px=32, val_resize_px=36, workers=2)
PILLOW_MAY_WARN = pytest.mark.filterwarnings("ignore:::PIL")  # of what it finds in broken files

# ------------------------------------------------------------------------------ formats

GREY = SCENE.convert("L")
ALPHA = Image.fromarray(np.tile(np.linspace(0, 255, 84).astype(np.uint8), (60, 1)))
PALETTE = SCENE.quantize(64)
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256 + 77)  # 16 bits a grey value


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def on_white(image: Image.Image, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return share * pixels(image) + (1 - share) * 255


def palette_on_white(*see_through: int) -> np.ndarray:
    return on_white(PALETTE, np.where(np.isin(np.asarray(PALETTE), see_through), 0, 255))


FORMATS = {
    "baseline JPEG": (jpeg(SCENE), pixels(SCENE), JPEG),
    "progressive JPEG": (jpeg(SCENE, progressive=True), pixels(SCENE), JPEG),
    "grey JPEG": (jpeg(GREY), pixels(GREY), JPEG),
    "CMYK JPEG": (jpeg(SCENE.convert("CMYK")), pixels(SCENE), JPEG),
    "PNG": (encode(SCENE, "PNG"), pixels(SCENE), EXACT),
    "palette PNG": (encode(PALETTE, "PNG"), pixels(PALETTE), EXACT),
    "palette PNG, one colour transparent": (
        encode(PALETTE, "PNG", transparency=5),
        palette_on_white(5),
        EXACT,
    ),
    "palette PNG, some colours transparent": (
        encode(PALETTE, "PNG", transparency=bytes([0, 0, 255, 0])),
        palette_on_white(0, 1, 3),
        EXACT,
    ),
    "16-bit grey PNG": (encode(DEEP, "PNG"), pixels(GREY), EXACT),
    "black and white PNG": (encode(GREY.convert("1"), "PNG"), pixels(GREY.convert("1")), EXACT),
    "RGBA PNG": (
        encode(with_alpha(SCENE), "PNG"),
        on_white(SCENE, np.asarray(ALPHA)),
        ROUNDING,
    ),
    "LA PNG": (encode(with_alpha(GREY), "PNG"), on_white(GREY, np.asarray(ALPHA)), ROUNDING),
    # WebP always halves the colours' resolution.
    "lossy WebP": (encode(SCENE, "WEBP", quality=95), pixels(SCENE), (24, 4)),
    "lossless WebP": (encode(SCENE, "WEBP", lossless=True), pixels(SCENE), EXACT),
    "lossless WebP with alpha": (
        encode(with_alpha(SCENE), "WEBP", lossless=True, exact=True),
        on_white(SCENE, np.asarray(ALPHA)),
        ROUNDING,
    ),
    "GIF, one colour transparent": (
        encode(PALETTE, "GIF", transparency=5),
        palette_on_white(5),
        EXACT,
    ),
    "BMP": (encode(SCENE, "BMP"), pixels(SCENE), EXACT),
    "TIFF": (encode(SCENE, "TIFF", compression="tiff_lzw"), pixels(SCENE), EXACT),
    "16-bit grey TIFF": (encode(DEEP, "TIFF"), pixels(GREY), EXACT),
}


@pytest.mark.parametrize("name", FORMATS)
def test_decodes_to_what_a_person_sees(name: str) -> None:
    encoded, expected, tolerance = FORMATS[name]
    assert_close(image_files.decode(encoded), expected, tolerance)
    # At least a size: what is no plain JPEG keeps its own.
    small = image_files.decode(encoded, 20, 20)
    assert small.shape[0] >= 20 and small.shape[1] >= 20


def test_a_file_named_as_another_format_is_what_its_bytes_say(tmp_path: Path) -> None:
    images = write_set(tmp_path, {"a/picture.JPEG": encode(SCENE, "PNG")})
    assert image_files.find_bad_images(images, 1, decode_all=True) == {}
    assert_close(image_files.decode(images.path(0).read_bytes()), pixels(SCENE), EXACT)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_the_picture_upright(orientation: int, kind: str) -> None:
    stored, exif = turned(SCENE, orientation)
    quality = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}}
    encoded = encode(stored, kind, exif=exif, **quality[kind])
    assert_close(image_files.decode(encoded), pixels(SCENE), JPEG if kind == "JPEG" else EXACT)


def jpeg_with_exif(content: bytes) -> bytes:
    # Without a resolution of its own, Pillow reads the data once more and keeps errors to itself.
    plain, segment = jpeg(SCENE, dpi=(72, 72)), b"Exif\0\0" + content
    return plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]


@PILLOW_MAY_WARN
def test_exif_data_that_cannot_be_read_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()[6:]
    as_text = content.replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x02")
    assert as_text != content
    for broken in (b"", b"MM", content[:5], content[:12], b"XX" + content[2:], as_text):
        assert_close(image_files.decode(jpeg_with_exif(broken)), pixels(SCENE), JPEG)


def test_exif_data_as_imagemagick_writes_it_turns_a_png() -> None:
    """In hexadecimal digits, in a text of a name of its own."""
    stored, exif = turned(SCENE, 6)
    hexadecimal = exif.tobytes().hex()
    text = PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(hexadecimal) // 2:8}\n{hexadecimal}\n")
    content = encode(stored, "PNG", pnginfo=text)
    assert_close(image_files.decode(content), pixels(SCENE), EXACT)


def test_exif_turns_although_other_parts_of_it_are_broken() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    content = exif.tobytes()[6:]
    broken = content.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07")  # a number, typed as bytes
    assert broken != content
    expected = np.rot90(pixels(SCENE), -1)
    assert_close(image_files.decode(jpeg_with_exif(content)), expected, JPEG)
    assert_close(image_files.decode(jpeg_with_exif(broken)), expected, JPEG)


# ------------------------------------------------------------------------------ bad files

WHOLE = {  # small files of every format, as they should be
    "a.jpg": jpeg(SCENE),
    "progressive.jpg": jpeg(SCENE, progressive=True),
    "turned.jpg": jpeg(*turned(SCENE, 6)[:1], exif=turned(SCENE, 6)[1]),
    "cmyk.jpg": jpeg(SCENE.convert("CMYK")),
    "a.png": encode(SCENE, "PNG"),
    "palette.png": encode(PALETTE, "PNG", transparency=5),
    "deep.png": encode(DEEP, "PNG"),
    "a.webp": encode(SCENE, "WEBP"),
    "alpha.webp": encode(with_alpha(SCENE), "WEBP", lossless=True),
    "a.gif": encode(PALETTE, "GIF"),
    "a.bmp": encode(SCENE, "BMP"),
    "a.tif": encode(SCENE, "TIFF"),
    "lzw.tiff": encode(SCENE, "TIFF", compression="tiff_lzw"),
}


def find_bad(folder: Path, files: dict[str, bytes], decode_all: bool) -> dict[str, str]:
    """Reasons by name of the files that are reported."""
    images = write_set(folder, {f"class/{name}": content for name, content in files.items()})
    bad = image_files.find_bad_images(images, 2, decode_all)
    return {name.removeprefix("class/"): reason for name, reason in bad.items()}


@pytest.mark.parametrize("decode_all", [False, True])
def test_good_files_are_not_reported(decode_all: bool, tmp_path: Path) -> None:
    trailing = {
        f"{extra}_{name}": WHOLE[name] + content * extra
        for name in ("a.jpg", "progressive.jpg", "a.png", "a.webp")
        for extra in (1, 30, 300, 5000)
        for content in (b"\0", b"\xab")
    }
    assert find_bad(tmp_path, WHOLE | trailing, decode_all) == {}


@PILLOW_MAY_WARN
@pytest.mark.parametrize("decode_all", [False, True])
def test_files_cut_short_are_reported(decode_all: bool, tmp_path: Path) -> None:
    cut = {}
    for name, content in WHOLE.items():
        # A PNG's last 22 bytes and a GIF's last 2 are but the end mark: the picture is whole.
        size = len(content) - (24 if name.endswith("png") else 3 if name.endswith("gif") else 1)
        for kept in (*range(0, 24, 3), *range(24, size, size // 25), size - 7, size):
            cut[f"{kept}_{name}"] = content[:kept]
    bad = find_bad(tmp_path, cut, decode_all)
    assert cut.keys() - bad.keys() == set()
    assert all(bad.values())  # each with a reason
    assert bad["0_a.jpg"] == "the file is empty"


def test_files_of_something_else_are_reported(tmp_path: Path) -> None:
    strange = {
        "text.jpg": b"404 not found\n" * 50,
        "zeros.png": bytes(3000),
        "half_zeros.jpg": WHOLE["a.jpg"][:2000] + bytes(len(WHOLE["a.jpg"]) - 2000),
        "header.jpg": WHOLE["a.jpg"][:200],
        "header.png": b"\x89PNG\r\n\x1a\n",
    }
    bad = find_bad(tmp_path, strange | WHOLE, decode_all=False)
    assert bad.keys() == strange.keys()
    assert bad["text.jpg"] == "not an image that can be read"


def damage(content: bytes, at: int) -> bytes:
    return content[:at] + random.Random(0).randbytes(300) + content[at + 300 :]


def test_damage_that_a_format_can_notice_is_found_by_decoding(tmp_path: Path) -> None:
    places = {"a.jpg": 100, "cmyk.jpg": 100, "a.png": 2000, "deep.png": 2000, "alpha.webp": 20}
    damaged = {name: damage(WHOLE[name], at) for name, at in places.items()}
    assert find_bad(tmp_path, WHOLE | damaged, decode_all=True).keys() == damaged.keys()
    # Both ends of these files are as they should be.
    assert find_bad(tmp_path, WHOLE | damaged, decode_all=False) == {}


def test_a_jpeg_damaged_inside_is_refused_or_what_other_programs_show() -> None:
    content, refused, shown = WHOLE["a.jpg"], 0, 0
    for at in range(1000, len(content) - 400, 50):
        damaged = content[:at] + random.Random(at).randbytes(300) + content[at + 300 :]
        try:
            picture = image_files.decode(damaged)
        except (ValueError, OSError) as error:
            assert re.search("damaged inside or cut short|broken data stream", str(error))
            refused += 1
            continue
        shown += 1  # nothing else in a JPEG tells right bytes from wrong
        with Image.open(io.BytesIO(damaged)) as image:
            assert_close(picture, pixels(image), EXACT)
    assert refused > 2 * shown > 0


def without_a_scan() -> bytes:
    """A progressive JPEG that lacks its second scan, with the tables before it."""
    content = jpeg(SCENE, progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", content)]
    tables = [found.start() for found in re.finditer(b"\xff\xc4", content)]
    start, end = (max(at for at in tables if at < scan) for scan in scans[1:3])
    return content[:start] + content[end:]


def test_a_progressive_jpeg_that_lacks_a_scan_is_shown_with_a_complaint() -> None:
    image_files.take_complaint()
    assert image_files.decode(without_a_scan()).shape == (60, 84, 3)
    assert image_files.take_complaint().startswith("Inconsistent progression sequence")
    assert image_files.take_complaint() == ""


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_tiff_of_32_bits_a_grey_value_is_refused(dtype: type) -> None:
    """0 to 255, 65,535 or 1: it does not say what white is, and would mostly come out black."""
    deep = Image.fromarray(np.asarray(SCENE.convert("L")).astype(dtype))
    with pytest.raises(ValueError, match="32 bits a grey value"):
        image_files.decode(encode(deep, "TIFF"))


def test_what_cannot_be_opened_any_more_is_forgotten_without_a_word(tmp_path: Path) -> None:
    """A link whose file has gone, which the folder's index does not see: reading it tells."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(encode(SCENE, "JPEG"))
    listed = image_files.list_folder(tmp_path)
    (tmp_path / "a/1.jpg").unlink()
    listed.forget(np.arange(1))
    with pytest.raises(FileNotFoundError):
        listed.read(0)


def test_a_folder_named_as_an_image_is_reported(tmp_path: Path) -> None:
    (tmp_path / "class" / "folder.jpg").mkdir(parents=True)
    assert find_bad(tmp_path, WHOLE, decode_all=False).keys() == {"folder.jpg"}


@PILLOW_MAY_WARN
def test_broken_files_raise_nothing_but_what_is_documented() -> None:
    dice, refused = random.Random(0), 0
    for content in WHOLE.values():
        for _ in range(60):
            broken = bytearray(content[: dice.choice([None, dice.randrange(len(content))])])
            zone = dice.choice([200, len(broken)])  # headers are a small part of a file
            for _ in range(dice.choice([1, 3, 20]) if broken else 0):
                broken[dice.randrange(min(zone, len(broken)))] = dice.choice(
                    [0, 255, dice.randrange(256)]
                )
            try:
                picture = image_files.decode(bytes(broken))
            except (ValueError, OSError) as error:
                assert str(error)
                refused += 1
            else:
                assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert refused > 300  # of 780


def with_jpeg_header(offset: int, content: bytes) -> bytes:
    """A JPEG whose frame header is changed from some byte after its marker on."""
    start = WHOLE["a.jpg"].index(b"\xff\xc0") + offset
    return WHOLE["a.jpg"][:start] + content + WHOLE["a.jpg"][start + len(content) :]


def test_a_header_of_absurd_size_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(image_files.simplejpeg, "decode_jpeg")  # it would take 12 GB
    with pytest.raises(ValueError, match="exceeds limit"):
        image_files.decode(with_jpeg_header(5, b"\xff\xdc\xff\xdc"))  # 65,500 x 65,500


def test_a_jpeg_with_unusual_subsampling_is_decoded_by_pillow() -> None:
    encoded = with_jpeg_header(11, b"\x31")  # three luma samples beside one another
    with Image.open(io.BytesIO(encoded)) as image:
        assert_close(image_files.decode(encoded), pixels(image), EXACT)


# ------------------------------------------------------------------------------ sets of images


def test_images_are_listed_by_class_then_name(tmp_path: Path) -> None:
    names = ("b/2.JPEG", "b/10.jpeg", "b/c.PNG", "a/z.webp", "a/a.Tiff", "a/m.bmp", "c/only.gif")
    others = ("b/.hidden.jpg", "b/notes.txt", "b/jpg", "b/deeper/in.jpg", ".cache/x.jpg", "x.jpg")
    images = write_set(tmp_path, dict.fromkeys(names + others, b""))
    assert images.classes == ("a", "b", "c")
    assert images.files == (
        *("a/a.Tiff", "a/m.bmp", "a/z.webp"),
        *("b/10.jpeg", "b/2.JPEG", "b/c.PNG"),
        "c/only.gif",
    )
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert images.labels.dtype == np.int64
    assert images.path(4) == tmp_path / "b" / "2.JPEG"


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare_data\.py imagenet DIR.*--train-folder-name"):
        image_files.open_image_set(str(tmp_path / "missing"), "train")
    with pytest.raises(UserError, match=f"{tmp_path} has no class folders"):
        write_set(tmp_path, {"picture.jpg": b"", ".hidden/picture.jpg": b""})
    with pytest.raises(UserError, match=f"class folder {tmp_path / 'b'} holds no image"):
        write_set(tmp_path, {"a/1.jpg": b"", "b/deeper/1.jpg": b"", "b/notes.txt": b""})


def test_a_link_to_itself_is_no_class_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "b").symlink_to("a")
    assert write_set(tmp_path, {"a/1.jpg": b""}).classes == ("a", "b")


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    def set_of(part: str, *classes: str) -> image_files.ImageSet:
        return write_set(tmp_path / part, {f"{name}/1.jpg": b"" for name in classes})

    train = set_of("train", "a", "b", "c")
    image_files.check_same_classes(train, set_of("same", "a", "b", "c"))
    less, more, other = set_of("less", "a", "c"), set_of("more", *"abcd"), set_of("other", *"abx")
    for val, complaints in (
        (less, ["b is missing under .*less", "2 images in 2 classes", "3 classes"]),
        (more, ["d is missing under .*train"]),
        (other, ["c is missing under .*other", "x is missing under .*train"]),
    ):
        for complaint in complaints:
            with pytest.raises(UserError, match=complaint):
                image_files.check_same_classes(train, val)
    many = set_of("many", *(f"n{number:02d}" for number in range(9)))
    with pytest.raises(UserError, match=r"n00, n01, n02, n03, n04, … are missing under .*train"):
        image_files.check_same_classes(train, many)


def test_the_folder_above_is_not_taken_for_empty_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_set(tmp_path / part, {"a/1.jpg": b"", "b/1.jpg": b""})
        said = f"has no class folders of its own: name {tmp_path / part}$"
        with pytest.raises(UserError, match=said):
            image_files.open_image_set(str(tmp_path), part)


def test_one_folder_for_training_and_validation_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "train", {"a/1.jpg": b"", "b/1.jpg": b""})
    (tmp_path / "val").symlink_to("train")
    train = str(tmp_path / "train")
    for val in (train, str(tmp_path / "val")):
        config = dataclasses.replace(CONFIG, train_folder_name=train, val_folder_name=val)
        with pytest.raises(UserError, match="is named for training and for validation: its acc"):
            image_files.open_images(config)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
def test_what_is_not_a_files_fault_skips_none(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Image.new("RGB", (20, 20))
    images = write_set(tmp_path, {"a/1.jpg": jpeg(small), "b/1.jpg": b"x"})
    assert list(image_files.find_bad_images(images, 1, decode_all=True)) == ["b/1.jpg"]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(image_files, "decode", fail)
    with pytest.raises(UserError, match=r"a/1.jpg (was not read .Stale|takes more memory)"):
        image_files.find_bad_images(images, 1, decode_all=True)


@pytest.mark.parametrize(
    "name",
    ["EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EMFILE", "ENFILE", "ENOMEM"],
)
def test_errors_of_the_system_are_told_from_those_of_a_file(name: str) -> None:
    error = OSError(getattr(errno, name), "what the system says")
    assert "was not read (what the system says)" in image_files.system_fault("a.jpg", error)
    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP):
        assert image_files.system_fault("a.jpg", OSError(number, "of the file")) == ""


def test_a_long_check_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = jpeg(Image.new("RGB", (20, 20)))
    images = write_set(tmp_path, {f"a/{number}.jpg": content for number in range(250)})
    monkeypatch.setattr(image_files, "TELL_S", -1.0)
    caplog.set_level("INFO", "resnet50")
    assert image_files.find_bad_images(images, 2, decode_all=False) == {}
    assert caplog.messages == [f"checked {done} of 250" for done in (100, 200, 250)]


def test_a_set_without_some_files(tmp_path: Path) -> None:
    images = write_set(
        tmp_path, dict.fromkeys(("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"), WHOLE["a.jpg"])
    )
    fewer = images.without(["a/1.jpg", "b/2.jpg", "unknown"])
    assert fewer.files == ("a/2.jpg", "b/1.jpg")
    assert fewer.labels.tolist() == [0, 1]
    assert (fewer.folder, fewer.classes) == (images.folder, images.classes)
    assert images.without([]).fingerprint() == images.fingerprint() != fewer.fingerprint()
    assert len(images.files) == 4
    with pytest.raises(UserError, match=f"no image in {tmp_path / 'b'} can be read"):
        images.without(["b/1.jpg", "b/2.jpg"])


def test_the_fingerprint_is_of_the_names_and_of_contents(tmp_path: Path) -> None:
    def made(name: str, *files: str, content: bytes = WHOLE["a.jpg"]) -> image_files.ImageSet:
        return write_set(tmp_path / name, dict.fromkeys(files, content))

    images = made("here", "a/1.jpg", "b/1.jpg")
    moved = made("there", "a/1.jpg", "b/1.jpg")
    renamed = made("renamed", "a/1.jpg", "b/2.jpg")
    other_class = made("class", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    assert images.fingerprint() == moved.fingerprint()
    other_size = made("size", "a/1.jpg", "b/1.jpg", content=jpeg(GREY))
    sets = (images, renamed, other_class, other_size)
    assert len({each.fingerprint() for each in sets}) == 4
    other_size.path(1).unlink()
    with pytest.raises(UserError, match=f"cannot read {other_size.path(1)} .*No such file"):
        other_size.fingerprint()


@pytest.mark.parametrize("index", [0, 1, 63])
def test_no_damaged_picture_is_a_part_of_the_fingerprint(index: int, tmp_path: Path) -> None:
    """Or else a run would not go on with the good copy that it asks for."""
    images = write_set(tmp_path, {f"a/{number:02}.jpg": WHOLE["a.jpg"] for number in range(64)})
    fingerprint = images.fingerprint()
    content = WHOLE["a.jpg"]
    images.path(index).write_bytes(content[: len(content) // 2] + content[-2:])  # ends well
    if index == 1:  # of every second one only
        assert images.fingerprint() == fingerprint
    else:
        with pytest.raises(UserError, match=f"cannot read {images.path(index)} .*a good copy"):
            images.fingerprint()


def test_a_complaint_of_a_picture_in_the_fingerprint_is_not_told_of_the_next(
    tmp_path: Path,
) -> None:
    images = write_set(tmp_path, {"a/1.jpg": without_a_scan(), "b/1.jpg": WHOLE["a.jpg"]})
    images.fingerprint()
    assert image_files.take_complaint() == ""


# ------------------------------------------------------------------------------ a run's images


def run_config(folder: Path, **changed: object) -> Config:
    """The configuration of a run on folder/train (11 images) and folder/val (5)."""
    good = WHOLE["a.jpg"]
    write_set(folder / "train", {f"{i % 2}/{i}.jpg": good for i in range(11)})
    write_set(folder / "val", {f"{i % 2}/{i}.jpg": good for i in range(5)})
    folders = {"train_folder_name": str(folder / "train"), "val_folder_name": str(folder / "val")}
    return dataclasses.replace(CONFIG, **folders, **{"batch_size": 4, **changed})


def test_a_run_gets_both_sets(tmp_path: Path) -> None:
    train, val, skipped = image_files.open_images(run_config(tmp_path))
    assert (len(train.files), len(val.files), skipped) == (11, 5, [])


def test_a_run_on_bad_images_is_refused_unless_they_are_skipped(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    bad = tmp_path / "train" / "1" / "3.jpg"
    bad.write_bytes(b"")
    (tmp_path / "val" / "0" / "4.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"2 of 16 images .*{bad} \(the file is empty\)"):
        image_files.open_images(config)

    config = dataclasses.replace(config, skip_bad_images=True)
    train, val, skipped = image_files.open_images(config)
    assert skipped == ["train/1/3.jpg", "val/0/4.jpg"]
    # The good files of the same names in the other set stay.
    assert len(train.files) == 10 and "1/3.jpg" not in train.files and "0/4.jpg" in train.files
    assert len(val.files) == 4 and "0/4.jpg" not in val.files and "1/3.jpg" in val.files

    bad.write_bytes(WHOLE["a.jpg"])  # a resumed run has the images that it began with
    again = image_files.open_images(config, skipped)
    assert [again[0].files, again[1].files, again[2]] == [train.files, val.files, skipped]


def test_damage_inside_a_file_is_skipped_too(tmp_path: Path) -> None:
    config = run_config(tmp_path, skip_bad_images=True)
    (tmp_path / "train" / "0" / "2.jpg").write_bytes(damage(WHOLE["a.jpg"], 100))
    assert image_files.open_images(config)[2] == ["train/0/2.jpg"]


@pytest.mark.parametrize(("images", "counted"), [(1, "1 image"), (6, "6 images")])
def test_a_single_class_is_refused(images: int, counted: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, batch_size=2)
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / part / "1")
    for path in list((tmp_path / "train/0").iterdir())[images:]:
        path.unlink()
    with pytest.raises(UserError, match=f"train has {counted} in one class, 0: .*two images"):
        image_files.open_images(config)


@pytest.mark.parametrize(("batch_size", "advice"), [(12, "--batch-size 11"), (5, "--batch-size 4")])
def test_a_batch_size_that_does_not_suit_the_images_is_refused(
    batch_size: int, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=advice):
        image_files.open_images(run_config(tmp_path, batch_size=batch_size))


# ------------------------------------------------------------------------------ a folder's index


def settled(folder: Path) -> None:
    """Class folders that changed a minute ago: an index is kept of what does not change now."""
    for class_folder in folder.glob("*/"):
        then_ns = time.time_ns() - 60 * 10**9
        os.utime(class_folder, ns=(then_ns, then_ns))


def indexed(folder: Path, **changed: object) -> Config:
    """A run's images, checked once, with their indexes."""
    config = run_config(folder, **changed)
    for part in ("train", "val"):
        settled(folder / part)
    image_files.open_images(config)
    assert (folder / "train" / image_files.INDEX_NAME).is_file()
    assert (folder / "val" / image_files.INDEX_NAME).is_file()
    return config


def spoil_unseen(path: Path) -> None:
    """Other bytes in the same file: its folder does not change."""
    with open(path, "r+b") as file:
        file.truncate(10)


def test_a_checked_folder_is_neither_listed_nor_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = indexed(tmp_path)
    first = [list_set(image_set) for image_set in image_files.open_images(config)[:2]]
    for path in tmp_path.glob("*/*/*.jpg"):
        spoil_unseen(path)
    monkeypatch.delattr(image_files, "image_names")  # which lists a class folder
    *again, skipped = image_files.open_images(config)
    assert [list_set(image_set) for image_set in again] == first
    assert skipped == []


@pytest.mark.parametrize("command", ["tar", "cp"])
def test_what_comes_with_the_old_time_of_its_folder_is_found(command: str, tmp_path: Path) -> None:
    config = indexed(tmp_path)
    train, copy = tmp_path / "train", tmp_path / "copy"
    before = (train / "1").stat().st_mtime_ns
    subprocess.run(["cp", "-a", train, copy], check=True)
    (copy / "1/new.jpg").write_bytes(WHOLE["a.jpg"])
    (copy / "1/3.jpg").write_bytes(b"")
    os.utime(copy / "1", ns=(before, before))
    if command == "tar":  # in the format that keeps fractions of a second
        tar = tmp_path / "tar"
        subprocess.run(["tar", "-C", copy, "--format=pax", "-cf", tar, "1"], check=True)
        subprocess.run(["tar", "-C", train, "-xf", tar], check=True)
    else:
        subprocess.run(["cp", "-a", copy / "1", train], check=True)
    assert (train / "1").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"1 of 17 images cannot be read.*1/3\.jpg"):
        image_files.open_images(config)
    (train / "1/3.jpg").write_bytes(WHOLE["a.jpg"])
    assert "1/new.jpg" in image_files.open_images(config)[0].files


def test_a_copy_of_a_checked_folder_is_checked_again(tmp_path: Path) -> None:
    indexed(tmp_path)
    subprocess.run(["cp", "-a", tmp_path / "train", tmp_path / "copy"], check=True)
    assert (tmp_path / "copy" / image_files.INDEX_NAME).is_file()
    for folder, checked in (("train", image_files.LOOKED_WHOLE), ("copy", image_files.NOT_CHECKED)):
        assert image_files.open_image_set(str(tmp_path / folder), "train").checked == checked


def list_set(image_set: image_files.ImageSet) -> tuple:
    files, labels = image_set.files, image_set.labels
    assert labels.dtype == np.int64
    return files, labels.tolist(), image_set.classes, image_set.folder


def test_no_index_is_kept_while_a_folder_changes(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    settled(tmp_path / "train")
    settled(tmp_path / "val")
    now_ns = time.time_ns()
    os.utime(tmp_path / "train" / "1", ns=(now_ns, now_ns))
    image_files.open_images(config)
    assert not (tmp_path / "train" / image_files.INDEX_NAME).exists()
    assert (tmp_path / "val" / image_files.INDEX_NAME).is_file()


def add(train: Path) -> None:
    (train / "0" / "new.jpg").write_bytes(b"")


def add_a_class(train: Path) -> None:
    for part in ("train", "val"):
        write_set(train.parent / part, {"2/new.jpg": b""})


def exchange(train: Path) -> None:
    (train / "new").write_bytes(b"")
    os.replace(train / "new", train / "1" / "3.jpg")


@pytest.mark.parametrize("change", [add, add_a_class, exchange])
def test_what_is_new_is_found_and_checked(change: Callable, tmp_path: Path) -> None:
    config = indexed(tmp_path)
    change(tmp_path / "train")
    with pytest.raises(UserError, match="images cannot be read"):  # the new one is empty
        image_files.open_images(config)
    for path in tmp_path.glob("*/*/*.jpg"):
        path.write_bytes(path.read_bytes() or WHOLE["a.jpg"])
    train, _, _ = image_files.open_images(config)
    assert sorted(train.files) == sorted(
        str(path.relative_to(tmp_path / "train")) for path in tmp_path.glob("train/*/*.jpg")
    )
    settled(tmp_path / "train")
    settled(tmp_path / "val")
    image_files.open_images(config)  # keeps another index
    spoil_unseen(train.path(0))
    assert image_files.open_images(config)[0].files == train.files


def test_what_is_removed_is_missed(tmp_path: Path) -> None:
    config = indexed(tmp_path)
    (tmp_path / "train" / "0" / "4.jpg").unlink()
    assert "0/4.jpg" not in image_files.open_images(config)[0].files
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / part / "1")
    folders = {part: str(tmp_path / part) for part in ("train", "val")}
    train, val = (image_files.open_image_set(folder, part) for part, folder in folders.items())
    assert train.classes == val.classes == ("0",)
    assert len(train) == 5 and train.labels.tolist() == [0] * 5


def test_a_damaged_index_is_as_good_as_none(tmp_path: Path) -> None:
    config = indexed(tmp_path)
    index = tmp_path / "train" / image_files.INDEX_NAME
    whole, image_set = index.read_bytes(), image_files.open_images(config)[0]
    assert image_set.checked == image_files.LOOKED_WHOLE
    array = io.BytesIO()
    np.save(array, np.arange(3))
    damaged = [b"", b"PK", b"garbage" * 100, array.getvalue(), whole + b"\0"]
    damaged += [whole[:length] for length in range(1, len(whole), 29)]
    for at in range(0, len(whole), 2):
        changed = bytearray(whole)
        changed[at] ^= 1 << at // 2 % 8
        damaged.append(bytes(changed))
    for content in damaged:
        index.write_bytes(content)
        opened = image_files.open_image_set(str(tmp_path / "train"), "train")
        assert list_set(opened) == list_set(image_set)
    index.write_bytes(whole[:-30])
    assert image_files.open_image_set(str(tmp_path / "train"), "train").checked == 0
    image_files.open_images(config)
    assert image_files.open_image_set(str(tmp_path / "train"), "train").checked == 1


def test_an_index_is_used_whole_or_not_at_all(tmp_path: Path) -> None:
    indexed(tmp_path)
    train = tmp_path / "train"
    index, listed = train / image_files.INDEX_NAME, image_files.list_folder(train)
    crcs = np.arange(11, dtype=np.uint32) * 0x01010101
    index.unlink()
    image_files.keep_index(dataclasses.replace(listed, crcs=crcs), image_files.DECODED)
    whole = index.read_bytes()
    used = 0
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        index.write_bytes(changed)
        opened = image_files.open_image_set(str(train), "train")
        assert list_set(opened) == list_set(listed)
        kept = opened.checked, None if opened.crcs is None else opened.crcs.tolist()
        assert kept in ((image_files.DECODED, crcs.tolist()), (image_files.NOT_CHECKED, None))
        used += opened.checked
    assert used < len(whole)  # where a bit stands for nothing, such as a member's time

    with np.load(io.BytesIO(whole)) as archive:
        arrays = dict(archive)
    wrong = {
        "counts": arrays["counts"] + 1,
        "names": arrays["names"][: bytes(arrays["names"]).rindex(b"\n")],
        "crc32": crcs[1:],
    }
    for name, array in wrong.items():
        np.savez(index, **{**arrays, name: array})
        assert image_files.open_image_set(str(train), "train").checked == 0


def test_an_index_of_another_version_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed(tmp_path)
    monkeypatch.setattr(image_files, "INDEX_VERSION", image_files.INDEX_VERSION + 1)
    assert image_files.open_image_set(str(tmp_path / "train"), "train").checked == 0


def test_an_index_that_cannot_be_kept_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tmp_path)
    train = tmp_path / "train"
    settled(train)
    if os.geteuid() == 0:  # who may write into any folder, but not into another one's place
        (train / f".{image_files.INDEX_NAME}.tmp").mkdir()
    else:
        train.chmod(0o555)
    with caplog.at_level("INFO", logger="resnet50"):
        assert len(image_files.open_images(config)[0]) == 11
    assert f"no index is kept in {train}: " in caplog.text
    train.chmod(0o755)
    assert not (train / image_files.INDEX_NAME).exists()


def test_no_index_is_kept_of_a_folder_with_a_bad_file(tmp_path: Path) -> None:
    for skip in (False, True):
        config = run_config(tmp_path, skip_bad_images=skip)
        spoil_unseen(tmp_path / "train" / "1" / "3.jpg")
        settled(tmp_path / "train")
        settled(tmp_path / "val")
        if skip:
            assert image_files.open_images(config)[2] == ["train/1/3.jpg"]
        else:
            with pytest.raises(UserError, match="1 of 16 images cannot be read"):
                image_files.open_images(config)
        assert not (tmp_path / "train" / image_files.INDEX_NAME).exists()
        assert (tmp_path / "val" / image_files.INDEX_NAME).exists()


def test_a_look_at_both_ends_does_not_stand_for_decoding(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    (tmp_path / "train" / "0" / "2.jpg").write_bytes(damage(WHOLE["a.jpg"], 100))
    settled(tmp_path / "train")
    settled(tmp_path / "val")
    assert image_files.open_images(config)[2] == []
    careful = dataclasses.replace(config, skip_bad_images=True)
    assert image_files.open_images(careful)[2] == ["train/0/2.jpg"]
    # The other way round it does: what was decoded need not be looked at.
    val = image_files.open_image_set(config.val_folder_name, "val")
    assert val.checked == image_files.DECODED
    spoil_unseen(val.path(0))
    assert image_files.check_files(config, {"val": val}) == []
    # To leave out what is damaged, all is decoded again: it may have changed since.
    assert image_files.check_files(careful, {"val": val}) == [f"val/{val.file(0)}"]


# ------------------------------------------------------------------------------ stores


def write_store(path: Path, entries: Iterable[str]) -> Path:
    """A store in which each picture's bytes are its name."""
    with StoreWriter(path, {"max_side": 0, "quality": 90}) as writer:
        for entry in entries:
            writer.add(entry, os.fsencode(entry))
        writer.finish()
    return path


def test_a_store_is_a_set_of_images(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", STORED)
    train, val = (image_files.open_image_set(str(path), part) for part in ("train", "val"))
    assert train.files == ("a/1.jpg", "a/2.jpg", "a-b/ä \udcff.jpg", "b/10.jpg", "b/9.jpg")
    assert val.files == ("a/1.jpg", "a-b/1.jpg", "b/1.jpg")
    assert train.labels.tolist() == [0, 0, 1, 2, 2] and train.labels.dtype == np.int64
    assert val.labels.tolist() == [0, 1, 2]
    image_files.check_same_classes(train, val)
    for part, images in (("train", train), ("val", val)):
        for index, file in enumerate(images.files):
            assert images.file(index) == file
            assert images.path(index) == path / part / file
            assert images.read(index) == (os.fsencode(f"{part}/{file}"), None)
        images.read_ahead(np.arange(len(images)))
    assert image_files.check_files(Config(), {"train": train, "val": val}) == []


STORED = [
    *("val/b/1.jpg", "train/b/9.jpg", "train/b/10.jpg", "train/a/2.jpg", "train/a/1.jpg"),
    *("train/a-b/ä \udcff.jpg", "val/a-b/1.jpg", "val/a/1.jpg"),
]


def test_every_picture_counts_in_the_fingerprint_of_a_store_of_smaller_ones(tmp_path: Path) -> None:
    """Packed with other settings, perhaps a single one is another."""
    fingerprints = set()
    for quality in (80, 90):
        path = tmp_path / f"{quality}.store"
        with StoreWriter(path, {}) as writer:
            for number in range(100):
                content = b"%d" % (quality if number == 1 else 0)
                for part in ("train", "val"):
                    writer.add(f"{part}/a/{number:02}.jpg", content, reencoded=number == 1)
            writer.finish()
        images = image_files.open_image_set(str(path), "train")
        chosen = np.linspace(0, 99, image_files.FINGERPRINT_IMAGES).astype(int)
        assert 1 not in chosen  # of those that stand for a folder
        fingerprints.add(images.fingerprint())
    assert len(fingerprints) == 2


def test_a_store_without_some_pictures(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", STORED)
    images = image_files.open_image_set(str(path), "train")
    fewer = images.without(["a/1.jpg", "b/10.jpg", "unknown"])
    assert fewer.files == ("a/2.jpg", "a-b/ä \udcff.jpg", "b/9.jpg")
    assert fewer.labels.tolist() == [0, 1, 2]
    for index, file in enumerate(fewer.files):
        assert fewer.read(index)[0] == os.fsencode(f"train/{file}")
    assert images.without([]).fingerprint() == images.fingerprint() != fewer.fingerprint()
    with pytest.raises(UserError, match=f"no image in {path}/train/a-b can be read"):
        images.without(["a-b/ä \udcff.jpg"])


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_store_without_a_part_is_refused(part: str, tmp_path: Path) -> None:
    entries = [entry for entry in STORED if not entry.startswith(part)]
    path = write_store(tmp_path / "store", entries)
    with pytest.raises(UserError, match=f"{path} has no pictures under {part}/: pack a source"):
        image_files.open_image_set(str(path), part)

"""What app, Lambda function and command line share: files checked, pictures read, classes named."""

import hashlib
import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import BLUE, MEAN, RED, STD, write_top_half_colour
from pictures import encode, jpeg, scene, turned, with_scans
from PIL import Image, ImageChops
from torchvision import transforms

import data
import image_files
from utils import Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gradio_deploy"))

import classifier

# ------------------------------------------------------------------------------ the export


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_top_half_colour(tmp_path)
    return tmp_path


def describe(**changes: object) -> Callable[[Path], None]:
    """Change keys of model.json; None removes one."""

    def change(folder: Path) -> None:
        described = {**json.loads((folder / "model.json").read_text()), **changes}
        described = {key: value for key, value in described.items() if value is not None}
        (folder / "model.json").write_text(json.dumps(described))

    return change


def not_onnx(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"x")
    described = {"file": "model.onnx", "sha256": hashlib.sha256(b"x").hexdigest()}
    describe(formats={"onnx": described})(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.json").unlink(), "model.json is missing"),
        (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda f: (f / "model.json").write_text("{"), "model.json is not JSON"),
        (lambda f: (f / "model.json").write_text("[]"), "is not of format 1"),
        (describe(format=2), "is not of format 1"),
        (describe(mean=None, std=None), "has no mean, std"),
        (describe(formats={"torchscript": {}}), "names no ONNX file"),
        (describe(formats=["onnx"]), "cannot be used as formats"),
        (describe(formats={"onnx": "model.onnx"}), "names no ONNX file"),
        (describe(formats={"onnx": {"file": "../model.onnx"}}), "names no ONNX file"),
        (describe(formats={"onnx": {"file": 5}}), "names no ONNX file"),
        (describe(formats={"onnx": {"file": "model.onnx"}}), "its sha256 differs"),
        (describe(input_px="32", resize_px=0), "cannot be used as input_px, resize_px"),
        (describe(resize_px=31), "has a resize_px below its input_px"),
        (describe(mean=[0.5, 0.4], std=[0.2, 0.2, 0]), "cannot be used as mean, std"),
        (describe(val_top1="81", val_images=[5]), "cannot be used as val_top1, val_images"),
        (describe(val_top1=math.inf, val_top5=math.nan), "cannot be used as val_top1, val_top5"),
        (describe(labels=[["red"], ["green"], ["blue"]]), "cannot be used as labels"),
        (describe(name=5, classes={}), "cannot be used as name, classes"),
        (lambda f: (f / "model.json").write_text("[" * 100_000), "model.json is not JSON"),
        (lambda f: (f / "model.json").write_bytes(b'{"name": "\xff"}'), "model.json is not JSON"),
        (lambda f: (f / "model.onnx").write_bytes(b"x"), "its sha256 differs"),
        (not_onnx, "model.onnx does not run"),
        (describe(input_px=33), "model.onnx does not run"),
        (describe(labels=["red", "green"]), "3 outputs, model.json has 2 labels and 3 classes"),
        (describe(classes=["n1", "n2"]), "3 outputs, model.json has 3 labels and 2 classes"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    export: Path, spoil: Callable[[Path], None], words: str
) -> None:
    classifier.load_export(export)
    spoil(export)
    with pytest.raises(classifier.ExportError) as error:
        classifier.load_export(export)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_hash_pins_both_files(export: Path) -> None:
    digest = hashlib.sha256((export / "model.json").read_bytes()).hexdigest()
    classifier.load_export(export, model_json_sha256=digest.upper())
    describe(val_top1=99.0)(export)
    with pytest.raises(classifier.ExportError, match="not the one whose SHA-256 was given"):
        classifier.load_export(export, model_json_sha256=digest)


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        *(("100000 100000", 1), ("1000 100000", 1), ("150000 50000", 3), ("max", 4)),
        ("9900000 100000", 4),  # of a share that is larger than the machine
    ],
)
def test_a_container_uses_the_cpus_of_its_share(
    monkeypatch: pytest.MonkeyPatch, limit: str, cpus: int
) -> None:
    monkeypatch.setattr(classifier.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(classifier.Path, "read_text", lambda *_, **__: limit)
    assert classifier.cpus() == cpus


def test_the_model_takes_as_many_threads_as_it_is_given(export: Path) -> None:
    for asked, threads in ((3, 3), (0, classifier.cpus())):
        session, _ = classifier.load_export(export, threads=asked)
        assert session.get_session_options().intra_op_num_threads == threads


# ------------------------------------------------------------------------------ pictures


def pictures() -> dict[str, bytes]:
    """Pictures of every kind that is read in a way of its own."""
    photo = scene(300, 400)
    stored, exif = turned(photo, 6)
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    return {
        "wide": jpeg(photo),
        "tall, subsampled": jpeg(scene(700, 320), subsampling="4:2:0"),
        "progressive": jpeg(photo, progressive=True),
        "small": jpeg(scene(60, 84)),
        "large": jpeg(scene(1500, 2000), subsampling="4:2:0"),
        "grey": jpeg(photo.convert("L")),
        "CMYK": encode(photo.convert("CMYK"), "JPEG"),
        "turned": jpeg(stored, exif=exif),
        "transparent": encode(clear, "PNG"),
        "16 bits": encode(deep, "PNG"),
        "palette": encode(photo.quantize(64), "GIF"),
        "WebP": encode(photo, "WEBP"),
    }


@pytest.mark.parametrize(("input_px", "resize_px"), [(224, 256), (128, 144)])
def test_a_picture_becomes_what_validation_shows_the_model(input_px: int, resize_px: int) -> None:
    config = Config(val_px=input_px, val_resize_px=resize_px)
    export = {"input_px": input_px, "resize_px": resize_px, "mean": MEAN, "std": STD}
    for name, content in pictures().items():
        shown = np.empty((input_px, input_px, 3), np.uint8)
        data.fill_val(config, image_files.encoded(content), 0, shown)
        images, _ = classifier.preprocess(classifier.open_picture(content), export)
        assert (images.dtype, images.shape) == (np.float32, (1, 3, input_px, input_px)), name
        pixels = 255 * (images[0].transpose(1, 2, 0) * STD + MEAN)
        assert np.abs(pixels - shown).max() < 1.01, name


@pytest.mark.parametrize(
    ("size", "resize_px", "input_px"),
    [((500, 375), 256, 224), ((333, 500), 256, 224), ((61, 47), 40, 32), ((57, 91), 35, 32)],
)
def test_preprocess_is_torchvisions_rule(
    size: tuple[int, int], resize_px: int, input_px: int
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
    images, box = classifier.preprocess(picture, export)
    found, expected = torch.from_numpy(images), rule(picture)[None]
    assert found.shape == expected.shape
    grey_levels = (found - expected).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255
    assert grey_levels.max() <= 1.01
    middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    assert middle == pytest.approx([side / 2 for side in size], abs=1.5)
    assert box[2] - box[0] == pytest.approx(min(size) * input_px / resize_px, abs=1.5)


def test_every_kind_of_picture_becomes_the_rgb_that_a_person_sees() -> None:
    ramp = np.arange(256, dtype=np.uint16).repeat(4).reshape(32, 32)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([*BLUE, *RED])
    red, blue, white = (Image.new("RGB", (32, 32), colour) for colour in (RED, BLUE, "white"))
    half = Image.new("RGB", (32, 32), (255, 127, 127))
    cases = [
        (encode(Image.fromarray(ramp * 257), "PNG"), Image.fromarray(ramp.astype(np.uint8))),
        (encode(Image.new("RGBA", (32, 32), (*RED, 0)), "PNG"), white),
        (encode(Image.new("RGBA", (32, 32), (*RED, 128)), "PNG"), half),
        (encode(palette, "PNG", transparency=1), white),
        (encode(red, "GIF", save_all=True, append_images=[blue]), red),
        (encode(Image.new("CMYK", (32, 32), 0), "TIFF"), white),
    ]
    for number, (content, picture) in enumerate(cases):
        found = classifier.open_picture(content)
        assert found.mode == "RGB", number
        difference = ImageChops.difference(found, picture.convert("RGB")).getextrema()
        assert max(high for _, high in difference) <= 1, (number, difference)


def test_a_phones_48_megapixels_are_upright() -> None:
    small = np.random.default_rng(2).integers(0, 256, (63, 47, 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((6048, 8064), Image.Resampling.BICUBIC)
    stored, exif = turned(large, 6)
    found = classifier.open_picture(encode(stored, "JPEG", exif=exif, quality=90))
    assert found.size == large.size
    difference = np.subtract(
        *(np.asarray(p.resize((256, 341), Image.Resampling.BILINEAR), int) for p in (found, large))
    )
    assert np.abs(difference).mean() < 1 and np.abs(difference).max() <= 8


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims width x height px in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_a_phones_film_behind_the_picture_is_no_scan() -> None:
    photo = jpeg(scene(60, 80))
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x0c" * 1000
    assert classifier.open_picture(photo + film).size == (80, 60)
    assert classifier.open_picture(with_scans(50)).size == (80, 60)


def test_what_is_not_read_gets_a_status_and_a_sentence() -> None:
    photo = jpeg(scene(60, 80))
    cases = [
        (b"", 400, "The picture is empty."),
        (bytes(classifier.MAX_BYTES + 1), 413, "more than 20 MB"),
        (bytes(classifier.MAX_BYTES), 415, "not a picture that can be read"),
        (b"milk, eggs, flour", 415, "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), 415, "HEIC"),
        (photo[: len(photo) // 2], 422, "damaged or incomplete"),
        (encode(scene(60, 80), "PNG")[:-2000], 422, "damaged or incomplete"),
        (png_of_size(10_000, 5_001), 413, "more than 50 million pixels"),
        (png_of_size(30_000, 30_000), 413, "more than 50 million pixels"),
        (encode(Image.new("L", (1, 5000)), "PNG"), 422, "100 times as long as wide"),
        (encode(Image.new("L", (5000, 1)), "PNG"), 422, "100 times as long as wide"),
        (with_scans(65), 422, "too many scans"),
        (with_scans(65, before=b"\xff\xe1\0\4\xff\xd9"), 422, "too many scans"),
        (with_scans(65, before=b"\xff\xc0\0\4\xff\xd9"), 422, "too many scans"),
        (with_scans(65, before=b"\xff\x02\xff\x00"), 422, "too many scans"),
    ]
    for content, status, words in cases:
        with pytest.raises(classifier.RefusedError) as error:
            classifier.open_picture(content)
        assert (error.value.status, words in str(error.value)) == (status, True), str(error.value)
        assert "\n" not in str(error.value)


def test_avif_may_begin_like_heic() -> None:
    content = encode(scene(60, 80), "AVIF")
    assert content[4:12] == b"ftypavif" and b"avif" in content[12:64]
    assert classifier.open_picture(content[:8] + b"mif1" + content[12:]).size == (80, 60)


def test_broken_exif_turns_nothing() -> None:
    picture = scene(60, 80)
    for broken in (b"\xff\xff\xff\xff", b"\x08\0\0\0\xff\xff"):
        found = classifier.open_picture(jpeg(picture, exif=b"Exif\0\0II*\0" + broken + bytes(8)))
        assert found.size == picture.size


def test_pillow_says_nothing_on_its_own(tmp_path: Path) -> None:
    content = jpeg(scene(60, 80), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(8))
    (tmp_path / "photo.jpg").write_bytes(content)
    program = "import classifier, sys; classifier.open_picture(open(sys.argv[1], 'rb').read())"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "photo.jpg"],
        cwd=Path(classifier.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------ answers


def test_the_likeliest_classes_come_first() -> None:
    export = {"classes": ["a", "b", "c"], "labels": ["ant", "bee", "cat"]}
    logits = np.array([1000, 1001, 998], np.float32)
    found = classifier.likeliest(logits, export, 2)
    assert [(one.class_id, one.label) for one in found] == [("b", "bee"), ("a", "ant")]
    expected = torch.from_numpy(logits).softmax(dim=0)
    assert [one.probability for one in found] == pytest.approx(expected[[1, 0]].tolist())


def test_of_equally_likely_classes_the_first_comes_first() -> None:
    """As torch.topk has it on a CPU, and the exporter's list of predictions."""
    export = {"classes": list("abcd"), "labels": list("abcd")}
    found = classifier.likeliest(np.array([1, 2, 2, 2], np.float32), export, 3)
    assert [one.class_id for one in found] == ["b", "c", "d"]


def test_labels_that_classes_share_are_told_apart() -> None:
    export = {
        "labels": ["crane", "kite", "crane"],
        "classes": ["n02012849", "n01608432", "n03126707"],
    }
    assert classifier.class_names(export) == ["crane (n02012849)", "kite", "crane (n03126707)"]


def test_it_stands_alone() -> None:
    """Beside it in Lambda lies no PyTorch, and nothing of ours but the handler and the decoder."""
    folder = Path(classifier.__file__).parent
    for name, others in (
        ("classifier.py", {"numpy", "onnxruntime", "PIL", "decoder"}),
        ("decoder.py", {"PIL"}),
    ):
        imported = {
            line.split()[1].partition(".")[0]
            for line in (folder / name).read_text().splitlines()
            if line.startswith(("import ", "from "))
        }
        assert imported - sys.stdlib_module_names == others, name

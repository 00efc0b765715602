"""tiled_jpeg.py: a cut shows what the whole picture shows, and is made of nothing but a table."""

import dataclasses
import io
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import run_stage_command
from pictures import as_read, encode, jpeg, scene, turned, write_set
from PIL import Image

import augment
import data
import image_files
import tiled_jpeg
from utils import Config

TABLE_AT = 20  # behind the start of the image (2 bytes) and its JFIF segment (18)
FIELDS_END = TABLE_AT + 16  # marker, length, name, three positions: then the tiles' lengths
SCAN_SIZE = 14  # bytes of the header before the first tile

# ------------------------------------------------------------------------------ helpers


def tiled(image: Image.Image, quality: int = 90) -> bytes:
    return tiled_jpeg.encode(np.asarray(image.convert("RGB")), quality)


def shown(encoded: bytes | bytearray) -> np.ndarray:
    """The picture as training decodes it; raises ValueError for what is not quite in order."""
    return simplejpeg.decode_jpeg(encoded, fastupsample=True)


def rectangles(height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width: the whole, its corners, its edges, and random ones."""
    draw = np.random.default_rng([height, width]).integers
    chosen = [(0, 0, height, width)]
    chosen += [(top, left, 1, 1) for top in (0, height - 1) for left in (0, width - 1)]
    chosen += [(0, 0, 1, width), (0, 0, height, 1)]
    chosen += [(height - 1, 0, 1, width), (0, width - 1, height, 1)]
    for _ in range(count):
        crop_height, crop_width = int(draw(1, height + 1)), int(draw(1, width + 1))
        top, left = int(draw(height - crop_height + 1)), int(draw(width - crop_width + 1))
        chosen.append((top, left, crop_height, crop_width))
    return chosen


def assert_cut_shows(whole: np.ndarray, rectangle: tuple[int, int, int, int], cut: tuple) -> None:
    """That a cut is the part of the whole that it says, and has the rectangle in it."""
    part, part_top, part_left, part_height, part_width = cut
    top, left, height, width = rectangle
    assert part_top <= top and top + height <= part_top + part_height
    assert part_left <= left and left + width <= part_left + part_width
    rows = slice(part_top, part_top + part_height)
    expected = whole[rows, part_left : part_left + part_width]
    assert expected.shape == (part_height, part_width, 3)
    assert np.array_equal(shown(part), expected)


def lengths(encoded: bytes) -> list[int]:
    """Bytes of each tile, as the table has them."""
    size = int.from_bytes(encoded[TABLE_AT + 2 : TABLE_AT + 4])
    return [
        number for (number,) in struct.iter_unpack(">H", encoded[FIELDS_END : TABLE_AT + 2 + size])
    ]


def table(encoded: bytes) -> bytes:
    return encoded[TABLE_AT : FIELDS_END + 2 * len(lengths(encoded))]


def header_size(encoded: bytes | bytearray) -> int:
    return encoded.index(b"\xff\xda") + SCAN_SIZE


PHOTO = scene(133, 250)  # 9 rows of 4 tiles of 4 blocks
TILED = tiled(PHOTO)

# ------------------------------------------------------------------------------ pixels

SIZES = [
    *((1, 1), (1, 300), (300, 1), (2, 17), (16, 16), (17, 16), (15, 81)),
    *((96, 128), (130, 95), (257, 401), (401, 257), (300, 400), (33, 545)),
    # Seven, eleven, thirteen and seventeen blocks, whose only divisors are 1 and themselves.
    *((40, 112), (64, 176), (50, 200), (35, 270)),
]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("content", ["scene", "noise", "grey"])
def test_a_cut_shows_the_whole_pictures_pixels(height: int, width: int, content: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pictures = {"noise": noise, "grey": noise[..., :1].repeat(3, axis=2)}
    picture = pictures.get(content, np.asarray(scene(height, width)))
    encoded = tiled_jpeg.encode(picture, 75 if content == "grey" else 92)
    whole = shown(encoded)
    assert whole.shape == picture.shape
    for rectangle in rectangles(height, width, 15):
        assert_cut_shows(whole, rectangle, tiled_jpeg.cut(encoded, *rectangle))
        # A store gives its bytes as a view.
        assert tiled_jpeg.cut(memoryview(encoded), *rectangle) == tiled_jpeg.cut(
            encoded, *rectangle
        )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (133, 250), (400, 300), (50, 200)])
def test_other_programs_see_a_usual_jpeg(height: int, width: int) -> None:
    image = scene(height, width)
    encoded = tiled(image)
    ours = simplejpeg.decode_jpeg(encoded)
    opened = Image.open(io.BytesIO(encoded))
    assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (width, height))
    assert "progressive" not in opened.info
    assert np.array_equal(np.asarray(opened), ours)
    colours = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(colours, ours)
    assert image_files.plain_jpeg_size(encoded) == (height, width)
    # Markers and table are all that it has beside a plain one of the same quality.
    options = {"quality": 90, "subsampling": "4:2:0"}
    plain = encode(image, "JPEG", **options)
    assert np.array_equal(simplejpeg.decode_jpeg(plain), ours)
    more = len(table(encoded)) + 6 + 6 * len(lengths(encoded))
    assert len(plain) < len(encoded) < len(plain) + more


def test_only_the_header_and_the_tiles_under_the_crop_are_cut_out() -> None:
    encoded = tiled(scene(480, 800))  # 30 rows of 10 tiles, 16 x 80 px each
    tiles = lengths(encoded)
    assert len(tiles) == 300 and sum(tiles) == len(encoded) - header_size(encoded)
    header = header_size(encoded) - len(table(encoded))
    for row, column in ((0, 0), (17, 3), (29, 9), (4, 9)):
        for rectangle in ((16 * row, 80 * column, 16, 80), (16 * row + 15, 80 * column + 79, 1, 1)):
            cut = tiled_jpeg.cut(encoded, *rectangle)
            assert cut[1:] == (16 * row, 80 * column, 16, 80)
            assert len(cut[0]) == header + tiles[10 * row + column] < len(encoded) / 40
    touched = [10 * row + column for row in (3, 4) for column in (2, 3, 4)]
    cut = tiled_jpeg.cut(encoded, 63, 239, 2, 82)
    assert cut[1:] == (48, 160, 32, 240)
    assert len(cut[0]) == header + sum(tiles[tile] for tile in touched)
    whole = tiled_jpeg.cut(encoded, 0, 0, 480, 800)
    assert len(whole[0]) == len(encoded) - len(table(encoded))


@pytest.mark.parametrize(
    ("height", "width", "loud"),
    [
        (65_500, 432, False),  # 4,094 rows of 9 tiles: more than a segment holds
        (20, 16 * 2053, True),  # 2,053 is prime: a tile of all of them is above 65,535 bytes
    ],
)
def test_a_picture_too_large_for_a_table_is_a_plain_jpeg(
    height: int, width: int, loud: bool
) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    if loud:
        picture[:] = np.random.default_rng(0).integers(0, 256, picture.shape)
    encoded = tiled_jpeg.encode(picture, 100 if loud else 50)
    assert b"TILES" not in encoded[:1000]
    assert image_files.plain_jpeg_size(encoded) == (height, width)
    assert tiled_jpeg.cut(encoded, 0, 0, 16, 16) is None
    assert np.abs(shown(encoded)[::50].astype(int) - picture[::50]).mean() < (60 if loud else 1)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (1, 65_501, 3), (65_501, 1, 3)])
def test_a_picture_that_no_jpeg_takes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be encoded"):
        tiled_jpeg.encode(np.zeros(shape, np.uint8), 90)


# ------------------------------------------------------------------------------ other files


def reencoded(quality: int, interval: int) -> bytes:
    """The photo by OpenCV, with restart markers behind as many blocks."""
    options = (
        *(cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
    )
    return cv2.imencode(".jpg", np.asarray(PHOTO)[..., ::-1], options)[1].tobytes()


OTHERS = {
    "plain": jpeg(PHOTO),
    "colours at half size": jpeg(PHOTO, subsampling="4:2:0"),
    "markers behind blocks": jpeg(PHOTO, restart_marker_blocks=4, subsampling="4:2:0"),
    "markers behind rows": jpeg(PHOTO, restart_marker_rows=1, subsampling="4:2:0"),
    "progressive": jpeg(PHOTO, progressive=True),
    "CMYK": jpeg(PHOTO.convert("CMYK")),
    "grey": jpeg(PHOTO.convert("L")),
    "EXIF": jpeg(PHOTO, exif=turned(PHOTO, 1)[1]),
    "turned": jpeg(turned(PHOTO, 6)[0], exif=turned(PHOTO, 6)[1]),
    "of OpenCV, the same tiles": reencoded(90, 4),
    "of OpenCV, another quality": reencoded(50, 4),
    "of OpenCV, other tiles": reencoded(90, 8),
    "PNG": encode(PHOTO, "PNG"),
    "nothing": b"",
    "two bytes": b"\xff\xd8",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_picture_that_is_not_tiled_is_left_whole(name: str) -> None:
    for rectangle in rectangles(133, 250, 5):
        assert tiled_jpeg.cut(OTHERS[name], *rectangle) is None


@pytest.mark.parametrize("name", [name for name in OTHERS if OTHERS[name][:2] == b"\xff\xd8"])
def test_a_table_that_another_program_kept_is_noticed(name: str) -> None:
    """It changed the picture and copied the segments that it does not know."""
    other = OTHERS[name]
    spliced = other[:TABLE_AT] + table(TILED) + other[TABLE_AT:]
    cuts = [tiled_jpeg.cut(spliced, *rectangle) for rectangle in rectangles(133, 250, 5)]
    if name == "of OpenCV, the same tiles":  # the very file that the table was made for
        assert spliced == TILED and None not in cuts
    else:
        assert cuts == [None] * len(cuts)


def test_a_segment_more_is_noticed() -> None:
    """A program that adds a comment or EXIF data, before or behind the table, shifts the tiles."""
    comment = b"\xff\xfe\0\x06abcd"
    behind = TABLE_AT + len(table(TILED))
    for place in (2, TABLE_AT, behind):
        assert tiled_jpeg.cut(TILED[:place] + comment + TILED[place:], 0, 0, 1, 1) is None
    assert tiled_jpeg.cut(TILED + b"\0", 0, 0, 1, 1) is None


# ------------------------------------------------------------------------------ damage


def test_a_truncated_picture_is_not_cut() -> None:
    for end in range(len(TILED)):
        assert tiled_jpeg.cut(TILED[:end], 0, 0, 133, 250) is None


def test_every_byte_of_the_table_counts() -> None:
    encoded = bytearray(TILED)
    for place in range(TABLE_AT, TABLE_AT + len(table(TILED))):
        for change in range(1, 256):
            encoded[place] ^= change
            assert tiled_jpeg.cut(encoded, 0, 0, 133, 250) is None
            assert tiled_jpeg.cut(encoded, 70, 130, 1, 1) is None
            encoded[place] ^= change
    assert tiled_jpeg.cut(encoded, 70, 130, 1, 1) is not None


@pytest.mark.parametrize("shift", ["one byte", "one tile"])
def test_lengths_that_only_add_up_are_noticed(shift: str) -> None:
    whole, tiles = shown(TILED), lengths(TILED)
    answers = []
    for tile in range(len(tiles) - 1):
        changed, by = tiles.copy(), 1 if shift == "one byte" else tiles[tile + 1]
        changed[tile], changed[tile + 1] = tiles[tile] + by, tiles[tile + 1] - by
        content = struct.pack(f">{len(changed)}H", *changed)
        encoded = TILED[:FIELDS_END] + content + TILED[FIELDS_END + len(content) :]
        row, column = divmod(tile, 4)
        for rectangle in ((0, 0, 133, 250), (16 * row, 64 * column, 5, 5)):
            assert tiled_jpeg.cut(encoded, *rectangle) is None
        for rectangle in rectangles(133, 250, 3):  # none of it, or tiles that lie where they did
            cut = tiled_jpeg.cut(encoded, *rectangle)
            answers.append(cut is None)
            if cut is not None:
                assert_cut_shows(whole, rectangle, cut)
    assert {True, False} == set(answers)


@pytest.mark.parametrize(("height", "width"), [(149, 250), (117, 250), (133, 314), (133, 186)])
def test_a_frame_of_another_size_is_noticed(height: int, width: int) -> None:
    """A row or a column of tiles more or less than the table has."""
    at = TILED.index(b"\xff\xc0") + 5
    assert TILED[at : at + 4] == struct.pack(">HH", 133, 250)
    encoded = TILED[:at] + struct.pack(">HH", height, width) + TILED[at + 4 :]
    for rectangle in rectangles(height, width, 3):
        assert tiled_jpeg.cut(encoded, *rectangle) is None


def damaged(encoded: bytes, draw: np.random.Generator) -> bytes:
    """A few bytes changed, left out, doubled or put elsewhere; the half of it in the header."""
    changed = bytearray(encoded)
    for _ in range(int(draw.integers(1, 4))):
        end = header_size(encoded) if draw.random() < 0.5 else len(changed)
        place, size = int(draw.integers(end)), int(draw.integers(1, 9))
        match int(draw.integers(5)):
            case 0:
                changed[place] ^= 1 << int(draw.integers(8))
            case 1:
                changed[place : place + size] = draw.bytes(size)
            case 2:
                del changed[place : place + size]
            case 3:
                changed[place:place] = changed[place : place + size]
            case _:
                other = int(draw.integers(len(changed)))
                changed[place : place + size] = changed[other : other + size]
    return bytes(changed)


def test_damage_raises_nothing_and_shows_nothing_else() -> None:
    """What the decoder takes for a good picture, it takes for the same one when it was cut."""
    draw, compared = np.random.default_rng(0), 0
    for _ in range(4000):
        encoded = damaged(TILED, draw)
        size = image_files.plain_jpeg_size(encoded)
        if size is None or size[0] * size[1] > 10**6:  # training would not ask for a cut; too slow
            continue
        (rectangle,) = rectangles(*size, 1)[-1:]
        cut = tiled_jpeg.cut(encoded, *rectangle)
        if cut is None:
            continue
        try:
            whole = shown(encoded)
            part = shown(cut[0])
        except ValueError:
            continue  # the decoder notices
        rows, columns = slice(cut[1], cut[1] + cut[3]), slice(cut[2], cut[2] + cut[4])
        assert np.array_equal(part, whole[rows, columns])
        compared += 1
    assert compared > 200


# ------------------------------------------------------------------------------ training


def test_training_crops_are_the_same_with_and_without_the_table() -> None:
    config, px = Config(train_px=48, workers=0), 48
    scales, kinds = set(), set()
    for height, width in ((800, 1003), (650, 487)):
        encoded = tiled(scene(height, width))
        without = encoded.replace(b"TILES\0", b"PLAIN\0")
        assert tiled_jpeg.cut(without, 0, 0, height, width) is None
        for index in range(60):
            *box, mirrored = augment.random_crop(config.seed, 1, index, height, width, 0.08)
            kinds.add((mirrored, len(tiled_jpeg.cut(encoded, *box)[0]) < len(encoded) / 2))
            scales.add(next(scale for scale in (8, 4, 2, 1) if min(box[2:]) >= scale * px))
            ours, expected = np.zeros((2, px, px, 3), np.uint8)
            data.fill_train(config, 1, as_read(encoded), index, ours)
            data.fill_train(config, 1, as_read(without), index, expected)
            assert np.array_equal(ours, expected)
    small = tiled(scene(60, 90))  # of which every crop is enlarged
    without = small.replace(b"TILES\0", b"PLAIN\0")
    for index in range(20):
        ours, expected = np.zeros((2, 96, 96, 3), np.uint8)
        data.fill_train(config, 1, as_read(small), index, ours)
        data.fill_train(config, 1, as_read(without), index, expected)
        assert np.array_equal(ours, expected)
    scales.add(1)
    assert scales == {1, 2, 4, 8} and len(kinds) == 4


def test_training_does_not_trust_the_table_of_a_file() -> None:
    """Which another program may have kept; a store's bytes were compared with their checksum."""
    config, tiles = Config(train_px=48, workers=0), lengths(TILED)
    for tile in range(0, len(tiles) - 1, 2):  # each pair has the other's lengths
        tiles[tile], tiles[tile + 1] = tiles[tile + 1], tiles[tile]
    content = struct.pack(f">{len(tiles)}H", *tiles)
    encoded = TILED[:FIELDS_END] + content + TILED[FIELDS_END + len(content) :]
    for index in range(20):
        ours, expected = np.zeros((2, 48, 48, 3), np.uint8)
        data.fill_train(config, 0, as_read(encoded), index, ours)
        data.fill_train(config, 0, as_read(TILED), index, expected)
        assert np.array_equal(ours, expected)


def test_training_crops_of_a_store_are_those_of_the_folder_unzipped_from_it(tmp_path: Path) -> None:
    pictures = {f"{'ab'[i % 2]}/{i}.JPEG": jpeg(scene(200 + 9 * i, 330 - 9 * i)) for i in range(8)}
    pictures["b/grey.png"] = encode(scene(170, 300).convert("L"), "PNG")
    for part in ("train", "val"):
        write_set(tmp_path / "source" / part, pictures)
    done = run_stage_command(
        *("scripts/prepare_data.py", "pack", tmp_path / "source", tmp_path / "store"),
        *("--max-side", 160, "--workers", 2),
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "store") as unzipped:
        unzipped.extractall(tmp_path / "folder")
    store = image_files.open_image_set(str(tmp_path / "store"), "train")
    folder = image_files.open_image_set(str(tmp_path / "folder/train"), "train")
    assert store.files == folder.files and len(store) == 9
    for index in range(len(store)):
        content, (height, width) = store.read(index)
        assert tiled_jpeg.cut(content, 0, 0, height, width) is not None
    config = Config(batch_size=5, train_px=32, workers=2)
    for px in (16, 64):
        config = dataclasses.replace(config, train_px=px)
        for epoch in range(4):
            ours = data.train_batches(store, config, epoch)
            expected = data.train_batches(folder, config, epoch)
            for (images, labels), (theirs, their_labels) in zip(ours, expected, strict=True):
                assert images.equal(theirs) and labels.equal(their_labels)
                assert images.float().std() > 10

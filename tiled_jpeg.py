"""JPEGs from which a crop is cut out before it is decoded.

A JPEG can only be decoded from its beginning on, but for one thing: behind a restart marker, the
decoder begins anew. `encode` sets a marker behind every few blocks, so that the picture falls into
tiles of some 80 x 16 px, and notes the tiles' lengths in an APP10 segment. `cut` puts the tiles
that a crop touches behind a header of their size, which gives a whole, smaller JPEG, without
decoding anything. Its pixels are those of the whole picture's decoding, bit for bit, as long as the
decoder repeats colours instead of blending them across tiles ("fast upsampling").

Every other program sees a usual baseline JPEG (ISO/IEC 10918-1), 1 % longer than without markers.
"""

import itertools
import struct

import cv2
import numpy as np

BLOCK_PX = 16  # side of what is coded together with colours at half size (4:2:0)
FIRST_MARKER = 0xD0  # RST0; up to RST7 in turn
END_OF_IMAGE = 0xD9
_NAME = b"TILES\0"
# Marker and length of the segment, its name, positions of the frame header and of the first tile,
# blocks in a tile; behind it the length of each tile with its marker, two bytes each.
_TABLE = struct.Struct(">2sH6s3H")
_TABLE_AT = 20  # behind the start of the image and its JFIF segment
_SCAN_SIZE = 14  # of the header of a scan with three components


def encode(picture: np.ndarray, quality: int) -> bytes:
    """A tiled JPEG of an RGB picture, uint8 (height, width, 3), with colours at half size.

    Raises ValueError for a picture that no JPEG takes: empty, or a side above 65,500 pixels.
    """
    options = (
        *(cv2.IMWRITE_JPEG_QUALITY, quality),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
        *(cv2.IMWRITE_JPEG_RST_INTERVAL, _tile_blocks(picture.shape[1])),
    )
    try:
        done, encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
    except cv2.error as error:
        raise ValueError(f"cannot be encoded: {error}") from None
    if not done:
        raise ValueError("cannot be encoded as a JPEG")
    return _with_table(encoded.tobytes())


def _tile_blocks(width: int) -> int:
    """Blocks in a tile: a divisor of the blocks in a row, near five; the row if there is none."""
    blocks = -(-width // BLOCK_PX)
    divisors = [count for count in range(3, 9) if blocks % count == 0]
    return min(divisors, key=lambda count: abs(count - 5), default=blocks)


def _with_table(jpeg: bytes) -> bytes:
    """The same JPEG with the segment that says where its tiles are."""
    position, interval, frame = 2, 0, 0
    while jpeg[position + 1] != 0xDA:  # the start of the scan
        marker, size = jpeg[position + 1], int.from_bytes(jpeg[position + 2 : position + 4])
        if marker == 0xC0:
            frame = position
        elif marker == 0xDD:
            interval = int.from_bytes(jpeg[position + 4 : position + 6])
        position += 2 + size
    first = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    # In coded data, 0xff is followed by 0 or by a marker.
    content = np.frombuffer(jpeg, np.uint8)[first:-2]
    restarts = np.flatnonzero((content[:-1] == 0xFF) & (content[1:] >> 3 == FIRST_MARKER >> 3))
    lengths = np.diff(restarts, prepend=-2, append=len(content))
    size = _TABLE.size + 2 * len(lengths)
    fits = max(lengths.max(), size) < 1 << 16
    usual = jpeg[2:4] == b"\xff\xe0" and frame and _restarts(jpeg, first, interval)
    if not usual or not fits:
        return jpeg  # larger than the table takes, or from an encoder of another kind
    head = (b"\xff\xea", size - 2, _NAME, frame + size, first + size, interval)
    table = _TABLE.pack(*head) + lengths.astype(">u2").tobytes()
    return jpeg[:_TABLE_AT] + table + jpeg[_TABLE_AT:]


def _restarts(jpeg: bytes | memoryview, first: int, interval: int) -> bool:
    """Whether the header before the first tile says that a tile has `interval` blocks."""
    segment = struct.pack(">2s2H2s", b"\xff\xdd", 4, interval, b"\xff\xda")
    start = first - _SCAN_SIZE - 6
    return interval > 0 and start > 0 and jpeg[start : start + len(segment)] == segment


def cut(
    jpeg: bytes | memoryview, top: int, left: int, height: int, width: int, trusted: bool = False
) -> tuple[bytearray, int, int, int, int] | None:
    """A JPEG of the tiles under a crop: its bytes, the top and left of its corner, its size.

    None for a JPEG that is not tiled. The rectangle must lie inside the picture. `trusted` says
    that the bytes were compared with a checksum, so that the markers need not be looked at.
    """
    if jpeg[_TABLE_AT : _TABLE_AT + 2] != b"\xff\xea" or len(jpeg) < _TABLE_AT + _TABLE.size:
        return None
    _, size, name, frame, first, interval = _TABLE.unpack_from(jpeg, _TABLE_AT)
    table_end = _TABLE_AT + 2 + size
    count = (table_end - _TABLE_AT - _TABLE.size) // 2
    known = name == _NAME and count > 0 and size == _TABLE.size - 2 + 2 * count
    # A program that changed the picture may have kept the segment: then it does not fit.
    if not known or not table_end <= frame < first - _SCAN_SIZE < len(jpeg) - _SCAN_SIZE:
        return None
    if jpeg[frame : frame + 2] != b"\xff\xc0" or not _restarts(jpeg, first, interval):
        return None
    lengths = struct.unpack_from(f">{count}H", jpeg, _TABLE_AT + _TABLE.size)
    starts = list(itertools.accumulate(lengths, initial=first))
    whole_height, whole_width = struct.unpack_from(">HH", jpeg, frame + 5)
    tile_px, columns = interval * BLOCK_PX, -(-whole_width // (interval * BLOCK_PX))
    if starts[-1] != len(jpeg) or count != columns * -(-whole_height // BLOCK_PX):
        return None
    first_row, end_row = top // BLOCK_PX, -(-(top + height) // BLOCK_PX)
    first_column, end_column = left // tile_px, -(-(left + width) // tile_px)
    part_top, part_left = first_row * BLOCK_PX, first_column * tile_px
    part_height = min(whole_height, end_row * BLOCK_PX) - part_top
    part_width = min(whole_width, end_column * tile_px) - part_left
    rows = range(first_row * columns, end_row * columns, columns)
    if not trusted and not all(
        _markers_fit(jpeg, starts, range(row + first_column, row + end_column)) for row in rows
    ):
        return None  # the table is of another picture
    part = bytearray().join(
        [
            *(jpeg[:_TABLE_AT], jpeg[table_end : frame + 5]),
            struct.pack(">HH", part_height, part_width),
            jpeg[frame + 9 : first],
            *(jpeg[starts[row + first_column] : starts[row + end_column]] for row in rows),
        ]
    )
    # Behind each tile stands a marker, whose number is to follow that of the one before.
    position, number = first - (table_end - _TABLE_AT), 0
    for row in rows:
        for length in lengths[row + first_column : row + end_column]:
            position += length
            part[position - 1] = FIRST_MARKER | number & 7
            number += 1
    part[-1] = END_OF_IMAGE
    return part, part_top, part_left, part_height, part_width


def _markers_fit(jpeg: bytes | memoryview, starts: list[int], tiles: range) -> bool:
    """Whether the markers before, between and behind some tiles are where the table says."""
    last = len(starts) - 1
    for tile in range(max(1, tiles.start), tiles.stop + 1):
        number = END_OF_IMAGE if tile == last else FIRST_MARKER | tile - 1 & 7
        if jpeg[starts[tile] - 2] != 0xFF or jpeg[starts[tile] - 1] != number:
            return False
    return True

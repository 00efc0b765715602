"""Decodes picture files in a process of its own, in which a hostile one does no harm.

A file of 2 MB can make Pillow take tens of GB, or minutes: a thousand tags that all copy the same
data, a hundred thousand parts that are joined one by one, tiles far larger than the picture. No
look at a file beforehand would find them all, so the process has a limit to its memory, and to the
time that a picture may take. It stays for the next picture; one that ends it is refused as a
damaged one is, and another process is started. It has none of its parent's secrets, and ends with
its parent.

`python3 decoder.py` is that process. It writes an empty line when it has started. On stdin come
pictures: the length in four bytes, the most significant first, and the file. On stdout go answers:
a line of JSON, which is [status, sentence], or [width, height]; then the RGB pixels follow, three
bytes each, in rows downwards. It needs Pillow and nothing else.
"""

import atexit
import contextlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

from PIL import AvifImagePlugin, Image

# What browsers and cameras make. Pillow's other readers are rarely tested with hostile files, and
# one of them (EPS) starts a program of its own.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# A marker and its kind (ITU T.81, annex B); fill bytes, 0xff too, may come before it. In a scan's
# data 0xff is followed by 0, or by a restart marker.
JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
MAX_PIXELS = 50_000_000  # a phone's 48 megapixels
MAX_ASPECT = 100  # a line of 1 x 60,000 px would fill 12 GB once its shorter side is enlarged
MAX_JPEG_SCANS = 64  # a progressive JPEG has about ten; each costs the time of a whole picture
# Of 8160 x 6120 px in 22 kinds of files, a transparent WebP took most memory, 816 MiB (VmData), and
# of those up to 20 MB a CMYK JPEG most time, 5 s on a busy core of an EPYC.
MAX_DATA_BYTES = 1 << 30
MAX_PICTURE_S = 20
BAND_PIXELS = 1 << 18  # so many go through the pipe at once

# Exif 2.32, tag 0x0112.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DAMAGED = "The picture is damaged or incomplete: send another copy of it."


class RefusedError(Exception):
    """What is not answered: a sentence for who sent it, and the HTTP status that fits."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


# ------------------------------------------------------------------------------ in the parent


class Decoder:
    """The process, which decodes one picture at a time. The first picture starts it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.has_started = False
        atexit.register(self.end)

    def start(self) -> None:
        """Start it where it does not run, and do not wait until it has started."""
        if self.process is not None and self.process.poll() is None:
            return
        self.end()
        kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-S", __file__],  # it writes nothing, and takes what is found
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # a terminal's Ctrl-C is for its parent
        )

    def end(self) -> None:
        """End it, whatever it is doing."""
        process, self.process, self.has_started = self.process, None, False
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:
                pass  # closes the pipes, and waits

    def decode(self, content: bytes) -> Image.Image:
        """The picture in a file as `decode` gives it; raises RefusedError."""
        with self.lock:
            self.start()
            try:
                return self.ask(content)
            except RefusedError:
                raise
            except (OSError, ValueError):  # the process has ended
                self.end()
                raise RefusedError(422, DAMAGED) from None
            except BaseException:  # what it goes on to say belongs to this picture
                self.end()
                raise

    def ask(self, content: bytes) -> Image.Image:
        """Send a file and receive the picture; OSError or ValueError where the process ends."""
        to, by = self.process.stdin, self.process.stdout
        if not self.has_started and by.readline() != b"\n":
            raise RuntimeError("the process that decodes pictures does not start")
        self.has_started = True
        to.write(len(content).to_bytes(4))
        to.write(content)
        to.flush()
        answer = json.loads(by.readline())
        if isinstance(answer[1], str):
            raise RefusedError(*answer)
        picture = Image.new("RGB", answer)
        for box in bands(picture):
            size = (box[2], box[3] - box[1])
            pixels = by.read(3 * size[0] * size[1])
            picture.paste(Image.frombytes("RGB", size, pixels), box)
        return picture


def bands(picture: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """The boxes of rows, from the top, that go through the pipe together."""
    rows = max(1, BAND_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        yield 0, top, picture.width, min(top + rows, picture.height)


# ------------------------------------------------------------------------------ in the process


def decode(content: bytes) -> Image.Image:
    """The first frame of a picture file as a person sees it: 8-bit RGB, upright, on white.

    Raises RefusedError for what is no picture, damaged, too large, or of a rare format.
    """
    if content[:2] == b"\xff\xd8" and has_many_scans(content):
        raise RefusedError(
            422, "This JPEG has too many scans: save it again in a program for pictures."
        )
    try:
        picture, turn = read(content)
        return picture if turn is None else picture.transpose(turn)
    except RefusedError:
        raise
    except Image.UnidentifiedImageError:
        raise RefusedError(
            415, "This is not a picture that can be read: send a JPEG, PNG or WebP file."
        ) from None
    except Image.DecompressionBombError:
        raise RefusedError(
            413, f"The picture has more than {MAX_PIXELS / 1e6:.0f} million pixels."
        ) from None
    except Exception:  # damage makes Pillow raise OSError, SyntaxError, ValueError, struct.error...
        raise RefusedError(422, DAMAGED) from None


def read(content: bytes) -> tuple[Image.Image, Image.Transpose | None]:
    """The first frame as RGB, and what brings it upright; raises RefusedError and many others.

    What a reader keeps of a file, several times a picture's size, ends with this function.
    """
    with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError  # as Pillow does, at more than three times that
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise RefusedError(422, f"The picture is more than {MAX_ASPECT} times as long as wide.")
        image.info.pop("xmp", None)  # by which Pillow turns a TIFF that has no tag for it
        image.load()
        return as_rgb(image), exif_turn(image)


def has_many_scans(content: bytes) -> bool:
    """Whether a JPEG has more than MAX_JPEG_SCANS; what comes behind its end does not count.

    Phones put films there, in which the bytes that begin a scan come by chance.
    """
    if content.count(b"\xff\xda") <= MAX_JPEG_SCANS:
        return False
    scans, position = 0, 2
    while scans <= MAX_JPEG_SCANS and (marker := JPEG_MARKER.search(content, position)):
        kind, position = marker[1][0], marker.end()
        if kind == 0xD9:  # end of image
            return False
        scans += kind == 0xDA
        if kind >= 0xC0:  # others have no length, and libjpeg goes on right behind them
            position += int.from_bytes(content[position : position + 2])
    return scans > MAX_JPEG_SCANS


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright, as its EXIF data says; data that is broken turns nothing.

    Without that data Pillow takes what XMP says, which no browser does.
    """
    bare = Image.new("L", (1, 1))
    names = ("exif", "Raw profile type exif")  # the other is ImageMagick's, in PNG files
    bare.info = {name: image.info[name] for name in names if name in image.info}
    try:
        return TURNS.get(bare.getexif().get(0x0112))
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, transparency on white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        image = image if image.mode == "I" else image.convert("I")
        image = image.point(lambda value: value / 256).convert("L")
        image.info.clear()  # what it says of transparency means grey levels of 16 bits
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def main() -> None:
    """Decode what comes on stdin, until its end."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without its parent, it ends without a word
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Pillow warns of large pictures, which are refused, and of broken EXIF data, and both times
    # with lines of its own source.
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(ValueError):  # there is a lower one already
            resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 2  # each takes memory, and a large host has hundreds
    pictures, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"\n")
    answers.flush()
    while len(length := pictures.read(4)) == 4:
        content = pictures.read(int.from_bytes(length))
        signal.alarm(MAX_PICTURE_S)  # it ends the process, in the midst of C code too
        try:
            picture = decode(content)
            answer = picture.size
        except RefusedError as error:
            picture, answer = None, (error.status, str(error))
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        if picture is not None:
            for box in bands(picture):
                answers.write(picture.crop(box).tobytes())
        answers.flush()
        del picture  # before the next one comes


if __name__ == "__main__":
    main()

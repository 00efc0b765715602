"""The trained classifier as an AWS Lambda function: a picture in, the five likeliest classes out.

It stands alone: beside it lie `model.onnx`, whose own metadata has labels, sizes, mean and standard
deviation, and `model.json` with that file's SHA-256, both from `generate_trace_model.py --formats
onnx`. Packages: requirements.txt. `scripts/aws/function.py` brings all of it to AWS.

A request, through a function URL (payload format 2.0) or as the event of `aws lambda invoke`:

    POST, the bytes of a picture
    POST, {"image": "<the same in base64>"}
    POST, {"s3_key": "holiday/1.jpg"}        an object of the bucket that IMAGE_BUCKET names

The answer: {"model": "...", "predictions": [{"class": "n01440764", "label": "tench",
"probability": 0.97}, ...], "time_ms": 61.3}. A request that is refused gets a status from 400 on
and {"error": "one sentence"}. Lambda itself refuses requests of more than 6 MB, base64 included:
larger pictures come by S3.
"""

import base64
import binascii
import hashlib
import io
import json
import math
import os
import re
import struct
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime
from PIL import Image

FOLDER = Path(__file__).resolve().parent
MODEL_FORMAT = 1  # of the metadata; the exporter counts it up when a key changes its meaning
TOP = 5
VCPU_MB = 1769  # Lambda gives one vCPU for so much memory, and in proportion

# What browsers and cameras make. Pillow's other readers are rarely tested with hostile files, and
# one of them (EPS) starts a program of its own.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEIC = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)  # AVIF may begin like the last two
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000  # with the model, a transparent picture of that size takes 1 GB
MAX_ASPECT = 100
MAX_JPEG_SCANS = 64  # a progressive JPEG has about ten; each costs the time of a whole picture
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)  # else only twice as much is refused

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


class RefusedError(Exception):
    """A request that gets an HTTP status from 400 on, and a sentence for who made it."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def refuse(status: int, sentence: str) -> NoReturn:
    """Answer with this status and sentence."""
    raise RefusedError(status, sentence)


def load_model(folder: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """The model and its metadata, after a check that it is the file that model.json describes.

    It takes float32 (N, 3, input_px, input_px) and gives logits, float32 (N, classes). Raises
    RuntimeError where the files do not belong together: Lambda logs it as the function's start.
    """
    content = (folder / "model.onnx").read_bytes()
    described = json.loads((folder / "model.json").read_text())["formats"]["onnx"]
    if hashlib.sha256(content).hexdigest() != described["sha256"]:
        raise RuntimeError("model.onnx is not the file that model.json describes: export it again")
    options = onnxruntime.SessionOptions()
    memory_mb = int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", VCPU_MB))
    options.intra_op_num_threads = max(1, round(memory_mb / VCPU_MB))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    texts = ("name", "resize_rule", "weights", "weights_sha256")
    metadata = {
        key: value if key in texts else json.loads(value) for key, value in properties.items()
    }
    if metadata.get("format") != MODEL_FORMAT:
        raise RuntimeError(f"model.onnx has no metadata of format {MODEL_FORMAT}: export it again")
    return session, metadata


def open_picture(content: bytes) -> Image.Image:
    """The first frame of a picture file as a person sees it: RGB, upright, on white.

    Raises RefusedError for what is no picture, damaged, or too large.
    """
    if not content:
        refuse(400, "The picture is empty.")
    if HEIC.match(content) and b"avif" not in content[:64]:
        refuse(415, "This is a HEIC photo, which is not read here: send it as a JPEG.")
    if content[:2] == b"\xff\xd8" and content.count(b"\xff\xda") > MAX_JPEG_SCANS:
        refuse(422, "This JPEG has too many scans: save it again in a program for pictures.")
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                refuse(422, f"The picture is more than {MAX_ASPECT} times as long as wide.")
            image.load()
            turn = exif_turn(image)
            return as_rgb(image if turn is None else image.transpose(turn))
    except RefusedError:
        raise
    except Image.UnidentifiedImageError:
        refuse(415, "This is not a picture that can be read: send a JPEG, PNG or WebP file.")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        refuse(413, f"The picture has more than {MAX_PIXELS / 1e6:.0f} million pixels.")
    except Exception:  # damage makes Pillow raise OSError, SyntaxError, ValueError, struct.error...
        refuse(422, "The picture is damaged or incomplete.")


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright, as its EXIF data says; data that is broken turns nothing."""
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, transparency on white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(picture: Image.Image, metadata: dict[str, Any]) -> np.ndarray:
    """RGB picture → the model's input as in validation: float32 (1, 3, input_px, input_px).

    The shorter side becomes resize_px (bilinear, antialiased), the centre input_px are kept; only
    what the crop shows is resized.
    """
    px, (width, height) = metadata["input_px"], picture.size
    resized = [int(metadata["resize_px"] * side / min(width, height)) for side in picture.size]
    left, top = (round((side - px) / 2) for side in resized)
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, (left + px) * across, (top + px) * down)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))  # rounding of the last digit
    pixels = np.asarray(picture.resize((px, px), Image.Resampling.BILINEAR, box=box), np.float32)
    mean, std = (np.array(metadata[key], np.float32) for key in ("mean", "std"))
    return ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, which no size of logits overflows."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def content_of(event: Any) -> bytes:
    """The bytes of the picture that an event means; raises RefusedError."""
    if not isinstance(event, dict) or "requestContext" not in event:  # aws lambda invoke
        return picture_of(event)
    if event["requestContext"]["http"]["method"] != "POST":
        refuse(405, "Send a picture with POST.")
    body = event.get("body") or ""
    in_base64 = event.get("isBase64Encoded")
    content = from_base64(body) if in_base64 else body.encode(errors="replace")
    if not content.strip():
        refuse(400, 'There is no picture: send its bytes, or JSON, {"image": "<base64>"}.')
    if not content.lstrip().startswith(b"{"):  # with which no picture begins
        return content
    try:
        return picture_of(json.loads(content))
    except (ValueError, RecursionError):
        refuse(400, "The request is not valid JSON.")


def picture_of(request: Any) -> bytes:
    """The bytes of the picture that a JSON request means; raises RefusedError."""
    fields = request if isinstance(request, dict) else {}
    image, key = fields.get("image"), fields.get("s3_key")
    if isinstance(image, str) == isinstance(key, str):
        refuse(400, 'JSON must have either "image", a text in base64, or "s3_key", a text.')
    return from_base64(image) if isinstance(image, str) else from_bucket(key)


def from_base64(text: str) -> bytes:
    """The bytes that base64 means, which may be broken into lines; raises RefusedError."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        refuse(400, "The picture is not valid base64.")
    if len(content) > MAX_BYTES:
        refuse(413, f"The picture has more than {MAX_BYTES / 1e6:.0f} MB.")
    return content


def from_bucket(key: str) -> bytes:
    """The bytes of an object of the bucket IMAGE_BUCKET; raises RefusedError."""
    bucket = os.environ.get("IMAGE_BUCKET")
    if not bucket:
        refuse(400, "This function reads no bucket: send the picture itself.")
    if not key or len(key.encode(errors="replace")) > 1024:
        refuse(400, '"s3_key" must have 1 to 1,024 bytes.')
    import boto3  # in Lambda's runtime; it takes a while, and most requests do without
    from botocore.exceptions import ClientError

    try:
        found = boto3.client("s3").get_object(Bucket=bucket, Key=key)
        if found["ContentLength"] > MAX_BYTES:
            refuse(413, f"The picture has more than {MAX_BYTES / 1e6:.0f} MB.")
        return found["Body"].read()
    except ClientError as error:
        # Without the right to list, S3 says "denied" where there is no such object.
        if error.response["Error"]["Code"] not in ("NoSuchKey", "AccessDenied"):
            raise
        refuse(404, "There is no such object in the bucket, or the function may not read it.")


def answer(status: int, content: dict[str, Any]) -> dict[str, Any]:
    """A response as function URLs want it."""
    headers = {"content-type": "application/json"}
    if status == 405:
        headers["allow"] = "POST"
    return {"statusCode": status, "headers": headers, "body": json.dumps(content)}


SESSION, METADATA = load_model(FOLDER)  # in the start of the function, which has a whole CPU


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Answer one request."""
    started = time.perf_counter()
    try:
        images = preprocess(open_picture(content_of(event)), METADATA)
    except RefusedError as refused:
        return answer(refused.status, {"error": str(refused)})
    (logits,) = SESSION.run(None, {"images": images})
    probabilities = probabilities_of(logits[0])
    predictions = [
        {
            "class": METADATA["classes"][index],
            "label": METADATA["labels"][index],
            "probability": float(probabilities[index]),
        }
        for index in np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    ]
    time_ms = math.ceil(10 * 1e3 * (time.perf_counter() - started)) / 10
    return answer(200, {"model": METADATA["name"], "predictions": predictions, "time_ms": time_ms})

"""The trained classifier as an AWS Lambda function: a picture in, the five likeliest classes out.

It stands alone: beside it lie classifier.py and decoder.py of gradio_deploy/, and `model.onnx` and
`model.json` from `generate_trace_model.py`. Packages: requirements.txt. `scripts/aws/function.py`
brings all of it to AWS.

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
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import classifier
from classifier import RefusedError

FOLDER = Path(__file__).resolve().parent
VCPU_MB = 1769  # Lambda gives one vCPU for so much memory, and in proportion
TOO_LARGE = f"The picture has more than {classifier.MAX_BYTES >> 20} MB."


def refuse(status: int, sentence: str) -> NoReturn:
    """Answer with this status and sentence."""
    raise RefusedError(status, sentence)


def content_of(event: Any) -> bytes:
    """The bytes of the picture that an event means; raises RefusedError."""
    if not isinstance(event, dict) or "requestContext" not in event:  # aws lambda invoke
        return picture_of(event)
    body = event.get("body") or ""
    try:
        method = event["requestContext"]["http"]["method"]
    except (KeyError, TypeError):
        method = None
    if method is None or not isinstance(body, str):
        refuse(400, "This is no event of a function URL (payload format 2.0).")
    if method != "POST":
        refuse(405, "Send a picture with POST.")
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
    if len(content) > classifier.MAX_BYTES:
        refuse(413, TOO_LARGE)
    return content


def from_bucket(key: str) -> bytes:
    """The bytes of an object of the bucket IMAGE_BUCKET; raises RefusedError."""
    bucket = os.environ.get("IMAGE_BUCKET")
    if not bucket:
        refuse(400, "This function reads no bucket: send the picture itself.")
    try:
        is_key = 1 <= len(key.encode()) <= 1024
    except UnicodeEncodeError:  # JSON can mean half a character
        is_key = False
    if not is_key:
        refuse(400, '"s3_key" must have 1 to 1,024 bytes of UTF-8.')
    import boto3  # in Lambda's runtime; it takes a while, and most requests do without
    from botocore.exceptions import ClientError

    try:
        found = boto3.client("s3").get_object(Bucket=bucket, Key=key)
        if found["ContentLength"] > classifier.MAX_BYTES:
            refuse(413, TOO_LARGE)
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


# In the start of the function, which has a whole CPU. What is wrong with the export, Lambda logs.
classifier.DECODER.start()  # while the model loads
MEMORY_MB = int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", VCPU_MB))
SESSION, EXPORT = classifier.load_export(FOLDER, threads=max(1, round(MEMORY_MB / VCPU_MB)))


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Answer one request."""
    started = time.perf_counter()
    try:
        picture = classifier.open_picture(content_of(event))
    except RefusedError as refused:
        return answer(refused.status, {"error": str(refused)})
    images, _ = classifier.preprocess(picture, EXPORT)
    (logits,) = SESSION.run(["logits"], {"images": images})
    predictions = [
        {"class": class_id, "label": label, "probability": probability}
        for class_id, label, probability in classifier.likeliest(logits[0], EXPORT)
    ]
    time_ms = math.ceil(10 * 1e3 * (time.perf_counter() - started)) / 10
    return answer(200, {"model": EXPORT["name"], "predictions": predictions, "time_ms": time_ms})

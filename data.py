"""Images → augmented uint8 batches → the device.

Threads decode and crop the images, each writing straight into its place in one uint8 batch of
shape (N, H, W, 3); decoding, resizing and reading release Python's interpreter lock. The bytes
stay bytes until they are on the device, where `normalize` makes floats of them.

What is random about an image, augment.py draws, so that neither the number of threads or processes
nor an interruption changes what the model sees.
"""

import collections
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
import torch
from PIL import Image

import augment
import distributed
import tiled_jpeg
from image_files import (
    Encoded,
    ImageSet,
    decode_plain_jpeg,
    decode_with_pillow,
    take_complaint,
)
from utils import MEAN, STD, Config, log, train_px

RESIZE = cv2.INTER_LINEAR  # of a training crop, of which less than half is left to shrink

cv2.setNumThreads(0)  # the threads here are the parallelism; OpenCV's own would fight them

# ------------------------------------------------------------------------------ pictures


def fill_train(config: Config, epoch: int, encoded: Encoded, index: int, out: np.ndarray) -> None:
    """Write the training crop of an image into `out`, uint8 (px, px, 3).

    Of a tiled JPEG, only the tiles under the crop are decoded: the same pixels, for less. The scale
    is the smallest of 1, 1/2, 1/4 and 1/8 at which the crop still covers `out` (libjpeg-turbo is
    slower at the others than at full size); then it is resized bilinearly, since averaging over
    areas takes up to six times as long for the little that is left to shrink. Whether a model
    trains as well, scripts/benchmark_resize.py tells. What is no plain JPEG comes at full size, and
    is averaged where it shrinks to half or less.
    """
    px = out.shape[0]
    data, size = encoded
    picture = decode_with_pillow(data) if size is None else None
    height, width = size or picture.shape[:2]
    top, left, crop_height, crop_width, mirrored = augment.random_crop(
        config.seed, epoch, index, height, width, config.crop_min_scale
    )
    if picture is None:
        # A view is of a store, which has compared it with its checksum.
        trusted = isinstance(data, memoryview)
        part = tiled_jpeg.cut(data, top, left, crop_height, crop_width, trusted)
        if part is not None:
            data, part_top, part_left, height, width = part
            top, left = top - part_top, left - part_left
        shrink = min(crop_height, crop_width) // px
        scale = next((scale for scale in (8, 4, 2) if shrink >= scale), 1)
        least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        picture = decode_plain_jpeg(data, *least, fast=True)
        if picture.shape[0] != height:
            bottom, right = round((top + crop_height) / scale), round((left + crop_width) / scale)
            top, left = round(top / scale), round(left / scale)
            crop_height, crop_width = bottom - top, right - left
    method = RESIZE
    if size is None and min(crop_height, crop_width) >= 2 * px:
        method = cv2.INTER_AREA
    crop = picture[top : top + crop_height, left : left + crop_width]
    if mirrored and config.flip:
        cv2.flip(cv2.resize(crop, (px, px), interpolation=method), 1, dst=out)
    else:
        cv2.resize(crop, (px, px), dst=out, interpolation=method)
    augment.change_pixels(config, epoch, index, out)


def fill_val(config: Config, encoded: Encoded, index: int, out: np.ndarray) -> None:
    """Write the centre crop of an image into `out`, uint8 (px, px, 3).

    The same pixels, to one or two grey levels, as torchvision's Resize(val_resize_px) and
    CenterCrop(val_px) on a Pillow image: decoded at full size and resized by Pillow, since this is
    what the app does to a photo. Only what the crop shows is resized.
    """
    data, size = encoded
    picture = Image.fromarray(decode_plain_jpeg(data) if size else decode_with_pillow(data))
    px, width, height = out.shape[0], *picture.size
    short = min(width, height)
    resized_width = int(config.val_resize_px * width / short)
    resized_height = int(config.val_resize_px * height / short)
    left, top = round((resized_width - px) / 2), round((resized_height - px) / 2)
    across, down = width / resized_width, height / resized_height
    box = (left * across, top * down, (left + px) * across, (top + px) * down)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))  # rounding of the last digit
    out[:] = np.asarray(picture.resize((px, px), Image.Resampling.BILINEAR, box=box))


# ------------------------------------------------------------------------------ batches

Batch = tuple[torch.Tensor, torch.Tensor]  # images uint8 (N, px, px, 3); labels int64 (N,)

DECODED_AHEAD = 2  # batches
# More of a store's batches that are fetched from the disk: 17 MB each. Where memory is short, what
# is fetched too early is forgotten before it is used, and read twice.
READ_AHEAD = 1


def reused_memory(shape: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """A function like torch.empty for uint8 tensors of up to `shape`, whose memory is used again.

    Fresh memory costs a tenth of the loader's time, for the kernel fills it with zeros. Used again
    is only what no tensor or array refers to any more.
    """
    blocks: list[tuple[np.ndarray, weakref.ref]] = []

    def empty(count: int, *_: int) -> torch.Tensor:
        free = (place for place, (_, user) in enumerate(blocks) if user() is None)
        place = next(free, len(blocks))
        block = blocks[place][0] if place < len(blocks) else np.empty(shape, np.uint8)
        view = block[:count]  # which the tensor, and all that is made of it, keeps alive
        blocks[place : place + 1] = [(block, weakref.ref(view))]
        return torch.from_numpy(view)

    return empty


def batches(
    image_set: ImageSet,
    fill: Callable[[Encoded, int, np.ndarray], None],
    order: np.ndarray,
    batch_size: int,
    px: int,
    workers: int,
    first_batch: int = 0,
    pin: bool = False,
    read_ahead: int = READ_AHEAD,
) -> Iterator[Batch]:
    """Yield the images of `order` in batches, decoded by `workers` threads two batches ahead.

    The last batch may be smaller. Where several processes share the work, each yields its part of
    every batch, and one may have no image of a small last batch. `pin` puts the batches into
    page-locked memory, from which a GPU copies while it computes. An image that cannot be read
    raises UserError with its path.
    """

    def fill_some(images: np.ndarray, indexes: np.ndarray) -> None:
        for out, index in zip(images, indexes.tolist(), strict=True):
            try:
                fill(image_set.read(index), index, out)
                complaint = take_complaint()
                if complaint:
                    path = image_set.path(index)
                    log.warning("perhaps damaged, but shown: %s (%s)", path, complaint)
            except (ValueError, OSError, cv2.error) as error:
                raise image_set.unreadable(index, error) from error

    chunks = [
        distributed.share(order[start : start + batch_size])
        for start in range(first_batch * batch_size, len(order), batch_size)
    ]
    # PyTorch keeps page-locked memory for the next batch, but not other memory.
    empty = (
        functools.partial(torch.empty, dtype=torch.uint8, pin_memory=True)
        if pin
        else reused_memory((max(map(len, chunks), default=0), px, px, 3))
    )
    pool = ThreadPoolExecutor(workers, "decode") if workers else None
    reader = ThreadPoolExecutor(1, "read ahead")  # it waits where the disk's queue is full

    def start(indexes: np.ndarray) -> tuple[Batch, list[Future]]:
        images = empty(len(indexes), px, px, 3)
        labels = torch.from_numpy(image_set.labels[indexes])
        labels = labels.pin_memory() if pin else labels
        array = images.numpy()
        if pool is None:
            fill_some(array, indexes)
            return (images, labels), []
        # Some images a task: enough to be worth a thread's while, few enough to share evenly.
        step = max(1, min(64, len(indexes) // workers))
        tasks = [
            pool.submit(fill_some, array[at : at + step], indexes[at : at + step])
            for at in range(0, len(indexes), step)
        ]
        return (images, labels), tasks

    def finish(batch: Batch, tasks: list[Future]) -> Batch:
        for task in tasks:
            task.result()
        return batch

    ahead = DECODED_AHEAD if pool is not None else 0
    started: collections.deque[tuple[Batch, list[Future]]] = collections.deque()
    try:
        for indexes in chunks[:read_ahead]:
            reader.submit(image_set.read_ahead, indexes)
        for indexes, later in itertools.zip_longest(chunks, chunks[read_ahead:]):
            if read_ahead and later is not None:
                reader.submit(image_set.read_ahead, later)
            started.append(start(indexes))
            if len(started) > ahead:
                yield finish(*started.popleft())
        while started:
            yield finish(*started.popleft())
    finally:
        for threads in (pool, reader):
            if threads is not None:
                threads.shutdown(cancel_futures=True)


def train_batches(
    image_set: ImageSet, config: Config, epoch: int, first_batch: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """The training batches of an epoch, from batch `first_batch` on, at that epoch's size."""
    return batches(
        image_set,
        functools.partial(fill_train, config, epoch),
        augment.epoch_order(config.seed, epoch, len(image_set)),
        config.batch_size,
        train_px(config, epoch),
        config.workers,
        first_batch,
        pin,
    )


def val_batches(image_set: ImageSet, config: Config, pin: bool = False) -> Iterator[Batch]:
    """All validation images, in order."""
    return batches(
        image_set,
        functools.partial(fill_val, config),
        np.arange(len(image_set)),
        config.val_batch_size,
        config.val_px,
        config.workers,
        pin=pin,
    )


def to_device(host_batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on the device; on a GPU the next one is copied while this one is used."""
    if device.type != "cuda":
        yield from host_batches
        return
    copies = _copy_stream(device)

    def start_copy(batch: Batch) -> tuple[list[torch.Tensor], torch.cuda.Event]:
        with torch.cuda.stream(copies):
            copied = [tensor.to(device, non_blocking=True) for tensor in batch]
            return copied, copies.record_event()

    def hand_over(copied: list[torch.Tensor], done: torch.cuda.Event) -> Batch:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(done)
        for tensor in copied:
            tensor.record_stream(stream)  # else its memory could be reused too early
        return copied[0], copied[1]

    underway = None
    for batch in host_batches:
        coming = start_copy(batch)
        if underway is not None:
            yield hand_over(*underway)
        underway = coming
    if underway is not None:
        yield hand_over(*underway)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: memory that was freed on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)


@functools.cache
def _scale_and_shift(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What normalises a channel of uint8 as scale * x + shift, float32 (3, 1, 1), made once."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (N, H, W, 3) → `dtype` (N, 3, H, W), channels_last, mean 0 and deviation 1.

    Computed in float32 and rounded once. On a GPU it is a single kernel, which reads the bytes and
    writes the result: nothing in float32 goes through its memory.
    """
    scale, shift = _scale_and_shift(images.device)
    images = images.permute(0, 3, 1, 2)
    out = torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    return torch.addcmul(shift, images, scale, out=out)

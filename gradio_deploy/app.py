"""The web page of a trained classifier: a picture in, the five likeliest classes out.

Command: `python3 app.py`, from any folder. It stands alone and reads only what
`generate_trace_model.py` writes beside it: `model.json` (labels, sizes, mean, standard deviation,
measured accuracy), `model.pt` (TorchScript, float32) and `examples/` (pictures, optional). It
writes nothing there. Its address is Gradio's to choose: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT.

A file that is missing or does not belong to the others ends it with one line on stderr and exit
code 2.
"""

import hashlib
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NoReturn

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parent
MODEL_FORMAT = 1  # of model.json; the exporter counts it up when a key changes its meaning
KEYS = (
    *("name", "file", "sha256", "classes", "labels", "input_px", "resize_px", "mean", "std"),
    *("weights", "epoch", "val_top1", "val_top5", "val_images"),
)

# What browsers and cameras make. Pillow's other readers are rarely tested with hostile files, and
# one of them (EPS) starts a program of its own.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_ASPECT = 100  # a line of 1 x 60,000 px would fill 12 GB once its shorter side is enlarged
MAX_UPLOAD = "20mb"
MAX_WAITING = 32  # people in the queue; the next one is told that it is full


def stop(reason: str) -> NoReturn:
    """End the program with one line on stderr and exit code 2."""
    print(f"error: {reason}: run `python3 generate_trace_model.py` first", file=sys.stderr)
    raise SystemExit(2)


def load_export(folder: Path) -> tuple[torch.jit.ScriptModule, dict]:
    """The model and its model.json, after a check that the files in `folder` belong together.

    The model takes float32 (N, 3, input_px, input_px) and gives logits, float32 (N, classes).
    Whatever is missing or does not fit ends the program through `stop`.
    """
    description = folder / "model.json"
    try:
        export = json.loads(description.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stop(f"{description} is missing")
    except ValueError as error:
        stop(f"{description} is not JSON ({error})")
    if not isinstance(export, dict) or export.get("format") != MODEL_FORMAT:
        stop(f"{description} is not of format {MODEL_FORMAT}, the one that this app reads")
    if missing := [key for key in KEYS if key not in export]:
        stop(f"{description} has no {', '.join(missing)}")

    weights = folder / export["file"]
    try:
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        stop(f"{weights} is missing")
    if sha256 != export["sha256"]:
        stop(f"{weights} is not the file that {description.name} describes (its sha256 differs)")

    try:
        with warnings.catch_warnings():
            # Still the format that a Space can run without the model's source.
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", FutureWarning)
            model = torch.jit.load(weights, map_location="cpu").eval()
        with torch.inference_mode():
            for _ in range(2):  # TorchScript compiles in its first two calls; nobody waits yet
                logits = model(torch.zeros(1, 3, export["input_px"], export["input_px"]))
    except RuntimeError as error:
        stop(f"{weights} does not run ({str(error).strip().splitlines()[-1]})")
    if not logits.shape[1] == len(export["labels"]) == len(export["classes"]):
        stop(
            f"{weights} has {logits.shape[1]} outputs, {description.name} has "
            f"{len(export['labels'])} labels and {len(export['classes'])} classes"
        )
    return model, export


def open_picture(path: Path) -> Image.Image:
    """The first frame of a picture file as a person sees it: 8-bit RGB, upright, on white.

    Raises gr.Error, with a sentence for the person who chose the file, if it cannot be used.
    """
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as file:
            image = ImageOps.exif_transpose(file)
    except Image.UnidentifiedImageError:
        refuse(f"{path.name} is not a picture that can be read. Try a JPEG, PNG or WebP file.")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million"
        refuse(f"{path.name} has more than {limit} pixels. Try a smaller copy of it.")
    except Exception:  # damage makes Pillow raise OSError, SyntaxError, ValueError, struct.error...
        refuse(f"{path.name} is damaged or incomplete. Try another copy of it.")
    if max(image.size) > MAX_ASPECT * min(image.size):
        refuse(f"{path.name} is more than {MAX_ASPECT} times as long as wide. Try another picture.")

    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def refuse(sentence: str) -> NoReturn:
    """Show the person a message in place of an answer; the server's log stays quiet."""
    raise gr.Error(sentence, print_exception=False)


def preprocess(picture: Image.Image, export: dict) -> torch.Tensor:
    """RGB picture → the model's input, float32 (1, 3, input_px, input_px), as in validation.

    The shorter side becomes resize_px (bilinear, antialiased), the centre input_px are kept.
    """
    short, crop_px = min(picture.size), export["input_px"]
    width, height = (int(export["resize_px"] * side / short) for side in picture.size)
    left, top = round((width - crop_px) / 2), round((height - crop_px) / 2)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    picture = picture.crop((left, top, left + crop_px, top + crop_px))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(export[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def class_names(export: dict) -> list[str]:
    """A name for each output; labels that several classes share (crane) carry their class too."""
    times = Counter(export["labels"])
    return [
        label if times[label] == 1 else f"{label} ({class_id})"
        for label, class_id in zip(export["labels"], export["classes"], strict=True)
    ]


def make_page(model: torch.jit.ScriptModule, export: dict, folder: Path) -> gr.Blocks:
    """The page and its one endpoint, `/classify`, for the export that lies in `folder`."""
    names = class_names(export)
    uploads = Path(gr.utils.get_upload_folder()).resolve()  # Gradio copies the examples there too

    def classify(upload: dict | None) -> tuple[dict[str, float], str]:
        """The likeliest classes of a picture with their probabilities, and the time it took."""
        path = Path((upload or {}).get("path") or "").resolve()
        # Gradio hands on whatever path of the server a handmade request names.
        if not path.is_relative_to(uploads):
            refuse("Choose a picture first.")
        start = time.perf_counter()
        images = preprocess(open_picture(path), export)
        ready = time.perf_counter()
        with torch.inference_mode():
            probabilities = model(images)[0].softmax(dim=0).tolist()
        read_ms, model_ms = (ready - start) * 1e3, (time.perf_counter() - ready) * 1e3
        parts = f"{read_ms:.0f} ms to read the picture, {model_ms:.0f} ms in the model"
        took = f"Answered in {read_ms + model_ms:.0f} ms: {parts}."
        return dict(zip(names, probabilities, strict=True)), took

    accuracy = f"its first answer was right for **{export['val_top1']:.2f} %**"
    if len(names) > 5:  # with fewer, one of the first five is always right
        accuracy += f", one of its first five for **{export['val_top5']:.2f} %**"
    with gr.Blocks(title=f"{export['name']} · image classifier", analytics_enabled=False) as page:
        gr.Markdown(
            f"# {export['name']}\nSays which of {len(names):,} classes a picture shows. "
            f"On {export['val_images']:,} validation pictures {accuracy} "
            f"({export['weights']} weights, epoch {export['epoch']})."
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=380
                )
                button = gr.Button("Classify", variant="primary")
            with gr.Column():
                answer = gr.Label(label="Likeliest classes", num_top_classes=5)
                took = gr.Markdown()
        ask = {"fn": classify, "inputs": picture, "outputs": [answer, took]}
        ask["preprocess"] = False  # else Gradio opens the file, and shows "Error" if it cannot
        ask["trigger_mode"] = "always_last"  # a second picture gets its answer after the first
        asked = gr.on([button.click, picture.upload], **ask, api_name="classify")

        endings = Image.registered_extensions()
        files = sorted((folder / "examples").glob("*"))
        if shown := [[str(f)] for f in files if endings.get(f.suffix.lower()) in PICTURE_FORMATS]:
            load = gr.Examples(shown, inputs=picture, cache_examples=False).load_input_event
            load.then(**ask, api_visibility="private")

        # No answer may stay beside a picture that it does not belong to.
        blank = {"fn": lambda: (None, None, ""), "outputs": [picture, answer, took]}
        picture.clear(**blank, api_visibility="private")
        asked.failure(**blank, api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def main() -> None:
    """Check the files, make the page, serve it until the process is ended."""
    # Pillow refuses a picture at twice its limit of pixels; from the limit on it only warns.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    model, export = load_export(FOLDER)
    page = make_page(model, export, FOLDER)
    # The visitor's own font: nothing to load, and every weight is there.
    theme = gr.themes.Default(primary_hue="indigo", font=("system-ui", "sans-serif"))
    # Gradio 6.20 serves a clicked example only from the current folder or an allowed one.
    examples = str(FOLDER / "examples")
    page.launch(theme=theme, max_file_size=MAX_UPLOAD, allowed_paths=[examples])


if __name__ == "__main__":
    main()

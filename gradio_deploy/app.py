"""The web page of a trained classifier: a picture in, the five likeliest classes out.

Command: `python3 app.py`, from any folder. It stands alone and reads only what
`generate_trace_model.py` writes beside it: `model.json` (labels, sizes, mean, standard deviation,
measured accuracy), `model.pt` (TorchScript, float32) and `examples/` (pictures, optional). It
writes nothing there. Its address is Gradio's to choose: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT.
MODEL_CARD_URL and CODE_URL are what the page links to, MODEL_JSON_SHA256 pins the export; each may
be left out.

A file that is missing or does not belong to the others ends it with one line on stderr and exit
code 2.
"""

import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

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
HEIC = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)  # AVIF may begin like the last two
MAX_ASPECT = 100  # a line of 1 x 60,000 px would fill 12 GB once its shorter side is enlarged
MAX_JPEG_SCANS = 64  # a progressive JPEG has about ten; each costs the time of a whole picture
MAX_UPLOAD = "20mb"
MAX_WAITING = 32  # people in the queue; the next one is told that it is full
MAX_SESSIONS = 1000  # visitors whose page Gradio remembers
KEEP_FILES_S = 3600  # how long uploads and heat maps stay on the disk

SHOWN_PX = 640  # longer side of the picture under the heat map
# Dark to bright, so that it can be read without telling colours apart (after matplotlib's inferno).
HEAT_COLOURS = ((20, 11, 52), (132, 32, 107), (229, 92, 48), (246, 215, 70))
CSS = """
.gradio-container { --link-text-color: #4f46e5; }
.dark .gradio-container, .gradio-container.dark { --link-text-color: #a5b4fc; }
#links a { margin-right: 1.2em; color: var(--link-text-color); }
#took { font-size: 0.9rem; opacity: 0.85; }
#answer .confidence-set, #answer .confidence-set * { font-family: inherit; }
#heat:has(.empty) { display: none; }
#heat img { max-height: 340px; object-fit: contain; }
@media (max-width: 640px) {
  .gradio-container main { padding: 12px !important; }
  #picture { height: 270px !important; }
}
"""


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
        content = description.read_bytes()
        pinned = os.environ.get("MODEL_JSON_SHA256")
        if pinned and hashlib.sha256(content).hexdigest() != pinned.strip().lower():
            stop(f"{description} is not the one that MODEL_JSON_SHA256 names")
        export = json.loads(content)
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
        content = weights.read_bytes()
    except FileNotFoundError:
        stop(f"{weights} is missing")
    if hashlib.sha256(content).hexdigest() != export["sha256"]:
        stop(f"{weights} is not the file that {description.name} describes (its sha256 differs)")

    try:
        with warnings.catch_warnings():
            # Still the format that a Space can run without the model's source.
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", FutureWarning)
            model = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
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


def last_features(model: torch.jit.ScriptModule, images: torch.Tensor) -> torch.Tensor:
    """What the last stage of a torchvision ResNet sees, float32 (N, channels, height, width).

    Raises AttributeError or RuntimeError if the model is built otherwise.
    """
    resnet = model.model
    for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        images = getattr(resnet, stage)(images)
    return images


def can_explain(model: torch.jit.ScriptModule, input_px: int) -> bool:
    """Whether its logits are one linear layer over the mean of `last_features`, tried on noise."""
    noise = torch.rand(2, 3, input_px, input_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        try:
            features = last_features(model, noise)
            logits = model.model.fc(features.mean(dim=(2, 3)))
        except (AttributeError, RuntimeError):
            return False
        return torch.allclose(logits, model(noise), rtol=1e-4, atol=1e-4)


def activation_map(model: torch.jit.ScriptModule, features: torch.Tensor, label: int) -> np.ndarray:
    """How much each place of (1, channels, height, width) speaks for a class: float32, 0 to 1.

    The class activation map of Zhou et al., arXiv 1512.04150: the last layer's weights of the class
    over the features at each place. Its mean over the places, with the bias, is the logit itself.
    What speaks against the class counts as 0; the largest value is 1.
    """
    evidence = torch.tensordot(model.model.fc.weight[label], features[0], dims=1).clamp(min=0)
    return (evidence / evidence.max().clamp(min=1e-12)).detach().numpy()


def paint(
    picture: Image.Image, evidence: np.ndarray, box: tuple[int, int, int, int]
) -> Image.Image:
    """The picture in grey with the evidence as colours over `box`, what the model saw of it.

    What lies outside of the box is darkened. `evidence` is float32 (height, width), 0 to 1.
    """
    scale = SHOWN_PX / max(picture.size)
    shown = picture.resize([max(1, round(scale * side)) for side in picture.size]).convert("L")
    left, top, right, bottom = (round(scale * edge) for edge in box)
    seen = (slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1)))
    grey = np.asarray(shown, np.float32)[..., None]
    pixels = np.repeat(0.4 * grey, 3, axis=2)
    height, width = pixels[seen].shape[:2]
    heat = Image.fromarray(evidence).resize((width, height), Image.Resampling.BICUBIC)
    heat = np.asarray(heat).clip(0, 1)
    steps = np.linspace(0, 1, len(HEAT_COLOURS))
    table = [np.interp(np.arange(256) / 255, steps, c) for c in zip(*HEAT_COLOURS, strict=True)]
    colours = np.stack(table, -1).astype(np.float32)[(255 * heat).astype(np.uint8)]
    strength = 0.75 * heat[..., None]
    pixels[seen] = grey[seen] * (1 - strength) + colours * strength
    return Image.fromarray(pixels.astype(np.uint8))


def open_picture(path: Path, least_px: int) -> Image.Image:
    """The first frame of a picture file as a person sees it: 8-bit RGB, upright, on white.

    A JPEG whose shorter side is at least eight times least_px is read at an eighth, a quarter or
    half of its size, but not below four times least_px. Raises gr.Error, with a sentence for the
    person who chose the file, if it cannot be used.
    """
    try:
        content = path.read_bytes()
    except OSError:  # removed after KEEP_FILES_S
        refuse("Choose the picture again.")
    if HEIC.match(content) and b"avif" not in content[:64]:
        refuse(
            f"{path.name} is a HEIC photo, which this page does not read. Send it as a JPEG "
            "(on an iPhone: Settings, Camera, Formats, Most Compatible)."
        )
    if content[:2] == b"\xff\xd8" and content.count(b"\xff\xda") > MAX_JPEG_SCANS:
        refuse(f"{path.name} would take too long to read. Try another copy of it.")
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as image:
            longer = max(image.size) / min(image.size)
            if longer > MAX_ASPECT:
                refuse(
                    f"{path.name} is more than {MAX_ASPECT} times as long as wide. "
                    "Try another picture."
                )
            image.draft(None, (4 * least_px, 4 * least_px))  # of a JPEG; else it does nothing
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except gr.Error:
        raise
    except Image.UnidentifiedImageError:
        refuse(f"{path.name} is not a picture that can be read. Try a JPEG, PNG or WebP file.")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million"
        refuse(f"{path.name} has more than {limit} pixels. Try a smaller copy of it.")
    except Exception:  # damage makes Pillow raise OSError, SyntaxError, ValueError, struct.error...
        refuse(f"{path.name} is damaged or incomplete. Try another copy of it.")

    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def refuse(sentence: str) -> NoReturn:
    """Show the person a message in place of an answer; the server's log stays quiet."""
    raise gr.Error(sentence, print_exception=False)


def preprocess(
    picture: Image.Image, export: dict
) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """RGB picture → the model's input, as in validation, and the box of the picture that it shows.

    The shorter side becomes resize_px (bilinear, antialiased), the centre input_px are kept. The
    input is float32 (1, 3, input_px, input_px), the box (left, top, right, bottom) in pixels of
    `picture`.
    """
    short, crop_px = min(picture.size), export["input_px"]
    width, height = (int(export["resize_px"] * side / short) for side in picture.size)
    left, top = round((width - crop_px) / 2), round((height - crop_px) / 2)
    crop = (left, top, left + crop_px, top + crop_px)
    pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR).crop(crop))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(export[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    box = tuple(round(edge * short / export["resize_px"]) for edge in crop)
    return (images - mean) / std, box


def class_names(export: dict) -> list[str]:
    """A name for each output; labels that several classes share (crane) carry their class too."""
    times = Counter(export["labels"])
    return [
        label if times[label] == 1 else f"{label} ({class_id})"
        for label, class_id in zip(export["labels"], export["classes"], strict=True)
    ]


def links(export: dict) -> str:
    """Markdown that links to the model's card and to the code, as far as they are known."""
    known = {
        "Model card": os.environ.get("MODEL_CARD_URL") or export.get("card_url"),
        "Code": os.environ.get("CODE_URL") or export.get("code_url"),
    }
    return " ".join(
        f"[{name}]({url})"
        for name, url in known.items()
        if isinstance(url, str) and re.fullmatch(r"https?://[^\s()<>]+", url)
    )


def uploaded_file(upload: Any, folders: tuple[Path, ...]) -> Path:
    """The file that a request means, if it lies in one of the folders; else refuses.

    Gradio hands on whatever path of the server a handmade request names.
    """
    name = upload.get("path") if isinstance(upload, dict) else None
    if isinstance(name, str) and "\0" not in name:
        path = Path(name).resolve()
        if any(path.is_relative_to(folder) for folder in folders):
            return path
    refuse("Choose a picture first.")


def make_page(model: torch.jit.ScriptModule, export: dict, folder: Path) -> gr.Blocks:
    """The page and its one endpoint, `/classify`, for the export that lies in `folder`."""
    names = class_names(export)
    uploads = Path(gr.utils.get_upload_folder()).resolve()  # Gradio copies the examples there too
    explained = can_explain(model, export["input_px"])

    def classify(upload: dict | None) -> tuple[dict[str, float], str, Image.Image | None]:
        """Classify a picture.

        Gives the likeliest classes with their probabilities, the time it took, and a picture of
        where the model saw the likeliest class.
        """
        return look(upload, None)

    def look(upload: Any, chosen: int | None) -> tuple[dict[str, float], str, Image.Image | None]:
        """The answer, with a heat map of the class at index `chosen`; None: of the likeliest."""
        path = uploaded_file(upload, (uploads,))
        start = time.perf_counter()
        picture = open_picture(path, export["resize_px"])
        images, box = preprocess(picture, export)
        ready = time.perf_counter()
        with torch.inference_mode():
            if explained:
                features = last_features(model, images)
                logits = model.model.fc(features.mean(dim=(2, 3)))
            else:
                logits = model(images)
            probabilities = logits[0].softmax(dim=0).tolist()
            done = time.perf_counter()
            heat = None
            if explained:
                label = int(logits[0].argmax()) if chosen is None else chosen
                heat = paint(picture, activation_map(model, features, label), box)
        read_ms, model_ms = (ready - start) * 1e3, (done - ready) * 1e3
        all_ms = (time.perf_counter() - start) * 1e3
        took = (
            f"Answered in {all_ms:.0f} ms: {read_ms:.0f} ms to read the picture, {model_ms:.0f} ms "
            f"in the model, {all_ms - read_ms - model_ms:.0f} ms for the rest."
        )
        if explained:
            took += f" Bright places below speak for **{names[label]}**."
        return dict(zip(names, probabilities, strict=True)), took, heat

    def explain(upload: Any, choice: gr.SelectData) -> tuple[str, Image.Image]:
        """The heat map of the class that the visitor selects in the answer."""
        if choice.value not in names:
            refuse("Choose one of the classes.")
        return look(upload, names.index(choice.value))[1:]

    accuracy = f"its first answer was right for **{export['val_top1']:.2f} %**"
    if len(names) > 5:  # with fewer, one of the first five is always right
        accuracy += f", one of its first five for **{export['val_top5']:.2f} %**"
    with gr.Blocks(
        title=f"{export['name']} · image classifier",
        analytics_enabled=False,
        delete_cache=(KEEP_FILES_S, KEEP_FILES_S),
    ) as page:
        gr.Markdown(
            f"# {export['name']}\nSays which of {len(names):,} classes a picture shows. "
            f"On {export['val_images']:,} validation pictures {accuracy} "
            f"({export['weights']} weights, epoch {export['epoch']})."
        )
        if linked := links(export):
            gr.Markdown(linked, elem_id="links")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    height=380,
                    buttons=["fullscreen"],
                    elem_id="picture",
                )
                button = gr.Button("Classify", variant="primary")
                below = gr.Column()
            with gr.Column():
                answer = gr.Label(label="Likeliest classes", num_top_classes=5, elem_id="answer")
                took = gr.Markdown(label="Time taken", elem_id="took")
                heat = gr.Image(
                    label="What it looked at",
                    visible=explained,
                    interactive=False,
                    format="webp",
                    elem_id="heat",
                    buttons=["download", "fullscreen"],
                )
        ask = {"fn": classify, "inputs": picture, "outputs": [answer, took, heat]}
        ask["preprocess"] = False  # else Gradio opens the file, and shows "Error" if it cannot
        ask["trigger_mode"] = "always_last"  # a second picture gets its answer after the first
        ask["scroll_to_output"] = True  # on a phone the answer lies below the picture
        asked = gr.on([button.click, picture.input], **ask, api_name="classify")
        if explained:
            answer.select(
                explain, picture, [took, heat], preprocess=False, api_visibility="private"
            )

        endings = Image.registered_extensions()
        files = sorted((folder / "examples").glob("*"))
        if shown := [[str(f)] for f in files if endings.get(f.suffix.lower()) in PICTURE_FORMATS]:
            with below:
                examples = gr.Examples(shown, inputs=picture, cache_examples=False)
            examples.load_input_event.then(**ask, api_visibility="private")

        # No answer may stay beside a picture that it does not belong to.
        blank = {
            "fn": lambda: (None, None, "", None),
            "outputs": [picture, answer, took, heat],
        }
        picture.clear(**blank, api_visibility="private")
        asked.failure(**blank, api_visibility="private")
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


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
    page.launch(
        theme=theme,
        css=CSS,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[examples],
        state_session_capacity=MAX_SESSIONS,
        run_history=False,
        footer_links=["api", "gradio", "settings"],
    )


if __name__ == "__main__":
    main()

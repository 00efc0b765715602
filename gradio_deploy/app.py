"""The web page of a trained classifier: a picture in, the five likeliest classes out.

Command: `python3 app.py`, from any folder. It stands alone: beside it lie classifier.py, decoder.py
and what `generate_trace_model.py` writes there, `model.onnx`, `model.json` (labels, sizes, mean,
standard deviation, measured accuracy) and `examples/` (pictures, optional). It writes nothing
there. Its address is Gradio's to choose: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT. MODEL_CARD_URL and
CODE_URL are what the page links to, MODEL_JSON_SHA256 pins the export; each may be left out.
Uploads lie in GRADIO_TEMP_DIR, or in a temporary folder, in which all files are deleted after an
hour, and the oldest of more than 2 GB before.

A file that is missing or does not belong to the others ends it with one line on stderr and exit
code 2.
"""

import contextlib
import json
import os
import re
import signal
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import classifier
import decoder

try:  # a Space has this package; where it runs on ZeroGPU, it must come before Gradio
    import spaces
except ImportError:
    spaces = None

# Else Gradio's import ends with a traceback.
if not os.environ.get("GRADIO_SERVER_PORT", "0").isdecimal():
    print("error: GRADIO_SERVER_PORT is no number", file=sys.stderr)
    raise SystemExit(2)

import gradio as gr
import numpy as np
import onnxruntime
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER = Path(__file__).resolve().parent
MAX_REQUEST_BYTES = 1_000_000  # of what is no upload: a question names a file, and is short
MAX_WAITING = 32  # people in the queue; the next one is told that it is full
MAX_SESSIONS = 1000  # visitors whose page Gradio remembers
KEEP_FILES_S = 3600  # how long uploads and heat maps stay on the disk
KEEP_BYTES = 2_000_000_000  # of all together; the oldest go first
SWEEP_S = 180  # how often what is beyond is looked for

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


def ask_for_no_gpu() -> None:
    """Is never called. On ZeroGPU, the hardware that a free account may have, a program in which no
    function asks for a GPU is ended at its start; the model runs on the CPU all the same.
    """


if spaces is not None:
    spaces.GPU(ask_for_no_gpu)


def activation_map(maps: np.ndarray, label: int) -> np.ndarray:
    """How much each place of (1, classes, height, width) speaks for a class: float32, 0 to 1.

    The class activation map of Zhou et al., arXiv 1512.04150: the last layer's weights of the class
    over the features at each place. Its mean over the places, with the bias, is the logit itself.
    What speaks against the class counts as 0; the largest value is 1.
    """
    evidence = maps[0, label].clip(min=0)
    return evidence / max(evidence.max(), 1e-12)


def paint(picture: Image.Image, evidence: np.ndarray, box: classifier.Box) -> Image.Image:
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


def refuse(sentence: str) -> NoReturn:
    """Show the person a message in place of an answer; the server's log stays quiet."""
    raise gr.Error(sentence, print_exception=False)


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


def uploaded_file(upload: Any, uploads: Path) -> Path:
    """The file that a request means, if it lies in the folder of the uploads; else refuses.

    Gradio hands on whatever path of the server a handmade request names.
    """
    name = upload.get("path") if isinstance(upload, dict) else None
    if isinstance(name, str) and "\0" not in name:
        path = Path(name).resolve()
        if path.is_relative_to(uploads):
            return path
    refuse("Choose a picture first.")


def take_uploads_only(picture: gr.Image) -> None:
    """Have it refuse an address, from which Gradio would fetch a file of any size.

    A class of its own would do the same, but Gradio writes a file beside the source of such.
    """
    move = picture.async_move_resource_to_block_cache

    async def move_upload(path: Any) -> str | None:
        if str(path).startswith(("http://", "https://")):
            refuse("Send the picture itself, not its address.")
        return await move(path)

    picture.async_move_resource_to_block_cache = move_upload


def own_folder() -> Path:
    """A temporary folder for the uploads, which no other user of the computer made or may read.

    The same at each start, if it can be. Not the folder that all of a user's Gradio apps share:
    what is old in it is deleted.
    """
    shared = Path(tempfile.gettempdir()).resolve()  # where that is a link itself, as on macOS
    own = shared / f"gradio-classifier-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        own.mkdir(0o700)
    found = own.lstat()  # of a link itself: anybody may have put one there
    is_private = found.st_uid == os.getuid() and not found.st_mode & 0o077
    if stat.S_ISDIR(found.st_mode) and is_private:
        return own
    return Path(tempfile.mkdtemp(prefix="gradio-classifier-", dir=shared))


def delete_old_files(folder: Path, kept: list[str], age_s: float, most_bytes: int) -> None:
    """Delete what has lain in the folder for so many seconds and is not kept, empty folders too.

    And the oldest files, where all together have more bytes than they may. Gradio's own deleting
    (`delete_cache`) ends for good where a file comes while it goes through their names, and does
    not know of uploads that were broken off.
    """
    for name in kept:
        with contextlib.suppress(OSError):
            os.utime(name)  # it is new again, also to another app that shares the folder
    files = []
    for place, _, names in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            # An upload's folder is empty for a moment; the one of all stays.
            if Path(place) != folder and time.time() - os.stat(place).st_ctime > age_s:
                os.rmdir(place)  # fails where something lies in it
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(path := Path(place, name))
                files.append((found.st_ctime, found.st_size, path))
    bytes_so_far = 0
    for changed, size, path in sorted(files, reverse=True):
        bytes_so_far += size
        if time.time() - changed > age_s or bytes_so_far > most_bytes:
            with contextlib.suppress(OSError):
                path.unlink()


def keep_deleting_old_files(page: gr.Blocks) -> None:
    """Never returns. The copies of the examples stay, which Gradio made as it built the page."""
    while True:
        kept = [name for block in page.blocks.values() for name in block.keep_in_cache]
        delete_old_files(Path(gr.utils.get_upload_folder()), kept, KEEP_FILES_S, KEEP_BYTES)
        time.sleep(SWEEP_S)


class BoundedRequests:
    """ASGI middleware that refuses a request whose body is too large, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, answer with 413, or end a body that grows too long."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        # Beside a file, the form around it takes some hundred bytes.
        limit = MAX_REQUEST_BYTES + (classifier.MAX_BYTES if is_upload else 0)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > limit:
            await PlainTextResponse("The request is too large.", 413)(scope, receive, send)
            return
        taken = 0

        async def receive_bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= limit else {"type": "http.disconnect"}

        await self.app(scope, receive_bounded, send)


def make_page(
    session: onnxruntime.InferenceSession, export: dict[str, Any], folder: Path
) -> gr.Blocks:
    """The page and its one endpoint, `/classify`, for the export that lies in `folder`."""
    names = classifier.class_names(export)
    uploads = Path(gr.utils.get_upload_folder()).resolve()  # Gradio copies the examples there too
    outputs = [output.name for output in session.get_outputs()]
    explained = "activation_maps" in outputs

    def classify(upload: dict | None) -> tuple[dict[str, float], str, Image.Image | None]:
        """Classify a picture.

        Gives the likeliest classes with their probabilities, the time it took, and a picture of
        where the model saw the likeliest class.
        """
        return look(upload, None)

    def classify_put_in(upload: Any) -> tuple[dict[str, float] | None, str, Any, Any]:
        """The answer to a picture that was put in, or nothing where the visitor has removed it.

        At last what is refused, and when. A refusal is told without an error, after which Gradio
        would not ask about a picture that was put in meanwhile.
        """
        try:
            return *(classify(upload) if upload else (None, "", None)), gr.skip()
        except gr.Error as error:
            gr.Warning(error.message)
            return None, "", None, f"{json.dumps(upload)} {time.monotonic()}"

    def take_out(shown: Any, refused: str) -> Any:
        """Empty the place of the picture, where the refused one is still in it.

        Only then: choosing the webcam empties it too, and what is set from here ends the webcam.
        """
        return None if str(refused).startswith(json.dumps(shown)) else gr.skip()

    def look(upload: Any, chosen: int | None) -> tuple[dict[str, float], str, Image.Image | None]:
        """The answer, with a heat map of the class at index `chosen`; None: of the likeliest."""
        path = uploaded_file(upload, uploads)
        start = time.perf_counter()
        try:
            content = path.read_bytes()
        except OSError:  # removed after KEEP_FILES_S
            refuse("Choose the picture again.")
        try:
            picture = classifier.open_picture(content)
        except classifier.RefusedError as error:
            refuse(str(error))
        images, box = classifier.preprocess(picture, export)
        ready = time.perf_counter()
        found = dict(zip(outputs, session.run(None, {"images": images}), strict=True))
        done = time.perf_counter()
        logits = found["logits"][0]
        heat = None
        if explained:
            label = int(logits.argmax()) if chosen is None else chosen
            heat = paint(picture, activation_map(found["activation_maps"], label), box)
        read_ms, model_ms = (ready - start) * 1e3, (done - ready) * 1e3
        all_ms = (time.perf_counter() - start) * 1e3
        took = (
            f"Answered in {all_ms:.0f} ms: {read_ms:.0f} ms to read the picture, {model_ms:.0f} ms "
            f"in the model, {all_ms - read_ms - model_ms:.0f} ms for the rest."
        )
        if explained:
            took += f" Bright places below speak for **{classifier.as_text(names[label])}**."
        return dict(zip(names, classifier.softmax(logits).tolist(), strict=True)), took, heat

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
        delete_cache=(10**9, 10**9),  # in seconds: at the app's end only, then whatever is left
    ) as page:
        gr.Markdown(
            f"# {classifier.as_text(export['name'])}\n"
            f"Says which of {len(names):,} classes a picture shows. "
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
                take_uploads_only(picture)
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
        refused = gr.Textbox(visible="hidden")  # a gr.State would hold up the app's end
        answers = [answer, took, heat]
        ask: dict[str, Any] = {"inputs": picture}
        ask["preprocess"] = False  # else Gradio opens the file, and shows "Error" if it cannot
        ask["trigger_mode"] = "always_last"  # a second picture gets its answer after the first
        ask["scroll_to_output"] = True  # on a phone the answer lies below the picture
        ask["concurrency_id"] = "model"
        asked = button.click(classify, **ask, outputs=answers, api_name="classify")
        ask |= {"fn": classify_put_in, "outputs": [*answers, refused], "api_visibility": "private"}
        put_in = [picture.input(**ask)]
        if explained:
            answer.select(
                explain,
                picture,
                [took, heat],
                preprocess=False,
                concurrency_id="model",
                api_visibility="private",
            )

        endings = Image.registered_extensions()
        formats = decoder.PICTURE_FORMATS
        files = sorted((folder / "examples").glob("*"))
        if shown := [[str(f)] for f in files if endings.get(f.suffix.lower()) in formats]:
            with below:
                examples = gr.Examples(shown, inputs=picture, cache_examples=False)
            put_in.append(examples.load_input_event.then(**ask))

        quick = {"queue": False, "api_visibility": "private"}  # for these, though it be full
        refused.change(take_out, [picture, refused], picture, preprocess=False, **quick)
        # No answer may stay beside a picture that it does not belong to.
        for event in (asked, *put_in):
            event.failure(lambda: (None, "", None), None, answers, **quick)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def serve(page: gr.Blocks) -> None:
    """Serve the page until the process is ended."""
    threading.Thread(target=keep_deleting_old_files, args=(page,), daemon=True).start()
    # The visitor's own font: nothing to load, and every weight is there.
    theme = gr.themes.Default(primary_hue="indigo", font=("system-ui", "sans-serif"))
    # Gradio serves a clicked example only from the current folder or an allowed one.
    examples = str(FOLDER / "examples")
    # Ended as by Ctrl-C, it deletes what visitors have sent.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    page.launch(
        theme=theme,
        css=CSS,
        max_file_size=classifier.MAX_BYTES,
        allowed_paths=[examples],
        app_kwargs={"middleware": [Middleware(BoundedRequests)]},
        state_session_capacity=MAX_SESSIONS,
        run_history=False,
        enable_monitoring=False,  # else everybody may read how often it was asked
        footer_links=["api", "gradio", "settings"],
    )


def main() -> None:
    """Check the files, make the page, serve it until the process is ended."""
    pinned = os.environ.get("MODEL_JSON_SHA256", "").strip()
    try:
        session, export = classifier.load_export(FOLDER, model_json_sha256=pinned)
    except classifier.ExportError as error:
        print(f"error: {error}: run `python3 generate_trace_model.py` first", file=sys.stderr)
        raise SystemExit(2) from None
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = str(own_folder())
    try:
        serve(make_page(session, export, FOLDER))
    except (OSError, OverflowError) as error:
        names = "GRADIO_SERVER_NAME, GRADIO_SERVER_PORT or GRADIO_TEMP_DIR"
        print(f"error: the app cannot be served ({error}): set another {names}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

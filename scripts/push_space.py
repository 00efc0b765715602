"""The app on a Hugging Face Space, for scripts: it asks nothing that an option can answer.

    python3 scripts/push_space.py USER/SPACE --dry-run     lists the files, sends none
    python3 scripts/push_space.py USER/SPACE               into a private Space
    python3 scripts/push_space.py USER/SPACE --public

Reads the app's folder, in which generate_trace_model.py has put the model. The Space, which is made
if it is not there, has in the end, after one commit:

    README.md           its head is the Space's configuration
    app.py, classifier.py, decoder.py, requirements.txt, .gitignore
    model.json          and the ONNX file that it names, after the checks that the app makes of them
    examples/           pictures

and nothing else: what the folder has beside these is not sent, and what the Space has beside these
is removed, after it was listed. The hub begins to build the Space at once.

The token is the one of `hf auth login`, or HF_TOKEN; it has to be allowed to write. A Space that
has an app already is asked about first (--yes does not ask), and the visibility of a Space that is
there is never changed. Files that it has as they are here are not sent again. What fails leaves the
Space's files as they were, or says that it has not. `hardware` in README.md's head, which
`gradio deploy` reads too, is what a new Space is asked to run on; without it, the hub's free CPU.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import tyro
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "gradio_deploy"))

import classifier
import pushing

from utils import UserError, parse_options, run_stage

APP_FILES = (
    *("app.py", "classifier.py", "decoder.py"),
    *("requirements.txt", "README.md", ".gitignore"),
)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # that every browser shows


@dataclasses.dataclass(frozen=True)
class SpaceOptions:
    """Which Space gets the app."""

    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="USER/SPACE")]
    """the Space, of a user or an organization"""
    app_folder: Path = Path("gradio_deploy")
    """folder with the app and the exported model"""
    public: bool = False
    """make the Space public; a new one is private otherwise"""
    dry_run: bool = False
    """list the files with their sizes, and send nothing"""
    yes: bool = False
    """do not ask before a Space that has an app already is changed"""


def make_files(folder: Path) -> dict[str, bytes]:
    """The Space's files by their names; raises UserError if they are not a whole app."""
    for name in APP_FILES:
        if not (folder / name).is_file():
            raise UserError(f"no {folder / name}: name the app's folder with --app-folder")
    try:
        _, model, content = classifier.read_export(folder)
    except classifier.ExportError as error:
        raise UserError(f"{error}: run `python3 generate_trace_model.py` first") from None
    pictures = sorted(
        path
        for path in (folder / "examples").glob("[!.]*")
        if path.suffix.lower() in PICTURES and path.is_file()
    )
    for path in pictures:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"rename {path}: a hub takes names in UTF-8 alone") from None
    return {
        **{name: (folder / name).read_bytes() for name in (*APP_FILES, "model.json")},
        model.name: content,
        **{f"examples/{path.name}": path.read_bytes() for path in pictures},
    }


def read_head(path: Path) -> dict[str, Any]:
    """The Space's configuration, the YAML of README.md; UserError if no Space comes of it."""
    try:
        head = huggingface_hub.metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):
        raise UserError(f"{path}: what stands between its lines of --- is no YAML") from None
    if (head.get("sdk"), head.get("app_file")) != ("gradio", "app.py"):
        raise UserError(
            f"{path} has to begin with a head of YAML between two lines of ---, in which stand "
            "`sdk: gradio` and `app_file: app.py`"
        )
    title = str(head.get("title", ""))
    if "/" in title or not pushing.is_repo_name(title):
        raise UserError(
            f"{path}: {title!r} is no title that `gradio deploy` can make a Space's name of: take "
            "letters, digits, '-', '_' and '.', at most 96"
        )
    return head


def main() -> None:
    """Read the files, list them, and send them."""
    options = parse_options(SpaceOptions, __doc__)
    pushing.check_repo(options.repo)
    files = make_files(options.app_folder)
    head = read_head(options.app_folder / "README.md")
    pushing.list_files(files)
    if options.dry_run:
        print(f"dry run: nothing was sent to {options.repo}")
        return
    told = pushing.push(
        files,
        options.repo,
        "The app and its model",
        public=options.public,
        yes=options.yes,
        is_space=True,
        hardware=head.get("hardware"),
    )
    print(told)


if __name__ == "__main__":
    run_stage(main)

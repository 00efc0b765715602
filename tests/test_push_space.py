"""The Space: what `gradio deploy` and push_space.py send to a hub on loopback, and what stays."""

import hashlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, run_stage_command
from exports import METADATA
from hub import Hub
from test_push_model import TOKEN, at_hub, environment, hub  # noqa: F401

sys.path.insert(0, str(REPOSITORY / "scripts"))

import push_space

from utils import UserError

SPACE = "spaces/user/digits"
APP_FILES = [
    *(".gitignore", "README.md", "app.py", "classifier.py", "decoder.py", "requirements.txt")
]
FILES = sorted(
    [*APP_FILES, "model.json", "model.onnx", "examples/0.jpg", "examples/1.png", "examples/2.JPG"]
)
# What such a folder has in it as well after a while, some of it secret.
SECRET = "sk-nobodyMayReadThis"
OTHERS = (
    *(".env", ".git/config", ".cache/huggingface/token", ".gradio/certificate.pem", "hf_token.txt"),
    *(".venv/lib/site.py", "__pycache__/app.cpython-311.pyc", ".ipynb_checkpoints/app.py"),
    *("app.log", "nohup.out", "model.pt", "model.pt2", "examples/.DS_Store", "key.pem"),
    *("examples/__pycache__/x.pyc", "examples/._0.jpg", "my_secrets.json"),
)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The app's folder as the export leaves it, and OTHERS; any bytes serve as the model."""
    folder = tmp_path / "app"
    shutil.copytree(
        REPOSITORY / "gradio_deploy",
        folder,
        ignore=lambda _, names: set(names) - set(APP_FILES),
    )
    model = bytes(range(256)) * 40
    about = {"file": "model.onnx", "sha256": hashlib.sha256(model).hexdigest()}
    written = {
        "model.onnx": model,
        "model.json": json.dumps({**METADATA, "formats": {"onnx": about}}).encode(),
        "examples/0.jpg": b"a picture",
        "examples/1.png": b"another",
        "examples/2.JPG": b"as a camera names it",
        **dict.fromkeys(OTHERS, SECRET.encode()),
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def has(app: Path, files: dict[str, bytes]) -> None:
    """Assert that the files of a Space are those of the app, and nothing of the others."""
    assert sorted(files.keys() - {".gitattributes"}) == FILES
    for name in FILES:
        assert files[name] == (app / name).read_bytes(), name
    for name, content in files.items():
        assert SECRET.encode() not in content and TOKEN.encode() not in content, name


# ------------------------------------------------------------------------------ gradio deploy


def deploy(app: Path, hub_url: str, answers: dict[str, str], **changed: str) -> tuple[int, str]:
    """Exit code and screen of `gradio deploy` on a terminal; answers are by what is waited for."""
    ours, terminal = pty.openpty()
    command = subprocess.Popen(
        [Path(sys.executable).parent / "gradio", "deploy"],
        cwd=app,
        env={**COMMAND_ENVIRONMENT, **environment(hub_url, app.parent), **changed},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    screen, waiting, end = "", dict(answers), time.monotonic() + 60
    os.set_blocking(ours, False)
    while time.monotonic() < end:
        try:
            screen += os.read(ours, 10_000).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # the other end is closed
            break
        for question in [question for question in waiting if question in screen]:
            time.sleep(0.3)  # until the terminal is as the question wants it
            os.write(ours, waiting.pop(question).encode())
    os.close(ours)
    command.kill()  # if it still waits for an answer
    return command.wait(), screen


def test_gradio_deploy_sends_the_app_and_nothing_else(app: Path, hub: Hub, tmp_path: Path) -> None:
    menu = {"Log in with your browser": "\x1b[B\r", "Enter your token": f"{TOKEN}\r"}
    code, screen = deploy(app, hub.url, menu, HF_TOKEN="")
    assert code == 0, screen
    assert "Space available at" in screen and TOKEN not in screen
    assert (tmp_path / "hf/token").read_text() == TOKEN
    place = "spaces/user/resnet50-imagenet"  # README.md's title
    assert list(hub.repos) == [place]
    has(app, hub.repos[place])
    assert hub.commits == [sorted(FILES)]
    assert [wanted["sdk"] for wanted in hub.created] == ["gradio"]
    assert not hub.private[place]  # as the README says

    (app / "examples/0.jpg").unlink()
    (app / "app.py").write_text("# changed\n")
    code, screen = deploy(app, hub.url, {}, HF_TOKEN="")  # asks nothing
    assert code == 0, screen
    assert hub.commits[1:] == [["app.py"]]
    assert "examples/0.jpg" in hub.repos[place]  # which push_space.py would remove


# ------------------------------------------------------------------------------ push_space.py


def test_a_space_gets_the_app_and_nothing_else(app: Path, hub: Hub, tmp_path: Path) -> None:
    for name in ("notes.txt", "examples/notes.txt"):  # of no name that tells what it is
        (app / name).write_text(SECRET)
    command = ("scripts/push_space.py", "user/digits", "--app-folder", app)
    done = run_stage_command(*command, "--dry-run", env=environment(hub.url, tmp_path, ""))
    assert (done.returncode, done.stderr) == (0, "")
    listed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert last == "dry run: nothing was sent to user/digits"
    sizes = {f"{(app / name).stat().st_size:>12,} bytes  {name}" for name in FILES}
    assert sorted(listed.splitlines()) == sorted(sizes)
    assert hub.requests == []

    done = run_stage_command(*command, env=environment(hub.url, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{listed}\nsent to {hub.url}/spaces/user/digits\n"
    has(app, hub.repos[SPACE])
    assert [sorted(paths) for paths in hub.commits] == [FILES]
    assert hub.private[SPACE]
    assert hub.created == [
        {
            **{"type": "space", "sdk": "gradio", "visibility": "private"},
            **{"name": "digits", "organization": "user", "hardware": "zero-a10g"},
        }
    ]


def push(*arguments: object) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["push_space.py", *map(str, arguments)])
        push_space.main()


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        push(*arguments)
    told = " ".join(str(error.value).split())
    assert TOKEN not in told and "Traceback" not in told
    return told


def test_only_what_differs_is_sent_and_what_is_stale_goes(
    app: Path, at_hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("user/digits", "--app-folder", app)
    push(*to)
    sent = len(at_hub.requests)
    push(*to)
    url = f"{at_hub.url}/spaces/user/digits"
    assert capsys.readouterr().out.endswith(f"nothing was sent: {url} is up to date\n")
    assert {method for method, _ in at_hub.requests[sent:]} == {"GET"}

    at_hub.repos[SPACE] |= {"model.pt": b"old", ".env": b"mine", "examples/old.jpg": b"old"}
    (app / "examples/1.png").write_bytes(b"a new one")
    (app / "examples/2.gif").write_bytes(b"one more")
    before = dict(at_hub.repos[SPACE])
    changes = (
        "replaced: examples/1.png; added: examples/2.gif; removed: .env, examples/old.jpg, model.pt"
    )
    question = f"user/digits has files already ({changes})"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert refused(*to) == f"{question}: give --yes to go on; nothing was sent"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda text: "n" if question in text else "y")
    assert refused(*to) == "nothing was sent"
    assert at_hub.repos[SPACE] == before and len(at_hub.commits) == 1
    at_hub.fault, at_hub.fault_at = 500, "/commit/"
    assert refused(*to, "--yes").endswith("user/digits is as it was")
    assert at_hub.repos[SPACE] == before
    at_hub.fault = None
    capsys.readouterr()
    push(*to, "--yes")
    assert f"{question}\nsent to " in capsys.readouterr().out
    gone = [".env", "examples/old.jpg", "model.pt"]
    assert at_hub.commits[1:] == [["examples/1.png", "examples/2.gif", *gone]]
    assert at_hub.repos[SPACE].keys() == {*FILES, "examples/2.gif", ".gitattributes"}
    model = hashlib.sha256((app / "model.onnx").read_bytes()).hexdigest()
    assert at_hub.requests.count(("PUT", f"/large/{model}")) == 1

    at_hub.repos[SPACE]["model.pt"] = b"old"
    push(*to, "--yes")
    assert at_hub.commits[2:] == [["model.pt"]] and "model.pt" not in at_hub.repos[SPACE]

    at_hub.repos[SPACE]["model.pt"] = b"old"
    at_hub.lost = lambda: None  # the answer to a commit that only removes
    assert "; user/digits was changed all the same" in refused(*to, "--yes")


def test_a_new_space_that_got_nothing_gets_all_from_the_same_command(
    app: Path, at_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("user/digits", "--app-folder", app)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # whoever asks ends the test
    at_hub.fault, at_hub.fault_at = 402, "/repos/create"
    told = refused(*to)
    assert told.startswith("the hub wants to be paid for it: a Gradio Space on the free CPU needs")
    assert told.endswith("nothing was sent") and at_hub.repos == {}
    for at_hub.fault, at_hub.fault_at in ((400, "/large/"), (403, "/commit/"), (500, "/commit/")):
        assert refused(*to).endswith(
            ("; the new repo user/digits is empty", "; user/digits is as it was")
        )
        assert sorted(at_hub.repos[SPACE]) == [".gitattributes", "README.md"]  # the hub's own
    at_hub.fault = None
    push(*to)
    has(app, at_hub.repos[SPACE])
    assert len(at_hub.commits) == 1 and at_hub.private[SPACE]


def test_what_a_space_forbade_before_arrives_all_the_same(app: Path, at_hub: Hub) -> None:
    at_hub.repos[SPACE] = {".gitignore": b"*.onnx\nexamples\n"}
    at_hub.private[SPACE] = True
    push("user/digits", "--app-folder", app, "--yes")
    has(app, at_hub.repos[SPACE])


def test_a_space_is_public_and_on_other_hardware_only_when_asked_for(
    app: Path, at_hub: Hub
) -> None:
    card = app / "README.md"
    card.write_text(card.read_text().replace("hardware: zero-a10g\n", "hardware: t4-small\n"))
    push("lab/open", "--app-folder", app, "--public")
    assert at_hub.private == {"spaces/lab/open": False}
    assert at_hub.created[0]["hardware"] == "t4-small"
    (app / "app.py").write_text("# changed\n")
    assert refused("lab/open", "--app-folder", app, "--yes") == (
        "lab/open is public: give --public, or name another repo; nothing was sent"
    )
    assert len(at_hub.commits) == 1


def test_who_may_not_write_is_told_before_anything_is_sent(
    app: Path, at_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("user/digits", "--app-folder", app)
    assert refused("another/digits", *to[1:]).startswith("another/digits belongs to another, and")
    at_hub.role = "read"
    assert refused(*to).startswith("this token may only read: make one that may write")
    at_hub.role = "write"
    at_hub.fault, at_hub.fault_at = 500, "/api/whoami"
    assert "out of order (it answers 500)" in refused(*to)
    at_hub.fault_at = "/api/spaces/"
    assert "out of order (it answers 500)" in refused(*to)
    at_hub.fault, at_hub.fault_at = 403, "repos/create"
    assert refused(*to).startswith("this token may not write to user/digits")
    at_hub.fault = None
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    assert refused(*to).startswith("the hub does not know this token")
    monkeypatch.delenv("HF_TOKEN")
    assert refused(*to).startswith("no token: give `hf auth login` one that may write")
    assert at_hub.repos == {} and at_hub.uploaded == {}


def test_without_a_network_one_line_tells_it(app: Path, hub: Hub, tmp_path: Path) -> None:
    hub.close()
    done = run_stage_command(
        *("scripts/push_space.py", "user/digits", "--app-folder", app),
        env=environment(hub.url, tmp_path),
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: the hub is out of reach or out of order (it cannot be reached): try the same "
        "command again later; nothing was sent\n"
    )


def test_what_the_hub_says_of_the_readme_is_passed_on(app: Path, at_hub: Hub) -> None:
    card = app / "README.md"
    card.write_text(
        card.read_text().replace("short_description: ", "short_description: " + 60 * "x")
    )
    assert refused("user/digits", "--app-folder", app) == (
        'Invalid metadata in README.md. - "short_description" must be at most 60 characters long; '
        "the new repo user/digits is empty"
    )
    assert at_hub.commits == []


def without(text: str, path: Path) -> None:
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, "", 1))


def describe(app: Path, **changes: object) -> None:
    described = json.loads((app / "model.json").read_text())
    (app / "model.json").write_text(json.dumps({**described, **changes}))


MISTAKES = {
    "model.json is missing: run `python3 generate_trace_model.py` first": lambda app: (
        app / "model.json"
    ).unlink(),
    "names no ONNX file in its own folder: run `python3 generate": lambda app: describe(
        app, formats={"torchscript": {}}
    ),
    "model.json names no ONNX file": lambda app: describe(app, formats={"onnx": {"file": 5}}),
    "cannot be used as std, val_top1": lambda app: describe(app, std=0, val_top1="75"),
    "model.json is not of format 1": lambda app: (app / "model.json").write_text("[]"),
    "model.json is not JSON": lambda app: (app / "model.json").write_text("{"),
    "model.onnx is missing": lambda app: (app / "model.onnx").unlink(),
    "model.onnx is not the file that ": lambda app: (app / "model.onnx").write_bytes(b"altered"),
    "classifier.py: name the app's folder": lambda app: (app / "classifier.py").unlink(),
    "decoder.py: name the app's folder": lambda app: (app / "decoder.py").unlink(),
    "app.py: name the app's folder": shutil.rmtree,
    "a hub takes names in UTF-8 alone": lambda app: shutil.copy(
        next((app / "examples").iterdir()), app / "examples/\udcff.png"
    ),
    "a head of YAML between two lines of ---": lambda app: without("---\n", app / "README.md"),
    "in which stand `sdk: gradio`": lambda app: without("sdk: gradio\n", app / "README.md"),
    "is no YAML": lambda app: (app / "README.md").write_text("---\ntitle: [\n---\n"),
    "'' is no title that": lambda app: without("title: resnet50-imagenet\n", app / "README.md"),
    "'a name' is no title that": lambda app: (app / "README.md").write_text(
        "---\ntitle: a name\nsdk: gradio\napp_file: app.py\n---\n"
    ),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_folder_that_is_no_app_is_told_before_the_hub_is_asked(
    said: str, app: Path, at_hub: Hub
) -> None:
    MISTAKES[said](app)
    assert said in refused("user/digits", "--app-folder", app)
    assert at_hub.requests == []


@pytest.mark.parametrize("name", ("digits", "user/", "a/b/c", "user/two words", "user/-x", "é/x"))
def test_a_name_that_no_hub_takes_is_told_before_it_is_asked(
    name: str, app: Path, at_hub: Hub
) -> None:
    assert refused(name, "--app-folder", app).startswith(f"{name!r} is no name for a repo: write ")
    assert at_hub.requests == []


def test_every_program_of_the_app_is_sent() -> None:
    programs = {path.name for path in (REPOSITORY / "gradio_deploy").glob("*.py")}
    assert programs <= set(push_space.APP_FILES)

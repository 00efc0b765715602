"""The push: what a hub on loopback gets, who can load it, and that nothing is half sent."""

import dataclasses
import html
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
import yaml
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, run_stage_command
from hub import Hub
from huggingface_hub import constants
from PIL import Image
from test_cost_report import LINES, write_lines

sys.path.insert(0, str(REPOSITORY / "scripts"))

import push_model
import pushing

import checkpoint
import engine
import generate_trace_model
import utils
from utils import Config, UserError

TOKEN = "hf_onlyForTheStandIn0123456789"
FILES = ["README.md", "config.json", "model.safetensors", "training_metrics.png"]
ROW = {
    **{"train_loss": 1.0, "train_top1": 40.0, "train_top5": 90.0, "train_images": 24},
    **{"learning_rate": 0.1, "val_loss": 1.0, "val_top5": 100.0, "val_images": 12},
    **{"train_s": 6.0, "val_s": 1.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, as the trainer and three starts would have left it."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


def make_run(folder: Path, *, blurpool: bool = False) -> Path:
    folder.mkdir()
    config = Config(
        name="tiny",
        epochs=2,
        train_folder_name="/home/somebody/private/train",
        val_folder_name="/home/somebody/private/val",
        val_px=64,
        val_resize_px=93,
        blurpool=blurpool,
    )
    made = engine.new_run(config, 3)
    made.model.train()
    for _ in range(3):  # statistics that are not BatchNorm's first ones
        made.model(torch.randn(8, 3, 64, 64))
    utils.save_config(folder, config, ["n01440764", "cat", "dog"], {"gpu": "NVIDIA A10G"})
    for name in ("best", "last"):
        weights = checkpoint.encode(made.model.model.state_dict())
        utils.write_atomically(folder / f"{name}.pt", weights)
        made.model.model.fc.weight.data *= 2  # the last weights are others
    rows = [{**ROW, "epoch": epoch, "val_top1": top1} for epoch, top1 in ((1, 41.5), (2, 30.0))]
    utils.write_metrics(folder / "metrics.jsonl", rows)
    result = {"epoch": 1, "val_top1": 41.67, "val_top5": 99.5, "val_images": 12}
    utils.write_json(folder / "result.json", {**result, "protocol": "the test's own protocol"})
    write_lines(folder, LINES)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.token = TOKEN
    yield hub
    hub.close()


def environment(hub_url: str, folder: Path, token: str = TOKEN) -> dict[str, str]:
    """Of a command that shall see this hub, and no other token or cache than the test's."""
    return {
        **{"HF_ENDPOINT": hub_url, "HF_TOKEN": token, "HF_HOME": str(folder / "hf")},
        # Large files go to the stand-in by Git LFS's protocol; Xet's is the hub's own.
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    }


# The programs of the card, and their logits against those of the run's own weights.
LOADER = """if True:
    import pathlib, sys, torch
    sys.path.insert(0, sys.argv[1])
    from model import load_weights
    card, weights = pathlib.Path(sys.argv[2]).read_text(), sys.argv[3]
    programs = [part.partition("```")[0] for part in card.split("```python\\n")[1:]]
    assert len(programs) == int(sys.argv[4])
    ours = load_weights(pathlib.Path(weights), 3).eval()
    spaces = [{} for _ in programs]
    for program, space in zip(programs, spaces):
        with torch.inference_mode():
            exec(program, space)
    batch = torch.randn(5, 3, 64, 64)
    from PIL import Image
    stored = Image.open("photo.jpg")
    assert stored.mode == "RGBA" and stored.getexif()[0x0112] == 6
    upright = stored.transpose(Image.Transpose.ROTATE_270)  # as a person sees it, on white
    picture = Image.new("RGB", upright.size, "white")
    picture.paste(upright, mask=upright)
    first, *others = (space["prepare"](picture) for space in spaces)
    assert all(torch.equal(first, other) for other in others)
    with torch.inference_mode():
        for space in spaces:
            assert (ours(batch) - space["model"](batch)).abs().max() <= 1e-5
            assert (ours(first[None]) - space["logits"]).abs().max() <= 1e-5
    print("equal")
"""


def test_what_arrives_loads_in_torchvision_and_timm(run: Path, hub: Hub, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    done = run_stage_command(
        "scripts/push_model.py", run, "user/tiny", env=environment(hub.url, tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert (done.stderr, TOKEN in done.stdout) == ("", False)
    assert done.stdout.endswith(f"sent to {hub.url}/user/tiny\n")
    assert {path: path.read_bytes() for path in run.iterdir()} == before

    files = hub.repos["models/user/tiny"]
    assert sorted(files) == FILES
    assert [sorted(paths) for paths in hub.commits] == [FILES]  # one commit
    assert hub.private["models/user/tiny"]
    assert len(hub.uploaded) == 2
    for content in files.values():
        for hidden in (TOKEN, "somebody", str(run.parent), str(REPOSITORY)):
            assert hidden.encode() not in content
    for name, content in files.items():
        assert f"{len(content):>12,} bytes  {name}\n" in done.stdout
    picture = Image.open(io.BytesIO(files["training_metrics.png"]))
    assert (picture.format, picture.size) == ("PNG", (1800, 1200))
    state = torch.load(run / "best.pt", weights_only=True)
    sent = safetensors.torch.load(files["model.safetensors"])
    assert sent.keys() == state.keys()
    assert all(torch.equal(sent[name], state[name]) for name in state)

    about = json.loads(files["config.json"])
    assert (about["architecture"], about["num_classes"]) == ("resnet50", 3)
    assert about["label_names"] == ["n01440764", "cat", "dog"]
    assert about["label_descriptions"] == {"n01440764": "tench", "cat": "cat", "dog": "dog"}
    assert about["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert about["pretrained_cfg"]["interpolation"] == "bilinear"

    card = files["README.md"].decode()
    for said in (
        *("| 12 | 41.67 % | 99.50 % |", "Protocol: the test's own protocol. The epoch was chosen"),
        *("Trained on 24 images, measured on 12 others", "(tench, cat, dog)", "on NVIDIA A10G"),
        *("2 epochs", "of epoch 1 (best)", "| max_lr | 0.175 |", "torchvision 0."),
        *("3 h 0 min with a machine, 1 interruption, $2.50 for the machine", "## Licence"),
    ):
        assert said in card
    guesses = run_programs(card, run, hub, tmp_path, count=2)
    assert guesses[-1] == "equal" and len(guesses) == 3
    assert guesses[0] == about["label_descriptions"][guesses[1]]


def run_programs(card: str, run: Path, hub: Hub, tmp_path: Path, count: int) -> list[str]:
    """What the card's programs and LOADER print."""
    (tmp_path / "README.md").write_text(card)
    photo = Image.effect_noise((150, 110), 60).convert("RGB")
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", "PNG", exif=exif)
    loaded = subprocess.run(
        [sys.executable, "-c", LOADER, REPOSITORY, "README.md", run / "best.pt", str(count)],
        cwd=tmp_path,
        env={**COMMAND_ENVIRONMENT, **environment(hub.url, tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert loaded.returncode == 0, loaded.stderr
    return loaded.stdout.split()


def test_a_network_with_blurpool_loads_by_its_card_and_no_other_way(
    hub: Hub, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "tiny", blurpool=True)
    environ = environment(hub.url, tmp_path)
    done = run_stage_command("scripts/push_model.py", run, "user/tiny", env=environ)
    assert done.returncode == 0, done.stderr
    card = hub.repos["models/user/tiny"]["README.md"].decode()
    assert "with BlurPool" in card and "| blurpool | True |" in card
    assert "create_model" not in card and "- timm\n" not in card
    assert run_programs(card, run, hub, tmp_path, count=1)[-1] == "equal"

    # With other classes, or as features, timm does not load strictly.
    tries = """if True:
        import timm, torch, torchvision
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_file
        for options in ({}, {"num_classes": 7}, {"num_classes": 0}, {"features_only": True}):
            try:
                timm.create_model("hf-hub:user/tiny", pretrained=True, **options)
            except RuntimeError as error:
                print(error)
        weights = load_file(hf_hub_download("user/tiny", "model.safetensors"))
        torchvision.models.resnet50(num_classes=3).load_state_dict(weights)
    """
    refused = subprocess.run(
        [sys.executable, "-c", tries],
        cwd=tmp_path,
        env={**COMMAND_ENVIRONMENT, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.stdout.splitlines() == ["Unknown model (resnet50_blurpool)"] * 4
    assert refused.returncode == 1
    assert 'Unexpected key(s) in state_dict: "blurpool"' in refused.stderr


def test_a_dry_run_writes_the_folder_and_asks_nobody(run: Path, hub: Hub, tmp_path: Path) -> None:
    options = ("--dry-run", "--to", tmp_path / "folder", "--weights", "last")
    done = run_stage_command(
        "scripts/push_model.py", run, "user/tiny", *options, env=environment(hub.url, tmp_path, "")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("dry run: nothing was sent to user/tiny\n")
    assert hub.requests == []
    paths = sorted((tmp_path / "folder").iterdir())
    assert [path.name for path in paths] == FILES
    for path in paths:
        assert f"{path.stat().st_size:>12,} bytes  {path.name}\n" in done.stdout
    card = (tmp_path / "folder/README.md").read_text()
    assert "| 12 | 30.00 % | 100.00 % |" in card and "in the training's arithmetic.\n" in card
    sent, state = (
        safetensors.torch.load_file(tmp_path / "folder/model.safetensors"),
        torch.load(run / "last.pt", weights_only=True),
    )
    assert all(torch.equal(sent[name], state[name]) for name in state)
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert [(one["name"], one["value"]) for one in metrics] == [
        *(("top-1 accuracy (%)", 30), ("top-5 accuracy (%)", 100))
    ]


def test_a_folder_with_other_files_is_left_as_it_is(run: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()

    def push(folder: Path) -> tuple[int, str]:
        options = (run, "user/tiny", "--dry-run", "--to", folder)
        done = run_stage_command(
            "scripts/push_model.py", *options, env=environment(hub.url, tmp_path, "")
        )
        return done.returncode, done.stderr

    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for folder in (run, tmp_path / "notes", tmp_path / "file"):
        error = f"error: --to {folder} holds other files: name a new folder\n"
        assert push(folder) == (2, error)
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert (tmp_path / "notes/README.md").read_text() == "mine"
    for _ in range(2):  # its own files it writes again
        assert push(tmp_path / "empty")[0] == 0


# ------------------------------------------------------------------------------ what may go wrong


CONTENT = {"README.md": b"---\nlicense: mit\n---\n", "model.safetensors": b"weights"}


@pytest.fixture
def at_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The same hub for pushes in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("mirror.TIMEOUT_S", 0.5)
    return hub


def push(repo: str = "user/tiny", *, public: bool = False, yes: bool = False) -> str:
    return pushing.push(CONTENT, repo, "a message", public=public, yes=yes)


def refused(repo: str = "user/tiny", **options: Any) -> str:
    with pytest.raises(UserError) as error:
        push(repo, **options)
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_who_may_not_write_is_told_before_anything_is_sent(
    at_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refused("another/tiny")
    assert (
        told
        == "another/tiny belongs to another, and this token to user: name a repo of user or lab"
    )
    at_hub.role = "read"
    assert refused().startswith("this token may only read: make one that may write")
    at_hub.role = "fineGrained"  # what such a one may do only the hub knows
    at_hub.fault, at_hub.fault_at = 403, "repos/create"
    assert refused().startswith("this token may not write to user/tiny")
    at_hub.fault = None
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    assert refused().startswith("the hub does not know this token")
    monkeypatch.delenv("HF_TOKEN")
    assert refused().startswith("no token: give `hf auth login` one")
    monkeypatch.setenv("HF_TOKEN", "hf_só")
    assert refused().startswith("the token has letters that no hub's token has: give")
    assert at_hub.repos == {} and at_hub.uploaded == {}


def test_a_hub_that_fails_midway_gets_no_half_of_it(at_hub: Hub) -> None:
    empty = "the new repo user/tiny is empty"
    at_hub.fault, at_hub.fault_at = 403, "/commit/"
    assert refused() == (
        "this token may not write to user/tiny: make one that may, at "
        f"https://huggingface.co/settings/tokens, or name another repo; {empty}"
    )
    assert at_hub.repos == {"models/user/tiny": {}} and at_hub.private["models/user/tiny"]
    at_hub.fault, at_hub.fault_at = 400, "/large/"
    told = "(it answers 400): try the same command again later; user/tiny is as it was"
    assert refused().endswith(told)
    at_hub.fault, at_hub.fault_at = 413, "/commit/"
    assert refused() == "the hub does not take it (it answers 413); user/tiny is as it was"
    at_hub.fault, at_hub.fault_at = "hang", "/api/models/"
    assert "(it does not answer)" in refused()
    at_hub.fault = None
    assert at_hub.repos == {"models/user/tiny": {}}
    assert push() == f"sent to {at_hub.url}/user/tiny"  # the same command again
    assert at_hub.repos == {"models/user/tiny": CONTENT}
    at_hub.close()
    assert "(it cannot be reached)" in refused(yes=True)


def test_a_push_whose_answer_is_lost_tells_whether_it_was_made(at_hub: Hub) -> None:
    at_hub.lost = lambda: None
    told = refused()
    assert "try the same command again later; user/tiny was changed all the same: the same" in told
    assert at_hub.repos == {"models/user/tiny": CONTENT}
    at_hub.lost = lambda: setattr(at_hub, "fault", 503)  # and all that comes after it
    at_hub.repos["models/user/tiny"] = {}
    assert refused().endswith(
        "; whether user/tiny was changed is not known: the same command tells"
    )
    at_hub.fault = at_hub.lost = None
    assert push() == f"nothing was sent: {at_hub.url}/user/tiny is up to date"
    assert len(at_hub.commits) == 2


def test_an_interruption_says_what_was_done() -> None:
    with (
        pytest.raises(UserError, match=r"^interrupted; the new repo a/b is empty$") as error,
        pushing.hub_errors("a/b", lambda: "the new repo a/b is empty"),
    ):
        raise KeyboardInterrupt
    assert error.value.exit_code == 75


def test_public_only_when_asked_for(at_hub: Hub) -> None:
    push("lab/open", public=True)
    push("lab/closed")
    assert at_hub.private == {"models/lab/open": False, "models/lab/closed": True}
    assert refused("lab/open", yes=True) == (
        "lab/open is public: give --public, or name another repo; nothing was sent"
    )
    assert len(at_hub.commits) == 2
    told = push("lab/closed", public=True, yes=True)
    assert told.endswith("lab/closed is up to date; it stays private, as it was")
    assert at_hub.private["models/lab/closed"]  # never changed


def test_files_that_are_there_are_asked_about(at_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = "models/user/tiny"
    at_hub.repos[repo], at_hub.private[repo] = {".gitattributes": b"*"}, True
    push()  # only what a hub puts into a new repo
    at_hub.repos[repo] = {"README.md": b"mine", "pytorch_model.bin": b"mine"}
    before = dict(at_hub.repos[repo])
    changes = "replaced: README.md; added: model.safetensors; left: pytorch_model.bin"
    question = f"user/tiny has files already ({changes})"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert refused() == f"{question}: give --yes to go on; nothing was sent"

    asked = []
    answers = iter(("", "n", EOFError, "yes"))

    def answer(text: str) -> str:
        asked.append(text)
        if (given := next(answers)) is EOFError:  # Ctrl-D
            raise given
        return given

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    assert [refused(), refused(), refused()] == ["nothing was sent"] * 3
    assert at_hub.repos[repo] == before
    push()
    assert at_hub.repos[repo] == {**before, **CONTENT}
    assert asked == [f"{question}. Go on? [y/N] "] * 4


def test_what_the_repo_has_is_not_sent_again(at_hub: Hub) -> None:
    push()
    sent = len(at_hub.requests)
    assert push() == f"nothing was sent: {at_hub.url}/user/tiny is up to date"
    assert {method for method, _ in at_hub.requests[sent:]} == {"GET"}
    at_hub.repos["models/user/tiny"]["README.md"] = b"another's"
    push(yes=True)
    assert at_hub.commits == [list(CONTENT), ["README.md"]]
    assert at_hub.repos["models/user/tiny"] == CONTENT


def test_what_the_repo_forbids_is_told(at_hub: Hub) -> None:
    at_hub.repos["models/user/tiny"] = {".gitignore": b"*.safetensors\n"}
    at_hub.private["models/user/tiny"] = True
    told = "the hub did not take model.safetensors: look at .gitignore in "
    assert refused(yes=True) == f"{told}{at_hub.url}/user/tiny"


def test_mistakes_are_told_before_the_hub_is_asked(
    at_hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        ((tmp_path, "user/tiny"), f"no {tmp_path}/best.pt: name a run's folder, such as runs/NAME"),
        ((run, "https://a.b/user/tiny"), "'https://a.b/user/tiny' is no name for a repo"),
    ):
        monkeypatch.setattr("sys.argv", ["push_model.py", *map(str, arguments)])
        with pytest.raises(UserError) as error:
            push_model.main()
        assert said in str(error.value)
    assert at_hub.requests == []


def test_timm_resizes_to_what_validation_does() -> None:
    """By timm's own arithmetic, for every pair of sizes of which rounding might make another."""
    for resize_px in range(32, 600):
        for px in range(32, resize_px + 1, 32):
            config = Config(val_px=px, val_resize_px=resize_px)
            about = push_model.timm_config(config, ["a", "b"])["pretrained_cfg"]
            assert int(about["input_size"][1] // about["crop_pct"]) in (resize_px - 1, resize_px)
            assert push_model.math.floor(px / about["crop_pct"]) == resize_px


def test_classes_whose_names_are_no_text_are_sent_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    record = json.loads((run / "config.json").read_text())
    record["classes"] = classes = ["caf\udce9", "na\udcefve", "\udcff"]
    (run / "config.json").write_text(json.dumps(record))
    files = push_model.make_files(run, "user/tiny", "best")
    about = json.loads(files["config.json"])
    assert about["label_names"] == classes
    assert about["label_descriptions"][classes[0]] == r"caf\udce9"
    card = html.unescape(files["README.md"].decode())
    assert r"a data set of its own, 3 classes (caf\udce9, na\udcefve, \udcff)" in card


def test_the_card_names_only_what_it_knows(run: Path) -> None:
    wnids = timm.data.ImageNetInfo().label_names()
    whole = {"train_images": 1_281_167, "val_images": 50_000}
    assert push_model.data_name(Config(), wnids, whole) == "ImageNet-1k"
    part = {**whole, "train_images": 100_000}
    assert push_model.data_name(Config(), wnids, part) == "a part of ImageNet-1k"
    assert push_model.data_name(Config(), ["a", "b"], whole) == "a data set of its own"
    others = [f"n{90_000_000 + number}" for number in range(1000)]
    for names in (others, wnids[:1] + others[1:]):  # of Imagenette's classes, ImageNet-21k has ten
        assert push_model.data_name(Config(), names, whole) == "a data set of its own"
    ten = sorted(torchvision.datasets.Imagenette._WNID_TO_CLASS)
    assert push_model.data_name(Config(), ten, whole) == "Imagenette"
    assert push_model.data_name(Config(), ten[:2], whole) == "a part of Imagenette"
    digits = utils.RECIPES["quickstart"].config
    assert "digits" in push_model.data_name(digits, list("0123456789"), part)
    record = json.loads((run / "config.json").read_text())
    record["config"] = dataclasses.asdict(Config(**{**record["config"], "epochs": 9}))
    accuracy = {"epoch": 1, "val_top1": 1.0, "val_top5": 2.0, "val_images": 3}
    card = push_model.write_card(run, "user/tiny", "best", record, accuracy)
    assert "**unfinished: 2 of 9 epochs**" in card and "1.00 %" in card
    assert "SGD with momentum, OneCycle with cosine annealing" in card
    record["config"] |= {"optimizer": "muon", "anneal_strategy": "linear"}
    card = push_model.write_card(run, "user/tiny", "best", record, accuracy)
    assert "\n\nMuon, OneCycle with linear annealing, cross-entropy;" in card
    record["config"]["loss"] = "bce"
    card = push_model.write_card(run, "user/tiny", "best", record, accuracy)
    assert "annealing, binary cross-entropy;" in card


def test_files_of_a_run_that_were_altered_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "tiny")
    for name, content, said in (
        ("cost.json", '{"interruptions": 5}', "cost.json is not what scripts/cost_report.py"),
        ("metrics.jsonl", json.dumps({**ROW, "train_images": "all"}), "line 1: epoch is missing"),
        ("config.json", '{"config": {}, "classes": ["a", "b", "c"]}', "lacks its versions"),
        ("config.json", '{"config": {}, "classes": [1, 2, 3]}', "settings and classes of a run"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=said):
            push_model.make_files(folder, "user/tiny", "best")


def test_weights_of_a_run_that_goes_on_are_not_sent_with_another_epoch_s_accuracy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "tiny"))
    load = generate_trace_model.load_weights

    def load_and_replace(*given: object) -> object:
        model = load(*given)
        utils.write_atomically(folder / "best.pt", (folder / "last.pt").read_bytes())
        return model

    monkeypatch.setattr(generate_trace_model, "load_weights", load_and_replace)
    with pytest.raises(UserError, match=r"best.pt was replaced .* same command again"):
        push_model.make_files(folder, "user/tiny", "best")


def test_a_cost_from_before_the_last_session_is_not_told(tmp_path: Path) -> None:
    write_lines(tmp_path, LINES)
    utils.write_metrics(tmp_path / "metrics.jsonl", [])
    summed = push_model.cost_section(tmp_path)
    told = {"running_s": 36_000, "interruptions": {}, "usd": 9.7}
    utils.write_json(tmp_path / "cost.json", told)
    assert "10 h 0 min with a machine" in push_model.cost_section(tmp_path)[0]
    written_at = (tmp_path / "sessions.jsonl").stat().st_mtime
    os.utime(tmp_path / "cost.json", (written_at - 1, written_at - 1))
    assert push_model.cost_section(tmp_path) == summed
    assert "10 h 0 min" not in summed[0]


def test_a_run_that_is_extended_is_unfinished_until_its_extra_epochs_are_trained(
    run: Path,
) -> None:
    record = json.loads((run / "config.json").read_text())
    accuracy = {"epoch": 1, "val_top1": 1.0, "val_top5": 2.0, "val_images": 3}
    for extra, said in ((0, "2 epochs, on "), (3, "**unfinished: 2 of 5 epochs**")):
        record["config"]["extra_epochs"] = extra
        assert said in push_model.write_card(run, "user/tiny", "best", record, accuracy)


@pytest.mark.parametrize(("options", "yes", "public"), [((), 0, 0), (("--yes", "--public"), 1, 1)])
def test_the_command_asks_for_what_its_options_say(
    options: tuple[str, ...], yes: int, public: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []
    monkeypatch.setattr(push_model, "make_files", lambda *_: CONTENT)
    monkeypatch.setattr(pushing, "push", lambda *_, **asked: pushed.append(asked))
    monkeypatch.setattr("sys.argv", ["push_model.py", "runs/tiny", "user/tiny", *options])
    push_model.main()
    assert pushed == [{"public": bool(public), "yes": bool(yes)}]


def test_the_licence_of_imagenets_images_is_told_of_any_part_of_them() -> None:
    for classes, known in ((["n01440764", "n02102040"], True), (["n01440764", "cat"], False)):
        assert ("images are ImageNet's" in push_model.limits_section(classes)) == known

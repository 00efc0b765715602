"""scripts/benchmark_resize.py: the real command, on a few small pictures."""

import json
from pathlib import Path

from conftest import make_images, run_stage_command
from test_trainer import as_options, plain_settings


def test_both_ways_are_trained_with_the_settings_that_were_asked_for(tmp_path: Path) -> None:
    make_images(tmp_path / "images", classes=3, images=7)
    # A recipe of which some settings are put back to what they are without it.
    settings = {
        **plain_settings(tmp_path / "images", tmp_path / "runs"),
        "recipe": "fast",
        "optimizer": "sgd",
        "epochs": 1,
        "first_train_px": 0,
        "seeds": 1,
        "output": tmp_path / "resize.json",
    }
    done = run_stage_command("scripts/benchmark_resize.py", *as_options(settings))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "resize.json").read_text())
    assert written["settings"]["recipe"] == "fast"
    assert written["settings"]["zero_init_residual"] is True and written["settings"]["epochs"] == 1
    weights = set()
    for way in ("bilinear", "area"):
        run = tmp_path / "runs" / f"run_{way}_0"
        used = json.loads((run / "config.json").read_text())["config"]
        assert used["recipe"] == "fast" and used["optimizer"] == "sgd"
        assert (used["train_px"], used["first_train_px"], used["seed"]) == (32, 0, 0)
        (result,) = written["results"][way]
        assert result["seed"] == 0 and result["val_images"] > 0
        assert f"{way:<8}  top-1 {result['val_top1']:.2f} %  loader " in done.stdout
        assert len(written["loader_img_per_s"][way]) == 3
        weights.add((run / "last.pt").read_bytes())
        for path in run.rglob("*.pt"):
            path.unlink()
    assert len(weights) == 2  # the way made a difference

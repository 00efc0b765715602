"""Numbers that a benchmark cannot measure with end it with one line, before it does anything."""

import pytest
from conftest import REPOSITORY, run_stage_command


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["loop", "--blocks", 0], "blocks and block_steps must be 1 or more"),
        (["loop", "--block-steps", -1], "blocks and block_steps must be 1 or more"),
        (["pack", "nowhere", "--blocks", 0], "blocks and workers must be 1 or more"),
        (["pack", "nowhere", "--workers", 0], "blocks and workers must be 1 or more"),
        (["lambda", "--photo", "x", "--starts", 0], "starts and pictures must be 1 or more"),
        (["lambda", "--photo", "x", "--pictures", 0], "starts and pictures must be 1 or more"),
        (["pack", "x", "--quality", 900], "max_side must be 0 or more, quality 1 to 100"),
        (["pack", "x", "--folder", "no"], "no folder no: make it, or name another with --folder"),
        (["resize", "--seeds", 0], "seeds must be 1 or more"),
        (["resize", "--epochs", 0], "epochs is 0: it must be above 0"),
    ],
)
def test_none_of_them_is_measured_in_no_blocks(options: list[object], says: str) -> None:
    name, *rest = options
    done = run_stage_command(REPOSITORY / f"scripts/benchmark_{name}.py", *rest)
    assert (done.returncode, done.stderr) == (2, f"error: {says}\n")

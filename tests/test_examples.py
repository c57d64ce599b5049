"""Examples run as they are, and say what their first lines promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_llama_gives_the_same_losses_every_way() -> None:
    losses = re.compile(r"step \d+: loss .*")
    plain = losses.findall(run("train_llama.py", "--steps", "5"))
    assert len(plain) == 5
    changed = run("train_llama.py", "--steps", "5", "--budget", "300MiB", "--arena")
    assert losses.findall(changed) == plain
    assert "FITS: needs" in changed
    hits = re.search(r"hits=(\d+)", changed)
    assert hits is not None
    assert int(hits[1]) > 0


def test_pipeline_llama_gives_the_same_losses_by_every_schedule(tmp_path: Path) -> None:
    losses = re.compile(r"step \d+: loss .*")
    few = ("--devices", "2", "--microbatches", "4", "--steps", "2")
    plain = run("pipeline_llama.py", *few, "--schedule", "1f1b")
    assert len(losses.findall(plain)) == 2
    picture = tmp_path / "step.html"
    changed = run("pipeline_llama.py", *few, "--schedule", "v-half", "--picture", str(picture))
    assert losses.findall(changed) == losses.findall(plain)
    differences = re.findall(r"device \d+ .* predicted .*: ([-+][\d.]+)%", changed)
    assert len(differences) == 2
    assert max(abs(float(difference)) for difference in differences) <= 2
    assert "<svg" in picture.read_text(encoding="utf-8")


@pytest.mark.timeout(600)
def test_kill_a_rank_ends_with_the_same_parameters() -> None:
    said = run("kill_a_rank.py", "--steps", "3", "--kill-in", "2", "--lose-node")
    assert "restored step 1 from memory" in said
    same = re.search(r"(\d+) of (\d+) parameters are equal to the last bit", said)
    assert same is not None
    assert same[1] == same[2] == "39"

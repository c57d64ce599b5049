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

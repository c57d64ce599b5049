"""The arena as torch's CUDA allocator. Each test is a process of its own: torch keeps an allocator for its life."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]

TRAIN = """
import sys, torch, stowplan
if {installed}:
    stowplan.arena.install("cuda:0", strict=True, on_progress=lambda message: None)
from tests import models
model = models.gpt2(4, 256).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(7)
losses, hits = [], []
for step in range(10):
    batch = {{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in models.batch_for(step, 4, 128).items()}}
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if {installed}:
        hits.append(stowplan.arena.stats())
print(losses, float(sum(p.double().sum() for p in model.parameters())))
if {installed}:
    served = hits[-1].hits - hits[-2].hits
    missed = hits[-1].misses - hits[-2].misses
    assert served > 100 and missed <= 0.01 * served, hits[-1]
    assert hits[-1].peak_bytes == hits[-1].height_bytes
    assert hits[-1].unknown_frees == hits[-1].double_frees == 0
"""

STREAMS = """
import torch, stowplan
stowplan.arena.install("cuda:0", strict=True)
side = torch.cuda.Stream()
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device="cuda"))])
expected = []
for step in range(40):
    value = torch.full((2**22,), float(step), device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000)
        copy = value * 2
        value.record_stream(side)
    del value
    torch.full((2**22,), float("nan"), device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    expected.append(bool((copy == 2 * step).all()))
    stowplan.arena.step()
assert all(expected), expected
assert stowplan.arena.stats().hits > 0
"""

OUT_OF_MEMORY = """
import torch, stowplan
stowplan.arena.install("cuda:0", strict=True)
try:
    torch.empty(2**50, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    assert "stowplan's arena" in str(error), error
else:
    raise AssertionError("no error")
assert torch.ones(10, device="cuda").sum() == 10
assert stowplan.arena.stats().out_of_memory == 1
"""

TOO_LATE = """
import torch, stowplan
torch.ones(1, device="cuda")
try:
    stowplan.arena.install("cuda:0")
except stowplan.ArenaUnavailable as error:
    assert "CUDA is in use already" in str(error), error
else:
    raise AssertionError("no error")
"""


def run(code: str) -> str:
    if not torch.cuda.is_available():
        pytest.fail("the gpu tests were asked for, and there is no CUDA device")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_is_exact_and_served_from_the_plan() -> None:
    assert run(TRAIN.format(installed=True)) == run(TRAIN.format(installed=False))


@pytest.mark.parametrize("code", [STREAMS, OUT_OF_MEMORY, TOO_LATE], ids=["streams", "out of memory", "too late"])
def test_alone(code: str) -> None:
    run(code)

"""torchdata's StatefulDataLoader in snapshots: order of data, losses and parameters go on where they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from stowplan.runtime.snapshot.state.restore import restore
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten

pytest.importorskip("torchdata.stateful_dataloader")
from tests.runtime.snapshot.loader_job import NUM_STEPS, Training

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


def state(training: Training) -> TrainingState:
    return TrainingState(model=training.model, optimizer=training.optimizer, data=training.loader, step=training.step)


@pytest.fixture(scope="module")
def whole() -> Training:
    """An uninterrupted training."""
    training = Training(0)
    training.run(NUM_STEPS)
    return training


@pytest.mark.parametrize("step", [1, 9, 10, 11, 20, 24])  # an epoch has ten: within, before its end is seen, after it
def test_it_goes_on_wherever_in_an_epoch_it_stopped(whole: Training, step: int) -> None:
    first = Training(0)
    first.run(step)
    flat = flatten(state(first))
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    second = Training(0)
    second.step = restore(dump_schema(flat.schema), buffer, state(second)).step
    second.run(NUM_STEPS)
    assert [*first.seen, *second.seen] == whole.seen
    assert json.loads(second.said())["parameters"] == json.loads(whole.said())["parameters"]


def test_a_snapshot_before_the_first_batch_changes_nothing(whole: Training) -> None:
    first = Training(0)
    flatten(state(first))
    first.run(NUM_STEPS)
    assert first.seen == whole.seen


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_in_the_middle_of_an_epoch(num_workers: int) -> None:
    killed_after = 14
    with tempfile.TemporaryDirectory(prefix="stow") as path:

        def job(*arguments: int) -> tuple[int, list[dict]]:
            command = [sys.executable, "-m", "tests.runtime.snapshot.loader_job", *map(str, arguments)]
            environment = {**os.environ, "XDG_RUNTIME_DIR": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=280, check=False)
            return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

        code, (before,) = job(num_workers, killed_after)
        assert code == -signal.SIGKILL
        code, (after, uninterrupted) = job(num_workers, 0)
        assert code == 0
    assert [step for step, _, _ in after["seen"]] == list(range(killed_after + 1, NUM_STEPS + 1))
    assert before["seen"] + after["seen"] == uninterrupted["seen"]
    assert {name: after[name] for name in ("parameters", "next")} == {
        name: uninterrupted[name] for name in ("parameters", "next")
    }

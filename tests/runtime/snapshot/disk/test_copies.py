"""Copies on disk: read by torch alone, whole or not at all, and no fault of the disk stops anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from stowplan import InvalidArgument, InvalidSnapshot
from stowplan.runtime.snapshot.disk.copies import (
    COMPLETE,
    finish,
    good_copies,
    is_complete,
    newest_complete,
    next_attempt,
    prune,
    write_part,
)
from stowplan.runtime.snapshot.disk.restore import restore_from_disk
from stowplan.runtime.snapshot.disk.tier import DiskTier
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
from tests.distributed import Ranks
from tests.runtime.snapshot.trainings import NUM_STEPS, SNAPSHOT_AT, Training, raw


def piece_of(state: TrainingState) -> Piece:
    flat = flatten(state)
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    return Piece(dump_schema(flat.schema), buffer)


def small(step: int) -> Piece:
    return piece_of(TrainingState(model=nn.Linear(2, 2), step=step))


def written(directory: Path, *steps: int) -> None:
    for step in steps:
        write_part(directory, small(step))
        assert finish(directory, step, 1) is not None


def test_a_copy_on_disk_resumes_to_the_last_bit(tmp_path: Path) -> None:
    plain = Training()
    losses = plain.run(NUM_STEPS)[SNAPSHOT_AT:]
    expected = plain.fingerprint()
    first = Training()
    first.run(SNAPSHOT_AT)
    write_part(tmp_path, piece_of(first.state()))
    path = finish(tmp_path, SNAPSHOT_AT, 1)
    assert path == newest_complete(tmp_path)
    second = Training()
    second.run(1)
    restored = restore_from_disk(path, second.state())
    assert restored.exact
    second.step = restored.step
    assert second.run(NUM_STEPS) == losses
    assert second.fingerprint() == expected


BUILD = """
import sys, torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
def build():
    torch.manual_seed(int(sys.argv[2]))
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1:].parameters()}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    return model, optimizer, scheduler
def train(model, optimizer, scheduler):
    torch.manual_seed(9)
    for _ in range(3):
        model(torch.randn(4, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(); optimizer.zero_grad(); scheduler.step()
    print([p.view(torch.int16).tolist() for p in model.parameters()], [g["lr"].hex() for g in optimizer.param_groups])
"""
WRITE = """
from pathlib import Path
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.disk.copies import finish, write_part
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
parts = build(); train(*parts)
flat = flatten(TrainingState(model=parts[0], optimizer=parts[1], scheduler=parts[2], step=3))
buffer = bytearray(flat.num_bytes); flat.copy_into(buffer)
write_part(sys.argv[1], Piece(flat.schema, buffer)); finish(sys.argv[1], 3, 1)
parts[2].last_epoch = 0; train(*parts)
"""
READ = """
import warnings
parts = build()
options = StateDictOptions(flatten_optimizer_state_dict=True)
model, optimizer = get_state_dict(*parts[:2], options=options)
state = {"model": model, "optimizer": optimizer}
warnings.simplefilter("ignore")
dcp.load(state, checkpoint_id=sys.argv[1] + "/step_000000000003")
set_state_dict(*parts[:2], model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
parts[2].last_epoch = 0
train(*parts)
assert "stowplan" not in sys.modules
"""


def test_torch_alone_loads_a_copy(tmp_path: Path) -> None:
    def process(script: str, seed: int) -> str:
        command = [sys.executable, "-c", BUILD + script, str(tmp_path), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert process(WRITE, 0) == process(READ, 1)


def write_sharded(rank: int, mesh: tuple[int, ...], directory: Path) -> dict[str, bytes]:
    training = Training(rank, mesh=mesh)
    training.run(SNAPSHOT_AT)
    write_part(directory, piece_of(training.state()))
    return training.whole()


def read_sharded(rank: int, mesh: tuple[int, ...], path: Path) -> tuple[dict[str, bytes], list[str]]:
    training = Training(rank, mesh=mesh)
    restored = restore_from_disk(path, training.state())
    assert restored.exact
    training.step = restored.step
    return training.whole(), training.run(NUM_STEPS)


def plain_losses(rank: int, mesh: tuple[int, ...]) -> list[str]:
    return Training(rank, mesh=mesh).run(NUM_STEPS)[SNAPSHOT_AT:]


@pytest.mark.parametrize("mesh", [(2,), (2, 1)], ids=["fsdp", "hsdp"])
def test_ranks_make_one_copy_for_any_number_of_ranks(ranks: Ranks, tmp_path: Path, mesh: tuple[int, ...]) -> None:
    whole = ranks.run(write_sharded, mesh, tmp_path)[0]
    path = finish(tmp_path, SNAPSHOT_AT, 2)
    assert path is not None
    for (found, losses), expected in zip(
        ranks.run(read_sharded, mesh, path), ranks.run(plain_losses, mesh), strict=True
    ):
        assert found == whole
        assert losses == expected
    alone = Training()
    assert not restore_from_disk(path, alone.state()).exact
    assert alone.whole() == whole


def test_a_copy_is_complete_when_all_parts_are_there(tmp_path: Path) -> None:
    flat = flatten(TrainingState(model=nn.Linear(2, 2), step=7))
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    schemas = [{**flat.schema, "rank": rank, "world_size": 2} for rank in range(2)]
    write_part(tmp_path, Piece(schemas[1], buffer))
    assert finish(tmp_path, 7, 2) is None
    assert newest_complete(tmp_path) is None
    write_part(tmp_path, Piece(schemas[0], buffer), attempt=1)  # of another attempt: not put together
    assert finish(tmp_path, 7, 2) is None
    write_part(tmp_path, Piece(schemas[0], buffer))
    path = finish(tmp_path, 7, 2)
    assert path == newest_complete(tmp_path) == finish(tmp_path, 7, 2)


def test_the_last_good_copies_stay(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step_000000000004" / ".metadata").unlink()
    (tmp_path / "step_000000000003.partial-0").mkdir()
    (tmp_path / "step_000000000009.partial-0").mkdir()
    (tmp_path / "step_000000000009.partial-1").mkdir()
    (tmp_path / "notes").mkdir()
    prune(tmp_path, 2, attempt=1)
    left = {path.name for path in tmp_path.iterdir()}
    kept = {f"step_{step:012}" for step in (2, 3, 4)} | {"step_000000000009.partial-1", "notes"}
    assert left == kept
    prune(tmp_path, 0, attempt=1)
    assert good_copies(tmp_path) == [tmp_path / "step_000000000003"]


def test_a_job_that_went_back_goes_on_from_what_it_wrote_then(tmp_path: Path) -> None:
    for step in (100, 400, 500):
        write_part(tmp_path, small(step), attempt=4)
        finish(tmp_path, step, 1, attempt=4)
    assert next_attempt(tmp_path) == 5
    write_part(tmp_path, small(120), attempt=5)  # begun, as by a node that is ahead
    tier = DiskTier(tmp_path, world_size=1, keep=2, attempt=5)
    assert tier.offer([small(110)])
    assert tier.wait()
    assert (tier.status.last_step, tier.status.num_written) == (110, 1)
    assert newest_complete(tmp_path) == tmp_path / "step_000000000110"
    assert [path.name for path in good_copies(tmp_path)] == ["step_000000000500", "step_000000000110"]
    assert finish(tmp_path, 120, 1, attempt=5) == newest_complete(tmp_path)
    assert tier.offer([small(500)])
    assert tier.wait()
    assert tier.status.num_written == 2
    path = newest_complete(tmp_path)
    assert path == tmp_path / "step_000000000500"
    assert json.loads((path / COMPLETE).read_bytes())["attempt"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"step_000000000120", "step_000000000500"}


def test_a_copy_of_another_step_is_not_the_one_that_is_written(tmp_path: Path) -> None:
    written(tmp_path, 500)
    schema = {**json.loads(small(110).schema), "world_size": 2, "rank": 1}
    tier = DiskTier(tmp_path, world_size=2, patience_seconds=0, attempt=1)
    assert tier.offer([Piece(schema, small(110).buffer)])
    assert tier.wait()
    assert (tier.status.num_written, tier.status.failed_step) == (0, 110)


def test_another_run_neither_restores_nor_writes_nor_deletes(tmp_path: Path) -> None:
    mine = DiskTier(tmp_path, world_size=1, keep=1, run="mine")
    assert mine.offer([small(5)])
    assert mine.wait()
    assert mine.status.num_written == 1
    path = tmp_path / "step_000000000005"
    said = "is of run 'mine', and this is run 'yours': give each run a directory of its own"
    with pytest.raises(InvalidSnapshot, match=said):
        newest_complete(tmp_path, "yours")
    assert newest_complete(tmp_path, "mine") == newest_complete(tmp_path) == path
    yours = DiskTier(tmp_path, world_size=1, keep=1, run="yours", attempt=1)
    assert yours.offer([small(6)])
    assert yours.wait()
    assert said in yours.status.error
    assert list(tmp_path.iterdir()) == [path]


def test_parts_of_two_runs_are_not_put_together(tmp_path: Path) -> None:
    base = small(6)
    for rank, run in enumerate(("mine", "yours")):
        write_part(tmp_path, Piece({**json.loads(base.schema), "rank": rank, "world_size": 2}, base.buffer), run=run)
    with pytest.raises(InvalidSnapshot, match=r"rank_00001.json is of run 'yours', and this is run 'mine'"):
        finish(tmp_path, 6, 2, run="mine")


def test_what_is_left_of_an_older_attempt_completes_nothing(tmp_path: Path) -> None:
    write_part(tmp_path, small(7), attempt=2)
    assert next_attempt(tmp_path, 2) == 3
    assert next_attempt(tmp_path, 9) == 9
    assert next_attempt(tmp_path / "nothing") == 1
    finish(tmp_path, 7, 1, attempt=2)
    write_part(tmp_path, small(8), attempt=1)
    with pytest.raises(InvalidSnapshot, match="is of attempt 2, and this is attempt 1"):
        finish(tmp_path, 8, 1, attempt=1)
    assert newest_complete(tmp_path) == tmp_path / "step_000000000007"


def test_waiting_for_parts_reads_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand ranks each looks five times in a second."""
    written(tmp_path, *range(1, 6))
    found: list[str] = []
    stat, glob = Path.stat, Path.glob
    monkeypatch.setattr(Path, "stat", lambda path, **options: (found.append(path.name), stat(path, **options))[1])
    monkeypatch.setattr(Path, "glob", lambda path, pattern: (found.append(pattern), glob(path, pattern))[1])
    assert not is_complete(tmp_path, 6)
    assert is_complete(tmp_path, 5)
    assert finish(tmp_path, 7, 1000) is None
    assert set(found) <= {"step_000000000007.partial-0"}


@pytest.mark.parametrize("name", ["__0_0.distcp", "rank_00000.json", ".metadata"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    written(tmp_path, 1, 2)
    file = tmp_path / "step_000000000002" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidSnapshot, match=name.replace(".", r"\.")):
        restore_from_disk(tmp_path / "step_000000000002", TrainingState(model=nn.Linear(2, 2)))
    file.write_bytes(data[:-1])
    assert newest_complete(tmp_path) == tmp_path / "step_000000000001"
    with pytest.raises(InvalidSnapshot, match="no complete copy"):
        restore_from_disk(tmp_path / "step_000000000003", TrainingState(model=nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["__0_0.distcp", "rank_00000.json.new", f"{COMPLETE}.new"])
def test_a_full_disk_is_reported_and_costs_no_copy(tmp_path: Path, name: str) -> None:
    tier = DiskTier(tmp_path, world_size=1, keep=1)
    assert tier.offer([small(1)])
    assert tier.wait()
    folder = tmp_path / "step_000000000002.partial-0"
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    assert tier.offer([small(2)])
    assert tier.wait()
    assert tier.reading_seconds is None
    assert tier.status.num_failed == 1
    assert "step 2: " in tier.status.error
    assert tier.status.last_step == 1
    assert newest_complete(tmp_path) == tmp_path / "step_000000000001"
    for path in folder.iterdir():
        path.unlink()
    assert tier.offer([small(2)])
    assert tier.wait()
    assert (tier.status.last_step, tier.status.error, tier.status.num_written) == (2, "", 2)
    assert good_copies(tmp_path) == [tmp_path / "step_000000000002"]


def test_a_slow_disk_makes_training_skip_copies(tmp_path: Path) -> None:
    folder = tmp_path / "step_000000000001.partial-0"
    folder.mkdir()
    os.mkfifo(folder / "__0_0.distcp")  # nobody reads: opening it does not return
    tier = DiskTier(tmp_path, world_size=1)
    assert tier.offer([small(1)])
    assert not tier.offer([small(2)])
    assert not tier.wait(0.05)
    assert (tier.status.writing, tier.status.num_skipped) == (1, 1)
    with (folder / "__0_0.distcp").open("rb") as reader:  # it goes on, and finds that this is no file
        reader.read()
    assert tier.wait()
    assert (tier.status.writing, tier.status.num_failed) == (None, 1)
    assert tier.offer([small(3)])
    assert tier.wait()
    assert tier.status.last_step == 3


def test_a_disk_that_hangs_holds_nobody_up_in_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "step_000000000001.partial-0"
    folder.mkdir()
    os.mkfifo(folder / "__0_0.distcp")  # nobody reads: opening it does not return
    tier = DiskTier(tmp_path, world_size=1)
    assert tier.offer([small(1)])
    closing = threading.Thread(target=tier.close, args=(0.05,), daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert tier.status.writing == 1
    with (folder / "__0_0.distcp").open("rb") as reader:
        assert reader.read() == b"", "it stops before the first tensor"
    assert tier.wait(30)
    assert "training ended before it was written" in tier.status.error
    assert newest_complete(tmp_path) is None


def test_parts_that_do_not_come_are_given_up(tmp_path: Path) -> None:
    schema = {**json.loads(small(4).schema), "world_size": 2}
    tier = DiskTier(tmp_path, world_size=2, patience_seconds=0)
    assert tier.offer([Piece(schema, small(4).buffer)])
    assert tier.wait()
    assert tier.status.error == "step 4: parts of other nodes did not come"
    assert tier.status.failed_step == 4


def test_parts_that_failed_elsewhere_are_not_waited_for(tmp_path: Path) -> None:
    schema = {**json.loads(small(4).schema), "world_size": 2}
    tier = DiskTier(tmp_path, world_size=2)
    assert tier.offer([Piece(schema, small(4).buffer)])
    tier.give_up(3)
    assert not tier.wait(0.5)
    tier.give_up(4)
    assert tier.wait()
    assert (tier.status.failed_step, tier.status.writing) == (4, None)


def test_two_nodes_see_the_same_copy_complete(tmp_path: Path) -> None:
    base = small(6)
    tiers = [DiskTier(tmp_path, world_size=2) for _ in range(2)]
    for rank, tier in enumerate(tiers):
        assert tier.offer([Piece({**json.loads(base.schema), "rank": rank, "world_size": 2}, base.buffer)])
    for tier in tiers:
        assert tier.wait()
        assert (tier.status.last_step, tier.status.num_written) == (6, 1)
        tier.close()
        assert not tier.offer([base])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: DiskTier(path, world_size=1, keep=0), "keep=0"),
        (lambda path: DiskTier(path, world_size=1).offer([]), r"pieces of steps \[\]"),
        (lambda path: DiskTier(path, world_size=1).offer([small(1), small(2)]), r"pieces of steps \[1, 2\]"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        make(tmp_path)


def test_the_bytes_of_a_rank_are_written_once(tmp_path: Path) -> None:
    model = nn.Linear(256, 256)
    num_bytes = write_part(tmp_path, piece_of(TrainingState(model=model)))
    assert num_bytes < sum(len(raw(parameter)) for parameter in model.parameters()) * 1.2

"""Two ranks: exact resumption of sharded training, and other world sizes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stowplan
from stowplan import InvalidArgument, InvalidSnapshot, SnapshotMismatch
from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.state.contents import Contents, Piece
from stowplan.runtime.snapshot.state.replicas import written_elsewhere
from stowplan.runtime.snapshot.state.restore import reshard, restore
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten
from tests.distributed import RankFailed, Ranks
from tests.runtime.snapshot.trainings import NUM_STEPS, SNAPSHOT_AT, Training

Taken = tuple[bytes, bytes]
SHARDED, HYBRID = (2,), (2, 1)


def taken(state: TrainingState) -> Taken:
    flat = flatten(state)
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    return dump_schema(flat.schema), bytes(buffer)


def train(rank: int, mesh: tuple[int, ...]) -> tuple[list[str], dict[str, bytes]]:
    training = Training(rank, mesh=mesh)
    return training.run(NUM_STEPS), training.fingerprint()


def train_and_die(rank: int, mesh: tuple[int, ...], folder: Path) -> None:
    training = Training(rank, mesh=mesh)
    training.run(SNAPSHOT_AT)
    schema, data = taken(training.state())
    (folder / f"schema{rank}").write_bytes(schema)
    (folder / f"bytes{rank}").write_bytes(data)
    training.run(SNAPSHOT_AT + 2)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def resume(rank: int, mesh: tuple[int, ...], folder: Path) -> tuple[list[str], dict[str, bytes]]:
    training = Training(rank, mesh=mesh)
    snapshot = (folder / f"schema{rank}").read_bytes(), (folder / f"bytes{rank}").read_bytes()
    training.step = restore(*snapshot, training.state()).step
    return training.run(NUM_STEPS), training.fingerprint()


@pytest.mark.parametrize("mesh", [SHARDED, HYBRID], ids=["fsdp", "hsdp"])
def test_killed_sharded_training_goes_on_to_the_last_bit(ranks: Ranks, tmp_path: Path, mesh: tuple[int, ...]) -> None:
    plain = ranks.run(train, mesh)
    with pytest.raises(RankFailed, match="exit code -9"):
        ranks.run(train_and_die, mesh, tmp_path)
    for (losses, bits), (resumed_losses, resumed_bits) in zip(plain, ranks.run(resume, mesh, tmp_path), strict=True):
        assert resumed_losses == losses[SNAPSHOT_AT:]
        assert resumed_bits == bits


def snapshot_of(rank: int, mesh: tuple[int, ...]) -> tuple[Taken, dict[str, bytes]]:
    training = Training(rank, mesh=mesh)
    training.run(SNAPSHOT_AT)
    return taken(training.state()), training.whole()


def resharded(rank: int, mesh: tuple[int, ...], pieces: list[Taken]) -> tuple[dict[str, bytes], list[float], bool]:
    training = Training(rank, mesh=mesh)
    restored = reshard([Piece(*piece) for piece in pieces], training.state())
    assert restored.step == SNAPSHOT_AT
    rates = [group["lr"] for group in training.optimizer.param_groups]
    training.step = restored.step
    whole = training.whole()
    training.run(SNAPSHOT_AT + 1)
    return whole, rates, restored.exact


def test_two_ranks_become_one(ranks: Ranks) -> None:
    answers = ranks.run(snapshot_of, SHARDED)
    pieces, (_, whole) = [piece for piece, _ in answers], answers[0]
    found, rates, exact = resharded(0, (), pieces[::-1])
    assert found == whole
    assert not exact
    expected = Training()
    expected.run(SNAPSHOT_AT)
    assert rates == [group["lr"] for group in expected.optimizer.param_groups]


def test_one_rank_becomes_two(ranks: Ranks) -> None:
    piece, whole = snapshot_of(0, ())
    for found, rates, exact in ranks.run(resharded, SHARDED, [piece]):
        assert found == whole
        assert rates == [pytest.approx(rates[0])] * 2
        assert not exact


def test_the_same_ranks_may_be_sharded_otherwise(ranks: Ranks) -> None:
    answers = ranks.run(snapshot_of, SHARDED)
    for found, _, exact in ranks.run(resharded, HYBRID, [piece for piece, _ in answers]):
        assert found == answers[0][1]
        assert exact


def refused(rank: int, pieces: list[Taken]) -> list[str]:
    training = Training(rank, mesh=HYBRID)
    before = training.whole() if training.optimizer.state else training.fingerprint()
    with pytest.raises(SnapshotMismatch) as caught:
        restore(*pieces[1 - rank], training.state())
    after = training.fingerprint()
    assert {**before, "next": b""} == {**after, "next": b""}
    return list(caught.value.problems)


def test_another_rank_and_another_sharding_are_named(ranks: Ranks) -> None:
    pieces = [piece for piece, _ in ranks.run(snapshot_of, SHARDED)]
    for rank, problems in enumerate(ranks.run(refused, pieces)):
        assert f"it is of rank {1 - rank} of 2, and this is rank {rank} of 2" in problems[0]
        text = "\n".join(problems)
        assert f"model.first.weight is sharded otherwise: S(0) over (2,) at ({1 - rank},) in the snapshot" in text
        assert f"R, S(0) over (2, 1) at ({rank}, 0) here (use reshard)" in text


def test_pieces_that_do_not_go_together_are_refused(ranks: Ranks) -> None:
    one, two = (Piece(*piece) for piece, _ in ranks.run(snapshot_of, SHARDED))
    for pieces in ([], [one], [two, two], [one, two, one]):
        with pytest.raises(InvalidArgument, match="give one of each rank, all of one step"):
            reshard(pieces, Training().state())
    schema = one.schema.replace(b'"rank":0', b'"rank":1')
    with pytest.raises(InvalidSnapshot, match="A rank's part is missing"):
        reshard([one, Piece(schema, one.buffer)], Training().state())


# ---- wrappers --------------------------------------------------------------------------------------------------------
def data_parallel(rank: int) -> tuple[Taken, dict[str, bytes], list[bool]]:
    training = Training(0)
    training.model = DistributedDataParallel(training.model)
    training.run(2)
    flat = flatten(training.state())
    model = dict(flat.schema["state"]["dict"])["model"]["dict"]
    return taken(training.state()), Training.whole(training), [leaf["tensor"]["owned"] for _, leaf in model]


def test_data_parallel_training_has_plain_names_and_one_owner(ranks: Ranks) -> None:
    (first, whole, owned), (second, _, others) = ranks.run(data_parallel)
    assert all(owned)
    assert not any(others)
    training = Training()
    reshard([Piece(*first), Piece(*second)], training.state())
    assert {f"module.{name}": bits for name, bits in training.whole().items()} == whole


def layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))


def pipelined(rank: int, pieces: list[Taken] | None) -> tuple[Taken, str]:
    pipeline = stowplan.Pipeline(
        layers(), num_microbatches=2, loss_fn=lambda output, target: (output - target).pow(2).mean()
    )
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=0.1)
    state = TrainingState(model=pipeline, optimizer=optimizer)
    batch = torch.ones(4, 4), torch.zeros(4, 4)
    if pieces is None:
        pipeline.step(batch)
        optimizer.step()
        optimizer.zero_grad()
    else:
        restore(*pieces[rank], state)
    snapshot = taken(state)
    return snapshot, repr(pipeline.step(batch))


def test_a_pipelines_stages_are_restored_and_become_one_model(ranks: Ranks) -> None:
    answers = ranks.run(pipelined, None)
    pieces = [piece for piece, _ in answers]
    assert ranks.run(pipelined, pieces) == answers
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    reshard([Piece(*piece) for piece in pieces], TrainingState(model=model, optimizer=optimizer))
    expected: Any = layers()
    plain = torch.optim.AdamW(expected.parameters(), lr=0.1)
    (expected(torch.ones(4, 4)) - 0).pow(2).mean().backward()
    plain.step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert optimizer.param_groups[0]["lr"] == 0.1


def owned_names(rank: int) -> tuple[list[str], list[str]]:
    """Of a pipeline, and of a model that all ranks have alike."""
    pipeline = stowplan.Pipeline(
        layers(), num_microbatches=2, loss_fn=lambda output, target: (output - target).pow(2).mean()
    )
    found = []
    for model in (pipeline, layers()):
        state = TrainingState(model=model)
        schema = flatten(state, elsewhere=written_elsewhere(Agreement(), state)).schema
        leaves = Contents.of(Piece(schema, bytes(schema["bytes"]))).model.items()
        found.append([name for name, leaf in leaves if leaf.owned])
    return found[0], found[1]


def test_each_name_is_written_to_disk_by_one_rank(ranks: Ranks) -> None:
    names = sorted(layers().state_dict())
    (first, alike), (second, none) = ranks.run(owned_names)
    assert first
    assert second
    assert sorted(first + second) == names
    assert (sorted(alike), none) == (names, [])

"""Snapshots of which each rank has a share, restored to the last bit: optimizers, groups, numbers of ranks, disk."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from stowplan import InvalidSnapshot
from stowplan.runtime.snapshot.disk.copies import finish, write_part
from stowplan.runtime.snapshot.disk.restore import restore_from_disk
from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.snapshotter import Snapshotter
from stowplan.runtime.snapshot.state.contents import Piece
from stowplan.runtime.snapshot.state.gathered import gather_pieces, restore_shares
from stowplan.runtime.snapshot.state.leaf import Leaf
from stowplan.runtime.snapshot.state.restore import reshard, restore
from stowplan.runtime.snapshot.state.shares import agreed_division
from stowplan.runtime.snapshot.state.training_state import TrainingState, size_bytes
from tests.distributed import Ranks
from tests.runtime.snapshot.conftest import eventually
from tests.runtime.snapshot.replicated import OPTIMIZERS, Replicated, piece_of
from tests.runtime.snapshot.trainings import Training

SNAPSHOT_AT, NUM_STEPS = 2, 4


def leaves(schema: bytes) -> list[Leaf]:
    """All of models and optimizers."""
    found = []

    def walk(node):
        if isinstance(node, list):
            for member in node:
                walk(member)
        elif isinstance(node, dict):
            for tag, content in node.items():
                if tag == "tensor":
                    found.append(Leaf.from_json(content))
                else:
                    walk(content)

    walk([part for name, part in json.loads(schema)["state"]["dict"] if name in ("model", "optimizer")])
    return found


def taken(training: Replicated | Training) -> tuple[bytes, bytes]:
    agreement = Agreement()
    return piece_of(training.state(), agreed_division(agreement, training.state()))


def groups_of(kind: str) -> dist.ProcessGroup | None:
    """Neighbours, or every other rank, or all."""
    ranks = {"all": None, "neighbours": [[0, 1], [2, 3]], "crossed": [[0, 3], [1, 2]], "uneven": [[0], [1, 2, 3]]}[kind]
    if ranks is None:
        return None
    groups = [dist.new_group(each) for each in ranks]
    return next(group for each, group in zip(ranks, groups, strict=True) if dist.get_rank() in each)


# ---- the same number of ranks ----------------------------------------------------------------------------------------
def train_and_resume(rank: int, optimizer: str, kind: str, begin: int) -> tuple[int, int, int, list[bool]]:
    group = groups_of(kind)
    seed = min(dist.get_process_group_ranks(group))  # each group has a model of its own
    first = Replicated(optimizer, seed=seed, group=group)
    first.run(begin)
    whole_bytes = size_bytes(first.state())
    schema, content = taken(first)
    ended = first.fingerprint()
    losses, last = first.run(begin + 2), first.fingerprint()
    second = Replicated(optimizer, seed=9, group=group)
    second.run(1)
    restored = restore_shares(Agreement(), Piece(schema, content), second.state())
    same = [restored.exact, restored.step == begin, second.fingerprint() == ended]
    second.step = restored.step
    same += [second.run(begin + 2) == losses, second.fingerprint() == last]
    own = sum(leaf.num_bytes for leaf in leaves(schema) if leaf.share is None)
    return whole_bytes, len(content), own, same


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("begin", [0, SNAPSHOT_AT])
def test_a_training_goes_on_to_the_last_bit(ranks4: Ranks, optimizer: str, begin: int) -> None:
    answers = ranks4.run(train_and_resume, optimizer, "all", begin)
    least = min(whole_bytes for whole_bytes, *_ in answers)
    for _, num_bytes, own_bytes, same in answers:
        assert all(same)
        rng_bytes = 14 << 10  # of the process's generators
        assert num_bytes < 1.05 * least / 4 + own_bytes + rng_bytes + 4096
        assert own_bytes < 2000  # batch norm's buffers, numbers of steps


@pytest.mark.parametrize("kind", ["neighbours", "crossed", "uneven"])
def test_groups_have_models_of_their_own_under_the_same_names(ranks4: Ranks, kind: str) -> None:
    for _, _, _, same in ranks4.run(train_and_resume, "adamw", kind, SNAPSHOT_AT):
        assert all(same)


def hybrid(rank: int) -> tuple[int, int, bool, bool]:
    first = Training(rank, mesh=(2, 2))
    first.run(SNAPSHOT_AT)
    whole_bytes = size_bytes(first.state())
    schema, content = taken(first)
    shares = {leaf.share.family for leaf in leaves(schema) if leaf.share}
    assert shares == {rank % 2}
    losses, ended = first.run(NUM_STEPS), first.fingerprint()
    asked = []

    class Counted(Agreement):
        def swap(self, to, outgoing, source, incoming):
            asked.append((source, incoming.numel()))
            super().swap(to, outgoing, source, incoming)

    second = Training(rank, mesh=(2, 2))
    restored = restore_shares(Counted(), Piece(schema, content), second.state())
    from_others = {source for source, num_bytes in asked if num_bytes}
    assert from_others == {(rank + 2) % 4}  # who has the same shards
    second.step = restored.step
    same = second.run(NUM_STEPS) == losses and second.fingerprint() == ended
    return whole_bytes, len(content), restored.exact, same


def test_replicas_of_shards_are_divided_too(ranks4: Ranks) -> None:
    for whole_bytes, num_bytes, exact, same in ranks4.run(hybrid):
        assert exact
        assert same
        assert num_bytes < whole_bytes


# ---- with all that belongs to a training -----------------------------------------------------------------------------
def lose_a_node(rank: int, sockets: Path, nodes: str) -> tuple[int, int, list[bool], int]:
    os.environ |= {"XDG_RUNTIME_DIR": str(sockets), "STOWPLAN_JOB_TOKEN": "a token for this test only"}

    def snapshotter(training: Replicated) -> Snapshotter:
        parts = {"model": training.model, "optimizer": training.optimizer, "extras": {"data": training.data}}
        return Snapshotter(**parts, run="job-1", node=nodes[rank], idle_seconds=60)

    first = Replicated()
    first.run(SNAPSHOT_AT)
    with snapshotter(first) as snapshots:
        assert snapshots.restore() is None
        saved = snapshots.save(first.step)
        assert snapshots.wait()
        lost = snapshots.status().memory.pid
        losses, ended = first.run(NUM_STEPS), first.fingerprint()
    dist.barrier()
    if len(set(nodes)) > 1 and rank == 1:
        os.kill(lost, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{lost}/cmdline").exists())
    dist.barrier()
    second = Replicated(seed=9)
    with snapshotter(second) as snapshots:
        restored = snapshots.restore()
        second.step = restored.step
        same = [restored.exact, second.run(NUM_STEPS) == losses, second.fingerprint() == ended]
        return saved.num_bytes, size_bytes(first.state()), same, snapshots.status().memory.pid


@pytest.mark.parametrize("nodes", ["aaaa", "abcd"])
def test_a_training_that_lost_a_node_goes_on_to_the_last_bit(ranks4: Ranks, nodes: str) -> None:
    with tempfile.TemporaryDirectory(prefix="stow") as sockets:
        answers = ranks4.run(lose_a_node, Path(sockets), nodes)
        for pid in {pid for *_, pid in answers}:
            os.kill(pid, signal.SIGKILL)
    for num_bytes, whole_bytes, same, _ in answers:
        assert all(same)
        # A fourth, on several nodes a copy of another, the schema, and what each rank has for itself.
        assert num_bytes < whole_bytes * (1 / 2 if nodes == "aaaa" else 3 / 4)


# ---- what differs ----------------------------------------------------------------------------------------------------
def one_that_differs(rank: int, name: str) -> tuple[list[str], bool, int, int]:
    first = Replicated()
    first.run(1)
    with torch.no_grad():
        dict(first.model.module.named_parameters())[name].view(torch.uint8)[-1, -1] ^= rank == 2
    before, agreement = first.fingerprint(), Agreement()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        piece = piece_of(first.state(), agreed_division(agreement, first.state()))
    second = Replicated(seed=9)
    restore_shares(agreement, Piece(*piece), second.state())
    whole = [leaf for leaf in leaves(piece[0]) if leaf.share is None and leaf.num_bytes > 1000]
    return [str(each.message) for each in caught], second.fingerprint() == before, len(whole), len(leaves(piece[0]))


@pytest.mark.parametrize(("name", "num_names"), [("up.weight", 1), ("tokens.weight", 2), ("frozen", 1)])
def test_what_differs_by_one_bit_is_held_whole_by_each_rank(ranks4: Ranks, name: str, num_names: int) -> None:
    for said, same, num_whole, _ in ranks4.run(one_that_differs, name):
        assert len(said) == 1
        assert f"{num_names} tensors that ranks should have the same of differ" in said[0]
        assert f"model.{name}" in said[0]
        assert same
        assert num_whole == num_names


def states_of_one(rank: int) -> bool:
    first = Replicated("sgd")
    first.run(1)
    if rank == 1:
        first.optimizer.state.clear()
    before, agreement = first.fingerprint(), Agreement()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        piece = piece_of(first.state(), agreed_division(agreement, first.state()))
    second = Replicated("sgd", seed=9)
    restore_shares(agreement, Piece(*piece), second.state())
    return second.fingerprint() == before


def test_states_that_a_rank_has_not_are_held_by_the_others(ranks4: Ranks) -> None:
    assert all(ranks4.run(states_of_one))


def of_zero(rank: int) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its import
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = DistributedDataParallel(nn.Linear(100, 100))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        model(torch.ones(2, 100)).sum().backward()
        optimizer.step()
    state = TrainingState(model={"replicated": model, "own": nn.Linear(50, 50)}, optimizer=optimizer)
    return set(agreed_division(Agreement(), state).portions)


def test_what_is_not_replicated_is_whole(ranks4: Ranks) -> None:
    assert ranks4.run(of_zero) == [{"model.replicated.weight", "model.replicated.bias"}] * 4


# ---- other numbers of ranks, and disk --------------------------------------------------------------------------------
def snapshot(rank: int, kind: str) -> tuple[tuple[bytes, bytes], dict[str, bytes]]:
    group = groups_of(kind)
    training = Replicated(seed=min(dist.get_process_group_ranks(group)), group=group)
    training.run(SNAPSHOT_AT)
    return taken(training), training.without_buffers()


@pytest.mark.parametrize("kind", ["all", "crossed", "uneven"])
def test_four_ranks_become_one(ranks4: Ranks, kind: str) -> None:
    answers = ranks4.run(snapshot, kind)
    training = Replicated(plain=True, seed=9)
    restored = reshard([Piece(*piece) for piece, _ in answers], training.state())
    assert not restored.exact
    assert training.without_buffers() == answers[0][1]


def from_two(rank: int, pieces: list[tuple[bytes, bytes]]) -> tuple[list[int], dict[str, bytes]]:
    """Two of four ranks have the pieces of a former start."""
    own = Piece(*pieces[rank - 1]) if rank in (1, 2) else None
    found = gather_pieces(Agreement(), own)
    training = Replicated(seed=9)
    reshard(found, training.state())
    return [json.loads(piece.schema)["rank"] for piece in found], training.without_buffers()


def two(rank: int) -> tuple[tuple[bytes, bytes], dict[str, bytes]]:
    training = Replicated()
    training.run(SNAPSHOT_AT)
    return taken(training), training.without_buffers()


def test_two_ranks_become_four(ranks: Ranks, ranks4: Ranks) -> None:
    answers = ranks.run(two)
    for found, content in ranks4.run(from_two, [piece for piece, _ in answers]):
        assert found == [0, 1]
        assert content == answers[0][1]


def test_a_share_alone_is_refused(ranks: Ranks) -> None:
    (one, _), (other, _) = ranks.run(two)
    schema = one[0].replace(b'"world_size":2', b'"world_size":1')
    training = Replicated(plain=True, seed=9)
    before = training.fingerprint()
    with pytest.raises(
        InvalidSnapshot, match=r"is divided over ranks, and the pieces of ranks (0|none) do not make it whole"
    ):
        restore(schema, one[1], training.state())
    with pytest.raises(InvalidSnapshot, match="these are not of one snapshot"):
        restore(schema, one[1], training.state(), [Piece(*other)])
    assert training.fingerprint() == before


@pytest.mark.parametrize("wrong", [{"begin": 10**6}, {"dim": 5}, {"whole": 1}, {"begin": -1}, {"family": None}])
def test_a_share_that_cannot_be_is_refused(ranks: Ranks, wrong: dict[str, int]) -> None:
    (one, _), _ = ranks.run(two)
    schema = json.loads(one[0])
    model = dict(schema["state"]["dict"])["model"]["dict"]
    dict(model)["up.weight"]["tensor"]["share"].update(wrong)
    with pytest.raises(InvalidSnapshot, match=r"model\.up\.weight cannot be read"):
        restore(schema, one[1], Replicated(plain=True).state())


def write(rank: int, directory: Path, kind: str) -> tuple[dict[str, bytes], int]:
    group = groups_of(kind)
    training = Replicated(seed=min(dist.get_process_group_ranks(group)), group=group)
    training.run(SNAPSHOT_AT)
    return training.without_buffers(), write_part(directory, Piece(*taken(training)))


def read(rank: int, path: Path) -> dict[str, bytes]:
    training = Replicated(seed=9)
    assert restore_from_disk(path, training.state()).exact
    return training.without_buffers()


def read_by_torch(path: Path) -> dict[str, bytes]:
    training = Replicated(plain=True, seed=9)
    training.run(1)
    parts = training.model, training.optimizer
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = get_state_dict(*parts, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.checkpoint.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
    set_state_dict(*parts, model_state_dict=model, optim_state_dict=optimizer, options=options)
    return training.without_buffers()


def test_a_copy_on_disk_is_written_by_all_and_read_by_torch(ranks4: Ranks, tmp_path: Path) -> None:
    answers = ranks4.run(write, tmp_path, "all")
    path = finish(tmp_path, SNAPSHOT_AT, 4)
    assert path is not None
    written = [num_bytes for _, num_bytes in answers]
    assert max(written) < 1.5 * min(written)
    assert ranks4.run(read, path) == [content for content, _ in answers]
    assert read_by_torch(path) == answers[0][0]


@pytest.mark.parametrize("kind", ["crossed", "uneven"])
def test_of_groups_with_the_same_names_the_first_is_on_disk(ranks4: Ranks, tmp_path: Path, kind: str) -> None:
    answers = ranks4.run(write, tmp_path, kind)
    path = finish(tmp_path, SNAPSHOT_AT, 4)
    assert path is not None
    assert read_by_torch(path) == answers[0][0]

"""Exact resumption from raw bytes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from stowplan import InvalidArgument, SnapshotMismatch
from stowplan.runtime.snapshot.state import training_state as snapshot_state
from stowplan.runtime.snapshot.state.restore import restore
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import TrainingState, flatten, size_bytes
from tests.runtime.snapshot.trainings import NUM_STEPS, SNAPSHOT_AT, Training, raw


def taken(state: TrainingState) -> tuple[bytes, bytearray]:
    """Schema and bytes of a snapshot."""
    flat = flatten(state)
    buffer = bytearray(flat.num_bytes)
    assert flat.copy_into(buffer).num_bytes == flat.num_bytes == size_bytes(state)
    return dump_schema(flat.schema), buffer


@pytest.mark.parametrize("at", [0, SNAPSHOT_AT])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_training_is_the_same_to_the_last_bit(at: int, optimizer: str) -> None:
    plain = Training(optimizer=optimizer)
    plain_losses = plain.run(NUM_STEPS)
    expected = plain.fingerprint()
    first = Training(optimizer=optimizer)
    first.run(at)
    snapshot = taken(first.state())
    assert first.run(NUM_STEPS) == plain_losses[at:]  # the snapshot changed nothing
    assert first.fingerprint() == expected
    second = Training(optimizer=optimizer)
    second.run(3)
    restored = restore(*snapshot, second.state())
    assert restored.extras["notes"] == {"name": "run", 3: (1, 2.5)}
    second.step = restored.step
    assert second.run(NUM_STEPS) == plain_losses[at:]
    assert second.fingerprint() == expected


SCRIPT = """
import sys
from pathlib import Path
from stowplan.runtime.snapshot.state.restore import restore
from stowplan.runtime.snapshot.state.state_schema import dump_schema
from stowplan.runtime.snapshot.state.training_state import flatten
from tests.runtime.snapshot.trainings import *
import os, signal, torch
torch.set_num_threads(1)
folder, resumed = Path(sys.argv[1]), sys.argv[2] == "resume"
training = Training()
if resumed:
    training.step = restore((folder / "schema").read_bytes(), (folder / "bytes").read_bytes(), training.state()).step
else:
    training.run(SNAPSHOT_AT)
    flat = flatten(training.state())
    buffer = bytearray(flat.num_bytes)
    flat.copy_into(buffer)
    (folder / "schema").write_bytes(dump_schema(flat.schema))
    (folder / "bytes").write_bytes(buffer)
    training.run(SNAPSHOT_AT + 2)
    os.kill(os.getpid(), signal.SIGKILL)
print(training.run(NUM_STEPS), {name: value.hex() for name, value in training.fingerprint().items()})
"""


def test_a_killed_process_is_resumed_by_another_from_bytes_alone(tmp_path: Path) -> None:
    def process(mode: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), mode]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert process("train").returncode == -9
    resumed = process("resume")
    assert resumed.returncode == 0, resumed.stderr
    plain = Training()
    losses = plain.run(NUM_STEPS)[SNAPSHOT_AT:]
    assert resumed.stdout.strip() == f"{losses} { {k: v.hex() for k, v in plain.fingerprint().items()} }"


def test_names_are_those_of_torch() -> None:
    training = Training()
    training.run(2)
    model, optimizer = get_state_dict(
        training.model, training.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    from stowplan.runtime.snapshot.state.contents import Contents, Piece

    contents = Contents.of(Piece(*taken(training.state())))
    assert set(contents.model) == set(model)
    expected = {f"model.{name}" for name in model}
    expected |= {f"optimizer.{name}" for name in optimizer if name.startswith("state.")}
    assert set(contents.shared_leaves()) == expected


def test_the_schema_is_canonical_json() -> None:
    training = Training()
    training.run(1)
    schema, _ = taken(training.state())
    assert schema == taken(training.state())[0]
    assert json.dumps(json.loads(schema), sort_keys=True, separators=(",", ":")).encode() == schema


def test_tied_parameters_take_their_bytes_once() -> None:
    untied, tied = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)]), nn.ModuleList()
    tied.extend([nn.Linear(64, 64, bias=False) for _ in range(2)])
    tied[1].weight = tied[0].weight
    sizes = [size_bytes(TrainingState(model=model)) for model in (untied, tied)]
    assert sizes[0] - sizes[1] == 64 * 64 * 4
    snapshot = taken(TrainingState(model=tied))
    with torch.no_grad():
        before = tied[0].weight.clone()
        tied[0].weight.zero_()
    restore(*snapshot, TrainingState(model=tied))
    assert tied[1].weight is tied[0].weight
    assert raw(tied[1].weight) == raw(before)


def test_the_bytes_are_a_copy() -> None:
    model = nn.Linear(3, 3)
    _, buffer = taken(TrainingState(model=model))
    before = bytes(buffer)
    with torch.no_grad():
        model.weight.add_(1)
    assert bytes(buffer) == before


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_other_strides_keep_their_values_and_their_strides(layout: str) -> None:
    def module() -> nn.Module:
        made = nn.Module()
        data = torch.randn(4, 6, 4, 6)
        made.weight = nn.Parameter(
            {
                "channels_last": data.to(memory_format=torch.channels_last),
                "transposed": data.permute(3, 1, 0, 2),
                "sliced": data[:, ::2, 1:],
            }[layout]
        )
        return made

    first, second = module(), module()
    optimizer = torch.optim.Adam(first.parameters())
    first.weight.grad = torch.randn_like(first.weight)
    optimizer.step()
    snapshot = taken(TrainingState(model=first, optimizer=optimizer))
    fresh = torch.optim.Adam(second.parameters())
    strides = second.weight.stride()
    restore(*snapshot, TrainingState(model=second, optimizer=fresh))
    assert second.weight.stride() == strides
    assert torch.equal(first.weight, second.weight)
    for key, value in optimizer.state[first.weight].items():
        assert torch.equal(value, fresh.state[second.weight][key])
        assert value.stride() == fresh.state[second.weight][key].stride()


def test_several_models_and_optimizers() -> None:
    def parts(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        models = {"actor": nn.Linear(3, 2), "critic": nn.Linear(3, 1)}
        optimizers = [torch.optim.AdamW(model.parameters(), lr=seed + 1.0) for model in models.values()]
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]) for optimizer in optimizers]
        for model, optimizer, scheduler in zip(models.values(), optimizers, schedulers, strict=True):
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
        return TrainingState(model=models, optimizer=optimizers, scheduler=schedulers)

    first, second = parts(0), parts(1)
    snapshot = taken(first)
    restore(*snapshot, second)
    assert taken(second) == snapshot


class Refuses:
    """Does not take its state, but for the one that it has."""

    def __init__(self) -> None:
        self.value = 1

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state != {"value": 1}:
            raise KeyError("other")


def test_differences_are_named_before_anything_is_changed() -> None:
    first, second = Training(), Training(rank=1)
    first.run(3)
    second.run(1)
    snapshot = taken(first.state())
    second.model.middle[1].weight = nn.Parameter(torch.zeros(9, 17))
    second.model.register_buffer("more", torch.zeros(2))
    second.model.last.half()
    second.optimizer = torch.optim.AdamW(second.model.parameters())
    state = second.state()
    state.extras = {"other": 1}
    before = second.fingerprint()
    with pytest.raises(SnapshotMismatch, match="nothing has been changed") as caught:
        restore(*snapshot, state)
    text = "\n".join(caught.value.problems)
    assert "model.more is missing in the snapshot" in text
    assert "model.middle.1.weight has shape (9, 16) in the snapshot and (9, 17) here" in text
    assert "model.last.weight is torch.float32 in the snapshot and torch.float16 here" in text
    assert "group 0 of the optimizer has parameters of several groups" in text
    assert "extras.other is missing in the snapshot" in text
    assert "extras.noise is in the snapshot only" in text
    after = second.fingerprint()
    assert {**before, "next": b""} == {**after, "next": b""}


def test_what_other_code_refuses_is_undone() -> None:
    first, second = Training(), Training(rank=1)
    first.run(3)
    thing, state = Refuses(), first.state()
    thing.value = 2
    state.extras = {"thing": thing}
    snapshot = taken(state)
    second.run(1)
    into = second.state()
    into.extras = {"thing": Refuses()}
    before, scheduler = second.fingerprint(), dict(second.scheduler.state_dict())
    with pytest.raises(SnapshotMismatch, match=r"extras\.thing does not take its state: KeyError"):
        restore(*snapshot, into)
    assert second.scheduler.state_dict() == scheduler
    assert {**before, "next": b""} == {**second.fingerprint(), "next": b""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "model is a int: give a torch.nn.Module"),
        ({"extras": {"f": {"x": [print]}}}, r"extras\.f\.x\[0\] is a builtins.builtin_function_or_method"),
        ({"extras": {"m": nn.Linear(1, 1)}}, r"extras\['m'\] is a Linear: pass it with the others"),
        ({"scheduler": object()}, "scheduler is a object without state_dict"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(7))])}, r"in no model, the first of shape \(7,\)"),
        ({"step": -1}, "step=-1"),
        ({"extras": {"s": torch.eye(2).to_sparse()}}, r"extras\.s is a Tensor with layout torch.sparse_coo"),
        ({"extras": {"s": torch.empty(2, device="meta")}}, r"extras\.s is torch.float32 on meta"),
    ],
)
def test_what_a_snapshot_cannot_hold_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        flatten(TrainingState(**{"model": nn.Linear(2, 2), **change}))


def test_buffers_that_cannot_take_it_are_refused() -> None:
    flat = flatten(TrainingState(model=nn.Linear(2, 2)))
    with pytest.raises(InvalidArgument, match=f"takes {flat.num_bytes}"):
        flat.copy_into(bytearray(flat.num_bytes - 1))
    with pytest.raises(InvalidArgument, match="read-only"):
        flat.copy_into(bytes(flat.num_bytes))


def test_generators_can_be_set_again_after_an_iterator_drew_from_them() -> None:
    model = nn.Linear(2, 2)
    snapshot = taken(TrainingState(model=model))
    expected = torch.rand(3)
    restored = restore(*snapshot, TrainingState(model=model))
    next(iter(torch.utils.data.DataLoader([1, 2])))
    restored.set_rng()
    assert torch.equal(torch.rand(3), expected)


def test_a_copy_that_fails_leaves_nothing_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(torch.Tensor):
        is_cuda = True

    class Stream:
        busy = True

        def synchronize(self) -> None:
            self.busy = False

    stream = Stream()
    monkeypatch.setattr(snapshot_state, "_side_stream", lambda device, streams: streams.setdefault(device, stream))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    tensors = (torch.ones(4).as_subclass(OnDevice), torch.ones(4))
    flat = snapshot_state.Flat({}, tensors, (0, 24), 32)  # the second one lies beyond the end
    with pytest.raises(RuntimeError):
        flat.copy_into(bytearray(32))
    assert not stream.busy

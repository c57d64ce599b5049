"""Copies on real streams: exact, within the predicted bytes, and from page-locked memory of the planned size."""

from __future__ import annotations

import pytest
import torch

from stowplan.offload.blocks import Block
from stowplan.offload.copies import OverlappedCopies
from stowplan.offload.copies.lanes import lanes_for
from stowplan.offload.engine import Engine
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.storages import content_of
from tests import models
from tests.offload import toys
from tests.offload.portions import portion_of, send

pytestmark = pytest.mark.gpu

MIB = 2**20
NUM_BLOCKS = 6


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("the gpu tests were asked for, and there is no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def batch_of(seed: int, device: torch.device) -> dict[str, object]:
    batch = models.batch_for(seed, batch=2, sequence=256)
    return {name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in batch.items()}


def train(model: torch.nn.Module, device: torch.device, interleaved: bool) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    seen = []
    for step in range(4):
        losses = []
        for number in range(4):
            if number < 3:
                losses.append(model(**batch_of(3 * step + number, device)).loss)
                if not interleaved:
                    losses[-1].backward()
            if number and interleaved:
                losses[number - 1].backward()
        seen += [loss.detach() for loss in losses]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("policy", ["swap", "mixed"])
def test_training_is_exact(device: torch.device, policy: str, window: int, interleaved: bool) -> None:
    expected = train(models.gpt2(NUM_BLOCKS, 256).to(device), device, interleaved)
    model = models.gpt2(NUM_BLOCKS, 256).to(device)
    names = toys.block_names(model)
    decisions = toys.decide(model, names, policy, lambda twin: twin(**batch_of(0, device)))
    slab = HostSlab(512 * MIB, device)
    copies = OverlappedCopies(slab, lanes_for(device), window)
    engine = Engine(model, [Block(name, model.get_submodule(name)) for name in names], decisions, copies)
    seen = train(model, device, interleaved)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert engine.counters.departures == 0
    assert 0 < engine.counters.returned_bytes < engine.counters.swapped_bytes
    assert (slab.used_bytes, slab.overflow_bytes) == (0, 0)


def test_values_come_back_while_compute_reuses_their_memory(device: torch.device) -> None:
    """Large copies, and kernels that overwrite whatever the allocator gives out meanwhile."""
    slab = HostSlab(512 * MIB, device)
    copies = OverlappedCopies(slab, lanes_for(device), 2)
    stops, sent, expected = [], [], []
    for place in range(8):
        stops.append(copies.begin(place, str(place)))
        value = torch.rand(8 * MIB, device=device)
        expected.append(value.double().sum())
        sent += send(copies, stops[-1], portion_of(value))
        del value
        torch.full((8 * MIB,), float("nan"), device=device)
    for place in reversed(range(8)):
        copies.fetch(stops[place], [sent[place]])
        torch.full((8 * MIB,), float("nan"), device=device)
        assert sent[place].tensor.double().sum() == expected[place]
        sent.pop()


def test_bytes_on_the_device_are_those_of_the_window(device: torch.device) -> None:
    slab = HostSlab(256 * MIB, device)
    copies = OverlappedCopies(slab, lanes_for(device), 2)
    size = 16 * MIB
    before = torch.cuda.memory_allocated(device)
    kept = []
    for place in range(8):
        stop = copies.begin(place, str(place))
        value = torch.empty(size, dtype=torch.uint8, device=device)
        kept.append((stop, send(copies, stop, portion_of(value))))
        del value
        assert torch.cuda.memory_allocated(device) - before == min(place + 1, 2) * size


def test_the_slab_is_page_locked_and_a_range_travels(device: torch.device) -> None:
    slab = HostSlab(MIB, device)
    assert slab.view(slab.take(4096)).is_pinned()
    copies = OverlappedCopies(slab, lanes_for(device), 1)
    whole = torch.arange(1024.0, device=device)
    stop = copies.begin(0, "block")
    (copy,) = send(copies, stop, portion_of(whole, 1024, 2048))
    copies.begin(1, "other")
    assert copies.fetch(stop, [copy]) == 1024
    assert torch.equal(content_of(copy.tensor)[1024:2048], content_of(whole)[1024:2048])


def test_a_trace_has_the_seconds_of_the_device(device: torch.device) -> None:
    copies = OverlappedCopies(HostSlab(256 * MIB, device), lanes_for(device), 1)
    trace = copies.record()
    value = torch.ones(32 * MIB, device=device)
    stop = copies.begin(0, "block")
    (copy,) = send(copies, stop, portion_of(value))
    copies.begin(1, "other")
    copies.fetch(stop, [copy])
    spans = {span.queue: span for span in trace.spans()}
    assert spans["to host"].end_seconds > spans["to host"].start_seconds
    assert spans["to device"].start_seconds >= spans["to host"].end_seconds

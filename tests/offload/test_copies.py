"""What every copy engine promises: the same bits back, in the same geometry, and the host bytes given up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stowplan.offload.copies import CopyEngine, PlainCopies
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.tape import Geometry

SLAB_BYTES = 2**20

Engine = tuple[CopyEngine, HostSlab]


def plain_copies() -> Engine:
    slab = HostSlab(SLAB_BYTES)
    return PlainCopies(slab), slab


# Every engine belongs in this list.
engines = pytest.mark.parametrize("make_engine", [plain_copies])

base = torch.linspace(-3, 3, 240)
TENSORS = {
    "contiguous": base.view(12, 20),
    "transposed": base.view(12, 20).t(),
    "slice with an offset": base.view(12, 20)[3:7, 2:15:3],
    "expanded": base[:5, None].expand(5, 7),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "bool": base > 0,
    "int64": torch.arange(31),
    "bfloat16": base.bfloat16().view(4, 60),
    "complex64": torch.complex(base, base.flip(0)),
    "channels last": base.view(2, 3, 5, 8).to(memory_format=torch.channels_last),
    "not a number": torch.tensor([float("nan"), float("-inf"), -0.0]),
}
tensors = pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@engines
@tensors
def test_a_round_trip_gives_the_same_bits_in_the_same_geometry(
    make_engine: Callable[[], Engine], tensor: torch.Tensor
) -> None:
    copies, slab = make_engine()
    original = tensor.clone(memory_format=torch.preserve_format) if tensor.is_contiguous() else tensor
    ticket = copies.to_host(original)
    assert slab.used_bytes >= original.untyped_storage().nbytes()
    back = copies.to_device(ticket)
    copies.wait(back)
    assert Geometry.of(back) == Geometry.of(original)
    assert back.untyped_storage().nbytes() == original.untyped_storage().nbytes()
    assert back.device == original.device
    assert torch.equal(bits(back), bits(original))
    copies.release(ticket)
    assert slab.used_bytes == 0


@engines
def test_copies_share_no_memory_with_their_origin(make_engine: Callable[[], Engine]) -> None:
    copies, _ = make_engine()
    tensor = torch.ones(8)
    ticket = copies.to_host(tensor)
    tensor.zero_()
    first, second = copies.to_device(ticket), copies.to_device(ticket)
    copies.wait(first)
    copies.wait(second)
    first.fill_(7)
    copies.release(ticket)
    assert second.tolist() == [1.0] * 8
    assert tensor.tolist() == [0.0] * 8


@engines
def test_many_values_are_away_at_once(make_engine: Callable[[], Engine]) -> None:
    copies, slab = make_engine()
    values = [torch.full((10 + i,), float(i)) for i in range(20)]
    tickets = [copies.to_host(value) for value in values]
    order = [7, 0, 19, *(i for i in range(20) if i not in (7, 0, 19))]
    for i in order:
        back = copies.to_device(tickets[i])
        copies.wait(back)
        copies.release(tickets[i])
        assert torch.equal(back, values[i])
    assert slab.used_bytes == 0


@engines
def test_a_whole_storage_travels_with_a_view_of_it(make_engine: Callable[[], Engine]) -> None:
    copies, _ = make_engine()
    whole = torch.arange(12.0)
    back = copies.to_device(copies.to_host(whole[4:6]))
    copies.wait(back)
    assert torch.equal(back.as_strided((12,), (1,), 0), whole)

"""What every copy engine promises: the same bits back, in the same geometry, and the host bytes given up."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count

import pytest
import torch

from stowplan.offload.copies import CopyEngine, Freight, HostCopy, Manifest, OverlappedCopies, PlainCopies, Stop
from stowplan.offload.copies.lanes import ThreadLanes
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.tape.tape import Geometry
from tests.offload.portions import Portion, portion_of, send

SLAB_BYTES = 2**20
WINDOW = 2

Engine = tuple[CopyEngine, HostSlab]


def plain_copies() -> Engine:
    slab = HostSlab(SLAB_BYTES)
    return PlainCopies(slab), slab


def overlapped_copies() -> Engine:
    slab = HostSlab(SLAB_BYTES)
    return OverlappedCopies(slab, ThreadLanes(), WINDOW), slab


# Every engine belongs in this list.
engines = pytest.mark.parametrize("make_engine", [plain_copies, overlapped_copies])

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


def send_away(copies: CopyEngine, *portions: Portion) -> tuple[Stop, list[HostCopy]]:
    """Until nothing is left on the device: as many blocks pass as may be on their way."""
    places = count()
    stop = copies.begin(next(places), "block")
    sent = send(copies, stop, *portions)
    for _ in range(copies.window):
        copies.begin(next(places), "other")
    assert all(copy.content is None for copy in sent)
    return stop, sent


@engines
@tensors
def test_a_round_trip_gives_the_same_bits_in_the_same_geometry(
    make_engine: Callable[[], Engine], tensor: torch.Tensor
) -> None:
    copies, slab = make_engine()
    original = tensor.clone(memory_format=torch.preserve_format) if tensor.is_contiguous() else tensor
    num_bytes = original.untyped_storage().nbytes()
    stop, (copy,) = send_away(copies, portion_of(original))
    assert slab.used_bytes >= num_bytes
    assert copies.fetch(stop, [copy]) == num_bytes
    back = copy.tensor
    assert Geometry.of(back) == Geometry.of(original)
    assert back.untyped_storage().nbytes() == num_bytes
    assert back.device == original.device
    assert torch.equal(bits(back), bits(original))
    assert back.data_ptr() != original.data_ptr() or not num_bytes
    assert slab.used_bytes == 0


@engines
def test_fetching_twice_copies_once(make_engine: Callable[[], Engine]) -> None:
    copies, _ = make_engine()
    stop, (copy,) = send_away(copies, portion_of(torch.ones(8)))
    assert copies.fetch(stop, [copy]) == 32
    assert copies.fetch(stop, [copy]) == 0
    assert copy.tensor.tolist() == [1.0] * 8


@engines
def test_many_values_are_away_at_once(make_engine: Callable[[], Engine]) -> None:
    copies, slab = make_engine()
    values = [torch.full((10 + i,), float(i)) for i in range(20)]
    stop, sent = send_away(copies, *map(portion_of, values))
    order = [7, 0, 19, *(i for i in range(20) if i not in (7, 0, 19))]
    for i in order:
        copies.fetch(stop, [sent[i]])
        assert torch.equal(sent[i].tensor, values[i])
    assert slab.used_bytes == 0


@engines
def test_a_whole_storage_travels_with_a_view_of_it(make_engine: Callable[[], Engine]) -> None:
    copies, _ = make_engine()
    whole = torch.arange(12.0)
    stop, (copy,) = send_away(copies, portion_of(whole[4:6]))
    copies.fetch(stop, [copy])
    assert copy.tensor.tolist() == [4.0, 5.0]
    assert torch.equal(copy.tensor.as_strided((12,), (1,), 0), whole)


@engines
def test_a_range_of_bytes_travels_and_leaves_the_others_alone(make_engine: Callable[[], Engine]) -> None:
    """The rest of the new storage is for somebody else to write."""
    copies, slab = make_engine()
    whole = torch.arange(64.0)
    stop, (copy,) = send_away(copies, portion_of(whole, 16 * 4, 40 * 4))
    assert slab.used_bytes == 24 * 4 + 32  # aligned to 64
    assert copies.fetch(stop, [copy]) == 24 * 4
    back = copy.tensor
    back[:16] = -1
    back[40:] = -2
    assert back.tolist() == [-1.0] * 16 + list(range(16, 40)) + [-2.0] * 24


@engines
def test_copies_that_nobody_wants_give_their_bytes_back(make_engine: Callable[[], Engine]) -> None:
    copies, slab = make_engine()
    _, sent = send_away(copies, *(portion_of(torch.ones(100)) for _ in range(4)))
    del sent
    gc.collect()
    assert slab.used_bytes == 0
    sent = send(copies, copies.begin(0, "block"), portion_of(torch.ones(100)))
    del sent
    assert slab.used_bytes == 0


@engines
def test_what_left_together_is_given_back_with_the_last_of_it(make_engine: Callable[[], Engine]) -> None:
    copies, slab = make_engine()
    stop, sent = send_away(copies, *(portion_of(torch.full((16,), float(i))) for i in range(4)))
    del sent[1:3]
    assert slab.used_bytes == 4 * 64
    copies.fetch(stop, sent[:1])
    assert slab.used_bytes == 4 * 64
    copies.fetch(stop, sent[1:])
    assert slab.used_bytes == 0
    assert [copy.tensor[0].item() for copy in sent] == [0.0, 3.0]


@engines
@pytest.mark.filterwarnings("ignore:the host slab:RuntimeWarning")
def test_what_does_not_fit_the_slab_in_one_piece_is_put_where_there_is_room(make_engine: Callable[[], Engine]) -> None:
    copies, slab = make_engine()
    before, hole, between = (slab.take(size) for size in (64, 128, SLAB_BYTES - 3 * 64))
    slab.give_back(hole)
    values = [torch.full((16,), float(i)) for i in range(4)]
    stop, sent = send_away(copies, *map(portion_of, values))
    assert slab.used_bytes == SLAB_BYTES
    assert slab.overflow_bytes == 2 * 64
    copies.fetch(stop, sent)
    assert [copy.tensor.tolist() for copy in sent] == [value.tolist() for value in values]
    assert slab.used_bytes == before.size_bytes + between.size_bytes


def test_a_manifest_is_made_anew_for_storages_that_are_not_as_known() -> None:
    def freight(part: torch.Tensor, given: bool = False) -> Freight:
        return Freight(Geometry.of(part), part.untyped_storage().nbytes(), given=given)

    small, large = torch.zeros(8), torch.zeros(12)
    manifest = Manifest([freight(small), freight(small[2:6]), freight(small, given=True)])
    assert manifest.fitting([small, small[2:6], small]) is manifest
    found = manifest.fitting([small, large[2:6], large[:8]])
    assert [f.num_bytes for f in found.freights] == [32, 48, 48]
    assert [f.dense for f in found.freights] == [True, False, False]
    assert found.size_bytes == 128


# ---- only where copies run beside compute ----------------------------------------------------------------------------
def test_what_is_still_on_the_device_is_taken_as_it_is() -> None:
    copies, slab = overlapped_copies()
    original = torch.arange(8.0)
    stop = copies.begin(0, "block")
    (copy,) = send(copies, stop, portion_of(original))
    copies.begin(1, "other")
    assert copies.fetch(stop, [copy]) == 0
    assert copy.tensor.data_ptr() == original.data_ptr()
    assert slab.used_bytes == 0


def test_values_come_back_ahead_and_are_not_copied_again() -> None:
    copies, _ = overlapped_copies()
    sent, stops = [], []
    for place in range(5):
        stops.append(copies.begin(place, str(place)))
        sent += send(copies, stops[-1], portion_of(torch.full((4,), float(place))))
    assert [copy.content is not None for copy in sent] == [False] * 3 + [True] * 2
    travelled = [copies.fetch(stops[place], [sent[place]]) for place in reversed(range(5))]
    assert travelled == [0, 16, 16, 16, 0]  # each has the one before it come: 3, which never left, then 2, 1 and 0
    assert [copy.tensor.tolist() for copy in sent] == [[float(place)] * 4 for place in range(5)]


def test_a_block_that_keeps_everything_has_those_before_it_come() -> None:
    copies, _ = overlapped_copies()
    stop, (copy,) = send_away(copies, portion_of(torch.ones(4)))
    after = Stop(stop.passage, 1, "keeps", stop.compute)
    assert copies.turn(after) == 16
    assert copy.content is not None
    assert copies.fetch(stop, [copy]) == 0


def test_a_trace_says_what_ran_when() -> None:
    slab = HostSlab(SLAB_BYTES)
    copies = OverlappedCopies(slab, ThreadLanes(), WINDOW)
    trace = copies.record()
    assert trace.spans() == []
    stops, sent = [], []
    for place in range(4):
        stops.append(copies.begin(place, str(place)))
        sent += send(copies, stops[-1], portion_of(torch.ones(4)))
    for place in reversed(range(4)):
        copies.fetch(stops[place], [sent[place]])
    copies.begin(0, "0")
    found = [(span.queue, span.block, span.what) for span in trace.spans()]
    assert sorted(found) == sorted(
        [
            *(("compute", str(place), way) for place in range(4) for way in ("forward", "backward")),
            *(("to host", str(place), "copy") for place in range(4)),
            *(("to device", str(place), "copy") for place in (0, 1)),
        ]
    )
    assert all(0 <= span.start_seconds <= span.end_seconds for span in trace.spans())


def test_what_does_not_fit_the_slab_comes_back_too() -> None:
    slab = HostSlab(64)
    copies = OverlappedCopies(slab, ThreadLanes(), WINDOW)
    values = [torch.full((100,), float(i)) for i in range(3)]
    with pytest.warns(RuntimeWarning, match="the host slab of 64 B is full"):
        stop, sent = send_away(copies, *map(portion_of, values))
    copies.fetch(stop, sent)
    assert [copy.tensor[0].item() for copy in sent] == [0.0, 1.0, 2.0]
    copies.begin(0, "block")
    assert not copies._overflow

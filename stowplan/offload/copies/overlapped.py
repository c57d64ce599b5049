"""Copies that run beside compute, on lanes of their own.

Note: who waits for whom
    A value is LEAVING (its bytes are on the device, a copy to the host is on its way), AWAY (on the host alone), COMING
    (in a new device buffer that is being filled) or BACK. Six waits order the three queues, and nothing else does:

    1. the lane to the host waits for the block's forward, which made the values;
    2. ... and for copies out of host bytes that were given back since, as it may be about to overwrite them;
    3. compute waits for the copies of block i before block i + window begins, and before block i's own backward. Only
       then are the device bytes let go (LEAVING -> AWAY), or taken as they are (LEAVING -> BACK);
    4. the lane to the device waits for what compute was given before the buffers were allocated: whoever had that
       memory before is done with it. By 3 the value is on the host then;
    5. compute waits for the copies into a block's buffers before the block's backward uses them (COMING -> BACK);
    6. compute waits for copies of values that nobody wanted any more, before their device bytes are let go.

    So memory goes back to the allocator only when the stream that it was allocated on has waited for the last copy that
    reads or writes it, and there is no need for ``record_stream``, which would hold it until the allocator happens to
    look. Host bytes are given back as soon as the last copy out of a consignment is on its lane: copies to the host are
    in order among themselves, and 2 orders them after that one.

Note: one order of locks
    ``_at_work`` is held while copies are started and waited for. A value may die at any time, in any thread, also in
    the middle of that by the garbage collector, so ``_abandon`` and ``_give_back`` take no lock: they append to queues
    that the next block to begin, forward or backward, works off.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from stowplan.offload.copies.lanes import Compute, Lanes, Mark
from stowplan.offload.copies.protocol import Consignment, Freight, HostCopy, Manifest, Passage, Stop
from stowplan.offload.copies.trace import Trace
from stowplan.offload.host_slab import HostSlab, Span
from stowplan.offload.storages import content_of, modified_in_place

__all__ = ["OverlappedCopies"]


class _Traveller(HostCopy):
    """A value whose copies are seen by nobody but the lanes.

    ``mark`` is of the copy that is on its way and that compute (``compute``, on whose stream ``content`` was allocated)
    has not waited for. A value that has no share in its consignment any more is coming or back. ``fault`` is set if
    somebody changed what never left in place (it had ``version``) while the copy may have been on its way.
    """

    __slots__ = ("_abandon", "complete", "compute", "fault", "mark", "version")

    content: torch.Tensor | None

    def __init__(
        self,
        freight: Freight,
        tensor: torch.Tensor,
        span: Span,
        consignment: Consignment,
        compute: Compute,
        abandon: Callable[[_Traveller], None],
    ) -> None:
        super().__init__(freight, tensor.device, span, consignment)
        self.content = tensor
        self.complete = True
        self.version = tensor._version
        self.fault: RuntimeError | None = None
        self.mark: Mark = None
        self.compute = compute
        self._abandon = abandon

    def check_untouched(self) -> None:
        """The copy is over: was the value what it was when it was sent, all the while?"""
        if self.content is not None and self.content._version != self.version:
            self.fault = modified_in_place(self.content, self.version)

    @property
    def tensor(self) -> torch.Tensor:
        assert self.mark is None, "compute has not waited for this value"
        if self.fault is not None:
            raise self.fault
        return super().tensor

    def __del__(self) -> None:
        # By the garbage collector too, in any thread and in the middle of anything: this may take no lock.
        if self.mark is not None:
            self._abandon(self)


class _Way(threading.local):
    """Where a thread is: its forward pass, and the stops whose values are leaving, with their numbers."""

    def __init__(self) -> None:
        self.passage = Passage(0)
        self.leaving: deque[tuple[int, weakref.ref[Stop]]] = deque()


class OverlappedCopies:
    """Copies on ``lanes``; up to ``window`` blocks' values are on their way in each direction.

    That is what the planner counts as staged (docs/planner.md). ``trace`` records what ran when, once ``record`` is
    called.
    """

    def __init__(self, slab: HostSlab, lanes: Lanes, window: int) -> None:
        self.slab = slab
        self.window = window
        self.trace: Trace | None = None
        self._lanes = lanes
        self._way = _Way()
        self._at_work = threading.Lock()
        self._abandoned: deque[tuple[Compute, Mark, torch.Tensor | None]] = deque()
        # Host memory beside the slab goes back to the system, so the host itself must know that its copies are over.
        self._overflow: deque[tuple[Mark, Mark, Span]] = deque()
        self._last_sent: Mark = None
        self._last_fetched: Mark = None
        self._unordered_reads: Mark = None  # of host bytes that were given back
        self._backward: tuple[str, Any] | None = None  # block and start of what is to be traced

    def record(self) -> Trace:
        """Record from now on what runs when."""
        self.trace = Trace(self._lanes.seconds_between)
        return self.trace

    # ---- forward ---------------------------------------------------------------------------------------------------
    def begin(self, place: int, name: str) -> Stop:
        way = self._way
        passage = way.passage
        if place <= passage.last:
            passage = way.passage = Passage(passage.origin + passage.last + 1)
        passage.last = place
        with self._at_work:
            compute = self._lanes.compute()
            self._let_go_abandoned()
            due = passage.origin + place - self.window
            while way.leaving and way.leaving[0][0] <= due:
                stop = way.leaving.popleft()[1]()
                if stop is not None:
                    self._let_go(stop)
        stop = Stop(passage, place, name, compute)
        if self.trace is not None:
            self._trace_backward(None, compute)
            stop.started = compute.stamp()
        return stop

    def send(self, stop: Stop, manifest: Manifest, tensors: Sequence[torch.Tensor]) -> list[_Traveller]:
        if self.trace is not None and stop.started is not None:
            self.trace.add("compute", stop.name, "forward", stop.started, stop.compute.stamp())
        if not tensors:
            return []
        with self._at_work:
            spans, held = self.slab.take_all(manifest.layout)
            consignment = Consignment(held, self._give_back)
            sent = [
                _Traveller(freight, tensor, span, consignment, stop.compute, self._abandon)
                for freight, tensor, span in zip(manifest.freights, tensors, spans, strict=True)
            ]
            pairs = [
                (self.slab.view(copy.span), _part(copy, tensor)) for copy, tensor in zip(sent, tensors, strict=True)
            ]
            self._lane_waits_for_reads()
            self._lane_waits_for_values(stop.compute)
            mark = self._last_sent = self._lanes.to_host.copy(pairs, stop.name, self.trace)
            for copy in sent:
                copy.mark = mark
            stop.copies = [weakref.ref(copy) for copy in sent]
        here = weakref.ref(stop)
        stop.passage.stops[stop.place] = here
        self._way.leaving.append((stop.passage.origin + stop.place, here))
        return sent

    def _let_go(self, stop: Stop) -> None:
        """LEAVING -> AWAY."""
        leaving = [copy for copy in stop.at_hand() if copy.mark is not None and copy.consignment is not None]
        if leaving:
            self._compute_waits_for_departures(leaving[0])
        for copy in leaving:
            copy.check_untouched()
            copy.content = copy.mark = None

    # ---- backward --------------------------------------------------------------------------------------------------
    def fetch(self, stop: Stop, copies: Sequence[HostCopy]) -> int:
        wanted = cast(Sequence[_Traveller], copies)  # nobody else makes any
        with self._at_work:
            compute = self._lanes.compute()
            self._trace_backward(stop.name, compute)
            self._let_go_abandoned()
            travelling = self._start_back(wanted, compute, stop.name)
            travelling += self._look_ahead(stop, compute)
            waited: Mark = None
            for copy in wanted:
                mark = copy.mark
                if mark is None:
                    continue
                if copy.consignment is not None:  # LEAVING -> BACK
                    if mark is not waited:
                        self._compute_waits_for_departures(copy)
                    copy.check_untouched()
                    copy.consignment = None
                elif mark is not waited:
                    self._compute_waits_for_arrivals(compute, mark)
                waited, copy.mark = mark, None
        return travelling

    def turn(self, stop: Stop) -> int:
        with self._at_work:
            compute = self._lanes.compute()
            self._trace_backward(stop.name, compute)
            self._let_go_abandoned()
            return self._look_ahead(stop, compute)

    def _look_ahead(self, stop: Stop, compute: Compute) -> int:
        """Start bringing back the blocks before ``stop``, the nearest first. A block that ran on another stream is left
        alone: its memory is that stream's.
        """
        travelling = 0
        for place in range(stop.place - 1, stop.place - self.window, -1):
            ref = stop.passage.stops.get(place)
            before = ref() if ref is not None else None
            if before is not None and before.compute == compute:
                travelling += self._start_back(before.at_hand(), compute, before.name)
        return travelling

    def _start_back(self, copies: Sequence[_Traveller], compute: Compute, name: str) -> int:
        """AWAY -> COMING; the bytes that are on their way."""
        away = [copy for copy in copies if copy.content is None and copy.consignment is not None]
        if not away:
            return 0
        buffers = [copy.freight.new_content(copy.device) for copy in away]
        pairs = [(_part(copy, content), self.slab.view(copy.span)) for copy, content in zip(away, buffers, strict=True)]
        self._lane_waits_for_buffers(compute)
        mark = self._lanes.to_device.copy(pairs, name, self.trace)
        self._last_fetched = self._unordered_reads = mark
        for copy, content in zip(away, buffers, strict=True):
            copy.content, copy.complete, copy.mark, copy.compute = content, False, mark, compute
            copy.consignment = None
        return sum(copy.freight.size_bytes for copy in away)

    # ---- the waits: "Note: who waits for whom" ---------------------------------------------------------------------
    def _lane_waits_for_values(self, compute: Compute) -> None:
        self._lanes.to_host.wait(compute.mark())

    def _lane_waits_for_reads(self) -> None:
        reads, self._unordered_reads = self._unordered_reads, None
        if reads is not None:
            self._lanes.to_host.wait(reads)

    def _compute_waits_for_departures(self, copy: _Traveller) -> None:
        copy.compute.wait(copy.mark)

    def _lane_waits_for_buffers(self, compute: Compute) -> None:
        self._lanes.to_device.wait(compute.mark())

    def _compute_waits_for_arrivals(self, compute: Compute, mark: Mark) -> None:
        compute.wait(mark)

    def _compute_waits_for_abandoned(self, compute: Compute, mark: Mark) -> None:
        compute.wait(mark)

    # ---- letting go ------------------------------------------------------------------------------------------------
    def _abandon(self, copy: _Traveller) -> None:
        """Nobody wants ``copy`` any more, which is on its way. "Note: one order of locks"."""
        self._abandoned.append((copy.compute, copy.mark, copy.content))

    def _give_back(self, span: Span) -> None:
        """Host bytes that have been read, will be by copies that are on their lane, or need not be."""
        if span.overflow is not None:
            self._overflow.append((self._last_sent, self._last_fetched, span))
        self.slab.give_back(span)

    def _let_go_abandoned(self) -> None:
        waited: Mark = None
        while self._abandoned:
            compute, mark, content = self._abandoned.popleft()
            if mark is not waited:
                self._compute_waits_for_abandoned(compute, mark)
                waited = mark
            del content
        is_done = self._lanes.is_done
        while self._overflow and all(mark is None or is_done(mark) for mark in self._overflow[0][:2]):
            self._overflow.popleft()

    def _trace_backward(self, name: str | None, compute: Compute) -> None:
        """A block's backward is drawn until the next one begins, or the next forward."""
        if self.trace is None:
            return
        now = compute.stamp()
        if self._backward is not None:
            block, start = self._backward
            self.trace.add("compute", block, "backward", start, now)
        self._backward = (name, now) if name is not None else None

    def __del__(self) -> None:
        # The slab and what was abandoned go now: no copy may be under way.
        self._lanes.to_host.finish()
        self._lanes.to_device.finish()


def _part(copy: HostCopy, content: torch.Tensor) -> torch.Tensor:
    """Those of the storage's bytes that travel."""
    whole, freight = content_of(content), copy.freight
    return whole if whole.numel() == freight.size_bytes else whole[freight.start : freight.stop]

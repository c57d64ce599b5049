"""From the marks of an outline to the phases of a step: what is around the blocks, and between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stowplan.core.program import BlockProgram, Gap, Phase
from stowplan.offload.capture.outline import (
    EMBEDDING_FORWARD,
    END,
    Moment,
    Outline,
    after,
    before,
    given_back,
    handed_on,
)

__all__ = ["Phases", "phases_of"]


class Phases(NamedTuple):
    """The phases that a capture finds. ``left_bytes`` is what the parts outside the blocks hold at the end."""

    embedding_forward: Phase
    head: Phase
    embedding_backward: Phase
    gaps: tuple[Gap, ...]
    left_bytes: int


def phases_of(outline: Outline, moments: Mapping[str, Moment], programs: Sequence[BlockProgram]) -> Phases:
    """Phases from ``moments``; ``programs`` are those of the calls, in order.

    What is alive outside the blocks at a mark is what the log has there, less what the next block counts itself: its
    own inputs before its forward, the gradients of its outputs before its backward. Blocks that backward does not
    reach (frozen ones) find there what the block before them in backward found.
    """
    calls = range(len(outline.calls))
    forward_left = [_forward_left(outline, moments, call) for call in calls]
    backward_left: list[int] = []
    left = 0
    for call in reversed(calls):
        if given_back(call) in moments:
            left = max(0, _start(moments, given_back(call)) - programs[call].output_gradient_bytes)
        elif not backward_left:
            left = _start(moments, END)
        backward_left.append(left)
    backward_left.reverse()
    end = _start(moments, END)
    last = calls[-1]
    gaps = [
        Gap(
            block=call,
            forward=_phase(moments.get(handed_on(call - 1)), forward_left[call]),
            backward=_phase(moments.get(after(call)), backward_left[call - 1]),
        )
        for call in calls[1:]
    ]
    shown = [
        gap
        for gap in gaps
        if (gap.forward.left_bytes, gap.backward.left_bytes) != (forward_left[gap.block - 1], backward_left[gap.block])
        or gap.forward.peak_bytes > gap.forward.left_bytes + programs[gap.block].forward_peak_bytes
        or gap.backward.peak_bytes + programs[gap.block].gradient_bytes
        > backward_left[gap.block] + programs[gap.block].backward_peak_bytes
    ]
    return Phases(
        embedding_forward=_phase(moments[EMBEDDING_FORWARD], forward_left[0]),
        head=_phase(moments[handed_on(last)], backward_left[last]),
        embedding_backward=_phase(moments.get(after(0)), end),
        gaps=tuple(shown),
        left_bytes=end,
    )


def _forward_left(outline: Outline, moments: Mapping[str, Moment], number: int) -> int:
    call, moment = outline.calls[number], moments[before(number)]
    own = call.own_bytes(outline.shared_positions(number), outline.captures[call.kind].input_bytes)
    return max(0, moment.segment.start_bytes - own - moment.earlier_bytes)


def _start(moments: Mapping[str, Moment], mark: str) -> int:
    return moments[mark].segment.start_bytes


def _phase(moment: Moment | None, left_bytes: int) -> Phase:
    if moment is None:  # a backward that nothing asks for
        return Phase(seconds=0.0, peak_bytes=left_bytes, left_bytes=left_bytes)
    return Phase(seconds=moment.seconds, peak_bytes=moment.segment.peak_bytes, left_bytes=left_bytes)

"""The head of a model, its last layer and the loss, as something to be planned: whole, or in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stowplan.core.allocations import OutsideAllocations, check_outside_allocations
from stowplan.core.program import Gap, Phase, StepProgram
from stowplan.core.records import RecordError

__all__ = ["Head", "HeadWay", "check_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWay:
    """One way to do the head, and what a step outside its blocks takes then.

    ``chunk_rows``: rows whose logits are there at once; 0: the model's own head. Logits that are held until backward is
    over count in every phase after the head, so all of them belong to the way.
    """

    chunk_rows: int
    embedding_forward: Phase
    head: Phase
    embedding_backward: Phase
    optimizer_step: Phase
    gaps: tuple[Gap, ...] = ()
    outside: OutsideAllocations | None = None

    @staticmethod
    def of(step: StepProgram, chunk_rows: int) -> HeadWay:
        """The way that ``step`` was captured in."""
        return HeadWay(
            chunk_rows=chunk_rows,
            embedding_forward=step.embedding_forward,
            head=step.head,
            embedding_backward=step.embedding_backward,
            optimizer_step=step.optimizer_step,
            gaps=step.gaps,
            outside=step.outside,
        )

    def within(self, step: StepProgram) -> StepProgram:
        """``step`` with its head done this way."""
        return replace(
            step,
            embedding_forward=self.embedding_forward,
            head=self.head,
            embedding_backward=self.embedding_backward,
            optimizer_step=self.optimizer_step,
            gaps=self.gaps,
            outside=self.outside,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A head that may be done in chunks.

    Attributes:
        module: the last layer's dotted name in the model.
        chunk_rows: the chosen way, one of ``ways``; the plan's step is captured in it.
        allowed: whether the user allowed chunks; if not, ``ways`` only tells what they would bring.
        ways: the model's own first.
    """

    module: str
    chunk_rows: int
    allowed: bool
    ways: tuple[HeadWay, ...]

    @property
    def own(self) -> HeadWay:
        """The model's own head."""
        return self.ways[0]

    @property
    def chunked(self) -> HeadWay:
        """The chosen way or, where the own is chosen, that of the others which has the lowest peak."""
        others = [way for way in self.ways[1:] if way.chunk_rows == self.chunk_rows] or self.ways[1:]
        return min(others, key=lambda way: way.head.peak_bytes)


def check_head(head: Head, step: StepProgram) -> None:
    """Raise RecordError unless the ways differ, the own comes first, and the step is captured in the chosen one."""
    rows = [way.chunk_rows for way in head.ways]
    if len(rows) < 2 or rows[0] != 0 or min(rows) < 0 or len(set(rows)) != len(rows):
        raise RecordError(
            f"$.head.ways: chunk_rows are {rows}; expected: 0 first, then one or more others, all different"
        )
    if head.chunk_rows not in rows or (head.chunk_rows and not head.allowed):
        raise RecordError(f"$.head.chunk_rows: {head.chunk_rows} is none of the ways that are allowed")
    for number, way in enumerate(head.ways):
        if way.outside is not None:
            check_outside_allocations(way.outside, step.num_blocks, f"$.head.ways[{number}].outside")
        before = 0
        for gap in way.gaps:
            if not before < gap.block < step.num_blocks:
                raise RecordError(f"$.head.ways[{number}].gaps: {gap.block} is not a later block of {step.num_blocks}")
            before = gap.block
    if HeadWay.of(step, head.chunk_rows) != head.ways[rows.index(head.chunk_rows)]:
        raise RecordError("$.head: the phases of $.step are not those of the chosen way")

"""What one training step does: the programs of its blocks, and the memory and time outside them.

Bytes are bytes of storages on the device, times are seconds. A block program is in single-assignment form: an
in-place write makes a new Value of zero bytes' growth (the storage is counted once, at its last version).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from stowplan.core.allocations import BlockAllocations, OutsideAllocations

__all__ = [
    "Action",
    "BlockDecisions",
    "BlockProgram",
    "Decision",
    "Decisions",
    "Gap",
    "Op",
    "Phase",
    "Split",
    "StepProgram",
    "Value",
    "decision_by_rows",
    "swaps",
]


class Action(StrEnum):
    """What happens to a saved value between forward and backward."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What happens to the token rows of one saved value: nested fractions, as in MEMO (arXiv 2407.12117, section 4.1).

    The first ``recomputed`` rows are made again, the ``swapped`` next ones wait on the host, the rest is kept. A row is
    one of ``Value.num_rows`` equal, contiguous stretches of the value's storage.
    """

    recomputed: int
    swapped: int


# What a plan says of one saved value: the same for all of it, or by rows.
Decision = Action | Split


def swaps(decision: Decision) -> bool:
    """Does anything of the value go to the host?"""
    return decision is Action.SWAP or (isinstance(decision, Split) and decision.swapped > 0)


# One for each saved value of a block, in the order of ``BlockProgram.saved``; and these for each block of a step.
BlockDecisions = tuple[Decision, ...]
Decisions = tuple[BlockDecisions, ...]


def decision_by_rows(num_rows: int, recomputed: int, swapped: int) -> Decision:
    """What is decided where the first ``recomputed`` of ``num_rows`` rows are made again and ``swapped`` follow.

    A ``Split`` only where rows differ; else the action that all of them share.
    """
    assert min(recomputed, swapped) >= 0
    assert recomputed + swapped <= num_rows
    if recomputed == num_rows:
        return Action.RECOMPUTE
    if swapped == num_rows:
        return Action.SWAP
    return Split(recomputed=recomputed, swapped=swapped) if recomputed or swapped else Action.KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A storage that the block reads or makes.

    Values that autograd saves carry the ``actions`` that are allowed for them; all others have none and exist only
    as steps on the way to a recomputation. Parameters, and inputs that all blocks share (masks, rotary tables), are
    no values: they are on the device anyway.

    A value with ``num_rows`` may be swapped by rows; ``splits`` are the numbers of first rows that may be recomputed
    alone (ascending, below ``num_rows``): at capture they had the same bits as in the whole or, where the plan need not
    be exact, were within its tolerance.
    """

    name: str
    size_bytes: int
    producer: int | None  # index of the op that makes it; None: an input of the block
    actions: tuple[Action, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    num_rows: int = 0  # 0: may not be divided
    splits: tuple[int, ...] = ()
    lingers: bool = False  # stays alive until the forward pass ends even if not kept (autocast's weight casts, caches)

    @property
    def saved(self) -> bool:
        """Does autograd save it for the backward pass?"""
        return bool(self.actions)

    def bytes_by_action(self, decision: Decision) -> dict[Action, int]:
        """Bytes of the value that ``decision`` keeps, swaps and recomputes; they add up to its size."""
        shares = dict.fromkeys(Action, 0)
        if not isinstance(decision, Split):
            shares[decision] = self.size_bytes
            return shares
        row_bytes = self.size_bytes // self.num_rows
        shares[Action.RECOMPUTE] = decision.recomputed * row_bytes
        shares[Action.SWAP] = decision.swapped * row_bytes
        shares[Action.KEEP] = self.size_bytes - shares[Action.RECOMPUTE] - shares[Action.SWAP]
        return shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator below autograd. ``inputs`` and ``outputs`` index the program's values."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    flops: int = 0
    workspace_bytes: int = 0  # scratch inside the kernel, gone when it returns
    replayable: bool = True
    causal_attention: bool = False  # recomputed for a prefix of rows at a quadratic price


@dataclass(frozen=True, kw_only=True)
class BlockProgram:
    """One block's forward and backward for one input signature; equal blocks share it. Ops are in execution order.

    Peaks are above the bytes alive at entry without the block's own input: everything saved is held, the input and
    (backward) the incoming gradient are included.
    """

    name: str
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    forward_seconds: float
    backward_seconds: float
    forward_peak_bytes: int
    backward_peak_bytes: int
    output_gradient_bytes: int = 0  # the incoming gradient of the block's output
    gradient_bytes: int = 0  # parameter gradients that stay after its backward
    held_bytes: int = 0  # saved bytes that no action can move (what autograd functions hide)
    lingering_bytes: int = 0  # unsaved bytes that stay until the forward pass ends
    allocations: BlockAllocations | None = None  # its requests one by one, where they were asked for

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """Indices of the saved values, in order: what a plan decides on."""
        return tuple(i for i, value in enumerate(self.values) if value.saved)

    def unsaved_inputs(self, ops: Iterable[int]) -> set[int]:
        """Inputs of the block that ``ops`` read and autograd does not save: who replays ``ops`` has to hold them."""
        read = {value for op in ops for value in self.ops[op].inputs}
        return {v for v in read if self.values[v].producer is None and not self.values[v].saved}

    @cached_property
    def saved_bytes(self) -> int:
        """Bytes of all saved values and of what cannot be moved."""
        return sum(self.values[i].size_bytes for i in self.saved) + self.held_bytes

    @cached_property
    def forward_end_bytes(self) -> int:
        """No fewer bytes than are alive when its forward ends: all that is saved or lingers, inputs and the output."""
        inputs = sum(v.size_bytes for v in self.values if v.producer is None and not v.saved)
        output = self.output_gradient_bytes  # as large as its gradient
        return min(self.forward_peak_bytes, self.saved_bytes + self.lingering_bytes + inputs + output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of the step outside the blocks.

    Bytes are above ``StepProgram.static_bytes`` and what blocks hold: ``peak_bytes`` the highest during the phase,
    ``left_bytes`` what the parts outside the blocks still hold after it.
    """

    seconds: float
    peak_bytes: int
    left_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What the model does between two blocks: block number ``block`` and the one before it.

    ``forward`` comes right before that block's forward, ``backward`` right after its backward.
    """

    block: int
    forward: Phase
    backward: Phase


@dataclass(frozen=True, kw_only=True)
class StepProgram:
    """One training step: static bytes, the phases around the blocks, and which program each block runs.

    Order of a step: ``embedding_forward``, blocks in order, ``head`` (final norm, head, loss and their backward),
    blocks in reverse, ``embedding_backward``, ``optimizer_step``; and between blocks the ``gaps``, where there is
    anything: most models have none, an encoder and its decoder have one, stages of a vision model have some.

    A block that is called several times in a step is there once for each call.
    """

    programs: tuple[BlockProgram, ...]
    blocks: tuple[int, ...]  # program of each block, in execution order
    block_names: tuple[str, ...]  # the same name again: another call of that block
    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    held_gradient_bytes: int  # gradients that are alive all step (accumulation); fresh ones are counted where made
    embedding_forward: Phase
    head: Phase
    embedding_backward: Phase
    optimizer_step: Phase
    gaps: tuple[Gap, ...] = ()  # in order of ``block``
    outside: OutsideAllocations | None = None  # requests around the blocks, where the programs have theirs

    @property
    def static_bytes(self) -> int:
        """Bytes alive all step whatever the plan."""
        return (
            self.parameter_bytes
            + self.buffer_bytes
            + self.optimizer_bytes
            + self.batch_bytes
            + self.held_gradient_bytes
        )

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @cached_property
    def gap_before(self) -> dict[int, Gap]:
        """The gaps by the number of the block that they precede."""
        return {gap.block: gap for gap in self.gaps}

    @cached_property
    def forward_left_bytes(self) -> tuple[int, ...]:
        """For each block, what the parts outside the blocks hold while it goes forward."""
        left, held = [], self.embedding_forward.left_bytes
        for block in range(self.num_blocks):
            held = self.gap_before[block].forward.left_bytes if block in self.gap_before else held
            left.append(held)
        return tuple(left)

    @cached_property
    def backward_left_bytes(self) -> tuple[int, ...]:
        """For each block, what the parts outside the blocks hold while it goes backward."""
        left, held = [], self.head.left_bytes
        for block in reversed(range(self.num_blocks)):
            left.append(held)
            held = self.gap_before[block].backward.left_bytes if block in self.gap_before else held
        return tuple(reversed(left))

    @cached_property
    def call_names(self) -> tuple[str, ...]:
        """A name for each block that no other has: that of the block, and which call of it where it has several."""
        calls: Counter[str] = Counter()
        names = []
        for name in self.block_names:
            calls[name] += 1
            names.append(f"{name} (call {calls[name]})" if calls[name] > 1 else name)
        return tuple(names)

    def program_of(self, block: int) -> BlockProgram:
        """The program that block number ``block`` runs."""
        return self.programs[self.blocks[block]]

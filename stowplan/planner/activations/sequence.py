"""A whole step's requests of memory under some decisions: what a capture saw of its parts, put together.

Values live and die as ``footprint`` and ``simulate`` count them: what is swapped leaves through the staging window and
comes back into new buffers, what is recomputed is made again by the ops of its replay.

Note: what belongs together
    Blocks and what is around them were captured apart. A block's output is the buffer that the outline's stand-in made
    there, and its input is what the outline passed on. In backward a block takes the gradient of its output over, and
    gives the gradient of its input for the one that the stand-in handed on: the same buffer again, or the first of its
    size to be allocated after that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from stowplan.core.allocations import (
    AllocationTrace,
    BlockAllocations,
    Events,
    Kind,
    OutsideAllocations,
    num_buffers,
)
from stowplan.core.errors import InvalidArgument
from stowplan.core.program import Action, BlockDecisions, BlockProgram, Decision, Decisions, Split, swaps
from stowplan.planner.activations.clock import NOTHING, Clock
from stowplan.planner.activations.problem import Problem, ProgramChoices

__all__ = ["allocations_of"]


def allocations_of(problem: Problem, decisions: Decisions) -> AllocationTrace:
    """The buffers of one step of ``problem`` under ``decisions``; static bytes are not among them.

    Raises InvalidArgument for decisions that are not possible, and for a step that was captured without its requests.
    """
    problem.check(decisions)
    step = problem.step
    if step.outside is None or any(program.allocations is None for program in step.programs):
        raise InvalidArgument(
            "the step was captured without its requests of memory: plan with allocations=True (--allocations FILE)."
        )
    return _Assembly(problem, decisions, step.outside).trace()


# ---- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Block:
    """One block on its way through the step. Positions are those of its saved values."""

    name: str
    program: BlockProgram
    choices: ProgramChoices
    decisions: BlockDecisions
    seen: BlockAllocations
    runs: dict[int, int]  # by op of its replay, how many of ``choices.whole`` parts of its rows it makes
    standing: dict[int, int] = field(default_factory=dict)  # the buffer of each value, by position
    kept_rows: dict[int, int] = field(default_factory=dict)
    borrowed: list[int] = field(default_factory=list)  # inputs that only the replay needs
    local: dict[int, int] = field(default_factory=dict)  # by number in ``seen``: what is neither saved nor an output

    @staticmethod
    def of(problem: Problem, number: int, decisions: BlockDecisions) -> _Block:
        program, choices = problem.step.program_of(number), problem.choices_of(number)
        assert program.allocations is not None
        runs: dict[int, int] = {}
        for position, decision in enumerate(decisions):
            share = _share(program, choices, position, decision)
            for op in choices.chains[position] if share else ():
                runs[op] = max(share, runs.get(op, 0))
        name = problem.step.call_names[number]
        return _Block(name, program, choices, decisions, program.allocations, runs)

    def size_bytes(self, position: int) -> int:
        return self.program.values[self.program.saved[position]].size_bytes

    @property
    def swapped(self) -> list[int]:
        """Positions of values that go to the host, in whole or in part."""
        return [position for position, decision in enumerate(self.decisions) if swaps(decision)]


def _share(program: BlockProgram, choices: ProgramChoices, position: int, decision: Decision) -> int:
    """How many of ``choices.whole`` parts of a value's rows are recomputed."""
    if isinstance(decision, Split):
        return decision.recomputed * (choices.whole // program.values[program.saved[position]].num_rows)
    return choices.whole if decision is Action.RECOMPUTE else 0


def _kind(decision: Decision) -> Kind:
    """What the buffer of a saved value is for, as forward makes it."""
    if decision is Action.KEEP:
        return Kind.KEPT
    return Kind.STAGED if swaps(decision) else Kind.TRANSIENT


# ---- the step --------------------------------------------------------------------------------------------------------


class _Assembly:
    """Walks through the step once."""

    def __init__(self, problem: Problem, decisions: Decisions, outside: OutsideAllocations) -> None:
        self.step = problem.step
        self.outside = outside
        self.clock = Clock()
        self.blocks = [_Block.of(problem, number, chosen) for number, chosen in enumerate(decisions)]
        self.window = problem.hardware.staging_blocks if problem.hardware.overlapped_copies else 0
        self.around: dict[int, int] = {}  # buffers outside the blocks, by their number there
        self.sizes = [event for stretch in outside.stretches for event in stretch if event > 0]
        self.firsts = _first_buffers(outside.stretches)
        self.lingering: list[int] = []

    def trace(self) -> AllocationTrace:
        clock, count = self.clock, len(self.blocks)
        clock.begin("embedding forward")
        self._around(0)
        for number, block in enumerate(self.blocks):
            self._forward(number, block)
            last = number == count - 1
            name = "head" if last else self._gap("forward", number + 1)
            self._between(2 * number + 2, name, always=last or number + 1 in self.step.gap_before)
        clock.drop_all(self.lingering)
        for number in reversed(range(count)):
            stretch = 4 * count - 1 - 2 * number
            handed_on = self._backward(number, self.blocks[number], stretch)
            name = self._gap("backward", number) if number else "embedding backward"
            in_gap = number in self.step.gap_before
            coming = number - self.window if self.window and in_gap else NOTHING
            self._between(stretch + 1, name, handed_on, coming, always=not number or in_gap)
        clock.begin("optimizer step")
        made: list[int] = []
        for event in self.outside.optimizer_step:
            if event > 0:
                made.append(clock.open(event, Kind.TRANSIENT))
            else:
                clock.drop(made[~event])
        return clock.trace()

    def _gap(self, way: str, number: int) -> str:
        return f"{way} of what precedes {self.blocks[number].name}"

    # ---- outside the blocks ----------------------------------------------------------------------------------------
    def _between(
        self, stretch: int, name: str, given: dict[int, list[int]] | None = None, coming: int = NOTHING, *, always: bool
    ) -> None:
        """What is done between two blocks; a part of its own where it takes memory. A block may be coming back then."""
        given = given or {}
        spare = {size: len(buffers) for size, buffers in given.items()}
        for event in self.outside.stretches[stretch]:
            if event > 0:
                spare[event] = spare.get(event, 0) - 1
        if always or any(left < 0 for left in spare.values()):
            self.clock.begin(name)
        if coming >= 0:
            self._come(coming)
        self._around(stretch, given)
        for buffers in given.values():
            self.clock.drop_all(buffers)

    def _around(self, stretch: int, given: Mapping[int, list[int]] = {}, made: Mapping[int, int] = {}) -> None:
        """Events outside the blocks. Instead of allocating, a buffer of ``made`` is taken, or one of its size that
        is ``given``.
        """
        number = self.firsts[stretch]
        for event in self.outside.stretches[stretch]:
            if event > 0:
                if number in made:
                    self.around[number] = made[number]
                    self.clock.hold(made[number])
                elif given.get(event):
                    self.around[number] = given[event].pop()
                else:
                    self.around[number] = self.clock.open(event, Kind.TRANSIENT, outside=True)
                number += 1
            elif ~event in self.around:
                self.clock.drop(self.around.pop(~event))

    # ---- forward ---------------------------------------------------------------------------------------------------
    def _forward(self, number: int, block: _Block) -> None:
        clock, seen = self.clock, block.seen
        clock.begin(f"forward of {block.name}")
        if number - self.window >= 0 and self.window:
            self._leave(number - self.window)
        positions = {buffer: position for position, buffer in enumerate(seen.saved) if buffer != NOTHING}
        kinds = {buffer: _kind(block.decisions[position]) for buffer, position in positions.items()}
        outputs = {place.buffer for place in seen.outputs}
        freed = {~event for event in seen.forward if event < 0}
        local: dict[int, int] = {}
        for event in seen.forward:
            if event > 0:
                held = len(local) not in freed | outputs
                local[len(local)] = clock.open(event, kinds.get(len(local), Kind.KEPT if held else Kind.TRANSIENT))
            else:
                clock.drop(local[~event])
        self._take_inputs(number, block)
        made = {place.position: local[place.buffer] for place in seen.outputs}
        given = {place.buffer: made[place.position] for place in self.outside.outputs[number] if place.position in made}
        self._around(2 * number + 1, made=given)
        for buffer, position in positions.items():
            block.standing[position] = local[buffer]
        self.lingering += [local[buffer] for buffer in seen.lingering]
        clock.drop_all(local[buffer] for buffer in outputs - positions.keys() - freed)
        taken = freed | outputs | positions.keys() | set(seen.lingering)
        block.local = {buffer: made for buffer, made in local.items() if buffer not in taken}
        self._end_forward(number, block)

    def _take_inputs(self, number: int, block: _Block) -> None:
        """Hold the block's own inputs that it saves, or will replay from."""
        given = {place.position: self.around.get(place.buffer, NOTHING) for place in self.outside.arguments[number]}
        saved = {value: position for position, value in enumerate(block.program.saved)}
        borrowed = block.program.unsaved_inputs(block.runs)
        for place in block.seen.arguments:
            buffer = given.get(place.position, NOTHING)
            if place.buffer in saved:
                position = saved[place.buffer]
                self.clock.hold(buffer)
                self.clock.is_for(buffer, _kind(block.decisions[position]))
                block.standing[position] = buffer
            elif place.buffer in borrowed:
                self.clock.hold(buffer)
                block.borrowed.append(buffer)

    def _end_forward(self, number: int, block: _Block) -> None:
        """Copy the kept rows of split values, and let go of what is not kept."""
        clock = self.clock
        for position, decision in enumerate(block.decisions):
            if isinstance(decision, Split):
                value = block.program.values[block.program.saved[position]]
                block.kept_rows[position] = clock.open(value.bytes_by_action(decision)[Action.KEEP], Kind.KEPT)
        for position, decision in enumerate(block.decisions):
            value = block.program.values[block.program.saved[position]]
            leaves = not swaps(decision) or not self.window
            if decision is Action.KEEP or not leaves or position not in block.standing:
                continue
            buffer = block.standing.pop(position)
            if value.lingers:
                self.lingering.append(buffer)
            else:
                clock.drop(buffer)

    def _leave(self, number: int) -> None:
        """What the block swaps is on the host."""
        block = self.blocks[number]
        for position in block.swapped:
            self.clock.drop(block.standing.pop(position, NOTHING))

    def _come(self, number: int) -> None:
        """What the block swaps may come back: buffers for what is not there."""
        block = self.blocks[number]
        for position in block.swapped:
            if position not in block.standing:
                block.standing[position] = self.clock.open(block.size_bytes(position), Kind.STAGED)

    # ---- backward --------------------------------------------------------------------------------------------------
    def _backward(self, number: int, block: _Block, stretch: int) -> dict[int, list[int]]:
        """A block's backward; gives the gradients of its inputs that nobody has taken, by size."""
        clock, seen = self.clock, block.seen
        clock.begin(f"backward of {block.name}")
        self._come(number)
        ahead = number - self.window + 1
        if self.window and 0 <= ahead < number:
            self._come(ahead)
        local = dict(block.local)
        taken = self._take_gradients(number, block, local)
        self._restore(block)
        clock.drop_all(block.borrowed)
        places = {buffer: position for position, buffer in enumerate(seen.saved) if buffer != NOTHING}
        count = num_buffers(seen.forward) + len({place.buffer for place in seen.output_gradients})
        handed_on = [local[buffer] for buffer in seen.input_gradients if buffer in local]
        for buffer in handed_on:
            clock.hold(buffer)
        freed = {~event for event in seen.backward if event < 0}
        for event in seen.backward:
            if event > 0:
                stays = count not in freed and count not in seen.input_gradients
                local[count] = clock.open(event, Kind.GRADIENT if stays else Kind.TRANSIENT)
                if count in seen.input_gradients:
                    clock.hold(local[count])
                    handed_on.append(local[count])
                elif stays:
                    del local[count]
                count += 1
            elif ~event in places:
                clock.drop(block.standing.pop(places[~event], NOTHING))
            else:
                clock.drop(local.pop(~event, NOTHING))
        for left in (block.standing.values(), local.values()):
            clock.drop_all(left)
        return self._hand_on(stretch, taken, handed_on)

    def _take_gradients(self, number: int, block: _Block, local: dict[int, int]) -> list[int]:
        """The block takes over the gradients of its outputs; gives their numbers outside."""
        places = {place.position: place.buffer for place in block.seen.output_gradients}
        taken: list[int] = []
        for place in self.outside.gradients[number]:
            buffer = places.get(place.position)
            if buffer is not None and buffer not in local and place.buffer in self.around:
                local[buffer] = self.around.pop(place.buffer)
                self.clock.is_for(local[buffer], Kind.TRANSIENT)
                taken.append(place.buffer)
        return taken

    def _hand_on(self, stretch: int, taken: list[int], handed_on: list[int]) -> dict[int, list[int]]:
        """What outside goes on under the numbers of gradients that were taken are now those of the inputs."""
        given: dict[int, list[int]] = defaultdict(list)
        for buffer in handed_on:
            given[self.clock.buffers[buffer].size_bytes].append(buffer)
        freed = {~event for event in self.outside.stretches[stretch]}
        for number in taken:
            if number not in freed:
                same = given[self.sizes[number]]
                self.around[number] = same.pop() if same else self.clock.open(self.sizes[number], Kind.TRANSIENT)
        self._around(stretch, given)
        return given

    def _restore(self, block: _Block) -> None:
        """Buffers for split values, their kept rows, and the replay of what is recomputed."""
        clock = self.clock
        for position, decision in enumerate(block.decisions):
            if isinstance(decision, Split) and position not in block.standing:
                block.standing[position] = clock.open(block.size_bytes(position), Kind.RECOMPUTED)
        clock.drop_all(block.kept_rows.values())
        for position, buffer in self._replayed(block):
            block.standing[position] = buffer

    def _replayed(self, block: _Block) -> Iterator[tuple[int, int]]:
        """Run the ops of the replay in order; gives the values that are recomputed whole, which stay."""
        clock, values = self.clock, block.program.values
        wanted = {
            block.program.saved[position]: position
            for position, decision in enumerate(block.decisions)
            if decision is Action.RECOMPUTE
        }
        last_use: dict[int, int] = {}
        for number in sorted(block.runs):
            last_use.update((value, number) for value in block.program.ops[number].inputs if not values[value].saved)
        made: dict[int, int] = {}
        for number in sorted(block.runs):
            op = block.program.ops[number]
            for value in op.outputs:
                num_bytes = -(-values[value].size_bytes * block.runs[number] // block.choices.whole)
                kind = Kind.RECOMPUTED if value in wanted else Kind.TRANSIENT
                made[value] = clock.open(num_bytes, kind)
                if value in wanted:
                    yield wanted[value], made[value]
            clock.drop(clock.open(op.workspace_bytes, Kind.TRANSIENT))
            for value in (*op.outputs, *dict.fromkeys(op.inputs)):
                if value in made and value not in wanted and last_use.get(value, number) == number:
                    clock.drop(made.pop(value))


def _first_buffers(stretches: Iterable[Events]) -> list[int]:
    """The number of the first buffer that each stretch allocates."""
    firsts, count = [], 0
    for stretch in stretches:
        firsts.append(count)
        count += num_buffers(stretch)
    return firsts

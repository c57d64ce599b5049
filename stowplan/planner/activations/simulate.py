"""An independent check: run one step as discrete events and count every byte.

Shares only data types with the formulas (evaluate.py, footprint.py) and the model: it finds the ops of a replay by
demand, walks them, and lets three queues (compute, copies out, copies in) race. A disagreement is a bug of ours.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from stowplan.core.plan import MomentBytes, Prediction
from stowplan.core.program import Action, BlockDecisions, BlockProgram, Decisions, Phase, Split
from stowplan.planner.activations.problem import Problem

__all__ = ["simulate"]

COMPUTE, TO_HOST, TO_DEVICE = "compute", "to host", "to device"
TaskKey = tuple[str, int]


@dataclass(slots=True)
class _Task:
    """Something that occupies a queue for ``seconds`` once all of ``after`` is done."""

    key: TaskKey
    queue: str
    seconds: float
    after: tuple[TaskKey, ...] = ()
    begin: Callable[[float], None] = lambda now: None
    end: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _Block:
    """Bytes and seconds of one block, found by walking its program."""

    program: BlockProgram
    name: str
    kept: int = 0
    lingering: int = 0
    swapped: int = 0
    staged: int = 0
    recomputed: int = 0
    replay_seconds: float = 0.0
    forward_peak: int = 0
    backward_peak: int = 0


@dataclass(slots=True)
class _Memory:
    """What lives on the device now, by block and reason, and the moments seen so far."""

    static: int
    outside: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    lingering: dict[int, int] = field(default_factory=dict)
    staged: dict[int, int] = field(default_factory=dict)
    gradients: int = 0
    host: int = 0
    host_peak: int = 0
    moments: list[MomentBytes] = field(default_factory=list)

    def note(self, name: str, seconds: float, working: int) -> None:
        """Record the peak of a moment that adds ``working`` bytes to what lives now."""
        moment = MomentBytes(
            name=name,
            seconds=seconds,
            static_bytes=self.static,
            gradient_bytes=self.gradients,
            kept_bytes=sum(self.kept.values()) + sum(self.lingering.values()),
            staged_bytes=sum(self.staged.values()),
            working_bytes=self.outside + working,
        )
        self.moments.append(moment)


def simulate(problem: Problem, decisions: Decisions) -> Prediction:
    """Time and bytes of one step under ``decisions``. Raises InvalidArgument for decisions that are not possible."""
    problem.check(decisions)
    names, kinds = problem.step.call_names, list(zip(problem.step.blocks, decisions, strict=True))
    walked = {kind: _walk(problem.step.programs[kind[0]], kind[1]) for kind in dict.fromkeys(kinds)}
    blocks = [replace(walked[kind], name=name) for kind, name in zip(kinds, names, strict=True)]
    memory = _Memory(static=problem.step.static_bytes)
    tasks = _forward_tasks(problem, blocks, memory) + _backward_tasks(problem, blocks, memory)
    seconds = _run(tasks)
    copying = {TO_HOST, TO_DEVICE}
    busy = sum(task.seconds for task in tasks if task.queue == COMPUTE and task.key[0] not in copying)
    highest = max(memory.moments, key=lambda moment: moment.peak_bytes)
    return Prediction(
        step_seconds=seconds,
        peak_bytes=highest.peak_bytes,
        peak_moment=highest.name,
        host_bytes=memory.host_peak,
        swapped_bytes=sum(block.swapped for block in blocks),
        recomputed_bytes=sum(block.recomputed for block in blocks),
        recompute_seconds=sum(block.replay_seconds for block in blocks),
        stall_seconds=max(0.0, seconds - busy),
        moments=tuple(memory.moments),
    )


def _walk(program: BlockProgram, chosen: BlockDecisions) -> _Block:
    """Sort the saved values of a block, and the rows of split ones, and replay what is recomputed."""
    block = _Block(program=program, name="")
    block.kept, block.lingering = program.held_bytes, program.lingering_bytes
    buffers, wanted, copies = set(), {}, 0
    for index, decision in zip(program.saved, chosen, strict=True):
        value = program.values[index]
        match decision:
            case Action.KEEP:
                parts = (0, 0, value.size_bytes)
            case Action.SWAP:
                parts = (0, value.size_bytes, 0)
            case Action.RECOMPUTE:
                parts = (value.size_bytes, 0, 0)
            case Split(recomputed=first, swapped=following):
                ends = (0, first, first + following, value.num_rows)
                edges = [value.size_bytes * row // value.num_rows for row in ends]
                parts = (edges[1], edges[2] - edges[1], edges[3] - edges[2])
                copies += parts[2]
        recomputed, swapped, kept = parts
        block.recomputed += recomputed
        block.swapped += swapped
        block.kept += kept
        if decision is Action.SWAP or (isinstance(decision, Split) and decision.swapped):
            block.staged += value.size_bytes  # the copy reads from all of it, and comes back into a whole buffer
        if decision is Action.RECOMPUTE:
            wanted[index] = Fraction(1)
        else:
            buffers.add(index)
            if isinstance(decision, Split) and decision.recomputed:
                wanted[index] = Fraction(decision.recomputed, value.num_rows)
        if value.lingers and decision is not Action.KEEP:
            block.lingering += value.size_bytes
    block.forward_peak = max(program.forward_peak_bytes, program.forward_end_bytes + copies)
    there = program.held_bytes + sum(program.values[value].size_bytes for value in buffers)
    peak, block.replay_seconds, held = _replay(program, buffers, wanted)
    block.kept += held
    joining = there + held + copies if copies else 0
    block.backward_peak = program.backward_peak_bytes
    if wanted or copies:
        block.backward_peak = max(block.backward_peak, program.output_gradient_bytes + max(peak, joining))
    return block


def _replay(program: BlockProgram, present: set[int], wanted: Mapping[int, Fraction]) -> tuple[int, float, int]:
    """Make the first share of ``wanted`` values' rows from ``present`` ones and block inputs.

    Rows of a value that is present too go into its buffer at once. Returns peak bytes above the block's entry, seconds,
    and the bytes of inputs held for it that nothing saves.
    """
    demanded: dict[int, Fraction] = {}
    stack = list(wanted.items())
    while stack:
        value, share = stack.pop()
        maker = program.values[value].producer
        if maker is None or demanded.get(maker, Fraction(0)) >= share:
            continue
        demanded[maker] = share
        stack += [(i, share) for i in program.ops[maker].inputs if i not in present]
    uses_left: dict[int, int] = {}
    for number in demanded:
        for value in set(program.ops[number].inputs) - present:
            uses_left[value] = uses_left.get(value, 0) + 1
    for value in wanted.keys() - present:
        uses_left[value] = uses_left.get(value, 0) + 1  # the backward pass reads it: never freed here
    given = [value for value in uses_left if program.values[value].producer is None]
    held = sum(program.values[value].size_bytes for value in given)
    fixed = program.held_bytes + held + sum(program.values[value].size_bytes for value in present)
    made: dict[int, int] = {}
    peak, seconds = fixed, 0.0
    for number, op in enumerate(program.ops):
        if number not in demanded:
            continue
        share = demanded[number]
        made.update((value, math.ceil(program.values[value].size_bytes * share)) for value in op.outputs)
        peak = max(peak, fixed + sum(made.values()) + op.workspace_bytes)
        seconds += op.seconds * float(share**2 if op.causal_attention else share)
        for value in set(op.inputs) - present:
            uses_left[value] -= 1
        made = {value: size for value, size in made.items() if uses_left.get(value, 0) > 0}
    return peak, seconds, held


def _forward_tasks(problem: Problem, blocks: list[_Block], memory: _Memory) -> list[_Task]:
    """Embedding, the blocks' forwards and what is between them, and the copies to the host."""
    step, hardware = problem.step, problem.hardware
    overlapped, window = hardware.overlapped_copies, hardware.staging_blocks

    def embed(now: float) -> None:
        memory.note("embedding forward", now, step.embedding_forward.peak_bytes)

    def embedded() -> None:
        memory.outside = step.embedding_forward.left_bytes

    tasks = [_Task(("embedding forward", 0), COMPUTE, step.embedding_forward.seconds, begin=embed, end=embedded)]
    for number, block in enumerate(blocks):
        for gap in step.gaps:
            if gap.block == number:
                tasks.append(_gap_task("forward", gap.forward, number, block, memory))

        def begin(now: float, number: int = number, block: _Block = block) -> None:
            memory.staged.pop(number - window, None)  # it waited for that copy
            memory.note(f"forward of {block.name}", now, block.forward_peak)

        def end(number: int = number, block: _Block = block) -> None:
            memory.kept[number], memory.lingering[number] = block.kept, block.lingering
            if overlapped:
                memory.staged[number] = block.staged

        def copied(block: _Block = block) -> None:
            memory.host += block.swapped
            memory.host_peak = max(memory.host_peak, memory.host)

        buffer = number - window
        waits = ((TO_HOST, buffer),) if overlapped and buffer >= 0 and blocks[buffer].swapped else ()
        tasks.append(_Task(("forward", number), COMPUTE, block.program.forward_seconds, waits, begin, end))
        if block.swapped:
            queue = TO_HOST if overlapped else COMPUTE
            seconds = block.swapped / hardware.to_host_bytes_per_second
            tasks.append(_Task((TO_HOST, number), queue, seconds, (("forward", number),), end=copied))
    return tasks


def _gap_task(
    way: str, phase: Phase, number: int, block: _Block, memory: _Memory, staged: Mapping[int, int] = {}
) -> _Task:
    """What the model does before ``block`` (forward) or after it (backward)."""

    def begin(now: float) -> None:
        memory.outside = 0  # the phase's bytes include what others left
        memory.staged.update(staged)
        memory.note(f"{way} of what precedes {block.name}", now, phase.peak_bytes)

    def end() -> None:
        memory.outside = phase.left_bytes

    return _Task((f"{way} gap", number), COMPUTE, phase.seconds, begin=begin, end=end)


def _backward_tasks(problem: Problem, blocks: list[_Block], memory: _Memory) -> list[_Task]:
    """Head, the copies back, the blocks' backwards with their replays, embedding, optimizer."""
    step, hardware = problem.step, problem.hardware
    overlapped, window = hardware.overlapped_copies, hardware.staging_blocks

    def head(now: float) -> None:
        memory.outside = 0  # the head's bytes include what the embedding left
        memory.staged.pop(len(blocks) - 1 - window, None)
        memory.note("head", now, step.head.peak_bytes)

    def headed() -> None:
        memory.lingering.clear()
        memory.outside = step.head.left_bytes

    def embedding(now: float) -> None:
        memory.outside = 0
        memory.note("embedding backward", now, step.embedding_backward.peak_bytes)

    def optimizer(now: float) -> None:
        memory.note("optimizer step", now, step.optimizer_step.peak_bytes)

    tasks = [_Task(("head", 0), COMPUTE, step.head.seconds, begin=head, end=headed)]
    for number in reversed(range(len(blocks))):
        block = blocks[number]

        def begin(now: float, number: int = number, block: _Block = block) -> None:
            memory.kept.pop(number)
            memory.staged.pop(number, None)
            ahead = number - window + 1
            if overlapped and 0 <= ahead < number:  # its copy may come from now on
                memory.staged[ahead] = blocks[ahead].staged
            memory.note(f"backward of {block.name}", now, block.backward_peak)

        def end(block: _Block = block) -> None:
            memory.gradients += block.program.gradient_bytes
            memory.host -= block.swapped

        waits: tuple[TaskKey, ...] = ()
        if block.swapped:
            room = ("backward", number + window) if number + window < len(blocks) else ("forward", len(blocks) - 1)
            sources = ((TO_HOST, number), room) if overlapped else ((TO_HOST, number),)
            seconds = block.swapped / hardware.to_device_bytes_per_second
            tasks.append(_Task((TO_DEVICE, number), TO_DEVICE if overlapped else COMPUTE, seconds, sources))
            waits = ((TO_DEVICE, number),)
        seconds = block.program.backward_seconds + block.replay_seconds
        tasks.append(_Task(("backward", number), COMPUTE, seconds, waits, begin, end))
        for gap in step.gaps:
            if gap.block == number:
                coming = number - window if overlapped else -1  # the copy that may come when this backward is over
                staged = {coming: blocks[coming].staged} if coming >= 0 else {}
                tasks.append(_gap_task("backward", gap.backward, number, block, memory, staged))
    tasks.append(_Task(("embedding backward", 0), COMPUTE, step.embedding_backward.seconds, begin=embedding))
    tasks.append(_Task(("optimizer step", 0), COMPUTE, step.optimizer_step.seconds, begin=optimizer))
    return tasks


def _run(tasks: list[_Task]) -> float:
    """Let every queue work through its tasks in order, each when what it waits for is done; seconds at the end."""
    queues: dict[str, deque[_Task]] = {COMPUTE: deque(), TO_HOST: deque(), TO_DEVICE: deque()}
    for task in tasks:
        queues[task.queue].append(task)
    done: set[TaskKey] = set()
    busy: set[str] = set()
    ends: list[tuple[float, int, _Task]] = []
    now, started = 0.0, 0
    while True:
        for name, queue in queues.items():
            if name not in busy and queue and all(key in done for key in queue[0].after):
                task = queue.popleft()
                task.begin(now)
                busy.add(name)
                heapq.heappush(ends, (now + task.seconds, started, task))
                started += 1
        if not ends:
            break
        now, _, task = heapq.heappop(ends)
        task.end()
        busy.discard(task.queue)
        done.add(task.key)
    assert not any(queues.values()), "tasks wait for each other"
    return now

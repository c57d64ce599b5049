"""The activation plan as a mixed-integer program (docs/planner.md has the formulas). Imports pulp through rows.py.

Per cell — a block, or blocks that share decisions — and saved value v there are k_v and s_v: kept and swapped, the rest
recomputed; binaries where v's rows may not be divided. ρ_o is for which fraction of the rows op o runs again. All other
quantities are linear in them: bytes kept, alive and swapped, replay seconds, and the bytes live during each op of the
replay. Only the price of causal attention is not: ρ² of its time, by tangents from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stowplan.core.program import Action, BlockProgram
from stowplan.planner.activations.problem import Problem, ProgramChoices
from stowplan.planner.rows import Rows, Variable

__all__ = ["Cell", "Scale", "add_cell", "add_device_rows", "add_host_row", "add_time_rows"]

# Slopes at which the price ρ² of recomputing attention for the first rows is touched: fine where ρ is small.
TANGENTS = (1 / 64, 1 / 32, 1 / 16, *(eighth / 8 for eighth in range(1, 9)))


@dataclass(frozen=True, slots=True)
class Scale:
    """Units of the program's numbers: a solver wants them near 1, not near 10¹¹."""

    bytes: float
    seconds: float

    @staticmethod
    def of(problem: Problem) -> Scale:
        """About a hundred units are all saved bytes and all ideal seconds."""
        saved = sum(problem.step.program_of(block).saved_bytes for block in problem.order)
        seconds = problem.ideal_seconds + sum(
            op.seconds for block in problem.order for op in problem.step.program_of(block).ops
        )
        return Scale(bytes=max(1, saved) / 100, seconds=(seconds or 1.0) / 100)


@dataclass(frozen=True, slots=True)
class Cell:
    """Variables of a block, in scaled units; ``actions`` are (k, s) of each saved value, empty where averaged."""

    kept: Variable
    alive: Variable
    swapped: Variable
    seconds: Variable
    backward_peak: Variable
    actions: tuple[tuple[Variable, Variable], ...] = ()


def add_cell(
    rows: Rows,
    program: BlockProgram,
    choices: ProgramChoices,
    scale: Scale,
    *,
    integer: bool = True,
    token_rows: bool = False,
) -> Cell:
    """Variables and rows of one block: decisions, what they cost, and the bytes of the replay.

    Without ``integer``, decisions may be fractions. Rows are divided as the problem allows, or with ``token_rows`` all
    of them: then the backward peak is only its constant part, a relaxation that no plan beats.

    Note: rows are a relaxation. Fractions stand for any number of rows, the copies of kept rows and the whole buffers
    of split values are left out, and all other bytes of a split are no more than it really has. So no plan of rows is
    below the optimum, and what is rounded from it has to be judged by the formulas.
    """
    saved = [program.values[index] for index in program.saved]
    sizes = [value.size_bytes / scale.bytes for value in saved]
    pairs = []
    runs: dict[int, Variable] = {}
    divided: set[int] = set()  # ops that may run for a part of the rows
    for actions, chain, num_rows, splits in zip(
        choices.actions, choices.chains, choices.num_rows, choices.splits, strict=True
    ):
        kept = rows.variable(0, 1 if Action.KEEP in actions else 0, integer=integer and not num_rows)
        swapped = rows.variable(0, 1 if Action.SWAP in actions else 0, integer=integer and not num_rows)
        pairs.append((kept, swapped))
        if Action.RECOMPUTE not in actions:
            rows.equal([(kept, 1), (swapped, 1)], 1)
            continue
        if num_rows and not splits:
            rows.equal([(kept, 1), (swapped, 1), (rows.variable(0, 1, integer=integer), 1)], 1)
        else:
            rows.at_most([(kept, 1), (swapped, 1)], 1)
        if splits or token_rows:
            divided.update(chain)
        for op in chain:
            if op not in runs:
                runs[op] = rows.variable(0, 1)
            rows.at_least([(runs[op], 1), (kept, 1), (swapped, 1)], 1)
    inputs = _held_inputs(rows, program, runs, scale)
    held = program.held_bytes / scale.bytes
    lingering = [size if value.lingers else 0.0 for value, size in zip(saved, sizes, strict=True)]
    alive = held + program.lingering_bytes / scale.bytes + sum(lingering)
    seconds = []
    for op, run in runs.items():
        priced = _quadratic(rows, run) if op in divided and program.ops[op].causal_attention else run
        seconds.append((priced, program.ops[op].seconds / scale.seconds))
    peak = rows.variable(program.backward_peak_bytes / scale.bytes)
    if not token_rows:
        _add_replay_rows(rows, program, pairs, runs, inputs, peak, scale)
    kept_sizes = [(k, size) for (k, _), size in zip(pairs, sizes, strict=True)]
    alive_sizes = [(k, size - rest) for (k, size), rest in zip(kept_sizes, lingering, strict=True)]
    return Cell(
        kept=rows.total([*kept_sizes, *inputs], held),
        alive=rows.total([*alive_sizes, *inputs], alive),
        swapped=rows.total([(s, size) for (_, s), size in zip(pairs, sizes, strict=True)]),
        seconds=rows.total(seconds),
        backward_peak=peak,
        actions=tuple(pairs),
    )


def _held_inputs(
    rows: Rows, program: BlockProgram, runs: dict[int, Variable], scale: Scale
) -> list[tuple[Variable, float]]:
    """Inputs that autograd does not save but a replay starts from: held (1) if any op that reads them runs."""
    readers = {
        v: [run for op, run in runs.items() if v in program.ops[op].inputs] for v in program.unsaved_inputs(runs)
    }
    return [(_any_of(rows, read), program.values[v].size_bytes / scale.bytes) for v, read in readers.items()]


def _quadratic(rows: Rows, run: Variable) -> Variable:
    """A variable at least ρ² (by tangents, from below): the price of the first ρ of causal attention's rows."""
    price = rows.variable(0, 1)
    for at in TANGENTS:
        rows.at_least([(price, 1), (run, -2 * at)], -at * at)
    return price


def _add_replay_rows(
    rows: Rows,
    program: BlockProgram,
    pairs: Sequence[tuple[Variable, Variable]],
    runs: dict[int, Variable],
    inputs: Sequence[tuple[Variable, float]],
    peak: Variable,
    scale: Scale,
) -> None:
    """The bytes live during each op of a replay, as linear rows below ``peak``.

    Note: replay bytes are linear. During op o the device has what is held, every saved value made by o or earlier
    (kept, swapped in, or recomputed by then), inputs held for the replay, later saved values unless they are
    recomputed (k + s of their size),
    second copies of kept or swapped outputs of o (ρ_o − (1 − k − s) of their size), and unsaved values made so far
    that a later op of the replay reads (ρ of the readers). If o does not run, the row is implied: by that of the op
    before it that runs, which has at least the same values, or, where none runs, by the bound on saved bytes that
    ``any_run`` relaxes to the backward peak without replay. Rows that no replay lifts above that are left out.
    """
    bytes_of = [value.size_bytes / scale.bytes for value in program.values]
    base = (program.output_gradient_bytes + program.held_bytes) / scale.bytes
    untouched = program.backward_peak_bytes / scale.bytes
    saved_bytes = program.saved_bytes / scale.bytes
    # Without a replay the incoming gradient and all saved bytes need not fit under the peak: relax by the difference.
    slack = max(0.0, program.output_gradient_bytes / scale.bytes + saved_bytes - untouched)
    any_run = rows.variable(0, 1)
    if slack:
        for run in runs.values():
            rows.at_least([(any_run, 1), (run, -1)], 0)
    for op in sorted(runs):
        terms: list[tuple[Variable, float]] = [(runs[op], program.ops[op].workspace_bytes / scale.bytes), *inputs]
        constant, most = base, base + sum(factor for _, factor in terms)
        for (kept, swapped), index in zip(pairs, program.saved, strict=True):
            size, maker = bytes_of[index], program.values[index].producer
            if maker is not None and maker > op:
                terms += [(kept, size), (swapped, size)]
                most += size
                continue
            constant, most = constant + size, most + size
            if maker == op and len(program.ops[op].outputs) > 1:
                terms += [(runs[op], size), (kept, size), (swapped, size)]
                constant, most = constant - size, most + size
        for index, readers in _transients(program, op, runs).items():
            alive = runs[op] if program.values[index].producer == op else _any_of(rows, [runs[r] for r in readers])
            terms.append((alive, bytes_of[index]))
            most += bytes_of[index]
        if most > untouched:
            relaxed = [(any_run, slack)] if slack else []
            rows.at_least([(peak, 1), *((v, -f) for v, f in terms), *((v, -f) for v, f in relaxed)], constant - slack)


def _transients(program: BlockProgram, op: int, runs: dict[int, Variable]) -> dict[int, list[int]]:
    """Unsaved values with bytes that may be alive during ``op``, with the ops from then on that read them."""
    found = {}
    for index, value in enumerate(program.values):
        if value.saved or value.producer not in runs or value.producer > op or not value.size_bytes:
            continue
        readers = [r for r in runs if r >= op and index in program.ops[r].inputs]
        if readers or value.producer == op:
            found[index] = readers
    return found


def _any_of(rows: Rows, runs: Sequence[Variable]) -> Variable:
    if len(runs) == 1:
        return runs[0]
    any_run = rows.variable(0, 1)
    for run in runs:
        rows.at_least([(any_run, 1), (run, -1)], 0)
    return any_run


def add_device_rows(rows: Rows, problem: Problem, cells: Sequence[Cell], scale: Scale, budget: Variable) -> None:
    """Every moment of the step stays within ``budget`` (scaled bytes). ``cells`` has one entry per block."""
    step, gaps = problem.step, problem.step.gap_before
    window = problem.hardware.staging_blocks if problem.hardware.overlapped_copies else 0
    count = len(cells)

    def in_flight(first: int, stop: int) -> list[tuple[Variable, float]]:
        return [(cells[j].swapped, -1.0) for j in range(max(0, first), stop)] if window else []

    def fits(terms: list[tuple[Variable, float]], constant_bytes: float) -> None:
        rows.at_least([(budget, 1), *terms], (step.static_bytes + constant_bytes) / scale.bytes)

    gradients = sum(step.program_of(block).gradient_bytes for block in problem.order)
    fits([], step.embedding_forward.peak_bytes)
    fits([], gradients + max(step.embedding_backward.peak_bytes, step.optimizer_step.peak_bytes))
    kept: list[tuple[Variable, float]] = []  # minus the bytes that blocks before this one hold
    alive: list[tuple[Variable, float]] = []
    for i, cell in enumerate(cells):
        program = step.program_of(i)
        if i in gaps:
            staged = in_flight(i - window, i)
            fits(alive + staged, gaps[i].forward.peak_bytes)
            fits(kept + staged, gaps[i].backward.peak_bytes + gradients)
        gradients -= program.gradient_bytes  # those of later blocks are there when this one goes backward
        staged = in_flight(i - window + 1, i)
        fits(alive + staged, step.forward_left_bytes[i] + program.forward_peak_bytes)
        fits([*kept, *staged, (cell.backward_peak, -1)], step.backward_left_bytes[i] + gradients)
        kept = [(rows.total([*((v, -f) for v, f in kept), (cell.kept, 1)]), -1.0)]
        alive = [(rows.total([*((v, -f) for v, f in alive), (cell.alive, 1)]), -1.0)]
    fits(alive + in_flight(count - window, count), step.head.peak_bytes)


def add_host_row(rows: Rows, problem: Problem, cells: Sequence[Cell], scale: Scale) -> None:
    """Swapped bytes of all blocks stay within the host budget."""
    rows.at_most([(cell.swapped, 1) for cell in cells], problem.host_budget_bytes / scale.bytes)


def add_time_rows(rows: Rows, problem: Problem, cells: Sequence[Cell], scale: Scale, *, relaxed: bool) -> Variable:
    """A variable (scaled seconds) that is at least the time of a step. ``relaxed``: no binaries for absent copies."""
    hardware = problem.hardware
    out = scale.bytes / hardware.to_host_bytes_per_second / scale.seconds  # scaled seconds per scaled byte
    back = scale.bytes / hardware.to_device_bytes_per_second / scale.seconds
    if not hardware.overlapped_copies:
        costs = [(cell.seconds, 1.0) for cell in cells] + [(cell.swapped, out + back) for cell in cells]
        return rows.total(costs, problem.ideal_seconds / scale.seconds)
    step, gaps = problem.step, problem.step.gap_before
    window, count = hardware.staging_blocks, len(cells)

    def after(terms: list[tuple[Variable, float]], seconds: float, *before: Variable | None) -> Variable:
        """The end of something that takes ``terms`` and ``seconds`` once all of ``before`` have ended."""
        end = rows.variable(0)
        for other in before or (None,):
            start = [] if other is None else [(other, -1.0)]
            rows.at_least([(end, 1), *start, *((v, -f) for v, f in terms)], seconds / scale.seconds)
        return end

    forwards: list[Variable] = []
    outs: list[Variable] = []
    for i, cell in enumerate(cells):
        program = step.program_of(i)
        before = [forwards[-1]] if i else [after([], step.embedding_forward.seconds)]
        if i in gaps:
            before = [after([], gaps[i].forward.seconds, *before)]
        before += [outs[i - window]] if i >= window else []
        forwards.append(after([], program.forward_seconds, *before))
        outs.append(after([(cell.swapped, out)], 0, forwards[-1], *outs[-1:]))
    end = after([], step.head.seconds, forwards[-1])
    ends: dict[int, Variable] = {}
    arrival: Variable | None = None
    for i in reversed(range(count)):
        program = step.program_of(i)
        room = ends.get(i + window, forwards[-1])
        arrival = after([(cells[i].swapped, back)], 0, room, *([arrival] if arrival is not None else []))
        if i >= count - window:  # earlier copies out have ended with the forward pass, which waited for them
            _wait_for_own_copy(rows, problem, i, cells[i], outs[i], arrival, scale, relaxed=relaxed)
        end = ends[i] = after([(cells[i].seconds, 1)], program.backward_seconds, end, arrival)
        if i in gaps:
            end = after([], gaps[i].backward.seconds, end)
    return after([], step.embedding_backward.seconds + step.optimizer_step.seconds, end)


def _wait_for_own_copy(
    rows: Rows,
    problem: Problem,
    block: int,
    cell: Cell,
    out: Variable,
    arrival: Variable,
    scale: Scale,
    *,
    relaxed: bool,
) -> None:
    """A block comes back after it has gone out — if it swaps anything, which takes a binary to say."""
    hardware, step = problem.hardware, problem.step
    first = max(0, step.num_blocks - hardware.staging_blocks)
    movable = [step.program_of(i).saved_bytes for i in range(first, step.num_blocks)]
    longest = sum(movable) / hardware.to_host_bytes_per_second / scale.seconds  # the queue out can be no longer
    back = scale.bytes / hardware.to_device_bytes_per_second / scale.seconds
    most = max(step.program_of(block).saved_bytes / scale.bytes, 1e-9)
    swaps = rows.variable(0, 1, integer=not relaxed)
    rows.at_most([(cell.swapped, 1), (swaps, -most)], 0)
    rows.at_least([(arrival, 1), (out, -1), (cell.swapped, -back), (swaps, -longest)], -longest)

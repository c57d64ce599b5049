"""A plan as plain text: printable ASCII, no colour needed, no line longer than the width.

The first lines are enough at 2 am: the verdict, what it costs, the peak, what was measured. Sections always come in
the same order. Every figure is written in the plan or a sum over it (figures.py), and every heading says where its
figures are from: [trace] captured from the model and simulated, [formula] calculated from rules, [measured] real steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from stowplan.core.allocations import Addresses
from stowplan.core.errors import InvalidArgument
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Baseline, Measurement, Plan, Prediction
from stowplan.core.units import format_bytes
from stowplan.reports.address_chart import HOLE, KIND_LETTERS, address_chart
from stowplan.reports.charts import ACTION_LETTERS, decision_grid, memory_chart, peak_bar
from stowplan.reports.figures import TOLERANCE, Comparison, bytes_by_action, compare, peak_moment
from stowplan.reports.lines import Unit, bytes_unit, cut, heading, seconds_unit, wrap

__all__ = ["LEAST_WIDTH", "render"]

LEAST_WIDTH = 80

_HOW_TO_MEASURE = (
    'Not measured yet. Run some steps inside "with stowplan.measure(model) as measured:"; then '
    '"plan.with_measurement(measured.measurement)" has the real figures beside the predicted ones.'
)


@dataclass(frozen=True, slots=True)
class _Page:
    """A plan, and how its figures are written."""

    plan: Plan
    width: int
    bytes: Unit
    seconds: Unit

    @property
    def spare_bytes(self) -> int:
        return self.plan.budget_bytes - self.plan.needed_bytes

    @property
    def spare_host_bytes(self) -> int:
        return self.plan.swap_budget_bytes - self.plan.prediction.host_bytes

    @property
    def fits(self) -> bool:
        return min(self.spare_bytes, self.spare_host_bytes) >= 0


def render(plan: Plan, width: int = 100, addresses: Addresses | None = None) -> str:
    """The text report of ``plan``, lines of at most ``width`` characters, with a map of ``addresses`` if there are any.

    Raises InvalidArgument below 80.
    """
    if width < LEAST_WIDTH:
        raise InvalidArgument(f"width={width} is too narrow for the tables; allowed: {LEAST_WIDTH} or more.")
    policies = (plan.prediction, plan.unplanned, *(baseline.prediction for baseline in plan.baselines))
    page = _Page(
        plan=plan,
        width=width,
        bytes=bytes_unit(max(plan.budget_bytes, *(policy.peak_bytes for policy in policies))),
        seconds=seconds_unit(max(policy.step_seconds for policy in policies)),
    )
    lines = [
        *_verdict(page),
        *_subject(page),
        *_peak(page),
        *_predicted_and_measured(page),
        *_gains(page),
        *_memory(page),
        *_addresses(page, addresses),
        *_decisions(page),
        *_provenance(page),
    ]
    return "\n".join(cut(line.rstrip(), width) for line in lines) + "\n"


# ---- the first lines -------------------------------------------------------------------------------------------------


def _verdict(page: _Page) -> list[str]:
    sentences = [
        _verdict_sentence(page),
        _price_sentence(page),
        _peak_sentence(page),
        _snapshot_sentence(page),
        _head_sentence(page),
    ]
    if page.plan.measurement is not None:
        sentences.append(_measured_sentence(page, page.plan.measurement))
    return [line for sentence in sentences if sentence for line in wrap(sentence, page.width)]


def _verdict_sentence(page: _Page) -> str:
    plan, size = page.plan, page.bytes
    step = f"A step takes {page.seconds.text(plan.prediction.step_seconds)}."
    needs = size.text(plan.needed_bytes)
    budget = size.text(plan.budget_bytes)
    if page.spare_bytes < 0:
        return f"DOES NOT FIT: needs {needs}, {size.text(-page.spare_bytes)} over the budget of {budget}. {step}"
    if page.spare_host_bytes < 0:
        host = size.text(plan.prediction.host_bytes)
        return f"DOES NOT FIT: needs {host} of the host, {size.text(-page.spare_host_bytes)} over its budget. {step}"
    spare = size.text(page.spare_bytes)
    if plan.declined:
        return (
            f"FITS WITHOUT A PLAN: needs {needs} of {budget}, {spare} spare. {step} "
            f"Everything is kept: applying this plan does nothing and costs nothing."
        )
    return f"FITS: needs {needs} of {budget}, {spare} spare. {step}"


def _head_sentence(page: _Page) -> str:
    """The head in chunks, or what that would bring."""
    head = page.plan.head
    if head is None or (head.allowed and not head.chunk_rows):
        return ""
    rows, size = f"chunks of {head.chunked.chunk_rows} rows", page.bytes
    own, chunked = size.text(head.own.head.peak_bytes), size.text(head.chunked.head.peak_bytes)
    if head.chunk_rows:
        return (
            f"The head ({head.module} and its loss) is computed in {rows}: outside the blocks its peak is {chunked}, "
            f"that of the model's own is {own}. Not bit for bit the same; the output has no logits."
        )
    return (
        f"What would help: chunked_head=True (--chunked-head) computes the head ({head.module} and its loss) in "
        f"{rows}, which takes {chunked} there instead of {own}. Not bit for bit the same; the output has no logits."
    )


def _price_sentence(page: _Page) -> str:
    """What memory was saved, at what price."""
    plan, size, seconds = page.plan, page.bytes, page.seconds
    if plan.declined:
        return ""
    over = plan.needed_by(plan.unplanned) - plan.budget_bytes
    verdict = f"{size.text(over)} over the budget" if over > 0 else "which fits, too"
    delay = seconds.difference(plan.prediction.step_seconds - plan.unplanned.step_seconds)
    price = "no slower" if delay == "same" else f"{delay} {seconds.name} a step"
    return (
        f"Without a plan: {size.text(plan.unplanned.peak_bytes)}, {verdict}. The plan swaps "
        f"{size.text(plan.prediction.swapped_bytes)} and recomputes {size.text(plan.prediction.recomputed_bytes)} "
        f"a step ({price}; {seconds.text(plan.prediction.recompute_seconds)} recomputing, "
        f"{seconds.text(plan.prediction.stall_seconds)} copying or waiting for copies). "
        f"Host memory: {size.text(plan.prediction.host_bytes)} of {format_bytes(plan.swap_budget_bytes)}."
    )


def _peak_sentence(page: _Page) -> str:
    moment = peak_moment(page.plan)
    when = "" if moment is None else f" {page.seconds.text(moment.seconds)} into the step,"
    prediction = page.plan.prediction
    plan, more = page.plan, page.plan.needed_bytes - prediction.peak_bytes
    beside = ""
    if plan.arena_bytes is not None:
        beside = f" live; addresses end at {page.bytes.text(plan.arena_bytes)}"
    elif more:
        beside = f" live; {page.bytes.text(more)} for fragmentation ({plan.fragmentation:.0%} of what moves) on top"
    return f"Peak{when} in {cut(prediction.peak_moment, 200)}: {page.bytes.text(prediction.peak_bytes)}{beside}."


def _snapshot_sentence(page: _Page) -> str:
    snapshots = page.plan.snapshots
    if snapshots is None:
        return ""
    parity = f" and {format_bytes(snapshots.parity_bytes)} of parity" if snapshots.parity_bytes else ""
    return (
        f"Snapshots: {format_bytes(snapshots.total_bytes)} of the host budget of "
        f"{format_bytes(page.plan.host_budget_bytes)}, for two of {format_bytes(snapshots.data_bytes)}{parity} each; "
        f"{format_bytes(page.plan.swap_budget_bytes)} are left for swapped values."
    )


def _measured_sentence(page: _Page, measurement: Measurement) -> str:
    parts = []
    for row in compare(page.plan, measurement)[:2]:
        if row.measured is not None:
            unit = page.seconds if row.is_seconds else page.bytes
            name = "step " if row.is_seconds else ""
            parts.append(f"{name}{unit.text(row.measured)} ({unit.difference(row.measured - row.predicted)})")
    over = max(measurement.peak_bytes, default=0) - page.plan.budget_bytes
    warning = f" OVER THE BUDGET by {page.bytes.text(over)}." if over > 0 else ""
    return f"Measured: {', '.join(parts) or 'no step'}.{warning}"


def _subject(page: _Page) -> list[str]:
    plan = page.plan
    lines = [
        f"Model     {plan.model}, {plan.step.num_blocks} blocks",
        f"Batch     {plan.batch}",
        f"Hardware  {_hardware(plan.hardware)}",
    ]
    return ["", *(part for line in lines for part in wrap(line, page.width, indent=" " * 10))]


def _hardware(hardware: Hardware) -> str:
    copies = "copies stop the computation"
    if hardware.overlapped_copies:
        copies = f"copies run beside it, {hardware.staging_blocks} staging blocks"
    return (
        f"{hardware.name} ({hardware.device_type}), {format_bytes(hardware.device_bytes)}, "
        f"{hardware.matmul_flops_per_second / 1e12:.3g} TFLOP/s, memory {_rate(hardware.memory_bytes_per_second)}, "
        f"to the host {_rate(hardware.to_host_bytes_per_second)}, back {_rate(hardware.to_device_bytes_per_second)}; "
        f"{copies}"
    )


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"


def _peak(page: _Page) -> list[str]:
    moment = peak_moment(page.plan)
    return [] if moment is None else ["", *peak_bar(moment, page.plan, page.bytes, page.width)]


# ---- sections --------------------------------------------------------------------------------------------------------


def _predicted_and_measured(page: _Page) -> list[str]:
    measurement = page.plan.measurement
    rows = () if measurement is None else compare(page.plan, measurement)
    if measurement is None or all(row.measured is None for row in rows):
        return [*heading("PREDICTED AND MEASURED", "trace", page.width), *wrap(_HOW_TO_MEASURE, page.width)]
    lines = heading("PREDICTED AND MEASURED", "measured", page.width)
    lines.append(f"{'':<30}{'predicted':>18}{'measured':>18}{'error':>12}")
    lines += [_comparison(row, page.seconds if row.is_seconds else page.bytes) for row in rows]
    num_steps = max(len(measurement.step_seconds), len(measurement.peak_bytes))
    source = f" Source: {measurement.source}." if measurement.source else ""
    note = f"The highest peak and the median of all else over {num_steps} measured steps.{source}"
    return lines + wrap(note, page.width)


def _comparison(row: Comparison, unit: Unit) -> str:
    line = f"{row.name:<30}{unit.text(row.predicted):>18}"
    if row.measured is None:
        return f"{line}{'not measured':>18}"
    error = "n/a" if row.error is None else f"{row.error:+.1%}"
    mark = f"  <-- over {TOLERANCE:.0%}" if row.is_off else ""
    return f"{line}{unit.text(row.measured):>18}{error:>12}{mark}"


def _gains(page: _Page) -> list[str]:
    plan = page.plan
    others = [
        Baseline(
            name="Without a plan: all kept",
            fits=plan.needed_by(plan.unplanned) <= plan.budget_bytes,
            prediction=plan.unplanned,
        ),
        *(baseline for baseline in plan.baselines if baseline.prediction != plan.unplanned),
    ]
    others.sort(key=lambda baseline: (not baseline.fits, baseline.prediction.step_seconds))
    lines = heading("WHAT THE PLAN GAINS", "formula", page.width)
    lines.append(f"{'':<32}{'verdict':<14}{'needs':>14}{'host':>14}{'step':>12}{'':>12}")
    lines.append(_policy(page, "This plan", page.fits, plan.prediction))
    lines += [_policy(page, other.name, other.fits, other.prediction, against=plan.prediction) for other in others]
    return lines + [line for sentence in _limits(page) for line in wrap(sentence, page.width)]


def _policy(page: _Page, name: str, fits: bool, prediction: Prediction, against: Prediction | None = None) -> str:
    difference = ""
    if against is not None:
        difference = f"({page.seconds.difference(prediction.step_seconds - against.step_seconds)})"
    return (
        f"{cut(name, 31):<32}{'fits' if fits else 'DOES NOT FIT':<14}{page.bytes.text(prediction.peak_bytes):>14}"
        f"{page.bytes.text(prediction.host_bytes):>14}{page.seconds.text(prediction.step_seconds):>12}{difference:>12}"
    )


def _limits(page: _Page) -> list[str]:
    """What no plan can beat, and the least budget that has one."""
    plan, solution = page.plan, page.plan.solution
    least = f"The least feasible budget is {page.bytes.text(plan.least_budget_bytes)}, the host budget unchanged."
    if plan.declined:
        return [least]
    bound = (
        f"No plan that fits can be faster than {page.seconds.text(solution.bound_seconds)} (linear relaxation with "
        f"token rows); this one is {solution.gap:.1%} above. "
        f"Found by {solution.solver} in {solution.seconds:.2f} s: {solution.proof}."
    )
    return [bound, least]


def _memory(page: _Page) -> list[str]:
    plan = page.plan
    if not plan.prediction.moments:
        return []
    chart = memory_chart(plan, page.bytes, page.seconds, page.width)
    note = (
        f"{len(plan.prediction.moments)} moments from left to right, the highest where several share a column; rows in "
        f"{page.bytes.name}, times in {page.seconds.name}; --- is the budget; letters as in the peak."
    )
    return [*heading("MEMORY THROUGH ONE STEP", "trace", page.width), *chart, *wrap(note, page.width)]


def _addresses(page: _Page, addresses: Addresses | None) -> list[str]:
    if addresses is None:
        return []
    chart = address_chart(addresses, page.bytes, page.width)
    letters = ", ".join(f"{letter} {kind}" for kind, letter in KIND_LETTERS.items())
    above = addresses.height_bytes / addresses.bound_bytes - 1 if addresses.bound_bytes else 0.0
    note = (
        f"{len(addresses.trace.allocations)} buffers above the {page.bytes.text(page.plan.step.static_bytes)} that "
        f"live all step, in {page.bytes.name}; events from left to right. {letters}, {HOLE} a hole. They end "
        f"{above:.2%} above the most bytes that are alive together."
    )
    return [*heading("ADDRESSES", "trace", page.width), *chart, *wrap(note, page.width)]


def _decisions(page: _Page) -> list[str]:
    plan = page.plan
    lines = heading("DECISIONS BY BLOCK AND VALUE", "trace", page.width)
    if plan.declined:
        return [*lines, "Nothing to decide: everything is kept."]
    for number, program in enumerate(plan.step.programs):
        if len(plan.step.programs) > 1:
            lines.append(cut(f"{program.name}, {plan.step.blocks.count(number)} blocks:", page.width))
        if program.saved:
            lines += decision_grid(plan, number, page.width)
        else:
            lines.append("saves nothing that a plan could move")
        if program.held_bytes:
            held = format_bytes(program.held_bytes)
            lines.append(f"besides, {held} a block that no plan can move")
    totals = bytes_by_action(plan)
    words = [f"{letter} {action} {page.bytes.text(totals[action])}" for action, letter in ACTION_LETTERS.items()]
    return [*lines, f"In all: {', '.join(words)}."]


def _provenance(page: _Page) -> list[str]:
    plan = page.plan
    origin = plan.hardware.origin
    tag = "measured" if origin == "measured" else "formula"
    notes = [
        "[trace]    Sizes, order and use of values: captured from the model's own blocks; bytes are live bytes of "
        "the allocator, not of the process.",
        f"[{tag}] ".ljust(11) + f"Rates of the hardware: {origin}.",
        "[formula]  Baselines: the same simulator under named rules.",
        *(f"- {assumption}" for assumption in plan.assumptions),
    ]
    if plan.versions:
        notes.append("Made with " + ", ".join(f"{name} {version}" for name, version in plan.versions) + ".")
    lines = heading("ASSUMPTIONS AND PROVENANCE", "", page.width)
    for note in notes:
        lines += wrap(note, page.width, indent=" " * (11 if note.startswith("[") else 2 if note[0] == "-" else 0))
    return lines

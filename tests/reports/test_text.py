from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stowplan.core.errors import InvalidArgument
from stowplan.core.plan import Plan
from stowplan.core.program import Action
from stowplan.core.units import GIB, MIB
from stowplan.reports.charts import decision_grid
from stowplan.reports.text import render
from tests.arbitrary_plans import plans
from tests.plans import LAYER, declined_plan, example_plan, measured_plan, split_plan, step_of

GOLDEN = Path(__file__).parent / "golden"

SECTIONS = (
    "PREDICTED AND MEASURED",
    "WHAT THE PLAN GAINS",
    "MEMORY THROUGH ONE STEP",
    "DECISIONS BY BLOCK AND VALUE",
    "ASSUMPTIONS AND PROVENANCE",
)


def over_budget_plan() -> Plan:
    """Figures that contradict the budget, as when a plan is read again under a smaller one."""
    plan = measured_plan()
    return replace(plan, budget_bytes=plan.prediction.peak_bytes - 100 * MIB)


def two_kinds_plan() -> Plan:
    """Encoder and decoder blocks: two programs, 120 blocks, autograd functions that hide bytes."""
    plan = example_plan(num_blocks=120)
    encoder = replace(LAYER, name="EncoderLayer", held_bytes=3 * MIB)
    blocks = (1,) * 10 + (0,) * 110
    return replace(plan, step=replace(plan.step, programs=(LAYER, encoder), blocks=blocks))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("planned", example_plan()),
        ("split", split_plan()),
        ("measured", measured_plan()),
        ("declined", declined_plan()),
        ("over_budget", over_budget_plan()),
        ("two_kinds", two_kinds_plan()),
    ],
)
def test_golden_reports(name: str, plan: Plan) -> None:
    path = GOLDEN / f"{name}.txt"
    text = render(plan)
    if os.environ.get("STOWPLAN_UPDATE_GOLDEN"):
        path.write_text(text, encoding="ascii")
    assert text == path.read_text(encoding="ascii")


@given(plans(), st.sampled_from([80, 100, 132]))
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=60)
def test_no_plan_breaks_the_page(plan: Plan, width: int) -> None:
    text = render(plan, width)
    for line in text.splitlines():
        assert len(line) <= width
        assert re.fullmatch(r"[ -~]*", line)
    found = [section for section in SECTIONS if f"\n{section}" in text]
    assert sorted(found, key=text.index) == found
    assert set(SECTIONS) - set(found) <= {"MEMORY THROUGH ONE STEP"}


@given(st.text(min_size=1, max_size=400))
def test_hostile_names_stay_in_their_place(name: str) -> None:
    plan = example_plan()
    hostile = replace(LAYER, name=name, values=(replace(LAYER.values[0], name=name), *LAYER.values[1:]))
    moments = tuple(replace(moment, name=name) for moment in plan.prediction.moments)
    plan = replace(
        plan,
        model=name,
        batch=name,
        step=replace(plan.step, programs=(hostile,), block_names=(name,) * plan.step.num_blocks),
        prediction=replace(plan.prediction, peak_moment=name, moments=moments),
        assumptions=(name,),
        versions=((name, name),),
    )
    lines = render(plan).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(re.fullmatch(r"[ -~]*", line) for line in lines)
    assert lines[0].startswith("FITS")


def test_the_first_line_is_the_verdict() -> None:
    plan = example_plan()
    spare = plan.budget_bytes - plan.prediction.peak_bytes
    line = render(plan).splitlines()[0]
    assert line == (
        f"FITS: needs {plan.prediction.peak_bytes / GIB:.2f} GiB of {plan.budget_bytes / GIB:.2f} GiB, "
        f"{spare / GIB:.2f} GiB spare. A step takes {plan.prediction.step_seconds:.2f} s."
    )


def test_a_declined_plan_says_that_it_costs_nothing() -> None:
    text = render(declined_plan())
    assert text.startswith("FITS WITHOUT A PLAN")
    assert "applying this plan does nothing and costs nothing" in " ".join(text.split())
    assert "Nothing to decide" in text


def test_more_than_the_budget_is_no_fit() -> None:
    lines = render(over_budget_plan()).splitlines()
    assert lines[0].startswith("DOES NOT FIT: needs")
    assert any("OVER THE BUDGET by" in line for line in lines[:8])


def test_without_a_measurement_there_is_a_way_to_one_and_no_table() -> None:
    text = render(example_plan())
    assert "stowplan.measure(model)" in text
    assert "error" not in text
    assert "Measured:" not in text


def test_errors_beyond_three_per_cent_are_marked() -> None:
    marked = [line.split("  ")[0] for line in render(measured_plan()).splitlines() if "<--" in line]
    assert marked == ["Step time"]


@pytest.mark.parametrize("num_blocks", [1, 7, 40, 41, 120])
def test_every_decision_is_one_letter(num_blocks: int) -> None:
    step = step_of(LAYER, num_blocks)
    actions = ((Action.KEEP, Action.RECOMPUTE, Action.SWAP, Action.KEEP), (Action.SWAP,) * 4)
    plan = replace(example_plan(), step=step, decisions=tuple(actions[block % 2] for block in range(num_blocks)))
    rows = [line for line in decision_grid(plan, 0, 100) if line.startswith("norm1 ")]
    letters = "".join(line[41:].split(" ")[0] for line in rows)
    assert letters == "".join("cs"[block % 2] for block in range(num_blocks))
    counts = [figure for line in rows for figure in re.findall(r"(\d+)([Ksc])\b", line[41:])]
    assert sum(int(number) for number, _ in counts) == num_blocks


def test_the_peak_bar_is_as_long_as_its_parts() -> None:
    plan = example_plan()
    bar = next(line for line in render(plan).splitlines() if line.startswith("at peak |"))
    room = bar.index("|", 9) - 9
    filled = len(bar[9 : 9 + room].rstrip())
    assert filled == round(room * plan.prediction.peak_bytes / plan.budget_bytes)


def test_small_models_are_told_in_small_units() -> None:
    plan = example_plan(num_blocks=3)
    small = replace(plan.prediction, peak_bytes=80 * MIB)
    plan = replace(plan, prediction=small, unplanned=small, baselines=(), budget_bytes=90 * MIB)
    assert render(plan).startswith("FITS: needs 80.00 MiB of 90.00 MiB, 10.00 MiB spare.")


def test_the_host_budget_counts_too() -> None:
    plan = example_plan()
    plan = replace(plan, host_budget_bytes=plan.prediction.host_bytes - GIB // 2)
    text = render(plan)
    assert text.startswith("DOES NOT FIT: needs 0.69 GiB of the host, 0.50 GiB over its budget.")
    assert re.search(r"^This plan +DOES NOT FIT", text, flags=re.MULTILINE)


def test_a_page_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"width=40 is too narrow .* allowed: 80 or more"):
        render(example_plan(), width=40)

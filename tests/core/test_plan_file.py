from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stowplan.core.errors import InvalidPlanFile
from stowplan.core.plan import Plan
from stowplan.core.program import Action, Split, Value, decision_by_rows
from tests.arbitrary_plans import plans
from tests.plans import example_plan, measured_plan, split_plan

Document = dict[str, Any]


@given(plans())
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=50)
def test_any_plan_reads_back_as_it_was(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("plan", [example_plan(), measured_plan(), split_plan()])
def test_a_saved_plan_loads(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("what was there before")
    plan.save(path)
    assert Plan.load(path) == plan
    assert list(tmp_path.iterdir()) == [path]  # no draft is left


def test_writing_twice_gives_the_same_bytes() -> None:
    text = example_plan().to_json()
    assert Plan.from_json(text).to_json() == text


def test_decisions_are_written_as_ranges_of_blocks() -> None:
    decisions = json.loads(example_plan(num_blocks=9).to_json())["decisions"]
    assert [entry["blocks"] for entry in decisions] == ["0-2", "3-5", "6-8"]
    assert decisions[1] == {"blocks": "3-5", "keep": ["q"], "swap": ["x_in"], "recompute": ["norm1", "up"]}


def test_splits_are_written_as_numbers_of_rows() -> None:
    decisions = json.loads(split_plan().to_json())["decisions"]
    assert decisions[0] == {
        "blocks": "0-3",
        "keep": [],
        "swap": ["x_in"],
        "recompute": ["q"],
        "rows": {
            "norm1": {"recompute": 64, "swap": 128, "keep": 64},
            "up": {"recompute": 128, "swap": 128},
        },
    }
    assert decisions[2]["rows"] == {"norm1": {"swap": 32, "keep": 224}}


def test_rows_that_all_do_the_same_are_no_split() -> None:
    assert [decision_by_rows(8, *rows) for rows in ((0, 0), (0, 8), (8, 0))] == list(Action)
    assert decision_by_rows(8, 2, 6) == Split(recomputed=2, swapped=6)


def test_bytes_of_a_value_by_what_its_rows_do() -> None:
    value = Value(name="up", size_bytes=80, producer=0, actions=tuple(Action), num_rows=8, splits=(2,))
    split = Split(recomputed=2, swapped=5)
    assert value.bytes_by_action(split) == {Action.KEEP: 10, Action.SWAP: 50, Action.RECOMPUTE: 20}
    assert value.bytes_by_action(Action.SWAP) == {Action.KEEP: 0, Action.SWAP: 80, Action.RECOMPUTE: 0}


def test_figures_that_are_no_numbers_are_not_written() -> None:
    plan = example_plan()
    broken = replace(plan, solution=replace(plan.solution, gap=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


def test_actions_of_a_block_by_name() -> None:
    assert example_plan(num_blocks=9).actions_of(4) == {
        "x_in": Action.SWAP,
        "norm1": Action.RECOMPUTE,
        "q": Action.KEEP,
        "up": Action.RECOMPUTE,
    }


# ---- files that are wrong --------------------------------------------------------------------------------------------


def test_a_missing_file_is_no_invalid_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        (example_plan().to_json()[:-100], "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"format": "stowplan-plan", "version": 1, "budget_bytes": NaN}', "NaN is no JSON number"),
        ("[]", "is not a stowplan plan"),
        ('{"version": 1}', "is not a stowplan plan"),
        ('{"format": "stowplan-schedule", "version": 1}', "is not a stowplan plan"),
        ('{"format": "stowplan-plan"}', "has plan version None; this stowplan reads version 1"),
        ('{"format": "stowplan-plan", "version": 2}', "has plan version 2; this stowplan reads version 1"),
        ('{"format": "stowplan-plan", "version": true}', "has plan version True; this stowplan reads version 1"),
        (
            example_plan().to_json().replace('"declined"', '"tolerance": 1e999, "declined"'),
            "1e999 is too large",
        ),
        (
            example_plan().to_json().replace('"host_budget_bytes": ', '"host_budget_bytes": ' + 40 * "1"),
            "1{30}... is too large",
        ),
        ('{"format": "stowplan-plan", "version": 1}', r"\$\.step: NoneType where dict is expected"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InvalidPlanFile, match=reason) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InvalidPlanFile, match="is not text"):
        Plan.load(path)


def _set(*keys: str | int, to: object) -> Callable[[Document], None]:
    def damage(document: Document) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return damage


def _drop(*keys: str | int) -> Callable[[Document], None]:
    def damage(document: Document) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return damage


def _gaps(*blocks: int) -> list[Document]:
    nothing = {"seconds": 0, "peak_bytes": 0, "left_bytes": 0}
    return [{"block": block, "forward": nothing, "backward": nothing} for block in blocks]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("budget_bytes"), "$: key 'budget_bytes' is missing"),
        (_set("extra", to=1), "$: unknown key 'extra'"),
        (_set("budget_bytes", to=-1), "$.budget_bytes: -1 is less than 0"),
        (_set("tolerance", to=1e-3), "$.tolerance: 0.001 goes with exact=False"),
        (_set("hardware", "device_type", to="tpu"), "$.hardware.device_type: 'tpu' is neither 'cpu' nor 'cuda'"),
        (_set("hardware", "staging_blocks", to=0), "$.hardware.staging_blocks: 0 is less than 1"),
        (_set("hardware", "to_host_bytes_per_second", to=0.0), "$.hardware.to_host_bytes_per_second: 0.0 is not more"),
        (_set("budget_bytes", to="1GiB"), "$.budget_bytes: str where int is expected"),
        (_set("prediction", "moments", 1, "name", to=None), "$.prediction.moments[1].name: NoneType where str"),
        (_set("step", "block_names", to=["a"]), "$.step.block_names: 1 names of 9 blocks"),
        (_set("step", "blocks", 4, to=7), "$.step.blocks[4]: 7 is not between 0 and 0"),
        (_set("step", "blocks", 4, to=-1), "$.step.blocks[4]: -1 is not between 0 and 0"),
        (_set("step", "gaps", to=_gaps(0)), "$.step.gaps[0].block: 0 is not between 1 and 8"),
        (_set("step", "gaps", to=_gaps(9)), "$.step.gaps[0].block: 9 is not between 1 and 8"),
        (_set("step", "gaps", to=_gaps(3, 3)), "$.step.gaps[1].block: 3 is not between 4 and 8"),
        (_set("step", "programs", 0, "ops", 1, "inputs", 0, to=99), "$.step.programs[0].ops[1].inputs[0]: 99 is not"),
        (_set("step", "programs", 0, "values", 1, "producer", to=4), "$.step.programs[0].values[1].producer: 4 is not"),
        (_set("step", "programs", 0, "values", 1, "name", to="q"), "$.step.programs[0].values: two saved values have"),
        (_set("step", "programs", 0, "values", 1, "actions", to=["drop"]), "values[1].actions[0]: 'drop' is none of"),
        (_set("decisions", to=None), "$.decisions: a list of block ranges is expected"),
        (_set("decisions", 1, to="3-5"), "$.decisions[1]: an object with"),
        (_set("decisions", 1, "blocks", to="4-5"), "$.decisions[1].blocks: '4-5' is not the next range"),
        (_set("decisions", 1, "blocks", to="3-2"), "$.decisions[1].blocks: '3-2' is not the next range"),
        (_set("decisions", 1, "blocks", to="3-²"), "$.decisions[1].blocks: '3-²' is not the next range"),
        (_set("decisions", 1, "blocks", to=3), "$.decisions[1].blocks: 3 is not the next range"),
        (_set("decisions", 2, "blocks", to="6-999999999"), "$.decisions[2].blocks: block 999999999 of 9"),
        (_drop("decisions", 2), "$.decisions: 6 blocks of 9"),
        (_set("decisions", 1, "keep", to="q"), "$.decisions[1].keep: a list of names is expected"),
        (_set("decisions", 1, "keep", to=[]), "$.decisions[1]: no action for 'q'"),
        (_set("decisions", 1, "keep", to=["q", "z"]), "$.decisions[1]: 'z' is no saved value of these blocks"),
        (_set("decisions", 1, "keep", to=["q", "up"]), "$.decisions[1].recompute: 'up' is no name, or has an action"),
        (_set("decisions", 1, "keep", to=[["q"]]), "$.decisions[1].keep: ['q'] is no name"),
        (_set("decisions", 1, "drop", to=[]), "$.decisions[1]: unknown key 'drop'"),
        (
            _set("decisions", 1, to={"blocks": "3-5", "recompute": ["x_in", "norm1", "q", "up"]}),
            "$.decisions[1]: 'recompute' is not allowed for 'x_in'",
        ),
    ],
)
def test_damage_is_named_by_its_path(damage: Callable[[Document], None], message: str) -> None:
    document = json.loads(example_plan(num_blocks=9).to_json())
    damage(document)
    with pytest.raises(InvalidPlanFile) as caught:
        Plan.from_json(json.dumps(document), "plan.json")
    assert f"plan.json: {message}" in str(caught.value) or message in str(caught.value)
    assert str(caught.value).endswith("Make it anew with stowplan plan --out.")


def _rows(rows: object) -> Callable[[Document], None]:
    return _set("decisions", 0, "rows", "up", to=rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set("decisions", 0, "rows", to=["up"]), "$.decisions[0].rows: an object of numbers of rows by name"),
        (_set("decisions", 0, "keep", to=["up"]), "$.decisions[0].rows: 'up' is no name, or has an action already"),
        (_set("decisions", 0, "rows", "z", to={"swap": 1}), "$.decisions[0]: 'z' is no saved value of these blocks"),
        (_drop("decisions", 0, "rows", "up"), "$.decisions[0]: no action for 'up'"),
        (_rows("swap"), "$.decisions[0].rows.up: an object like"),
        (_rows({"drop": 256}), "$.decisions[0].rows.up: an object like"),
        (_rows({"recompute": 64, "swap": 192.0}), "$.decisions[0].rows.up: numbers of rows are whole and above 0"),
        (_rows({"recompute": 64, "swap": True}), "$.decisions[0].rows.up: numbers of rows are whole and above 0"),
        (_rows({"recompute": 64, "swap": 192, "keep": 0}), "$.decisions[0].rows.up: numbers of rows are whole and"),
        (_rows({"recompute": 64, "swap": 191}), "$.decisions[0].rows.up: 255 rows; 'up' has 256"),
        (_rows({"swap": 256}), "$.decisions[0].rows.up: all rows swap: list 'up' under 'swap'"),
        (_rows({"recompute": 65, "swap": 191}), "$.decisions[0].rows.up.recompute: 65 is none of the first rows"),
        (
            _set("step", "programs", 0, "values", 4, "actions", to=["keep", "recompute"]),
            "$.decisions[0].rows.up.swap: not allowed for 'up'",
        ),
        (
            _set("decisions", 0, "rows", "q", to={"swap": 256}),
            "$.decisions[0].rows: 'q' is no name, or has an action already",
        ),
        (
            _set("step", "programs", 0, "values", 1, "num_rows", to=7),
            "$.step.programs[0].values[1].num_rows: 7 rows do",
        ),
        (_set("step", "programs", 0, "values", 1, "num_rows", to=-1), "$.step.programs[0].values[1].num_rows: -1 rows"),
        (
            _set("step", "programs", 0, "values", 1, "splits", to=[64, 64]),
            "$.step.programs[0].values[1].splits[1]: 64 is not between 65 and 255, ascending",
        ),
        (
            _set("step", "programs", 0, "values", 0, "splits", to=[64]),
            "$.step.programs[0].values[0].splits[0]: 64 is not between 1 and -1",
        ),
    ],
)
def test_damaged_rows_are_named_by_their_path(damage: Callable[[Document], None], message: str) -> None:
    document = json.loads(split_plan().to_json())
    damage(document)
    with pytest.raises(InvalidPlanFile) as caught:
        Plan.from_json(json.dumps(document), "plan.json")
    assert f"plan.json: {message}" in str(caught.value)


def test_rows_of_an_undivided_value_are_refused() -> None:
    document = json.loads(split_plan().to_json())
    document["decisions"][0]["recompute"] = []
    document["decisions"][0]["rows"]["q"] = {"swap": 1, "keep": 1}
    with pytest.raises(InvalidPlanFile, match=r"\$\.decisions\[0\]\.rows\.q: the rows of 'q' may not be divided"):
        Plan.from_json(json.dumps(document))


TEXT = split_plan().to_json()


@given(st.integers(0, len(TEXT) - 1), st.integers(0, 30), st.text(max_size=5))
def test_any_damage_is_refused_or_harmless(at: int, length: int, inserted: str) -> None:
    try:
        plan = Plan.from_json(TEXT[:at] + inserted + TEXT[at + length :])
    except InvalidPlanFile:
        return
    assert plan.step.num_blocks == len(plan.decisions)

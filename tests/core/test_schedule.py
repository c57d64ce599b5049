"""Schedules as data: actions, the two forms as text, placements, what is refused."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowplan.core.errors import InvalidArgument, InvalidSchedule
from stowplan.core.schedule import Action, Kind, Schedule, loop_placement, v_placement

TWO_DEVICES = """\
0: 0F0 0F1 0B0 0B1
1: 1F0 1I0 1F1 1I1 1W0 1W1
"""


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Orders that need not make sense, of stages that are all somewhere."""
    num_stages = draw(st.integers(1, 5))
    devices = draw(st.lists(st.integers(0, 3), min_size=num_stages, max_size=num_stages))
    orders: list[list[Action]] = [[] for _ in range(max(devices) + 1)]
    for stage, device in enumerate(devices):
        for microbatch in [0, *draw(st.lists(st.integers(0, 120), max_size=6))]:
            orders[device].append(Action(stage, draw(st.sampled_from(Kind)), microbatch))
    return Schedule.of_orders([draw(st.permutations(order)) for order in orders])


@given(st.integers(0, 999), st.sampled_from(Kind), st.integers(0, 9999))
def test_an_action_is_read_as_it_is_written(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage, kind, microbatch)
    assert Action.parse(str(action)) == action
    assert str(action) == f"{stage}{kind.value}{microbatch}"


@pytest.mark.parametrize("text", ["", "F", "1F", "F1", "1X2", "-1F0", "1F-1", "1SEND_F0", "1f0", "(0F0;1B0)OVERLAP"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(InvalidSchedule, match="is no action: an action is a stage"):
        Action.parse(text)


@given(schedules())
def test_both_forms_load_as_they_were_saved(schedule: Schedule) -> None:
    assert Schedule.from_text(schedule.to_text()) == schedule
    assert Schedule.from_csv(schedule.to_csv()) == schedule


def test_the_forms_look_like_this(tmp_path: Path) -> None:
    schedule = Schedule.from_text(TWO_DEVICES)
    assert (schedule.num_devices, schedule.num_stages, schedule.num_microbatches) == (2, 2, 2)
    assert str(schedule) == TWO_DEVICES
    schedule.save_csv(tmp_path / "schedule.csv")
    assert (tmp_path / "schedule.csv").read_text() == "0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1I1,1W0,1W1\n"
    assert Schedule.load_csv(tmp_path / "schedule.csv") == schedule


def test_idle_cells_are_skipped() -> None:
    schedule = Schedule.from_text("0: 0F0   .   . 0B0\n1:   . 1F0 1B0   .\n")
    assert Schedule.from_csv("0F0,,,0B0\n,1F0,1B0,\n") == schedule
    assert schedule.orders[1] == (Action(1, Kind.FORWARD, 0), Action(1, Kind.BACKWARD, 0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this schedule is empty"),
        ("0: 0F0\n1: 2F0\n", "stage 1 has no action, but stage 2 has"),
        ("0: 0F0\n0: 1F0\n", 'line 2 does not begin with "1:"'),
        ("0F0 0B0\n", 'line 1 does not begin with "0:"'),
        ("0: 0F0 0G0\n", "line 1, cell 2: '0G0' is no action"),
        ("0: 999999999F0\n", "stage 0 has no action"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidSchedule, match=said):
        Schedule.from_text(text)


def test_a_csv_that_is_none_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidSchedule, match="line 2, cell 3: '1SEND_F0' is no action"):
        Schedule.from_csv("0F0,0B0\n1F0,1B0,1SEND_F0\n")


def test_placements() -> None:
    assert loop_placement(3) == (0, 1, 2)
    assert loop_placement(2, 3) == (0, 1, 0, 1, 0, 1)
    assert v_placement(3) == (0, 1, 2, 2, 1, 0)
    with pytest.raises(InvalidArgument, match="num_devices=0"):
        v_placement(0)
    with pytest.raises(InvalidArgument, match=r"stages_per_device=1\.5"):
        loop_placement(2, 1.5)  # type: ignore[arg-type]


def test_stages_are_found_by_device() -> None:
    schedule = Schedule.from_text("0: 0F0 3F0\n1: 1F0 2F0\n")
    assert [schedule.stages_of(device) for device in range(2)] == [(0, 3), (1, 2)]


def test_an_excerpt_marks_one_cell() -> None:
    schedule = Schedule.from_text("".join(f"{i}: {' '.join(f'{i}F{n}' for n in range(12))}\n" for i in range(9)))
    assert schedule.excerpt(4, 6) == "".join(
        f"{i}: {' '.join(cell.rjust(5) for cell in ['...', *cells, '...'])}\n"
        for i in range(1, 8)
        for cells in [[f">{i}F{n}<" if (i, n) == (4, 6) else f"{i}F{n}" for n in range(2, 11)]]
    )
    assert schedule.excerpt(8, 12).splitlines()[-1] == "8:   ...   8F8   8F9  8F10  8F11 >end<"


def test_torch_loads_the_csv_and_writes_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.pipelining import schedules as torch_schedules

    caplog.set_level(logging.ERROR)
    runtime = object.__new__(torch_schedules._PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages, runtime._n_microbatches = 2, 2, 2
    runtime._defer_pp_recv, runtime.pipeline_order, runtime._stages = False, {}, []
    schedule = Schedule.from_text(TWO_DEVICES)
    schedule.save_csv(tmp_path / "schedule.csv")
    runtime._load_csv(str(tmp_path / "schedule.csv"), "compute_only")
    assert [list(map(str, order)) for order in schedule.orders] == [
        list(map(repr, runtime.pipeline_order[device])) for device in range(2)
    ]
    assert runtime.stage_index_to_group_rank == dict(enumerate(schedule.stage_devices))

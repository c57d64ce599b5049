"""``stowplan schedule``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stowplan.core.schedule import Schedule
from stowplan.planner.schedule import check, generate
from tests.cli.commands import run, told

V_HALF = ("schedule", "--kind", "v-half", "--devices", "4", "--microbatches", "12")


def test_a_named_schedule_is_printed_drawn_and_saved(tmp_path: Path) -> None:
    result = run(*V_HALF, "--csv", tmp_path / "s.csv", "--picture", tmp_path / "s.svg", "--limit", "3")
    assert result.exit_code == 0, result.output
    assert Schedule.load_csv(tmp_path / "s.csv") == generate("v-half", 4, 12)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert result.stdout.isascii()
    assert "takes 77, 6.5% of it bubble" in result.stdout
    # 77 ticks a line, of which 72 are work; and the peak
    timeline = [line.split() for line in lines if re.fullmatch(r"[0-3] [FIWfiw.]+ \S+", line)]
    assert [(len(passes), passes.count("."), peak) for _, passes, peak in timeline] == [(77, 5, "3")] * 4
    assert ElementTree.fromstring((tmp_path / "s.svg").read_text()).tag.endswith("svg")


def test_json_is_all_there_is() -> None:
    told_of = json.loads(run(*V_HALF, "--json").stdout)
    schedule = generate("v-half", 4, 12)
    assert told_of["orders"] == [list(map(str, order)) for order in schedule.orders]
    assert tuple(told_of["stage_devices"]) == schedule.stage_devices
    assert (told_of["step_time"], told_of["work_time"]) == (77.0, 72.0)


def test_auto_stays_within_bytes(tmp_path: Path) -> None:
    arguments = ("--limit", "10GiB", "--activations", "2GiB", "--static", "3GiB", "--steps", "20000")
    result = run("schedule", "--devices", "4", "--microbatches", "8", *arguments, "--json", "--csv", tmp_path / "s.csv")
    told_of = json.loads(result.stdout)
    assert max(told_of["peaks"]) <= told_of["limit"] == 10 * 2**30
    check(Schedule.load_csv(tmp_path / "s.csv"), limit_microbatches=3)  # (10 - 3) / 2


def test_csv_may_go_to_stdout() -> None:
    result = run(*V_HALF, "--csv", "-")
    assert Schedule.from_csv(result.stdout) == generate("v-half", 4, 12)
    assert "of it bubble" in result.stderr


def test_v_min_is_warned_of_where_it_loses() -> None:
    v_min = ("schedule", "--kind", "v-min", "--devices", "8", "--microbatches", "16")
    assert "longer than 1f1b" in run(*v_min, "--times", "10:13:8").stderr
    assert run(*v_min).stderr == ""


def test_a_limit_that_a_named_schedule_breaks_is_exit_code_3(tmp_path: Path) -> None:
    result = run(*V_HALF, "--limit", "2", "--csv", tmp_path / "s.csv")
    assert result.exit_code == 3
    assert "the least limit of v-half is 3 microbatches" in result.stderr
    assert (tmp_path / "s.csv").exists()


def test_a_limit_that_nothing_keeps_is_exit_code_3() -> None:
    line = told(run("schedule", "--devices", "2", "--microbatches", "4", "--limit", "5GiB", "--activations", "6GiB"), 3)
    assert "the least limit is 6.00 GiB" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--times", "1:2"), "give three positive numbers, F:I:W"),
        (("--times", "1:2:x"), "give three positive numbers, F:I:W"),
        (("--times", "1:0:1"), "is no time"),
        (("--limit", "0"), "the least limit is 1 microbatch"),
        (("--limit", "4GiB"), "say with --activations"),
        (("--static", "4GiB"), "say with --activations"),
        (("--limit", "0.5"), "has a fraction but no unit"),
        (("--picture", "s.png"), "a name that ends with .html or .svg"),
        (("--picture", "no/where/s.svg"), "cannot be written"),
        (("--json", "--csv", "-"), "both want stdout"),
        (("--kind", "interleaved"), "give 4 or 8"),
    ],
)
def test_what_cannot_be_used_is_refused(more: tuple[str, ...], said: str) -> None:
    assert said in told(run("schedule", "--devices", "4", "--microbatches", "6", "--steps", "1", *more), 2)

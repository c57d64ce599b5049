"""Rules of failures: what they hit, how often, and what is no rule."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.snapshot import fail_points
from stowplan.runtime.snapshot.fail_points import MARKS_VARIABLE, POINTS, RULES_VARIABLE, arm, fail_at


@pytest.fixture
def rules(monkeypatch):
    """Arms this process as a trainer of rank 1 on node "a", and disarms it."""

    def set_rules(text, node="a", rank=1):
        monkeypatch.setenv(RULES_VARIABLE, text)
        arm(node, rank)

    yield set_rules
    set_rules("")


def failures(point, times=6):
    found = []
    for time_ in range(1, times + 1):
        try:
            fail_at(point)
        except OSError as error:
            found.append((time_, error.errno))
    return found


@pytest.mark.parametrize(("count", "hit"), [("", [1]), (":3", [3]), (":2-4", [2, 3, 4]), (":5-", [5, 6]), (":9", [])])
def test_a_count_says_which_time(rules, count, hit):
    rules(f"encode{count}=raise:ENOSPC")
    assert failures("encode") == [(time_, 28) for time_ in hit]
    assert failures("parity") == []


@pytest.mark.parametrize(
    ("place", "node", "rank", "hit"),
    [
        *(("", "b", None, True), ("@a", "a", None, True), ("@a", "a", 1, True), ("@a", "b", 1, False)),
        *(("@rank-1", "a", 1, True), ("@rank-1", "a", 2, False), ("@rank-1", "a", None, False)),
    ],
)
def test_a_place_says_which_processes(rules, place, node, rank, hit):
    rules(f"encode{place}=raise:EIO", node, rank)
    assert bool(failures("encode", 1)) == hit


def test_several_rules_count_by_themselves(rules):
    rules("encode:1=raise:EIO, encode:3=raise:ENOSPC,copy.end=stall:0.05")
    assert failures("encode") == [(1, 5), (3, 28)]
    begin = time.monotonic()
    fail_at("copy.end")
    assert time.monotonic() - begin >= 0.05


def test_a_single_failure_that_left_its_mark_does_not_happen_again(rules, tmp_path, monkeypatch):
    monkeypatch.setenv(MARKS_VARIABLE, str(tmp_path))
    for _ in range(2):  # as in a process and its successor
        rules("encode@a:2=raise:EIO,parity:2-=raise:EIO")
        before = [path.name for path in tmp_path.iterdir()]
        assert failures("encode") == ([] if before else [(2, 5)])
        assert len(failures("parity")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encode@a:2", "parity:2-"]


def test_kill_is_sigkill():
    script = "from stowplan.runtime.snapshot.fail_points import *; arm('a'); fail_at('encode'); fail_at('encode')"
    environment = {"PATH": "", RULES_VARIABLE: "encode:2=kill"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("encodes=kill", "points are copy.begin, copy.during"),
        ("encode", "a rule is POINT[@PLACE][:COUNT]=ACTION"),
        ("encode@a b=kill", "a rule is"),
        ("encode:0=kill", "the first time is 1"),
        ("encode:4-3=kill", "the first time is 1, the last one not before it"),
        ("encode=raise:ENOSUCH", "actions are kill, raise:ERRNO"),
        ("encode=stall", "actions are"),
        ("encode=kill:9", "actions are"),
    ],
)
def test_what_is_no_rule_is_refused(rules, rule, problem):
    with pytest.raises(InvalidArgument, match=re.escape(f"{RULES_VARIABLE} has {rule!r}: {problem}")):
        rules(f"parity=kill,{rule}")


def test_all_points_are_in_the_code_once_and_in_the_documentation():
    source = "\n".join(path.read_text() for path in Path(fail_points.__file__).parent.rglob("*.py"))
    calls = re.findall(r"fail_at\(([^)]*)\)", source.replace("def fail_at(point: str)", ""))
    assert sorted(name for call in calls for name in re.findall(r'"([a-z.]+)"', call)) == sorted(POINTS)
    page = Path("docs/snapshots.md").read_text()
    assert [f"| `{name}` | {where} |" for name, where in POINTS.items() if f"| `{name}` | {where} |" not in page] == []

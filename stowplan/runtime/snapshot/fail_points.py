"""Named points at which a process of a job can be made to fail, so that recovery can be tried out.

    STOWPLAN_FAIL_AT="copy.during@rank-1:3=kill,encode@node-b=stall:2,disk.part:2-4=raise:ENOSPC"

A rule is ``POINT[@PLACE][:COUNT]=ACTION``. PLACE is a node's name, for all of its processes, or ``rank-N``, for that
trainer; without one every process is meant. COUNT is which time in a process the point fails: ``3``, ``3-5`` or ``3-``
(from then on), the first without one. ACTION is ``kill`` (SIGKILL), ``raise:ERRNO`` (an OSError) or ``stall:SECONDS``
(of the thread that is there; at points of the exchange everything of it).

STOWPLAN_FAIL_MARKS names a directory in which each rule that acts leaves an empty file with its own name. A rule with a
single count that has left one does nothing any more: not in other processes, and not in those that are started again.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stowplan.core.errors import InvalidArgument

__all__ = ["MARKS_VARIABLE", "POINTS", "RULES_VARIABLE", "arm", "fail_at"]

RULES_VARIABLE = "STOWPLAN_FAIL_AT"
MARKS_VARIABLE = "STOWPLAN_FAIL_MARKS"
POINTS = {
    "copy.begin": "trainer: a slot is WRITING, nothing is copied",
    "copy.during": "trainer: half of the tensors are copied",
    "copy.end": "trainer: all is copied, the memory process does not know",
    "commit.end": "trainer: the memory process knows, training does not go on yet",
    "restore.begin": "trainer: the snapshot is whole in memory, nothing of the training is changed",
    "restore.end": "trainer: the training is restored",
    "disk.part": "trainer's thread: a part is about to be written",
    "disk.finish": "trainer's thread: all parts are there, the copy is not complete",
    "reserve": "memory process: memory is about to be taken",
    "checksums": "memory process: a trainer has committed, checksums are not computed",
    "local": "memory process: checksums are in place, the slot is WRITING",
    "encode": "memory process: parity is overwritten, nothing of it is computed",
    "parity": "memory process: parity and its checksums are in place, the slot is LOCAL",
    "global": "memory process: every node has PARITY, the slot has not come to GLOBAL",
    "exchange": "memory process: another node is about to be asked for something",
    "recover": "memory process: recovery begins",
    "rebuild": "memory process: what was lost is overwritten, nothing of it is computed",
    "recovered": "memory process: all nodes' parts are verified, the snapshot is not GLOBAL here",
}
_RULE = re.compile(
    r"(?P<point>[a-z.]+)(@(?P<place>[A-Za-z0-9._-]+))?(:(?P<first>\d+)(?P<more>-(?P<last>\d+)?)?)?=(?P<action>\S+)"
)


@dataclass(eq=False)
class _Rule:
    name: str
    place: str | None
    first: int
    last: float
    act: Callable[[], None]
    passed: int = 0


_rules: dict[str, list[_Rule]] = {}
_lock = threading.Lock()


def fail_at(point: str) -> None:
    """Do what a rule for this process says of ``point``; nothing without one. Raises OSError where it says so."""
    if not _rules:
        return
    due = []
    with _lock:
        for rule in _rules.get(point, ()):
            rule.passed += 1
            if rule.first <= rule.passed <= rule.last and _marked(rule):
                due.append(rule)
    for rule in due:
        rule.act()


def arm(node: str, rank: int | None = None) -> None:
    """Take this process's rules from the environment: of the trainer ``rank``, or of the node's memory process.

    Raises InvalidArgument: a rule that cannot be read, or names what there is not.
    """
    _rules.clear()
    for text in filter(None, (part.strip() for part in os.environ.get(RULES_VARIABLE, "").split(","))):
        point, rule = _parsed(text)
        if rule.place in (None, node) or (rank is not None and rule.place == f"rank-{rank}"):
            _rules.setdefault(point, []).append(rule)


def _parsed(text: str) -> tuple[str, _Rule]:
    found = _RULE.fullmatch(text)
    if found is None:
        raise _invalid(text, "a rule is POINT[@PLACE][:COUNT]=ACTION")
    if found["point"] not in POINTS:
        raise _invalid(text, f"points are {', '.join(POINTS)}")
    first = int(found["first"] or 1)
    last = float(found["last"] or "inf") if found["more"] else first
    if not 1 <= first <= last:
        raise _invalid(text, "the first time is 1, the last one not before it")
    name, _, _ = text.partition("=")
    return found["point"], _Rule(name, found["place"], first, last, _action(text, found["action"]))


def _action(text: str, action: str) -> Callable[[], None]:
    kind, _, value = action.partition(":")
    if kind == "kill" and not value:
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise" and hasattr(errno, value):
        return lambda: _raise(getattr(errno, value))
    if kind == "stall" and re.fullmatch(r"\d+(\.\d+)?", value):
        return lambda: time.sleep(float(value))
    raise _invalid(text, "actions are kill, raise:ERRNO (a name of errno, such as ENOSPC) and stall:SECONDS")


def _raise(number: int) -> None:
    raise OSError(number, f"{os.strerror(number)} ({RULES_VARIABLE})")


def _marked(rule: _Rule) -> bool:
    """Whether the rule may act: a single failure that has happened anywhere does not happen again."""
    directory = os.environ.get(MARKS_VARIABLE)
    if not directory:
        return True
    try:
        (Path(directory) / rule.name).touch(exist_ok=rule.first != rule.last)
    except FileExistsError:
        return False
    return True


def _invalid(text: str, allowed: str) -> InvalidArgument:
    return InvalidArgument(f"{RULES_VARIABLE} has {text!r}: {allowed} (docs/snapshots.md#trying-recovery-out).")

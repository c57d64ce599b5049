from __future__ import annotations

import copy
import pickle
import re

import pytest

from stowplan.core import errors
from stowplan.core.errors import InfeasibleBudget, StowplanError
from stowplan.core.hardware import PRESETS, preset
from stowplan.core.units import GIB

ALL = [getattr(errors, name) for name in errors.__all__]


def test_every_error_has_the_root() -> None:
    assert all(issubclass(error, StowplanError) for error in ALL)


def test_all_names_every_error_of_the_module() -> None:
    defined = {
        name for name, item in vars(errors).items() if isinstance(item, type) and item.__module__ == errors.__name__
    }
    assert set(errors.__all__) == defined


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"^[ │├└─]*([A-Z]\w+)(?: \(also an? (\w+)\))?", errors.__doc__ or "", flags=re.MULTILINE)
    also = {name: base for name, base in drawn if name in errors.__all__}
    assert set(also) == set(errors.__all__)
    for name, base in also.items():
        bases = {ancestor.__name__ for ancestor in getattr(errors, name).__mro__}
        assert not base or base in bases


def test_infeasible_budget_names_the_least() -> None:
    error = InfeasibleBudget(GIB, 2 * GIB, 4 * GIB)
    assert (error.budget_bytes, error.least_bytes, error.host_budget_bytes) == (GIB, 2 * GIB, 4 * GIB)
    for fact in ("1.00 GiB", f"{2 * GIB} bytes", "host budget 4.00 GiB", "Raise budget="):
        assert fact in str(error)


@pytest.mark.parametrize("remake", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_infeasible_budget_travels_between_processes(remake) -> None:
    error = InfeasibleBudget(GIB, 2 * GIB)
    again = remake(error)
    assert type(again) is InfeasibleBudget
    assert (str(again), again.least_bytes) == (str(error), error.least_bytes)


@pytest.mark.parametrize("remake", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_what_a_snapshot_has_lost_travels_between_processes(remake) -> None:
    error = errors.UnrecoverableSnapshot(["node 1", "node 2"], "one may be lost", "Start anew.")
    assert str(error) == ("the snapshot cannot be recovered: lost are node 1, node 2, and one may be lost. Start anew.")
    again = remake(error)
    assert (str(again), again.lost, again.stands, again.advice) == (
        str(error), ("node 1", "node 2"), "one may be lost", "Start anew.",
    )  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        errors.SnapshotMemoryUnavailable("two slots take too much", 2 * GIB, GIB),
        errors.SnapshotProcessUnavailable("it is gone"),
        errors.SnapshotRefused("run", "another run"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_snapshots_raise_travels_between_processes(error) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    assert preset("H100-SXM") is PRESETS["h100-sxm"]
    with pytest.raises(errors.InvalidArgument, match="'tpu' is not known; allowed: a100-sxm, h100-sxm"):
        preset("tpu")

"""stowplan: decide what each block of a model keeps, swaps to the host or recomputes, and train under that plan.

    plan = stowplan.plan(model, batch, budget="60GiB", optimizer=optimizer)
    with stowplan.apply(plan, model):
        ...  # the training loop as it was

Importing this package imports neither torch nor a solver: names are looked up at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stowplan import arena
    from stowplan.core.errors import (
        ArenaUnavailable,
        BudgetExceeded,
        CompilationFailed,
        InfeasibleBudget,
        InfeasibleCapacity,
        InfeasibleSchedule,
        InvalidArgument,
        InvalidPlanFile,
        InvalidProblemFile,
        InvalidSchedule,
        InvalidSize,
        InvalidSnapshot,
        MissingDependency,
        NoGradients,
        NoLogits,
        PlanMismatch,
        PlanRejected,
        RankFailed,
        ReplayMismatch,
        SnapshotMemoryUnavailable,
        SnapshotMismatch,
        SnapshotPeerRefused,
        SnapshotPeerUnavailable,
        SnapshotProcessUnavailable,
        SnapshotRefused,
        SolverFailed,
        StowplanError,
        UnrecoverableSnapshot,
        UnsupportedModel,
    )
    from stowplan.core.hardware import Hardware
    from stowplan.core.plan import Measurement, Plan, Prediction
    from stowplan.core.program import Action
    from stowplan.core.schedule import Schedule
    from stowplan.runtime.pipeline.pipeline import Pipeline
    from stowplan.runtime.snapshot.exchange.limits import SnapshotLimits
    from stowplan.runtime.snapshot.reservation import SnapshotMemory
    from stowplan.runtime.snapshot.snapshotter import Snapshotter
    from stowplan.session import (
        PipelinePlan,
        allocations,
        allow_replay,
        applied,
        apply,
        dry,
        linear_cross_entropy,
        measure,
        plan,
        replan,
        report,
        wrap,
    )

__version__ = "0.1.0"

__all__ = [
    "Action",
    "ArenaUnavailable",
    "BudgetExceeded",
    "CompilationFailed",
    "Hardware",
    "InfeasibleBudget",
    "InfeasibleCapacity",
    "InfeasibleSchedule",
    "InvalidArgument",
    "InvalidPlanFile",
    "InvalidProblemFile",
    "InvalidSchedule",
    "InvalidSize",
    "Measurement",
    "MissingDependency",
    "NoGradients",
    "NoLogits",
    "Pipeline",
    "PipelinePlan",
    "Plan",
    "PlanMismatch",
    "PlanRejected",
    "Prediction",
    "ReplayMismatch",
    "Schedule",
    "SnapshotMemory",
    "SnapshotMemoryUnavailable",
    "SnapshotProcessUnavailable",
    "SnapshotRefused",
    "RankFailed",
    "SnapshotLimits",
    "Snapshotter",
    "SnapshotPeerRefused",
    "SnapshotPeerUnavailable",
    "SolverFailed",
    "StowplanError",
    "InvalidSnapshot",
    "SnapshotMismatch",
    "UnrecoverableSnapshot",
    "UnsupportedModel",
    "__version__",
    "allocations",
    "allow_replay",
    "applied",
    "apply",
    "arena",
    "dry",
    "linear_cross_entropy",
    "measure",
    "plan",
    "replan",
    "report",
    "wrap",
]

_HOMES = {
    "stowplan.core.hardware": ("Hardware",),
    "stowplan.core.plan": ("Measurement", "Plan", "Prediction"),
    "stowplan.core.program": ("Action",),
    "stowplan.core.schedule": ("Schedule",),
    "stowplan.runtime.pipeline.pipeline": ("Pipeline",),
    "stowplan.runtime.snapshot.exchange.limits": ("SnapshotLimits",),
    "stowplan.runtime.snapshot.reservation": ("SnapshotMemory",),
    "stowplan.runtime.snapshot.snapshotter": ("Snapshotter",),
    "stowplan.session": (
        "PipelinePlan",
        "allocations",
        "allow_replay",
        "applied",
        "apply",
        "dry",
        "linear_cross_entropy",
        "measure",
        "plan",
        "replan",
        "report",
        "wrap",
    ),
}
_MODULES = {"arena"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What has no home of its own is an error.
    if name in _MODULES:
        return import_module(f"stowplan.{name}")
    found: object = getattr(import_module(_HOME_OF.get(name, "stowplan.core.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

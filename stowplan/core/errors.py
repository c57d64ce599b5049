"""Every error that stowplan raises on purpose.

StowplanError
├── InvalidArgument (also a ValueError)     what was given, what is allowed, what to do
│   └── InvalidSize                         a size that is no byte count
├── InfeasibleBudget                        no plan fits; names the least feasible budget
├── InfeasibleSchedule                      no pipeline schedule stays within the limit; names the least feasible one
├── InfeasibleCapacity                      proved: no addresses fit; says how it is known
├── UnsupportedModel                        the model cannot be captured or hooked as it is
├── BudgetExceeded                          a step took more than its plan promised; only with strict=True
├── PlanMismatch                            a plan meets a model or a batch it was not made for
├── InvalidPlanFile                         a plan file that cannot be read
├── InvalidSchedule                         a pipeline schedule that is none, or that cannot be run; shows where
├── InvalidProblemFile                      a packing problem's CSV file that cannot be read
├── MissingDependency (also an ImportError) an optional package is needed; names the extra
├── ArenaUnavailable                     the arena cannot be torch's allocator here, or now; says why
├── CompilationFailed                    a library of ours cannot be compiled here; says why
├── SolverFailed                            the MIP solver gave no usable answer
├── NoLogits (also a RuntimeError)          a chunked head makes no logits, and code asks for them
├── NoGradients (also a RuntimeError)       a cross entropy in chunks goes backward once, without second derivatives
├── PlanRejected                            our own simulator contradicts the plan: a bug of ours
├── ReplayMismatch (also a RuntimeError)    a recomputed value cannot be what the forward pass had
├── RankFailed                              something failed on other ranks; has what each of them raised
├── UnrecoverableSnapshot                   more of a snapshot is lost than its code stands; names what
├── SnapshotMemoryUnavailable (also a MemoryError) the host has not the memory that snapshots take, or not the kind
├── SnapshotProcessUnavailable (also a ConnectionError) the memory process cannot be started or reached, or is gone
└── SnapshotRefused                         the memory process does not do what was asked; ``reason`` is a word for why
├── InvalidSnapshot                         a snapshot's schema or copy on disk that cannot be read
└── SnapshotMismatch                        a snapshot is of another training; names every difference
├── SnapshotPeerRefused                     a node of the exchange of snapshots refuses another, or a request
├── SnapshotPeerUnavailable (also a ConnectionError)  a node of the exchange cannot be reached, or was cut off
└── UnrecoverableSnapshot                   more of a snapshot is lost than its code stands; names what
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "ArenaUnavailable",
    "BudgetExceeded",
    "CompilationFailed",
    "InfeasibleBudget",
    "InfeasibleCapacity",
    "InfeasibleSchedule",
    "InvalidArgument",
    "InvalidPlanFile",
    "InvalidProblemFile",
    "InvalidSchedule",
    "InvalidSize",
    "InvalidSnapshot",
    "MissingDependency",
    "NoGradients",
    "NoLogits",
    "PlanMismatch",
    "PlanRejected",
    "RankFailed",
    "ReplayMismatch",
    "SnapshotMemoryUnavailable",
    "SnapshotProcessUnavailable",
    "SnapshotRefused",
    "SnapshotMismatch",
    "SnapshotPeerRefused",
    "SnapshotPeerUnavailable",
    "SolverFailed",
    "StowplanError",
    "UnrecoverableSnapshot",
    "UnsupportedModel",
]


class StowplanError(Exception):
    """Root of all errors raised by stowplan."""


class InvalidArgument(StowplanError, ValueError):
    """An argument that stowplan cannot use; the message says what is allowed."""


class InvalidSize(InvalidArgument):
    """A size that is not a number of bytes."""


class InfeasibleBudget(StowplanError):
    """No plan fits the device and host budgets.

    Attributes:
        budget_bytes: the device budget that was asked for.
        least_bytes: the smallest device budget for which a plan exists, the host budget unchanged.
        host_budget_bytes: the host budget that was in force.
        advice: where the least plan has its peak, and what would bring that down.
        snapshot_bytes: what snapshots take of the host budget.
        least_host_bytes: with snapshots the smallest host budget that a plan was found for, the device budget
            unchanged; None: none would do, or nobody looked.
    """

    def __init__(
        self,
        budget_bytes: int,
        least_bytes: int,
        host_budget_bytes: int | None = None,
        advice: str = "Raise budget= to that, shorten the batch, or raise host_budget=.",
        snapshot_bytes: int = 0,
        least_host_bytes: int | None = None,
    ) -> None:
        from stowplan.core.units import format_bytes

        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.host_budget_bytes = host_budget_bytes
        self.advice = advice
        self.snapshot_bytes = snapshot_bytes
        self.least_host_bytes = least_host_bytes
        host = ""
        if host_budget_bytes is not None:
            taken = f", of which snapshots take {format_bytes(snapshot_bytes)}" if snapshot_bytes else ""
            host = f" (host budget {format_bytes(host_budget_bytes)}{taken})"
        remedy = ""
        if least_host_bytes is not None:
            remedy = f"The least host budget is {format_bytes(least_host_bytes)} ({least_host_bytes} bytes). "
        if snapshot_bytes > (host_budget_bytes or 0):
            super().__init__(
                f"snapshots take {format_bytes(snapshot_bytes)} ({snapshot_bytes} bytes) of the host, and the host "
                f"budget is {format_bytes(host_budget_bytes or 0)} ({host_budget_bytes} bytes). {remedy}{advice}"
            )
            return
        super().__init__(
            f"no plan fits a budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes){host}; "
            f"the least feasible budget is {format_bytes(least_bytes)} ({least_bytes} bytes). {remedy}{advice}"
        )

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[object, ...]]:
        given = (self.budget_bytes, self.least_bytes, self.host_budget_bytes, self.advice)
        return type(self), (*given, self.snapshot_bytes, self.least_host_bytes)


class InfeasibleSchedule(StowplanError):
    """No pipeline schedule stays within the limit on every device.

    Attributes:
        limit_bytes: the limit that was asked for.
        least_bytes: the smallest limit that a schedule was found for: one microbatch at a time.
    """

    def __init__(self, limit_bytes: int, least_bytes: int) -> None:
        from stowplan.core.units import format_bytes

        self.limit_bytes, self.least_bytes = limit_bytes, least_bytes
        super().__init__(
            f"no pipeline schedule stays within {format_bytes(limit_bytes)} ({limit_bytes} bytes) on every device; "
            f"the least limit is {format_bytes(least_bytes)} ({least_bytes} bytes), which takes one microbatch at a "
            f"time. Raise the limit to that, make microbatches smaller, or use more devices."
        )

    def __reduce__(self) -> tuple[type[InfeasibleSchedule], tuple[int, int]]:
        return type(self), (self.limit_bytes, self.least_bytes)


class InfeasibleCapacity(StowplanError):
    """No addresses for all buffers are within the capacity: proved, never guessed.

    Attributes:
        capacity_bytes: what was asked for.
        least_bytes: proved: no capacity below can do. Whether this one can is not said.
        proof: how that is known.
    """

    def __init__(self, capacity_bytes: int, least_bytes: int, proof: str) -> None:
        self.capacity_bytes = capacity_bytes
        self.least_bytes = least_bytes
        self.proof = proof
        super().__init__(
            f"no addresses are within {capacity_bytes} bytes; it takes at least {least_bytes}: {proof}. Raise the "
            f"capacity, or leave it out for the least that is found."
        )

    def __reduce__(self) -> tuple[type[InfeasibleCapacity], tuple[int, int, str]]:
        return type(self), (self.capacity_bytes, self.least_bytes, self.proof)


class UnsupportedModel(StowplanError):
    """The model cannot be captured or hooked as it is; the message says what to change."""


class BudgetExceeded(StowplanError):
    """A step under a plan took more of the device's memory than the budget.

    Attributes:
        budget_bytes: the device budget that was planned for.
        measured_bytes: the highest live bytes that were seen.
    """

    def __init__(self, budget_bytes: int, measured_bytes: int) -> None:
        from stowplan.core.units import format_bytes

        self.budget_bytes = budget_bytes
        self.measured_bytes = measured_bytes
        super().__init__(
            f"a step under a plan for {format_bytes(budget_bytes)} ({budget_bytes} bytes) took "
            f"{format_bytes(measured_bytes)} ({measured_bytes} bytes). Plan anew with budget= lowered by the "
            f"difference, or leave strict= out to go on with a warning."
        )

    def __reduce__(self) -> tuple[type[BudgetExceeded], tuple[int, int]]:
        return type(self), (self.budget_bytes, self.measured_bytes)


class NoLogits(StowplanError, RuntimeError):
    """Code asks for logits under a plan with a chunked head, which computes the loss without making them.

    Attributes:
        asked: what was asked of them.
        shape: what theirs would be.
    """

    def __init__(self, asked: str, shape: Sequence[int]) -> None:
        self.asked, self.shape = asked, tuple(shape)
        super().__init__(
            f"{asked}: these logits {self.shape} were never made, as the plan has a chunked head: they may be cast, "
            f"cut by rows and given to cross_entropy, once. Read logits in eval mode or under torch.no_grad(), where "
            f"the head is the model's own, or plan without chunked_head=True."
        )

    def __reduce__(self) -> tuple[type[NoLogits], tuple[str, tuple[int, ...]]]:
        return type(self), (self.asked, self.shape)


class NoGradients(StowplanError, RuntimeError):
    """A cross entropy in chunks of rows is asked for gradients that it has not: a second time, or of gradients."""


class PlanMismatch(StowplanError):
    """A plan was applied to a model or a batch it was not made for."""


class InvalidPlanFile(StowplanError):
    """A plan file is damaged, of another version, or not a plan at all."""


class InvalidSchedule(StowplanError):
    """A pipeline schedule cannot be read, or cannot be run as it is.

    Attributes:
        problem: what is wrong, in one line.
        device: the device with the wrong action, if there is one.
        position: the place of that action in the device's order, from 0; its end where an action is missing.
        grid: the actions around it, the wrong one marked.
    """

    def __init__(self, problem: str, device: int | None = None, position: int | None = None, grid: str = "") -> None:
        self.problem, self.device, self.position, self.grid = problem, device, position, grid
        super().__init__(f"{problem}\n{grid}" if grid else problem)

    def __reduce__(self) -> tuple[type[InvalidSchedule], tuple[str, int | None, int | None, str]]:
        return type(self), (self.problem, self.device, self.position, self.grid)


class InvalidProblemFile(StowplanError):
    """A packing problem's CSV file is no such table, or one of its cells cannot be; names line and column."""


class MissingDependency(StowplanError, ImportError):
    """An optional package is needed for this call; the message names the extra to install."""


class ArenaUnavailable(StowplanError):
    """The arena cannot become, or is not, torch's allocator; the message says what to do."""


class CompilationFailed(StowplanError):
    """A shared library of ours is to be compiled, and cannot be; the message holds the compiler's last lines."""


class SolverFailed(StowplanError):
    """The MIP solver ended without a usable answer."""


class PlanRejected(StowplanError):
    """The independent simulator contradicts the plan: a bug of stowplan, never the user's."""


class ReplayMismatch(StowplanError, RuntimeError):
    """A value cannot be recomputed as it was: something it depends on has changed since the forward pass."""


class RankFailed(StowplanError):
    """Something failed on other ranks, so this one does not go on either; they raise what it was.

    Attributes:
        doing: what all ranks were doing.
        failures: what was raised, by rank; what is no StowplanError comes as one that names it.
    """

    def __init__(self, doing: str, failures: Mapping[int, StowplanError]) -> None:
        self.doing, self.failures = doing, dict(failures)
        told = "; ".join(f"rank {rank}: {failure}" for rank, failure in sorted(self.failures.items()))
        super().__init__(f"{doing} failed on {len(self.failures)} other rank(s), so it is ended here, too. {told}")

    def __reduce__(self) -> tuple[type[RankFailed], tuple[str, dict[int, StowplanError]]]:
        return type(self), (self.doing, self.failures)


class SnapshotPeerRefused(StowplanError):
    """A node that exchanges snapshots refuses another, or what it asks for.

    Attributes:
        reason: one word for programs: "token", "server", "version", "run", "group", "code", "node", "generation",
            "behind", "absent", "bad" or "malformed".
        problem: what was given, what is allowed, what to do.
    """

    def __init__(self, reason: str, problem: str) -> None:
        self.reason, self.problem = reason, problem
        super().__init__(problem)

    def __reduce__(self) -> tuple[type[SnapshotPeerRefused], tuple[str, str]]:
        return type(self), (self.reason, self.problem)


class SnapshotPeerUnavailable(StowplanError, ConnectionError):
    """A node that exchanges snapshots cannot be reached, does not answer in time, or its connection broke."""


class UnrecoverableSnapshot(StowplanError):
    """More of a snapshot is lost than can be computed from what is left; wrong bytes are never given instead.

    Attributes:
        lost: what is lost, each by name.
        stands: what could have been lost without harm.
        advice: what to do now.
    """

    def __init__(
        self,
        lost: Sequence[str],
        stands: str,
        advice: str = "Go on from the newest copy on disk.",
    ) -> None:
        self.lost, self.stands, self.advice = tuple(lost), stands, advice
        super().__init__(
            f"the snapshot cannot be recovered: lost are {', '.join(self.lost)}, and {self.stands}. {self.advice}"
        )

    def __reduce__(self) -> tuple[type[UnrecoverableSnapshot], tuple[tuple[str, ...], str, str]]:
        return type(self), (self.lost, self.stands, self.advice)


class SnapshotMemoryUnavailable(StowplanError, MemoryError):
    """The host cannot give snapshots their memory; known before training starts.

    Attributes:
        problem: what is the matter, and what to do.
        needed_bytes: what snapshots take on this host.
        available_bytes: what there is; None where the amount is not what is wrong.
    """

    def __init__(self, problem: str, needed_bytes: int, available_bytes: int | None = None) -> None:
        self.problem, self.needed_bytes, self.available_bytes = problem, needed_bytes, available_bytes
        super().__init__(problem)

    def __reduce__(self) -> tuple[type[SnapshotMemoryUnavailable], tuple[str, int, int | None]]:
        return type(self), (self.problem, self.needed_bytes, self.available_bytes)


class SnapshotProcessUnavailable(StowplanError, ConnectionError):
    """The memory process of snapshots cannot be started or reached, or has gone; training can go on without it."""


class SnapshotRefused(StowplanError):
    """The memory process of snapshots, or its client, refuses; nothing has changed.

    Attributes:
        reason: one word for programs: "user", "version", "run", "generation", "busy", "malformed", "order", "size",
            "unknown" or "unsafe".
        problem: what was given, what is allowed, what to do.
    """

    def __init__(self, reason: str, problem: str) -> None:
        self.reason, self.problem = reason, problem
        super().__init__(problem)

    def __reduce__(self) -> tuple[type[SnapshotRefused], tuple[str, str]]:
        return type(self), (self.reason, self.problem)


class InvalidSnapshot(StowplanError):
    """A snapshot's schema, or a copy of it on disk, is damaged, incomplete or of another version."""


class SnapshotMismatch(StowplanError):
    """A snapshot does not fit the training that it is to be restored into; nothing has been changed.

    Attributes:
        problems: every difference, each by name.
    """

    _SHOWN = 12

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = [f"\n  {problem}" for problem in self.problems[: self._SHOWN]]
        if len(self.problems) > self._SHOWN:
            shown.append(f"\n  and {len(self.problems) - self._SHOWN} more")
        super().__init__(
            "the snapshot is of another training than the one that it is to be restored into (nothing has been "
            "changed); build model, optimizer and the rest as they were when it was taken:" + "".join(shown)
        )

    def __reduce__(self) -> tuple[type[SnapshotMismatch], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)

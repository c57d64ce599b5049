"""Addresses for the buffers of a step: its requests under some decisions, packed."""

from __future__ import annotations

import numpy as np

from stowplan.core.allocations import Addresses, AllocationTrace
from stowplan.core.errors import InvalidArgument
from stowplan.core.hardware import Hardware
from stowplan.core.plan import Plan
from stowplan.core.program import Decisions, StepProgram
from stowplan.planner.activations import policies
from stowplan.planner.activations.problem import Problem
from stowplan.planner.activations.sequence import allocations_of
from stowplan.planner.packing import Problem as PackingProblem
from stowplan.planner.packing import pack

__all__ = ["ALIGNMENT_BYTES", "addresses_of", "packing_problem", "place", "requests"]

# What torch's allocators align to: c10::gAlignment on the CPU, CUDACachingAllocator's kMinBlockSize.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 512}


def requests(step: StepProgram, hardware: Hardware, decisions: Decisions | None = None) -> AllocationTrace:
    """The buffers of ``step`` under ``decisions``; None: everything kept. Raises as ``allocations_of`` does."""
    problem = Problem(step=step, hardware=hardware, budget_bytes=2**60, host_budget_bytes=2**60)
    return allocations_of(problem, policies.keep_all(problem) if decisions is None else decisions)


def packing_problem(trace: AllocationTrace, alignment_bytes: int = 1) -> PackingProblem:
    """The buffers of ``trace`` to be packed; times are its event numbers. Raises InvalidArgument beyond 2**60 bytes."""
    if trace.bound_bytes > 2**60:
        raise InvalidArgument(f"{trace.bound_bytes} bytes are alive together: there are addresses for 2**60 at most.")
    rows = [(allocation.lower, allocation.upper, allocation.size_bytes) for allocation in trace.allocations]
    lower, upper, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return PackingProblem(lower, upper, size, alignment=alignment_bytes)


def place(trace: AllocationTrace, device_type: str, time_limit_seconds: float = 10.0) -> Addresses:
    """Addresses for all buffers of ``trace``, as low as are found in time, aligned as ``device_type``'s are."""
    problem = packing_problem(trace, ALIGNMENT_BYTES[device_type])
    solution = pack(problem, time_limit_seconds=time_limit_seconds)
    return Addresses(
        trace=trace,
        offsets=tuple(solution.offsets.tolist()),
        height_bytes=solution.height_bytes,
        bound_bytes=solution.bound_bytes,
    )


def addresses_of(plan: Plan) -> Addresses | None:
    """Addresses for the step of ``plan``; None where its requests were not captured."""
    if plan.step.outside is None:
        return None
    return place(requests(plan.step, plan.hardware, plan.decisions), plan.hardware.device_type)

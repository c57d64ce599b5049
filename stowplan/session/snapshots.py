"""Plans beside snapshots: the host budget is for swapped values and for what snapshots take of the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stowplan.core.errors import InfeasibleBudget
from stowplan.core.plan import SnapshotBytes
from stowplan.core.program import StepProgram
from stowplan.offload.capture.optimizers import steady_states
from stowplan.session.solving import Solver

if TYPE_CHECKING:
    import torch

    from stowplan.runtime.snapshot.reservation import SnapshotMemory

__all__ = ["NO_OPTIMIZER", "counting_snapshots", "free_for_snapshots", "of_one_rank", "snapshot_size"]

# An assumption of plans beside snapshots.
NO_OPTIMIZER = "snapshots are counted without optimizer states, as optimizer= was not given"


def snapshot_size(
    memory: SnapshotMemory | None, model: Any, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> SnapshotBytes | None:
    """What a ``Snapshotter`` of the model and the optimizer will reserve for this rank, as soon as that has stepped.

    Where parameters are distributed all ranks that have them call it. Raises InvalidArgument for what a snapshot
    cannot hold.
    """
    if memory is None:
        return None
    from stowplan.runtime.snapshot.state.sizes import predicted

    states = None if optimizer is None else steady_states(optimizer, device)
    return predicted(memory, model, optimizer, states).size


def free_for_snapshots(memory: SnapshotMemory | None) -> int:
    """Bytes of this host that are not available only because snapshots of the same training have them already."""
    if memory is None:
        return 0
    from stowplan.runtime.snapshot.memory.region import mapped_bytes

    return memory.num_ranks_per_node * mapped_bytes()


def of_one_rank(host_bytes: int, memory: SnapshotMemory | None, size: SnapshotBytes | None) -> int:
    """What of a node's memory is left for one rank, its own snapshots included, once the others have theirs."""
    if memory is None or size is None:
        return host_bytes
    return max(0, host_bytes - (memory.num_ranks_per_node - 1) * size.total_bytes)


@contextmanager
def counting_snapshots(solver: Solver, step: StepProgram, snapshots: SnapshotBytes | None) -> Iterator[None]:
    """Around solving with what snapshots leave: where nothing fits, the error says what they take, and what would do.

    Raises InfeasibleBudget at once where they take more than there is.
    """
    if snapshots is None:
        yield
        return
    taken = snapshots.total_bytes
    whole = solver.host_bytes + taken
    try:
        if solver.host_bytes < 0:
            least_bytes = solver._replace(host_bytes=0).least_bytes(step)
            raise InfeasibleBudget(solver.device_bytes, least_bytes, whole, "")
        yield
    except InfeasibleBudget as error:
        swapped = solver.least_host_bytes(step)
        advice = error.advice or "Raise host_budget= to that, shard the state over more ranks, or take no snapshots."
        least_host = None if swapped is None else taken + swapped
        raise InfeasibleBudget(error.budget_bytes, error.least_bytes, whole, advice, taken, least_host) from None

"""Decisions under change: trying another choice for a block costs microseconds, not a whole evaluation."""

from __future__ import annotations

from stowplan.core.program import BlockDecisions, Decisions
from stowplan.planner.activations.evaluate import peaks_of_moments, seconds_of_step
from stowplan.planner.activations.footprint import BlockFootprint, Footprints
from stowplan.planner.activations.problem import Problem

__all__ = ["Draft"]


class Draft:
    """Decisions of all blocks with their footprints, time and excess bytes, changed in place.

    ``excess_bytes`` is by how much device and host budgets together are exceeded (0: it fits); ``seconds`` the time
    of one step. Equal to ``evaluate`` at all times.
    """

    def __init__(self, problem: Problem, decisions: Decisions, footprints: Footprints | None = None) -> None:
        self.problem = problem
        self.footprints = footprints if footprints is not None else Footprints(problem)
        self.chosen: list[BlockDecisions] = list(decisions)
        self.blocks = [self.footprints.of(block, chosen) for block, chosen in enumerate(decisions)]
        self.excess_bytes = self._excess()
        self.seconds = seconds_of_step(problem, self.blocks)

    @property
    def decisions(self) -> Decisions:
        return tuple(self.chosen)

    @property
    def peak_bytes(self) -> int:
        return max(peaks_of_moments(self.problem, self.blocks))

    @property
    def host_bytes(self) -> int:
        return sum(block.swapped_bytes for block in self.blocks)

    def _excess(self) -> int:
        device = self.peak_bytes - self.problem.budget_bytes
        return max(0, device) + max(0, self.host_bytes - self.problem.host_budget_bytes)

    def _swap_in(self, changes: dict[int, BlockDecisions]) -> dict[int, BlockDecisions]:
        """Put ``changes`` in place without judging them; returns what undoes them."""
        undo = {block: self.chosen[block] for block in changes}
        for block, chosen in changes.items():
            self.chosen[block] = chosen
            self.blocks[block] = self.footprints.of(block, chosen)
        return undo

    def cost_of(self, changes: dict[int, BlockDecisions]) -> tuple[int, float]:
        """(excess bytes, seconds) if ``changes`` were made; seconds are infinite where excess alone rules them out."""
        undo = self._swap_in(changes)
        excess = self._excess()
        seconds = seconds_of_step(self.problem, self.blocks) if excess <= self.excess_bytes else float("inf")
        self._swap_in(undo)
        return excess, seconds

    def change(self, changes: dict[int, BlockDecisions]) -> None:
        """Make ``changes``."""
        self._swap_in(changes)
        self.excess_bytes = self._excess()
        self.seconds = seconds_of_step(self.problem, self.blocks)

    def improve_by(self, changes: dict[int, BlockDecisions]) -> bool:
        """Make ``changes`` if they exceed budgets by less, or by no more and take less time."""
        if self._cannot_help(changes):
            return False
        excess, seconds = self.cost_of(changes)
        if excess > self.excess_bytes or (excess == self.excess_bytes and seconds >= self.seconds * (1 - 1e-12)):
            return False
        self._swap_in(changes)
        self.excess_bytes, self.seconds = excess, seconds
        return True

    def copy_seconds(self, block: BlockFootprint) -> float:
        """What the copies of ``block`` cost in compute time if nothing hides them; 0 where copies overlap."""
        hardware = self.problem.hardware
        if hardware.overlapped_copies:
            return 0.0
        swapped = block.swapped_bytes
        return swapped / hardware.to_host_bytes_per_second + swapped / hardware.to_device_bytes_per_second

    def _cannot_help(self, changes: dict[int, BlockDecisions]) -> bool:
        """Within budgets, time falls only if something is replayed or copied less: cheap to see without a trial."""
        if self.excess_bytes:
            return False
        for block, chosen in changes.items():
            now, then = self.blocks[block], self.footprints.of(block, chosen)
            if then.replay_seconds < now.replay_seconds or then.swapped_bytes < now.swapped_bytes:
                return False
        return True

"""Carrying a plan out on the blocks of one model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stowplan.core.program import Decision, swaps
from stowplan.offload.blocks import Block, refuse_unsupported
from stowplan.offload.copies import CopyEngine
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.planned_block import PlannedBlock, does_something
from stowplan.offload.tape.checks import Checks
from stowplan.offload.tape.proof import Tolerance
from stowplan.offload.tape.run import Counters

__all__ = ["Engine"]


class Engine:
    """Hooks a plan's decisions into ``blocks`` and, on ``remove``, takes all of it away again.

    Args:
        blocks: in order of their calls; a block that is called several times in a forward pass is there as often.
        decisions: per call, what each saved value does, by name.
        copies: moves swapped values.
        counters: what was done is added here.
        checks: compares what is brought back for backward; by default a sample.
        failure_note: goes onto the error of an allocation that fails while values are brought back.
        tolerance: what rows that are recomputed alone may differ by; None: by no bit.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[Block],
        decisions: Sequence[Mapping[str, Decision]],
        copies: CopyEngine,
        counters: Counters | None = None,
        checks: Checks | None = None,
        failure_note: str = "",
        tolerance: Tolerance | None = None,
    ) -> None:
        refuse_unsupported(model, blocks)
        self.counters = counters if counters is not None else Counters()
        self.checks = checks if checks is not None else Checks()
        calls: dict[torch.nn.Module, list[int]] = {}
        for place, block in enumerate(blocks):
            calls.setdefault(block.module, []).append(place)
        names = {block.module: block.name for block in blocks}
        passed = _passed(decisions, copies.window)
        self.blocks = [
            PlannedBlock(
                Block(names[module], module),
                [decisions[place] for place in places],
                copies,
                self.counters,
                self.checks,
                failure_note,
                places,
                tolerance,
            )
            for module, places in calls.items()
            if any(place in passed or does_something(decisions[place]) for place in places)
        ]
        busy = [block for block in self.blocks if len(block.untouched) < len(block.planned)]
        if busy:
            busy[0].is_first = True
        self._repeated = [block for block in self.blocks if len(block.planned) > 1]
        self._interception = Interception(model, self._begin) if self._repeated else None
        settled = weakref.ref(self.checks)
        self._stepping = register_optimizer_step_pre_hook(lambda *stepping: _settle(settled))
        weakref.finalize(self.checks, self._stepping.remove)

    def _begin(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pass begins: blocks that are called several times count their calls anew."""
        for block in self._repeated:
            block.num_calls = 0
        return forward(*args, **kwargs)

    def remove(self) -> None:
        """Give every block its own forward back. Graphs already made stay valid.

        Raises ReplayMismatch if a comparison whose verdict was still to be read failed.
        """
        if self._interception is not None:
            self._interception.remove()
        while self.blocks:
            self.blocks.pop().interception.remove()
        self._stepping.remove()
        self.checks.settle_from_now_on()


def _passed(decisions: Sequence[Mapping[str, Decision]], window: int) -> set[int]:
    """The calls that come while a block's values are on their way: they are told of, even if they keep everything."""
    swapping = [place for place, actions in enumerate(decisions) if any(map(swaps, actions.values()))]
    return {place + ahead for place in swapping for ahead in range(1, window + 1)}


def _settle(checks: weakref.ref[Checks]) -> None:
    """An optimizer is about to step, of whatever model."""
    found = checks()
    if found is not None:
        found.settle()

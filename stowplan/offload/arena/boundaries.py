"""Where one training step ends and the next begins, told by the optimizers' steps."""

from __future__ import annotations

__all__ = ["Boundaries"]


class Boundaries:
    """Which optimizer's step ends a training step: the last of a round.

    A round ends when an optimizer steps that has stepped in it already. The last one of the first round is kept, for
    as long as it steps in every round: what matters is that steps end at the same place each time. With one optimizer
    each of its steps ends one (micro-batches before it are part of the step). Of several that step in turn it is the
    last, also where each parameter has an optimizer of its own that steps in backward.
    """

    def __init__(self) -> None:
        self._round: dict[int, None] = {}  # in order
        self._last: int | None = None

    def stepped(self, optimizer: int) -> bool:
        """An optimizer has stepped: does the training step end here? The very first one counts as an end."""
        if optimizer in self._round:
            if self._last not in self._round:
                self._last = next(reversed(self._round))
            self._round.clear()
        first = self._last is None and not self._round
        self._round[optimizer] = None
        return first or optimizer == self._last

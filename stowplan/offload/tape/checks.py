"""Comparing what backward gets with what the forward pass had.

The signature of a call cannot see everything that a block computes with (a number in a closure, say). So some
bytes of what is recomputed are kept and compared after the replay; on demand, all bytes of all that was away.

Note: when a check is read
    On the CPU a comparison is over at once and a difference is raised inside backward. A device that runs ahead of the
    host would have to be waited for, so there the verdicts stay on the device until ``settle``: at the next call of a
    planned block and, at the latest, before any optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch

from stowplan.core.errors import InvalidArgument, ReplayMismatch

__all__ = ["Checks", "Verify"]

# Of one recomputed value per call, taken in turn.
_NUM_SAMPLED_BYTES = 128
# Where rows may be rounded otherwise, what is made from them differs by more: relative to the largest number compared.
_ROUNDED = 0.1


class Verify(StrEnum):
    """What is compared after a replay."""

    OFF = "off"  # nothing
    SAMPLE = "sample"  # about 128 bytes of one recomputed value per call, taken in turn
    ALL = "all"  # every byte of every value that was recomputed or swapped: holds them all meanwhile

    @staticmethod
    def of(name: str) -> Verify:
        """Raises InvalidArgument for a name that is none of these."""
        if name not in tuple(Verify):
            raise InvalidArgument(f"verify={name!r} is not known; allowed: {', '.join(map(repr, map(str, Verify)))}.")
        return Verify(name)


class Witness:
    """Bytes of a storage as the forward pass had them, or numbers of ``dtype``: each ``step``-th from ``first``."""

    __slots__ = ("content", "first", "step")

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype, first: int, step: int) -> None:
        self.first = first
        self.step = step
        self.content = _every(tensor, dtype, first, step).clone()

    def found(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same ones of another tensor's storage."""
        return _every(tensor, self.content.dtype, self.first, self.step)


def _every(tensor: torch.Tensor, dtype: torch.dtype, first: int, step: int) -> torch.Tensor:
    """Every ``step``-th number from ``first`` of the storage read as ``dtype``; shares its memory."""
    storage = tensor.untyped_storage()
    count = max(0, -(-(storage.nbytes() // dtype.itemsize - first) // step))
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(storage, first, (count,), (step,))


def _runs_ahead(device: torch.device) -> bool:
    return device.type != "cpu"


class Checks:
    """The comparisons of one engine. ``runs_ahead`` tells devices whose verdicts are read later.

    Where a plan need not be ``exact``, numbers may differ by a tenth of the largest that is compared: rounding is let
    pass, another scale or another mask is not.
    """

    def __init__(
        self,
        verify: Verify = Verify.SAMPLE,
        runs_ahead: Callable[[torch.device], bool] = _runs_ahead,
        exact: bool = True,
    ) -> None:
        self.verify = verify
        self._exact = exact
        self._runs_ahead = runs_ahead
        self._pending: list[tuple[torch.Tensor, str, str]] = []

    def witness(self, tensor: torch.Tensor, turn: int) -> Witness:
        """A copy of what ``verify`` asks to be compared of ``tensor``'s storage; ``turn`` shifts the sample."""
        rounded = not self._exact and tensor.is_floating_point()
        dtype = tensor.dtype if rounded else torch.uint8
        if self.verify is Verify.ALL:
            return Witness(tensor, dtype, 0, 1)
        num_items = tensor.untyped_storage().nbytes() // dtype.itemsize
        step = max(1, num_items // _NUM_SAMPLED_BYTES)
        if not rounded:
            step |= 1  # odd: every byte of a number gets its turn
        return Witness(tensor, dtype, turn % min(step, max(num_items, 1)), step)

    def compare(self, witness: Witness, tensor: torch.Tensor, block: str, value: str) -> None:
        """Raise ReplayMismatch if ``tensor`` is not what was witnessed, now or when checks are settled."""
        expected, found = witness.content, witness.found(tensor)
        if self._runs_ahead(tensor.device):
            self._pending.append((_differs(expected, found), block, value))
        elif not torch.equal(expected, found) and _differs(expected, found):
            raise _mismatch(block, value)

    def settle(self) -> None:
        """Wait for the verdicts that are still on the device. Raises ReplayMismatch for the first bad one."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        verdicts: list[bool] = torch.stack([flag for flag, _, _ in pending]).tolist()
        for differs, (_, block, value) in zip(verdicts, pending, strict=True):
            if differs:
                raise _mismatch(block, value)

    def settle_from_now_on(self) -> None:
        """Settle, and compare at once whatever comes later: nobody will ask any more."""
        self._runs_ahead = lambda device: False
        self.settle()


def _differs(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Bytes: in any; numbers: in any by more than rounding, as far as that can be told."""
    if not expected.is_floating_point():
        return (expected != found).any()
    a, b = expected.float(), found.float()
    largest = a.abs().nan_to_num(nan=0.0, posinf=0.0).max() if a.numel() else a.sum()
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= _ROUNDED * largest)
    return ~same.all()


def _mismatch(block: str, value: str) -> ReplayMismatch:
    return ReplayMismatch(
        f"{value!r} of {block} was brought back for backward and is not what the forward pass had: the block computes "
        f"with something that changes from call to call and is neither an argument nor a number held by its modules. "
        f"The gradients of this step are not usable, and no optimizer has stepped on them; leave the block out of the "
        f"plan (blocks=)."
    )

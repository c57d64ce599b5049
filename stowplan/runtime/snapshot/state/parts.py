"""Which pieces have the parts of a replicated tensor that was divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stowplan.core.errors import InvalidSnapshot
from stowplan.runtime.snapshot.state.contents import Contents
from stowplan.runtime.snapshot.state.leaf import Leaf

__all__ = ["Parts", "part_of"]


class Parts:
    """Of what is in ``own``, with the rest of it in ``others``, pieces of the same step.

    Raises InvalidSnapshot: a piece is of another step, or of another number of ranks.
    """

    def __init__(self, own: Contents, others: Sequence[Contents]) -> None:
        self._own = own
        self._sources = [(source, source.shared_leaves()) for source in (own, *others)]
        for other in others:
            if (other.step, other.world_size) != (own.step, own.world_size):
                raise InvalidSnapshot(
                    f"rank {own.rank} of {own.world_size} has step {own.step}, and rank {other.rank} of "
                    f"{other.world_size} step {other.step}: these are not of one snapshot."
                )

    def of(self, name: str, leaf: Leaf) -> list[tuple[Contents, Leaf]]:
        """All parts of the tensor that ``leaf`` is of in ``own``, and whose they are.

        Raises InvalidSnapshot: one is missing, or there twice.
        """
        share = leaf.share
        if share is None:
            return [(self._own, leaf)]
        found = []
        for source, leaves in self._sources:
            other = leaves.get(name)
            if other is None or other.share is None or not other.num_bytes:
                continue
            if (other.share.family, other.share.dim, other.local_offsets) == (
                share.family, share.dim, leaf.local_offsets,
            ):  # fmt: skip
                found.append((source, other))
        found.sort(key=lambda part: part[1].offsets)
        end = 0
        for _, part in found:
            assert part.share is not None
            fits = (part.dtype, part.local_shape) == (leaf.dtype, leaf.local_shape)
            end = end + part.shape[share.dim] if fits and part.share.begin == end else -1
        if end != share.whole:
            raise InvalidSnapshot(
                f"{name} is divided over ranks, and the pieces of ranks "
                f"{', '.join(str(source.rank) for source, _ in found) or 'none'} do not make it whole: give those of "
                f"all ranks that have it, or go on from another snapshot."
            )
        return found


def part_of(tensor: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    """Where in a rank's tensor a leaf's bytes belong."""
    share = leaf.share
    return tensor if share is None else tensor.narrow(share.dim, share.begin, leaf.shape[share.dim])

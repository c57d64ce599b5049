"""Where a rank is: on which node, beside whom; and how all ranks of a job agree, beside training's own collectives."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from stowplan.core.errors import InvalidArgument, RankFailed, StowplanError
from stowplan.runtime.snapshot.memory.protocol import LOOPBACK

__all__ = [
    "NODE_VARIABLE",
    "RUN_VARIABLE",
    "Agreement",
    "CodeGroup",
    "Place",
    "failed_with",
    "node_name",
    "own_address",
    "run_name",
]

T = TypeVar("T")
NODE_VARIABLE = "STOWPLAN_NODE"
RUN_VARIABLE = "STOWPLAN_RUN"


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's. ``nodes`` are their names, in the order of their first ranks."""

    rank: int
    world_size: int
    node: str
    nodes: tuple[str, ...]
    local_rank: int
    local_size: int
    one_host: bool  # all nodes are

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True, slots=True)
class CodeGroup:
    """The ranks that a code is over, one on each node, by the numbers of nodes; this one is ``ranks[index]``."""

    ranks: tuple[int, ...]
    index: int
    m: int

    @property
    def owners(self) -> tuple[int, ...]:
        """The ranks whose shares of what is replicated this one holds: its own, and the m before it."""
        return tuple(self.ranks[self.index - behind] for behind in range(self.m + 1))

    def within(self, ranks: Iterable[int]) -> bool:
        """Whether all of the group are among ``ranks``."""
        return set(self.ranks) <= set(ranks)


class Agreement:
    """All ranks' words, by a group of gloo of its own; in a process without torch.distributed its own word only."""

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self._group = dist.new_group(backend="gloo") if ready else None
        self.rank = dist.get_rank() if ready else 0
        self.world_size = dist.get_world_size() if ready else 1

    def gather(self, word: T) -> list[T]:
        """That of each rank; all call it."""
        if self._group is None:
            return [word]
        words: list[Any] = [None] * self.world_size
        dist.all_gather_object(words, word, group=self._group)
        return cast(list[T], words)

    def together(self, doing: str, work: Callable[[], T]) -> list[T]:
        """``work`` on all ranks, and what it gave on each; where it fails on one, all raise, and nobody waits for ever.

        Raises what ``work`` raised here; RankFailed, which tells of it, elsewhere.
        """
        made: list[T] = []
        failure: Exception | None = None
        try:
            made.append(work())
        except Exception as error:  # noqa: BLE001 - raised below: the others wait to hear of it
            failure = error
        told = self.gather((made, _tellable(failure)))
        if failure is not None:
            raise failure
        failures = {rank: problem for rank, (_, problem) in enumerate(told) if problem is not None}
        if failures:
            raise RankFailed(doing, failures)
        return [found[0] for found, _ in told]

    def place(self, node: str) -> Place:
        """Where this rank is among all. Raises InvalidArgument: nodes with different numbers of ranks."""
        names = self.gather((node, socket.gethostname()))
        ranks: dict[str, list[int]] = {}
        for rank, (name, _) in enumerate(names):
            ranks.setdefault(name, []).append(rank)
        if len({len(each) for each in ranks.values()}) > 1:
            counts = ", ".join(f"{name} {len(each)}" for name, each in ranks.items())
            raise InvalidArgument(f"nodes have different numbers of ranks ({counts}): start the same number on each.")
        return Place(
            rank=self.rank,
            world_size=self.world_size,
            node=node,
            nodes=tuple(ranks),
            local_rank=ranks[node].index(self.rank),
            local_size=len(ranks[node]),
            one_host=len({host for _, host in names}) == 1,
        )

    def swap(self, to: int, outgoing: torch.Tensor, source: int, incoming: torch.Tensor) -> None:
        """Send bytes to one rank while others come from another; both have to call it. Empty ones are left out."""
        works = []
        if outgoing.numel():
            works.append(dist.isend(outgoing, to, group=self._group))
        if incoming.numel():
            works.append(dist.irecv(incoming, source, group=self._group))
        for work in works:
            work.wait()  # type: ignore[union-attr]


def _tellable(failure: Exception | None) -> StowplanError | None:
    if failure is None or isinstance(failure, StowplanError):
        return failure
    return StowplanError(f"{type(failure).__name__}: {failure}")


def failed_with(error: Exception, kind: type[StowplanError]) -> bool:
    """Whether that is what failed, here or, as RankFailed says, on all ranks on which something did."""
    failures = error.failures.values() if isinstance(error, RankFailed) else [error]
    return all(isinstance(each, kind) for each in failures)


def node_name(given: str | None) -> str:
    """``given``, or STOWPLAN_NODE, or the host's name."""
    return given or os.environ.get(NODE_VARIABLE) or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]


def own_address(one_host: bool) -> str:
    """That of this host for the other nodes. Raises InvalidArgument: its name leads to itself only."""
    if one_host:
        return LOOPBACK
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise InvalidArgument(
            f"this host's name, {name!r}, has no address ({error}): give listen=, its own."
        ) from error
    if address.startswith("127."):
        raise InvalidArgument(
            f"this host's name, {name!r}, is {address} here, at which other nodes cannot reach it: give listen=, its "
            f"address in the cluster's network."
        )
    return address


def run_name(given: str | None) -> str:
    """``given``, or STOWPLAN_RUN, or torchrun's ``--rdzv-id``. Raises InvalidArgument: none of them."""
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    found = given or os.environ.get(RUN_VARIABLE) or (elastic if elastic != "none" else "")
    if not found:
        raise InvalidArgument(
            f"this run has no name, by which a restart finds its snapshots: give run=…, or set {RUN_VARIABLE}, to the "
            f"same on all ranks and in all restarts, and to another one for each job."
        )
    return found

"""Erasure codes as data: which chunks of which nodes make a stripe, and what its parities are sums of.

A group has n nodes. Each cuts its bytes into equal chunks (the last ones shorter, or empty) and has parity chunks
beside them. A *stripe* takes one chunk from some nodes and has parities on others; no two of its chunks are on one
node. Parity p is the sum over i of coefficient[p][i] · chunk i over GF(2^8), and any p chunks of a stripe with p
parities can be computed from the others. The codes differ in their stripes alone:

    mirror  node i's only chunk; its copy is on node i + 1 mod n
    raim5   stripe r: chunk idx(i, r) = r if i > r else r − 1 of each node i ≠ r; their XOR is on node r
            (RAIM5 of REFT, arXiv 2310.12670)
    rs      stripe s: P, the XOR, is on node s, Q = Σ 2^i · chunk i on node s + 1, the chunks are of nodes s + 2,
            s + 3, … mod n (RAID-6's P and Q: Reed and Solomon's code, rotated so that each node has as much parity)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.snapshot.codes.field import ORDER, power

__all__ = ["NAMES", "Area", "Chunk", "Code", "Name", "Stripe", "code_for"]

Name: TypeAlias = Literal["mirror", "raim5", "rs"]
NAMES: tuple[Name, ...] = ("mirror", "raim5", "rs")
_MOST_NODES = ORDER + 2  # of rs: the powers of 2 in a stripe's Q differ


class Area(StrEnum):
    """Where a node has a chunk: among its own bytes, or among the parities that it keeps for the group."""

    DATA = "data"
    PARITY = "parity"


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Chunk ``index``, from 0, of ``area`` of ``node``."""

    node: int
    area: Area
    index: int

    def __str__(self) -> str:
        return f"{self.area} chunk {self.index} of node {self.node}"


@dataclass(frozen=True, slots=True)
class Stripe:
    """Chunks of different nodes; ``coefficients[p][i]`` is what ``parity[p]`` has of ``data[i]``."""

    data: tuple[Chunk, ...]
    parity: tuple[Chunk, ...]
    coefficients: tuple[tuple[int, ...], ...]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All, data first."""
        return (*self.data, *self.parity)


@dataclass(frozen=True)
class Code:
    """A code for a group of ``n`` nodes, of which any ``m`` may be lost; ``code_for`` makes them."""

    name: Name
    n: int
    m: int
    stripes: tuple[Stripe, ...]

    @functools.cached_property
    def num_data_chunks(self) -> int:
        """Of each node."""
        return sum(chunk.node == 0 for stripe in self.stripes for chunk in stripe.data)

    @functools.cached_property
    def num_parity_chunks(self) -> int:
        """Of each node. Its parity takes num_parity_chunks / num_data_chunks of the bytes of the largest node."""
        return sum(chunk.node == 0 for stripe in self.stripes for chunk in stripe.parity)

    @property
    def overhead(self) -> float:
        """A node's parity bytes for each of its own: 1 / (n − 1) of raim5, 2 / (n − 2) of rs, 1 of mirror."""
        return self.num_parity_chunks / self.num_data_chunks

    def survives(self, lost: Iterable[int]) -> bool:
        """Whether all can be computed when these nodes are lost: always up to m; a mirror while no neighbours are.

        Raises InvalidArgument for what is no node of the group.
        """
        gone = self.nodes(lost)
        return all(sum(chunk.node in gone for chunk in stripe.chunks) <= len(stripe.parity) for stripe in self.stripes)

    def nodes(self, given: Iterable[int]) -> frozenset[int]:
        """``given`` as a set. Raises InvalidArgument for what is no node of the group."""
        found = frozenset(given)
        if wrong := sorted(found - set(range(self.n))):
            raise InvalidArgument(f"node {wrong[0]} is not in a group of {self.n}: nodes are 0 to {self.n - 1}.")
        return found

    @property
    def stands(self) -> str:
        """What may be lost, for messages."""
        chunks = "1 chunk" if self.m == 1 else f"{self.m} chunks"
        nodes = "1 node" if self.m == 1 else f"{self.m} nodes"
        return f"{self.name} of {self.n} nodes stands the loss of any {nodes}, or of {chunks} in each stripe"


def code_for(n: int, m: int = 1, name: Name | None = None) -> Code:
    """The code for ``n`` nodes of which any ``m`` may be lost.

    Unless named it is for m = 1 raim5, which with two nodes is a mirror, and for m = 2 rs, from n = 3 on; for m = 2
    five nodes or more are advised, as parity takes 2 / (n − 2) of the bytes.

    Raises InvalidArgument: an unknown name, or n and m that the code is not for.
    """
    if name is not None and name not in NAMES:
        raise InvalidArgument(f"name={name!r} is no code: {', '.join(NAMES)} are.")
    if m not in (1, 2):
        raise InvalidArgument(f"m={m} lost nodes: codes stand 1 (mirror, raim5) or 2 (rs).")
    chosen: Name = name or ("rs" if m == 2 else "raim5" if n > 2 else "mirror")
    if m != (2 if chosen == "rs" else 1):
        raise InvalidArgument(f"m={m} is not for {chosen}: m=1 is for mirror and raim5, m=2 for rs.")
    least = m + 1
    if n < least:
        raise InvalidArgument(f"n={n} nodes: {chosen} takes {least} or more.")
    if chosen == "rs" and n > _MOST_NODES:
        raise InvalidArgument(f"n={n} nodes: rs takes {_MOST_NODES} at most; make several groups.")
    return Code(chosen, n, m, tuple(_STRIPES[chosen](n, first) for first in range(n)))


def _mirror(n: int, node: int) -> Stripe:
    return Stripe((Chunk(node, Area.DATA, 0),), (Chunk((node + 1) % n, Area.PARITY, 0),), ((1,),))


def _raim5(n: int, keeper: int) -> Stripe:
    data = tuple(Chunk(i, Area.DATA, keeper if i > keeper else keeper - 1) for i in range(n) if i != keeper)
    return Stripe(data, (Chunk(keeper, Area.PARITY, 0),), ((1,) * len(data),))


def _rs(n: int, keeper: int) -> Stripe:
    # The k-th node after the keeper has its (k - 2)-nd chunk here: each of its n - 2 chunks in another stripe.
    data = tuple(Chunk((keeper + k) % n, Area.DATA, k - 2) for k in range(2, n))
    parity = (Chunk(keeper, Area.PARITY, 0), Chunk((keeper + 1) % n, Area.PARITY, 1))
    return Stripe(data, parity, ((1,) * len(data), tuple(power(i) for i in range(len(data)))))


_STRIPES = {"mirror": _mirror, "raim5": _raim5, "rs": _rs}

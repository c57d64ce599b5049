"""Which memory processes of a run are on a node: of the layout of ranks that the job has now, and of former ones.

Memory is of a layout: how many nodes, how many ranks on each, which code over them. A job that is started again with
another one finds the memory of the former beside its own; it restores from there, and lets it go when its own holds a
snapshot. So a memory process is named by its node and its layout: ``node-0.2x4-raim5-1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stowplan.runtime.snapshot.codes import NAMES, Code, code_for
from stowplan.runtime.snapshot.memory.connection import serving
from stowplan.runtime.snapshot.memory.messages import Status
from stowplan.runtime.snapshot.memory.slots import State

__all__ = ["Found", "RankLayout", "memory_on", "node_of", "numbered", "own_memory", "processes_on"]

_SUFFIX = re.compile(r"(\d+)x(\d+)(?:-([a-z0-9]+)-(\d+))?(?:\.\d+)?")


@dataclass(frozen=True, slots=True, order=True)
class RankLayout:
    """``num_nodes`` nodes of ``local_size`` ranks each; ``code``: None for one node alone."""

    num_nodes: int
    local_size: int
    code_name: str = ""
    m: int = 0

    @classmethod
    def of(cls, num_nodes: int, local_size: int, code: Code | None) -> RankLayout:
        return cls(num_nodes, local_size, code.name, code.m) if code else cls(num_nodes, local_size)

    @classmethod
    def parsed(cls, suffix: str) -> RankLayout | None:
        """From the part of a memory process's name behind its node's; None where it is none."""
        match = _SUFFIX.fullmatch(suffix)
        if match is None or (match[3] or NAMES[0]) not in NAMES:
            return None
        return cls(int(match[1]), int(match[2]), match[3] or "", int(match[4] or 0))

    @property
    def code(self) -> Code | None:
        name = next((name for name in NAMES if name == self.code_name), None)
        return code_for(self.num_nodes, self.m, name) if name else None

    def process(self, node: str, standing_in_for: int | None = None) -> str:
        """The name of a node's memory process; or of one that is there in place of a lost node's."""
        suffix = f"-{self.code_name}-{self.m}" if self.code_name else ""
        stand_in = "" if standing_in_for is None else f".{standing_in_for}"
        return f"{node}.{self.num_nodes}x{self.local_size}{suffix}{stand_in}"


@dataclass(frozen=True, slots=True)
class Found:
    """Memory of a node of a layout: ``index`` of the node in its group, bytes reserved for each rank's slot.

    ``newest``: generation and number of the newest snapshot of which a rank has all data; None where there is none.
    ``counted``: whether any may have been complete on all ranks, as all ranks here have come to PARITY with it.
    """

    layout: RankLayout
    process: str
    index: int
    data_bytes: int
    parity_bytes: int
    newest: tuple[int, int] | None
    counted: bool = False


def numbered(nodes: Sequence[str], layout: RankLayout, found: Mapping[str, Sequence[Found]]) -> dict[str, int]:
    """The number of each node in its group: the one that its memory was reserved with, a free one for newcomers.

    So it does not matter in which order a launcher takes nodes after one was replaced. Where two claim the same number
    the one with the newer snapshot has it.
    """
    held = [(node, own_memory(node, layout, found.get(node, ()))) for node in nodes]
    claims = [(own.newest or (-1, -1), node, own.index) for node, own in held if own and own.index < len(nodes)]
    numbers: dict[str, int] = {}
    for _, node, index in sorted(claims, key=lambda claim: claim[0], reverse=True):
        if index not in numbers.values():
            numbers[node] = index
    free = iter(sorted(set(range(len(nodes))) - set(numbers.values())))
    return {node: numbers[node] if node in numbers else next(free) for node in nodes}


def own_memory(node: str, layout: RankLayout, found: Sequence[Found]) -> Found | None:
    """What a node itself has of a layout; not what it holds in the place of others."""
    return next((each for each in found if each.process == layout.process(node)), None)


def node_of(process: str) -> str:
    """The node that a memory process of this name is on; the name itself where it has no layout."""
    return re.sub(rf"\.{_SUFFIX.pattern}$", "", process)


def processes_on(run: str, node: str, directory: Path | None = None) -> Iterator[tuple[RankLayout, Status]]:
    """All memory processes of a run on a node of this host, whatever their layouts."""
    prefix = f"{node}."

    def of_node(name: str) -> RankLayout | None:
        return RankLayout.parsed(name.removeprefix(prefix)) if name.startswith(prefix) else None

    for _, status in serving(run, directory, lambda name: of_node(name) is not None):
        layout = of_node(status.node)
        assert layout is not None
        yield layout, status


def _has_counted(status: Status) -> bool:
    """Where ranks of the node have no memory any more it may be that theirs did."""
    coded = [{slot.sequence for slot in rank.slots if slot.state >= State.PARITY} for rank in status.ranks]
    return bool(set.intersection(*coded) if len(coded) == status.num_ranks else set.union(*coded))


def memory_on(run: str, node: str, directory: Path | None = None) -> list[Found]:
    """What is held there."""
    found = []
    for layout, status in processes_on(run, node, directory):
        if not status.ranks:
            continue
        complete = [slot for rank in status.ranks for slot in rank.slots if slot.state >= State.LOCAL]
        newest = max(((slot.generation, slot.sequence) for slot in complete), default=None)
        data_bytes = max(rank.data_bytes for rank in status.ranks)
        parity_bytes = max(rank.parity_bytes for rank in status.ranks)
        index = status.ranks[0].coding.index
        found.append(Found(layout, status.node, index, data_bytes, parity_bytes, newest, _has_counted(status)))
    return found

"""Every order of steps of a group of nodes, with losses at each: states of the shipped logic beside what memory holds.

What is modelled: nodes begin, complete, code and finish snapshots in any order; a trainer, a memory process or a node
is lost between any two steps, also while the group recovers from an earlier loss; nodes that have not heard of a
restart go on. Nodes are alike, so states that differ in their order alone count once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from stowplan.runtime.snapshot.memory.slots import Slot, Slots, Snapshot, State, every, restorable


@dataclass(frozen=True)
class Rules:
    """The shipped ones, and what they would be without one of their parts."""

    num_slots: int = 2
    second_barrier: bool = True
    num_parity_buffers: int = 2
    fence_first: bool = True  # before it is chosen what a restart restores
    kept: int = 0  # all later snapshots leave this one where it is


@dataclass(frozen=True)
class Node:
    """``parity`` is what memory really holds, whatever ``slots`` says of it."""

    slots: Slots
    parity: tuple[Snapshot | None, ...]
    made: int = 0  # sequence number of the last snapshot that its trainer has begun
    coding: Snapshot | None = None
    lost: bool = False
    running: bool = True  # its trainer does; not between a restart's fence and its rollback


@dataclass(frozen=True)
class Group:
    nodes: tuple[Node, ...]
    generation: int = 0
    limit: int = 0  # no trainer begins snapshots beyond
    losses: int = 0  # that may still happen
    protected: bool = False  # once, all nodes had data and parity of the same snapshot
    chosen: int | None = None  # what a restart restores (0: nothing), from its choice until all have it
    fencing: bool = False


class Counterexample(Exception):
    """A state from which nothing can be restored although it has to be."""


def explore(n: int, m: int, rules: Rules, num_snapshots: int, losses: int) -> int:
    """Walk through all states; how many there are. Raises Counterexample."""
    slots = Slots((Slot(),) * rules.num_slots)
    empty = Node(slots, (None,) * rules.num_parity_buffers)
    first = Group((empty,) * n, limit=num_snapshots, losses=losses)
    seen, todo = {first}, [first]
    while todo:
        group = todo.pop()
        _check(group, m)
        steps = {_sorted(after) for after in _steps(group, m, rules, empty, num_snapshots)}
        if not steps and any(slot.pending for node in group.nodes for slot in node.slots.slots):
            raise Counterexample(f"a snapshot is pending for ever: {group}")
        for after in (*steps, *map(_sorted, _losses(group, m, empty))):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return len(seen)


def _check(group: Group, m: int) -> None:
    if not group.protected:
        return
    alive = [node for node in group.nodes if not node.lost]
    gone = len(group.nodes) - len(alive)
    for more in range(m - gone + 1):
        for survivors in combinations(alive, len(alive) - more):
            if not _recoverable(survivors, gone + more, m):
                raise Counterexample(f"{gone + more} of {len(group.nodes)} nodes lost, survivors are {survivors}")


@functools.cache
def _recoverable(survivors: tuple[Node, ...], num_lost: int, m: int) -> bool:
    """What a restart would choose is there, on every survivor."""
    newest = max(node.slots.generation for node in survivors) + 1
    chosen = restorable([node.slots.fenced(newest) for node in survivors], num_lost, m)
    return chosen is not None and all(
        node.slots.state(chosen.sequence) >= State.LOCAL and (not num_lost or chosen in node.parity)
        for node in survivors
    )


def _steps(group: Group, m: int, rules: Rules, empty: Node, num_snapshots: int) -> Iterator[Group]:
    slots = tuple(node.slots for node in group.nodes)
    for index, node in enumerate(group.nodes):
        if node.lost:
            if group.chosen is not None:
                yield from _rebuilt(group, index, empty)
            continue
        if node.running:
            for after in _own_steps(node, slots, rules, group.limit):
                yield _with(group, index, after)
            for slot in node.slots.slots:
                others = [other for other in group.nodes if other.slots.generation == node.slots.generation]
                passed = any(o.made >= slot.sequence and not o.slots.state(slot.sequence) for o in others)
                if slot.snapshot and slot.state <= State.PARITY and passed:
                    left = node.slots.abandoned(slot.sequence, by_all=True)
                    yield _with(group, index, replace(node, slots=left, coding=None))
        if node.slots.generation < group.generation:
            stopped = node.slots.fenced(group.generation)
            yield _with(group, index, replace(node, slots=stopped, coding=None, running=False))
        if group.chosen is not None and not node.running:
            back = node.slots.rolled_back(group.chosen)
            yield _with(group, index, replace(node, slots=back, running=True, made=group.limit - num_snapshots))
    alive = [node for node in group.nodes if not node.lost]
    fenced = all(node.slots.generation == group.generation for node in alive)
    if group.fencing and (fenced or not rules.fence_first):
        found = restorable([node.slots for node in alive], len(group.nodes) - len(alive), m)
        limit = max(node.made for node in group.nodes) + num_snapshots
        yield replace(group, fencing=False, chosen=found.sequence if found else 0, limit=limit)
    if group.chosen is not None and fenced and all(node.running and not node.lost for node in group.nodes):
        yield replace(group, chosen=None)


@functools.cache
def _own_steps(node: Node, members: tuple[Slots, ...], rules: Rules, limit: int) -> tuple[Node, ...]:
    after = []
    generation = node.slots.generation
    held = {slot.sequence for slot in node.slots.slots if slot.snapshot and slot.snapshot.generation == generation}
    kept = rules.kept if rules.kept in held else 0
    if node.slots.next_slot(kept) is not None and node.made < limit:
        snapshot = Snapshot(generation, node.made + 1, node.made + 1)
        slots, index = node.slots.begun(snapshot, kept)
        parity = node.parity
        if rules.num_parity_buffers == rules.num_slots:
            parity = (*parity[:index], None, *parity[index + 1 :])
        after.append(replace(node, slots=slots, parity=parity, made=snapshot.sequence))
    for index, slot in enumerate(node.slots.slots):
        snapshot, buffer = slot.snapshot, index % rules.num_parity_buffers
        if snapshot is None:
            continue
        if slot.state is State.WRITING:
            after.append(replace(node, slots=node.slots.advanced(snapshot.sequence, State.LOCAL)))
        if slot.state is State.LOCAL and node.coding is None and every(members, snapshot, State.LOCAL):
            parity = (*node.parity[:buffer], None, *node.parity[buffer + 1 :])
            after.append(replace(node, coding=snapshot, parity=parity))
        if node.coding == snapshot and not every(members, snapshot, State.LOCAL):
            after.append(replace(node, coding=None))  # a member does not serve it any more
        elif node.coding == snapshot:
            parity = (*node.parity[:buffer], snapshot, *node.parity[buffer + 1 :])
            slots = node.slots.advanced(snapshot.sequence, State.PARITY)
            after.append(replace(node, slots=slots, coding=None, parity=parity))
        if slot.state is State.PARITY and (every(members, snapshot, State.PARITY) or not rules.second_barrier):
            after.append(replace(node, slots=node.slots.advanced(snapshot.sequence, State.GLOBAL)))
    return tuple(after)


def _rebuilt(group: Group, index: int, empty: Node) -> Iterator[Group]:
    """A lost node's replacement, in two steps; it counts as lost until data and parity are there."""
    node, made = group.nodes[index], group.limit
    held = [slot.snapshot for other in group.nodes for slot in other.slots.slots if slot.sequence == group.chosen]
    snapshot = next(filter(None, held), None) if group.chosen else None
    if snapshot is None:
        back = replace(empty.slots, generation=group.generation)
        yield _with(group, index, replace(empty, slots=back, made=made))
    elif not node.slots.state(snapshot.sequence):
        slots, _ = replace(empty.slots, generation=group.generation).rebuilding(snapshot)
        yield _with(group, index, replace(node, slots=slots))
    else:
        where = node.slots.find(snapshot.sequence)
        slots = node.slots.advanced(snapshot.sequence, State.LOCAL).advanced(snapshot.sequence, State.PARITY)
        parity = (*empty.parity[:where], snapshot, *empty.parity[where + 1 :])[: len(empty.parity)]
        yield _with(group, index, Node(slots, parity, made=made))


def _losses(group: Group, m: int, empty: Node) -> Iterator[Group]:
    if not group.losses:
        return
    group = replace(group, losses=group.losses - 1)
    restart = replace(group, generation=group.generation + 1, fencing=True, chosen=None)
    yield restart  # a trainer is lost; where does not matter, as all are told to end
    for index, node in enumerate(group.nodes):
        if not node.lost:
            yield _with(group, index, replace(node, slots=node.slots.survived(), coding=None))
            after = _with(restart, index, replace(empty, lost=True))
            beyond = sum(other.lost for other in after.nodes) > m  # then the job has to begin anew
            yield replace(after, protected=after.protected and not beyond)


def _with(group: Group, index: int, node: Node) -> Group:
    nodes = (*group.nodes[:index], node, *group.nodes[index + 1 :])
    done = any(
        all(each.slots.state(s.sequence) >= State.PARITY and s in each.parity for each in nodes) for s in _in(node)
    )
    return replace(group, nodes=nodes, protected=group.protected or done)


def _in(node: Node) -> Iterator[Snapshot]:
    return (slot.snapshot for slot in node.slots.slots if slot.snapshot)


def _sorted(group: Group) -> Group:
    return replace(group, nodes=tuple(sorted(group.nodes, key=_key)))


@functools.cache
def _key(node: Node) -> str:
    return repr(node)

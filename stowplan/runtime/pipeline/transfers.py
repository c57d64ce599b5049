"""Tensors between the stages of a pipeline: buffers when they are due, sends that are let go when they are done.

Two process groups, one for each direction: what goes up never waits behind what comes down. Within a channel (one
process to another) tensors are matched by order, which ``stowplan.planner.schedule.messages`` plans.

Note: who keeps a tensor that is being sent
    Work of gloo is over for its sender only once somebody has waited for it, so a thread for each channel waits; the
    tensor itself is let go by the thread that trains, between two actions. On CUDA a work says itself when it is over.
"""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from stowplan.core.errors import StowplanError
from stowplan.core.schedule import Schedule
from stowplan.planner.schedule.messages import channels

__all__ = ["Form", "Link", "Transfers"]


Item = TypeVar("Item")


class Form(NamedTuple):
    """What is to be known of a tensor before it comes."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=device)


class Key(NamedTuple):
    """A tensor between two stages: the input of ``stage``, or the gradient of its output."""

    stage: int
    gradient: bool
    microbatch: int


class Link:
    """The processes of one pipeline, and its two groups.

    ``group`` holds them in the order of the schedule's devices; None is the default group. Every process of it must
    make its link at the same time.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        default = dist.group.WORLD
        assert default is not None, "torch.distributed is initialised"
        self.group: dist.ProcessGroup = group if group is not None else default
        self.ranks = dist.get_process_group_ranks(self.group)
        self.rank = self.ranks.index(dist.get_rank())
        self.device = device
        self._level_names()
        self._down = _like(self.group, self.ranks, device)
        self._up = _like(self.group, self.ranks, device)
        self._connected: set[tuple[int, int]] = set()

    @property
    def size(self) -> int:
        return len(self.ranks)

    def send(self, tensor: torch.Tensor, target: int) -> Any:
        """Begin to send to device ``target``; gives the work. The tensor must stay as it is until that is over."""
        return dist.isend(tensor, group=self._towards(self.rank, target), group_dst=target)

    def receive(self, buffer: torch.Tensor, source: int) -> Any:
        """Begin to fill ``buffer`` with what device ``source`` sends next; gives the work."""
        return dist.irecv(buffer, group=self._towards(source, self.rank), group_src=source)

    def connect(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Open the channels (source, target) one after the other, in one order on all processes.

        Backends connect two processes when they first exchange something, and wait for each other meanwhile. Those
        that are open are left alone: nobody waits then.
        """
        new = set(pairs) - self._connected
        self._connected |= new
        for source, target in sorted(new):
            tensor = torch.zeros(1, device=self.device)
            if self.rank == source:
                self.send(tensor, target).wait()
            elif self.rank == target:
                self.receive(tensor, source).wait()

    def told(self, item: Item, source: int = 0) -> Item:
        """What device ``source`` has, on all of them."""
        items = [item]
        dist.broadcast_object_list(items, group=self.group, group_src=source, device=self.device)
        return items[0]

    def gathered(self, item: Item) -> list[Item]:
        """What all devices have, in their order, on each of them."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def together(self, work: Callable[[], Item], *, in_turns: bool = False) -> Item:
        """``work`` on all devices; where it fails on one, all of them raise, and none waits for ever.

        ``in_turns``: one process after the other where they share a machine's cores (CPUs).

        Raises what ``work`` raised here, StowplanError that tells of it elsewhere.
        """
        made: list[Item] = []
        failure: Exception | None = None
        taking_turns = in_turns and self.device.type == "cpu"
        for turn in range(self.size) if taking_turns else (self.rank,):
            if turn == self.rank:
                try:
                    made.append(work())
                except Exception as error:  # noqa: BLE001 - raised below: the others wait to hear of it
                    failure = error
            if taking_turns:
                dist.barrier(self.group)
        told = self.gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for device, message in enumerate(told):
            if message is not None:
                raise StowplanError(f"device {device} of the pipeline: {message}")
        return made[0]

    def _level_names(self) -> None:
        """Have all processes find the same names for new groups.

        torch names a group that only its members make by the number of groups that a process is in: with different
        numbers they would wait for each other for ever. Who is in fewer makes groups of its own.
        """
        numbers = self.gathered(len(dist.distributed_c10d._world.pg_names))
        for _ in range(max(numbers) - numbers[self.rank]):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)

    def _towards(self, source: int, target: int) -> dist.ProcessGroup:
        return self._down if source < target else self._up


def _like(group: dist.ProcessGroup, ranks: list[int], device: torch.device) -> dist.ProcessGroup:
    """A new group of the same processes, with the same backend and timeout."""
    timeout = group._get_backend(device).options._timeout
    made: dist.ProcessGroup = dist.new_group(ranks, timeout, dist.get_backend(group), use_local_synchronization=True)
    return made


class Transfers:
    """One process's part in the exchange of a schedule's tensors. Begin each step with ``begin``."""

    def __init__(self, schedule: Schedule, link: Link) -> None:
        self.link = link
        self._devices = schedule.stage_devices
        self._due: list[tuple[int, int, Key]] = []  # position, source, tensor
        pairs = []
        for channel in channels(schedule):
            pairs.append((channel.source, channel.target))
            if channel.target == link.rank:
                columns = (channel.stages, channel.gradients, channel.microbatches, channel.posted)
                for stage, gradient, microbatch, position in zip(*map(list, columns), strict=True):
                    key = Key(int(stage), bool(gradient), int(microbatch))
                    self._due.append((int(position), channel.source, key))
        self._due.sort(key=lambda due: due[0])  # stable: the order within a channel stays
        link.connect(pairs)
        self._waiters: dict[int, _Waiter] = {}
        self._forms: Sequence[Form | None] = ()
        self._next = 0
        self._coming: dict[Key, tuple[torch.Tensor, Any]] = {}
        self._here: dict[Key, torch.Tensor] = {}
        self._going: list[_Sent] = []

    def begin(self, forms: Sequence[Form | None]) -> None:
        """A step begins; ``forms`` has those of the inputs of each stage (None: the first one's)."""
        self._forms = forms
        self._next = 0

    def post(self, position: int) -> None:
        """Make room for what is due before the action at ``position``, and let go of what has been sent."""
        self._let_go()
        while self._next < len(self._due) and self._due[self._next][0] <= position:
            _, source, key = self._due[self._next]
            form = self._forms[key.stage + key.gradient]
            assert form is not None, "nothing is sent to the first stage"
            buffer = form.empty(self.link.device)
            self._coming[key] = buffer, self.link.receive(buffer, source)
            self._next += 1

    def take(self, key: Key) -> torch.Tensor:
        """The tensor; waits until it has come. Nothing here holds it any more."""
        if key in self._here:
            return self._here.pop(key)
        buffer, work = self._coming.pop(key)
        work.wait()
        self._let_go()  # what was sent may have arrived meanwhile
        return buffer

    def give(self, tensor: torch.Tensor, key: Key) -> None:
        """Send ``tensor`` to where it is used, and hold it until that is over."""
        target = self._devices[key.stage]
        if target == self.link.rank:
            self._here[key] = tensor
            return
        tensor = tensor.contiguous()
        work = self.link.send(tensor, target)
        if tensor.device.type == "cpu":
            if target not in self._waiters:
                self._waiters[target] = _Waiter()
            self._going.append(_Sent(tensor, self._waiters[target].wait(work)))
        else:
            self._going.append(_Sent(tensor, work))

    def _let_go(self) -> None:
        self._going = [sent for sent in self._going if not sent.is_over()]

    def finish(self) -> None:
        """Wait until all that was given has been sent."""
        for sent in self._going:
            sent.wait()
        self._going.clear()


class _Sent:
    """A tensor that is on its way."""

    def __init__(self, tensor: torch.Tensor, work: Any) -> None:
        self.tensor = tensor
        self._work = work

    def is_over(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> None:
        self._work.wait()


class _Waiter:
    """A thread that waits for works, in their order."""

    def __init__(self) -> None:
        works: queue.SimpleQueue[_Waited | None] = queue.SimpleQueue()
        self._works = works
        threading.Thread(target=_serve, args=(works,), name="stowplan-sends", daemon=True).start()
        weakref.finalize(self, works.put, None)

    def wait(self, work: Any) -> _Waited:
        waited = _Waited(work)
        self._works.put(waited)
        return waited


def _serve(works: queue.SimpleQueue[_Waited | None]) -> None:
    while (waited := works.get()) is not None:
        waited.serve()
        del waited  # it holds nothing while the next one is waited for


class _Waited:
    """A work that another thread waits for."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._over = threading.Event()
        self._error: BaseException | None = None

    def serve(self) -> None:
        try:
            self._work.wait()
        except BaseException as error:  # noqa: BLE001 - raised where the tensor was given
            self._error = error
        self._work = None
        self._over.set()

    def is_completed(self) -> bool:
        if self._over.is_set():
            self._raise()
            return True
        return False

    def wait(self) -> None:
        self._over.wait()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

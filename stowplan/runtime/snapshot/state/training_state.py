"""What a snapshot is of: everything that a training needs to go on to the last bit, taken apart under one commit.

state = TrainingState(model=model, optimizer=optimizer, scheduler=scheduler, data=loader, step=step)
flat = flatten(state)                       # refers to live tensors: copy before the next optimizer.step()
flat.copy_into(buffer)                      # flat.num_bytes raw bytes
schema = flat.schema                        # JSON
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from stowplan.core.errors import InvalidArgument, InvalidSnapshot
from stowplan.runtime.snapshot.fail_points import fail_at
from stowplan.runtime.snapshot.state.leaf import ALIGNMENT
from stowplan.runtime.snapshot.state.modules import Models, models_of, named, parameter_groups
from stowplan.runtime.snapshot.state.payload import Division
from stowplan.runtime.snapshot.state.state_schema import Encoder, envelope

__all__ = [
    "Copied",
    "Flat",
    "OptimizerStates",
    "TrainingState",
    "as_bytes",
    "bits",
    "check_rng",
    "flatten",
    "is_stateful",
    "set_rng",
    "size_bytes",
]

OptimizerStates: TypeAlias = Mapping[torch.Tensor, Mapping[str, Any]]  # by parameter
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(kw_only=True)
class TrainingState:
    """The parts of a training on this rank. Several of a kind: a dict by name, or a list.

    Attributes:
        model: modules (plain, DDP, FSDP2), ``stowplan.Pipeline``, DeepSpeed engines. An averaged model goes here, too.
        optimizer: optimizers of their parameters; that of an engine with ZeRO may be left out.
        scheduler, scaler, data: anything with ``state_dict`` and ``load_state_dict``; ``data`` is the position in it.
        extras: by name: anything with ``state_dict`` and ``load_state_dict``, tensors, generators, plain values.
        step: how many steps are done.
    """

    model: Any
    optimizer: Any = None
    scheduler: Any = None
    scaler: Any = None
    data: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0

    def stateful(self) -> dict[str, dict[str, Any]]:
        """Schedulers, scalers and data by part and name.

        Raises:
            InvalidArgument: one has no ``state_dict``, or no ``load_state_dict``.
        """
        parts = {part: named(getattr(self, part), part) for part in ("scheduler", "scaler", "data")}
        for part, things in parts.items():
            for name, thing in things.items():
                if not is_stateful(thing):
                    raise InvalidArgument(
                        f"{part}{f' {name!r}' if name else ''} is a {type(thing).__name__} without state_dict and "
                        f"load_state_dict. Give it both; for data, torchdata's StatefulDataLoader has them."
                    )
        return parts


class Copied(NamedTuple):
    """What ``copy_into`` did."""

    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Flat:
    """A training's state as a schema and tensors in order; these are the live ones.

    Attributes:
        schema: JSON-able (``state_schema.dump_schema`` gives its bytes). Its "bytes" are those of this rank's state.
        tensors, offsets: what lies where in the buffer, each at a multiple of 64.
        num_bytes: of the buffer: the state, and copies of others' shares behind it.
        shares: the bytes of this rank's share, with which the state ends, and of each copy; empty without copies.
    """

    schema: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    num_bytes: int
    shares: tuple[int, ...] = ()

    def copy_into(self, buffer: Any) -> Copied:
        """Write all bytes at their places; done when this returns. Gaps between tensors become zeros.

        Tensors on a GPU go side by side on a stream of their own, after what their device has to do so far; if the
        buffer is page-locked (cudaHostRegister) at the speed of the link.

        Args:
            buffer: anything writable and contiguous (memoryview, mmap, bytearray) of ``num_bytes`` or more.

        Raises:
            InvalidArgument: the buffer is too small, or cannot be written to.
        """
        begin = time.perf_counter()
        if memoryview(buffer).readonly or memoryview(buffer).nbytes < self.num_bytes:
            raise InvalidArgument(
                f"the buffer has {memoryview(buffer).nbytes} bytes{' and is read-only' * memoryview(buffer).readonly}; "
                f"this snapshot takes {self.num_bytes} that can be written."
            )
        data, raw = as_bytes(buffer), memoryview(buffer).cast("B")
        streams: dict[torch.device, torch.cuda.Stream] = {}
        try:
            with torch.no_grad():
                for index, (tensor, offset) in enumerate(zip(self.tensors, self.offsets, strict=True)):
                    if index == len(self.tensors) // 2:
                        fail_at("copy.during")
                    end = offset + tensor.nbytes
                    gap = raw[end : end + -end % ALIGNMENT]
                    gap[:] = bytes(len(gap))
                    place = data[offset:end].view(_INTEGERS[tensor.itemsize]).view(tensor.shape)
                    if tensor.is_cuda:
                        with torch.cuda.stream(_side_stream(tensor.device, streams)):
                            place.copy_(bits(tensor), non_blocking=True)
                    else:
                        place.copy_(bits(tensor))
        finally:  # what failed may leave its memory to others: nothing may still be written into it
            for stream in streams.values():
                stream.synchronize()
        return Copied(self.num_bytes, time.perf_counter() - begin)


def _side_stream(device: torch.device, streams: dict[torch.device, torch.cuda.Stream]) -> torch.cuda.Stream:
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
        streams[device].wait_stream(torch.cuda.current_stream(device))
    return streams[device]


def flatten(
    state: TrainingState,
    division: Division | None = None,
    *,
    elsewhere: Collection[str] | None = None,
    encoder: Encoder | None = None,
    optimizer_states: OptimizerStates | None = None,
) -> Flat:
    """Take a training's state apart. Nothing is copied or changed: copy before anything of it changes.

    Args:
        state: of the training.
        division: what this rank's snapshot has of what is replicated (``shares.agreed_division``); the other ranks'
            have the rest. Default: all tensors are whole.
        elsewhere: paths of plain tensors that other ranks write to disk (``replicas.written_elsewhere``). Default: all,
            but on rank 0.
        encoder: what takes values apart. Default: one of this division.
        optimizer_states: by parameter, for those of which the optimizer has none yet.

    Raises:
        InvalidArgument: something that a snapshot cannot hold; names path and type, and says what to do.
    """
    if type(state.step) is not int or state.step < 0:
        raise InvalidArgument(f"step={state.step!r}: give the number of steps that are done, 0 or more.")
    ready = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if ready else 0
    shares = division.shares if division else ()
    encoder = encoder or Encoder(division.portions if division else None, shares[0] if shares else None)
    encoder.owned, encoder.elsewhere = elsewhere is not None or rank == 0, elsewhere or ()
    models = models_of(state.model)
    tree: dict[str, Any] = {
        "model": {**models.tensors, **{name: module.get_extra_state() for name, module in models.stateful.items()}},
        "optimizer": _optimizer_tree(state, models, optimizer_states or {}),
    }
    node = [[part, encoder.encode(value, part)] for part, value in tree.items()]
    encoder.owned, encoder.elsewhere, encoder.sharded = True, (), False
    rest: dict[str, Any] = {
        part: {name: thing.state_dict() for name, thing in things.items()} for part, things in state.stateful().items()
    }
    rest["extras"] = {name: _extra(name, value) for name, value in state.extras.items()}
    rest["rng"] = _rng()
    node += [[part, encoder.encode(value, part)] for part, value in rest.items()]
    encoder.move_share(encoder.own.num_bytes)
    payloads = encoder.own, *shares
    begins = list(accumulate((payload.num_bytes for payload in payloads), initial=0))
    schema = envelope(
        {"dict": node},
        num_bytes=sum(payload.num_bytes for payload in payloads[:2]),
        rank=rank,
        step=state.step,
        world_size=dist.get_world_size() if ready else 1,
    )
    tensors = tuple(tensor for payload in payloads for tensor in payload.tensors)
    offsets = [begin + offset for begin, payload in zip(begins, payloads, strict=False) for offset in payload.offsets]
    return Flat(schema, tensors, tuple(offsets), begins[-1], tuple(payload.num_bytes for payload in shares))


def size_bytes(state: TrainingState) -> int:
    """The bytes that a snapshot of it takes now. Optimizers that have not stepped have no states yet."""
    return flatten(state).num_bytes


def is_stateful(thing: Any) -> bool:
    """Whether it has ``state_dict`` and ``load_state_dict``."""
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that copies keep every bit of every dtype."""
    return tensor.detach().view(_INTEGERS[tensor.itemsize])


def as_bytes(buffer: Any) -> torch.Tensor:
    """A buffer as a tensor of uint8 over the same memory."""
    raw = memoryview(buffer).cast("B")
    if not raw.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(raw, dtype=torch.uint8)


def set_rng(rng: Mapping[str, Any]) -> None:
    """Set every random generator of this process to what ``flatten`` found."""
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    if rng["cuda"]:
        torch.cuda.set_rng_state_all(rng["cuda"])


def check_rng(rng: Mapping[str, Any]) -> None:
    """Refuse states that generators do not take; they are as before afterwards.

    Raises:
        InvalidSnapshot: one of them cannot be set.
    """
    before = _rng()
    try:
        set_rng(rng)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidSnapshot(
            f"the snapshot's random generators cannot be set: {type(error).__name__}: {error}. It is damaged, or of "
            f"other versions of Python, NumPy or torch; go on from another snapshot."
        ) from error
    finally:
        set_rng(before)


def _rng() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=True)
    return {
        "python": (version, np.array(words, np.uint64), gauss),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _extra(name: str, value: Any) -> Any:
    if isinstance(value, nn.Module | torch.optim.Optimizer):
        raise InvalidArgument(
            f"extras[{name!r}] is a {type(value).__name__}: pass it with the others, as in model={{'main': …, "
            f"{name!r}: …}} or optimizer={{…}}, so that it is restored in place."
        )
    return value.state_dict() if is_stateful(value) else value


def _optimizer_tree(state: TrainingState, models: Models, missing: OptimizerStates) -> dict[str, Any]:
    """``{"state": {name: …}, "groups": [{option: …, "params": [name, …]}, …]}`` over all optimizers."""
    states: dict[str, Any] = {}
    groups = []
    for optimizer, group, names in parameter_groups(named(state.optimizer, "optimizer"), models):
        for name, parameter in zip(names, group["params"], strict=True):
            found = optimizer.state.get(parameter, missing.get(parameter))
            if found is not None:
                states[name] = dict(found)
        groups.append({**group, "params": names})
    return {"state": states, "groups": groups}

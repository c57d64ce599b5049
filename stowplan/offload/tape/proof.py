"""The proof that a tape can be replayed: every op is done again and compared, bit for bit, with the forward pass.

Each op runs on true inputs: where a saved value is at hand its true tensor is used, whatever the replay gave, so that
one op's fault is not blamed on another, and no more than the replay's temporaries is held at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from stowplan.offload.tape.replay import advance, below_autograd, view_of
from stowplan.offload.tape.rng import Position, rewound
from stowplan.offload.tape.rules import PURE
from stowplan.offload.tape.tape import Ref, Tape, TapeOp, map_refs

__all__ = ["prove"]

# Results of attention kernels that hold the generator's state, and nothing at all without dropout.
_UNSET = frozenset({"rng_state", "unused", "philox_seed", "philox_offset"})
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prove(
    tape: Tape,
    given: Mapping[int, torch.Tensor],
    truth: Mapping[int, torch.Tensor],
    position: Position,
    around_op: Callable[[int], AbstractContextManager[None]] = lambda op: nullcontext(),
) -> None:
    """Replay all that claims to be recomputable; ops whose results differ from ``truth`` are marked not replayable.

    Args:
        given: tensors of parameters, inputs and constants, by value.
        truth: tensors of the saved values as the forward pass had them, by value, over the whole storage.
        position: where the random generators stood when the block began.
        around_op: opened with an op's number while it runs (to watch its memory and time).
    """
    env: dict[tuple[int, int], torch.Tensor] = {}
    recomputable = tape.recomputable()
    available = {v for v in tape.saved_versions() if tape.saved_final(v)} - recomputable
    numbers, _ = tape.closure(recomputable, available)
    ops = set(numbers)
    last_random = max((k for k in ops if tape.ops[k].random), default=-1)
    uses = Counter(key for k in ops for key in tape.ops[k].reads)

    def fetch(ref: Ref) -> torch.Tensor:
        key = (ref.value, ref.version)
        if key in env:
            return view_of(env[key], ref.geometry)
        return view_of(truth[ref.value] if ref.value in truth else given[ref.value], ref.geometry)

    with below_autograd(), rewound(position):
        for k, op in enumerate(tape.ops):
            if k not in ops:
                if op.random and k < last_random:
                    advance(tape, op)
                continue
            args = [map_refs(argument, fetch) for argument in op.args]
            kwargs = {name: map_refs(argument, fetch) for name, argument in op.kwargs.items()}
            with around_op(k):
                result = op.func(*args, **kwargs)
            del args, kwargs
            _take_results(tape, op, result, env, truth)
            del result
            for key in op.reads:
                uses[key] -= 1
            for key in [key for key in env if not uses[key] and _is_over(tape, key)]:
                del env[key]


def _take_results(
    tape: Tape,
    op: TapeOp,
    result: object,
    env: dict[tuple[int, int], torch.Tensor],
    truth: Mapping[int, torch.Tensor],
) -> None:
    """Take an op's results into ``env``; a saved value is compared, and its true tensor serves from then on."""
    results = result if isinstance(result, tuple | list) else (result,)
    for position, value in op.makes:
        env[value, 0] = results[position]
    for value, version in op.writes:
        env[value, version] = env.pop((value, version - 1))
    unset = {value for position, value in op.makes if not op.random and _is_unset(op, position)}
    for value, version in (*((value, 0) for _, value in op.makes), *op.writes):
        if value in unset:
            continue
        if value in truth and version == tape.values[value].last_version:
            made = env.pop((value, version))
            op.replayable &= all(
                _same_bits(view_of(made, slot.geometry), view_of(truth[value], slot.geometry))
                for slot in tape.slots
                if slot.value == value
            )


def _is_unset(op: TapeOp, position: int) -> bool:
    """Is that result memory which nothing fills?"""
    schema = op.func._schema
    name = schema.returns[position].name if position < len(schema.returns) else ""
    return name in _UNSET or position in PURE.get(schema.name, ())


def _is_over(tape: Tape, key: tuple[int, int]) -> bool:
    """No later in-place write continues this version."""
    return key[1] == tape.values[key[0]].last_version


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integers = _INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))

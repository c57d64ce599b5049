"""The proof that a tape can be replayed: every op is done again and compared, bit for bit, with the forward pass.

Each op runs on true inputs: where a saved value is at hand its true tensor is used, whatever the replay gave, so that
one op's fault is not blamed on another, and no more than the replay's temporaries is held at a time. Ops that keep
token rows apart are run for first rows too, and compared with the first rows of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from stowplan.offload.storages import content_of
from stowplan.offload.tape.replay import advance, below_autograd, view_of
from stowplan.offload.tape.rng import Position, rewound
from stowplan.offload.tape.rows import RowRef, RowWise, row_bytes
from stowplan.offload.tape.rules import PURE
from stowplan.offload.tape.tape import Ref, Tape, TapeOp, map_refs

__all__ = ["DEFAULT_TOLERANCES", "RowTrials", "Tolerance", "prove"]

# Results of attention kernels that hold the generator's state, and nothing at all without dropout.
_UNSET = frozenset({"rng_state", "unused", "philox_seed", "philox_offset"})
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# About one unit in the last place of bf16 (which fp16 stays far below), and what reordered sums of fp32 differ by.
DEFAULT_TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}


class Tolerance(NamedTuple):
    """What rows may differ by from those of the whole, relative to its largest number; None: by the dtype's default."""

    relative: float | None = None

    def of(self, dtype: torch.dtype) -> float:
        """The largest difference allowed, relative; 0 for what is no number of floating point."""
        if dtype not in DEFAULT_TOLERANCES:
            return 0.0
        return DEFAULT_TOLERANCES[dtype] if self.relative is None else self.relative


class RowTrials(NamedTuple):
    """What to try of first rows: ``points`` are numbers of them, by op; those that pass become the op's ``splits``.

    Without a tolerance they must have the same bits.
    """

    num_rows: int
    rules: Mapping[int, RowWise]
    points: Mapping[int, Sequence[int]]
    tolerance: Tolerance | None = None


def prove(
    tape: Tape,
    given: Mapping[int, torch.Tensor],
    truth: Mapping[int, torch.Tensor],
    position: Position,
    around_op: Callable[[int], AbstractContextManager[None]] = lambda op: nullcontext(),
    trials: RowTrials | None = None,
) -> None:
    """Replay all that claims to be recomputable; ops whose results differ from ``truth`` are marked not replayable.

    Args:
        given: tensors of parameters, inputs and constants, by value.
        truth: tensors of the saved values as the forward pass had them, by value, over the whole storage.
        position: where the random generators stood when the block began.
        around_op: opened with an op's number while it runs (to watch its memory and time).
        trials: first rows to try, of ops that keep rows apart.
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
            del args
            if trials is not None and k in trials.points:
                op.splits = _rows_that_agree(tape, op, trials, k, fetch, kwargs, result)
            _take_results(tape, op, result, env, truth)
            del result
            for key in op.reads:
                uses[key] -= 1
            for key in [key for key in env if not uses[key] and _is_over(tape, key)]:
                del env[key]


def _rows_that_agree(
    tape: Tape,
    op: TapeOp,
    trials: RowTrials,
    number: int,
    fetch: Callable[[Ref], torch.Tensor],
    kwargs: dict[str, Any],
    result: object,
) -> tuple[int, ...]:
    """The numbers of first rows that the op makes alone as it made them in ``result``."""
    rule = trials.rules[number]
    whole = result if isinstance(result, tuple | list) else (result,)
    agreeing = []
    for rows in trials.points[number]:
        part = op.func(*(_first(argument, rows, fetch) for argument in rule.args), **kwargs)
        parts = part if isinstance(part, tuple | list) else (part,)
        if all(
            _agrees(whole[position], parts[position], rows * row_bytes(tape.values[value], trials.num_rows), trials)
            for position, value in rule.makes
        ):
            agreeing.append(rows)
    return tuple(agreeing)


def _first(argument: Any, rows: int, fetch: Callable[[Ref], torch.Tensor]) -> Any:
    if type(argument) is RowRef:
        return view_of(fetch(argument.ref), argument.first(rows))
    if type(argument) is list:
        return [_first(item, rows, fetch) for item in argument]
    return map_refs(argument, fetch)


def _agrees(whole: torch.Tensor, part: torch.Tensor, num_bytes: int, trials: RowTrials) -> bool:
    """Is ``part``'s storage the first bytes of ``whole``'s? One number all over (weights of zero) proves nothing."""
    if part.untyped_storage().nbytes() != num_bytes:
        return False
    expected, found = content_of(whole)[:num_bytes], content_of(part)
    numbers = expected.view(whole.dtype)
    if not bool((numbers != numbers[0]).any()):
        return False
    if torch.equal(expected, found):
        return True
    allowed = trials.tolerance.of(whole.dtype) if trials.tolerance is not None else 0.0
    if not allowed:
        return False
    a, b = numbers.double(), found.view(whole.dtype).double()
    return bool((a - b).abs().max() <= allowed * a.abs().max())


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

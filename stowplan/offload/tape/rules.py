"""What a replay may do again, op by op.

Note: what is never replayed
    A replayed op must give the same bits again and change nothing but its outputs. So these are left alone, and values
    that need them are kept or swapped: ops outside ``aten`` and ``prims`` (collectives, custom kernels), ops that
    write to tensors behind their schema's back (batch norms update running statistics), ops whose result shapes or
    Python values depend on data, and random ops whose use of the generator depends on more than shapes.
    A custom kernel that is known to be pure (``PURE``), or declared so (``allow_replay``), is replayed.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import torch

from stowplan.core.errors import InvalidArgument

__all__ = ["ALLOCATIONS", "PURE", "OpRules", "allow_replay", "overwrites_whole", "rules_of"]

aten = torch.ops.aten

# Ops that give uninitialised memory: what fills it may be a kernel that no dispatch mode sees.
ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.empty_permuted.default,
    }
)
_FILLS = frozenset({"copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_", "exponential_"})
# Random ops whose use of the generator depends on shapes only, so that a stand-in tensor advances it as much.
_ADVANCES_BY_SHAPE = frozenset(
    {"bernoulli_", "native_dropout", "normal_", "uniform_", "rand", "randn", "rand_like", "randn_like"}
)
_HIDDEN_WRITES = frozenset(
    {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index", "_batch_norm_with_update"}
)
# Custom ops of others that give the same bits again and change nothing but their outputs. Calls with dropout are told
# apart by their argument ``dropout_p`` and not replayed. With each, its results that nothing fills without dropout.
PURE = {"flash_attn::_flash_attn_forward": {3}, "flash_attn::_flash_attn_varlen_forward": {3}}
_allowed: set[str] = set(PURE)

_DATA_DEPENDENT = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_RESHAPING_WRITES = frozenset({"set_", "resize_", "resize_as_", "resize"})


_QUALIFIED = re.compile(r"\w+::\w+")


class OpRules(NamedTuple):
    """Static facts of one operator overload."""

    name: str  # without namespace and overload
    writes: tuple[tuple[int, str, bool], ...]  # arguments written in place: position, name, keyword only
    random: bool
    replayable: bool
    writes_unseen: bool  # to tensors that its schema does not name
    data_dependent: bool
    reshapes: bool  # changes what a storage is, not only what is in it


@cache
def rules_of(func: Any) -> OpRules:
    """The rules of an ``OpOverload``, read from its schema and tags."""
    name = func._schema.name.split("::")[1]
    writes = tuple(
        (position, argument.name, argument.kwarg_only)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    random = torch.Tag.nondeterministic_seeded in func.tags
    return OpRules(
        name=name,
        writes=writes,
        random=random,
        replayable=(func.namespace in ("aten", "prims") and name not in _HIDDEN_WRITES)
        or func._schema.name in _allowed,
        writes_unseen=name in _HIDDEN_WRITES,
        data_dependent=bool(_DATA_DEPENDENT & set(func.tags)),
        reshapes=name in _RESHAPING_WRITES,
    )


def allow_replay(op: Any) -> None:
    """Declare that a custom op is pure, so that values that need it may be recomputed.

    Pure: it gives the same bits for the same inputs, draws no random numbers, and changes nothing but its outputs. Its
    first replay at every block is compared with the forward pass all the same. Call it before planning and applying.

    Args:
        op: an ``OpOverload`` or ``OpOverloadPacket`` (``torch.ops.mylib.myop``), what ``torch.library.custom_op``
            gives, or the qualified name ``"mylib::myop"``.

    Raises InvalidArgument for anything else, an op that is not registered, one that writes to its arguments or is
    tagged as random or dependent on data, and ops of ``aten`` and ``prims``, whose rules are known.
    """
    name = _qualified_name(op)
    namespace, _, stem = name.partition("::")
    if namespace in ("aten", "prims"):
        raise InvalidArgument(f"allow_replay({name!r}): ops of {namespace} have rules of their own; nothing to allow.")
    try:
        packet = getattr(getattr(torch.ops, namespace), stem)
    except AttributeError:
        raise InvalidArgument(
            f"allow_replay({name!r}): no such op is registered; import the library that registers it first."
        ) from None
    for overload in packet.overloads():
        rules = rules_of(getattr(packet, overload))
        for fault, said in (
            (rules.writes, "writes to its arguments"),
            (rules.random, "is tagged as drawing random numbers"),
            (rules.data_dependent, "is tagged as dependent on data"),
        ):
            if fault:
                raise InvalidArgument(f"allow_replay({name!r}): it {said}, so it cannot be run again.")
    _allowed.add(name)
    rules_of.cache_clear()


def _qualified_name(op: Any) -> str:
    if isinstance(op, torch._ops.OpOverload):
        return str(op._schema.name)
    if isinstance(op, torch._ops.OpOverloadPacket):
        return str(op._qualified_op_name)
    name = op if isinstance(op, str) else getattr(op, "_qualname", None)
    if not isinstance(name, str) or not _QUALIFIED.fullmatch(name):
        raise InvalidArgument(
            f"allow_replay({op!r}): allowed are an op (torch.ops.mylib.myop), what torch.library.custom_op gives, or a "
            f'qualified name such as "mylib::myop".'
        )
    return name


def draws_random_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does this very call use the generator? Attention without dropout does not, whatever its tags say, and a custom
    kernel with dropout does.
    """
    rules = rules_of(func)
    custom = func.namespace not in ("aten", "prims")
    if not rules.random and not custom:
        return False
    if "attention" not in rules.name and not custom:
        return True
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            probability = kwargs.get(argument.name, args[position] if position < len(args) else 0.0)
            return bool(probability != 0.0)
    return rules.random


def advances_by_shape(func: Any, kwargs: dict[str, Any]) -> bool:
    """Can a call on stand-in tensors move the default generator exactly as the true call did?"""
    return rules_of(func).name in _ADVANCES_BY_SHAPE and kwargs.get("generator") is None


def overwrites_whole(func: Any) -> bool:
    """Does the op define every byte of the tensor that it writes to?"""
    return rules_of(func).name in _FILLS or "out" in func._overloadname

"""What a replay may do again, op by op.

Note: what is never replayed
    A replayed op must give the same bits again and change nothing but its outputs. So these are left alone, and values
    that need them are kept or swapped: ops outside ``aten`` and ``prims`` (collectives, custom kernels), ops that
    write to tensors behind their schema's back (batch norms update running statistics), ops whose result shapes or
    Python values depend on data, and random ops whose use of the generator depends on more than shapes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["ALLOCATIONS", "OpRules", "overwrites_whole", "rules_of"]

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
_DATA_DEPENDENT = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_RESHAPING_WRITES = frozenset({"set_", "resize_", "resize_as_", "resize"})


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
        replayable=func.namespace in ("aten", "prims") and name not in _HIDDEN_WRITES,
        writes_unseen=name in _HIDDEN_WRITES,
        data_dependent=bool(_DATA_DEPENDENT & set(func.tags)),
        reshapes=name in _RESHAPING_WRITES,
    )


def draws_random_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does this very call use the generator? Attention without dropout does not, whatever its tags say."""
    rules = rules_of(func)
    if not rules.random:
        return False
    if "attention" not in rules.name:
        return True
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            probability = kwargs.get(argument.name, args[position] if position < len(args) else 0.0)
            return bool(probability != 0.0)
    return True


def advances_by_shape(func: Any, kwargs: dict[str, Any]) -> bool:
    """Can a call on stand-in tensors move the default generator exactly as the true call did?"""
    return rules_of(func).name in _ADVANCES_BY_SHAPE and kwargs.get("generator") is None


def overwrites_whole(func: Any) -> bool:
    """Does the op define every byte of the tensor that it writes to?"""
    return rules_of(func).name in _FILLS or "out" in func._overloadname

"""Values of small tensors that depend on no weights: masks, positions, counts. Branches on them go where they would.

A known tensor has a real twin. An op on known tensors is done with their twins, too. What cannot be known is guessed,
and every guess is told.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from stowplan.core.errors import UnsupportedModel

__all__ = ["Known"]

aten = torch.ops.aten

_MAX_ELEMENTS = 1 << 18
_ASK_FOR_A_NUMBER = frozenset({aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default})
_MASKS = (torch.bool, torch.uint8)
_SHAPE_DEPENDS_ON_DATA = torch.Tag.dynamic_output_shape
# Their results do not depend on what their tensor argument holds.
_FILLS = frozenset(
    getattr(aten, name).default
    for name in ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "zero_")
) | {aten.fill_.Scalar}
_UNDEFINED = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
)


class Known:
    """Real twins of fake tensors; ``guesses`` lists, in words, what had to be taken for granted."""

    def __init__(self) -> None:
        self.guesses: dict[str, None] = {}
        self._twins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._storages: set[int] = set()  # that known tensors were ever on

    def remember(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """``fake`` stands for ``real``, if that is small enough to keep."""
        if real.numel() <= _MAX_ELEMENTS and real.device.type == "cpu":
            with unset_fake_temporarily():
                self._put(fake, real.detach().clone())  # ops are done with it, in place ones too

    def twin_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A real tensor of the same values, None where they are not known."""
        twin: torch.Tensor | None = self._twins.get(tensor) if isinstance(tensor, FakeTensor) else tensor
        return twin

    # ---- ops that ask for values ----------------------------------------------------------------------------------
    def answers(self, func: Any) -> bool:
        """Does the op look at data, so that it must be answered here?"""
        return func in _ASK_FOR_A_NUMBER or _SHAPE_DEPENDS_ON_DATA in func.tags

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the op gives: by the twins, or a guess. Raises UnsupportedModel where no guess is sound."""
        tensors = _tensors((args, kwargs))
        if func is aten.index.Tensor and not any(i is not None and i.dtype in _MASKS for i in args[1]):
            return func(*args, **kwargs)
        if all(self.twin_of(t) is not None for t in tensors):
            with unset_fake_temporarily():
                real = func(*tree_map(self._as_real, args), **tree_map(self._as_real, kwargs))
            return tree_map(lambda leaf: self._faked(leaf, tensors), real)
        if func not in _ASK_FOR_A_NUMBER:
            raise UnsupportedModel(
                f"{func} at {_caller()} gives a tensor whose shape depends on values that are not known without "
                f"running the model: plan on the device (without hardware=, with real weights), or leave these modules "
                f"out of the plan's step."
            )
        guess = _guess(func, args)
        self.guesses[f"{_caller()} asks for a value that only a real run would know: taken to be {guess}"] = None
        return guess

    def _faked(self, leaf: Any, like: list[torch.Tensor]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=like[0].device)
        self.remember(fake, leaf)
        return fake

    # ---- all others -----------------------------------------------------------------------------------------------
    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Do with the twins what was done with the fake tensors, or forget what is not known any more."""
        if torch.Tag.nondeterministic_seeded in func.tags or func in _UNDEFINED:
            self._forget_written(func, args)
            return
        given = _tensors((args, kwargs))
        made = _tensors(result) if not func._schema.is_mutable or result is not None else given
        small = all(t.numel() <= _MAX_ELEMENTS for t in made)
        known = func in _FILLS or all(self.twin_of(t) is not None for t in given)
        if not made or not small or not known or not all(isinstance(t, FakeTensor) for t in _written(func, args)):
            self._forget_written(func, args)
            return
        try:
            with unset_fake_temporarily():
                real = func(*tree_map(self._as_real, args), **tree_map(self._as_real, kwargs))
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError):
            self._forget_written(func, args)
            return
        if result is not None:
            for fake, twin in zip(made, _tensors(real), strict=True):
                if isinstance(fake, FakeTensor):
                    self._put(fake, twin)

    def _put(self, fake: torch.Tensor, twin: torch.Tensor) -> None:
        self._twins[fake] = twin
        self._storages.add(fake.untyped_storage()._cdata)

    def _as_real(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        if not isinstance(leaf, FakeTensor):
            return leaf
        twin = self._twins.get(leaf)
        # For an op whose result does not depend on the argument's values, any values will do.
        return torch.empty(leaf.shape, dtype=leaf.dtype) if twin is None else twin

    def _forget_written(self, func: Any, args: tuple[Any, ...]) -> None:
        if not func._schema.is_mutable:
            return
        written = {tensor.untyped_storage()._cdata for tensor in _written(func, args)} & self._storages
        if not written:
            return
        self._storages -= written
        for fake in [fake for fake in self._twins if fake.untyped_storage()._cdata in written]:
            del self._twins[fake]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def _written(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors that the op writes to."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [t for a, given in pairs if a.alias_info is not None and a.alias_info.is_write for t in _tensors(given)]


def _guess(func: Any, args: tuple[Any, ...]) -> bool | int | float:
    if func is aten.equal.default:
        return bool(args[0].shape == args[1].shape)
    if args[0].dtype is torch.bool or func is aten.is_nonzero.default:
        return True
    return 1.0 if args[0].dtype.is_floating_point else 1


_OURS = str(Path(__file__).parents[2])
_TORCH = str(Path(torch.__file__).parent)


def _caller() -> str:
    """File and line of the model's code that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((_OURS, _TORCH)):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"

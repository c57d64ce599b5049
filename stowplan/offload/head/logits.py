"""What stands for logits that are never made: it may be cast, cut by rows, laid flat and given to a cross entropy.

So a model's own code, and a loss of the user's, run as they are; that nothing else happens to the logits on their way
to the loss (scales, soft caps) needs no list of models: whatever else is asked of them is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from stowplan.core.errors import NoLogits
from stowplan.offload.head.loss import REDUCTIONS, chunked_loss, product_dtype

__all__ = ["Logits", "OnLoss"]

OnLoss = Callable[[int], object]

_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


class Logits:
    """``head(hidden)`` that is not there: ``(..., classes)``, of the type that the layer would give.

    Args:
        hidden: ``(..., features)``.
        head: the layer.
        dtype: of the logits by now; None: as the layer gives them.
        chunk_rows: rows whose logits the loss makes at once.
        on_loss: told the number of rows when a loss is computed.
        products: the type that the layer computes in; None: as autocast says now, when the layer is called. The loss
            may be computed outside autocast.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: torch.nn.Linear,
        chunk_rows: int,
        dtype: torch.dtype | None = None,
        on_loss: OnLoss = lambda num_rows: None,
        products: torch.dtype | None = None,
    ) -> None:
        self._hidden, self._head, self._chunk_rows, self._on_loss = hidden, head, chunk_rows, on_loss
        self._products = products if products is not None else product_dtype(hidden, head.weight)
        self.dtype = dtype if dtype is not None else self._products
        self._shape = torch.Size((*hidden.shape[:-1], head.out_features))

    # ---- what they look like ----------------------------------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def requires_grad(self) -> bool:
        return True

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self._shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one of its sizes."""
        return self._shape if dim is None else self._shape[dim]

    def numel(self) -> int:
        """Number of logits."""
        return self._shape.numel()

    def is_floating_point(self) -> bool:
        """Always."""
        return True

    def __repr__(self) -> str:
        return f"Logits(never made: chunked_head; shape={tuple(self._shape)}, dtype={self.dtype})"

    # ---- what may be done with them ---------------------------------------------------------------------------------
    def _with(self, hidden: torch.Tensor, dtype: torch.dtype | None = None) -> Logits:
        return Logits(hidden, self._head, self._chunk_rows, dtype or self.dtype, self._on_loss, self._products)

    def contiguous(self) -> Logits:
        """As they are."""
        return self

    def float(self) -> Logits:
        """In float32, which they are computed in anyway."""
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        """In another type of at least the same precision, on the same device."""
        wanted = [item for item in (*args, *kwargs.values()) if not isinstance(item, bool)]
        dtypes = [item for item in wanted if isinstance(item, torch.dtype)]
        places = [torch.device(item) for item in wanted if isinstance(item, torch.device | str | int)]
        # Another tensor asks for its type and its place, which are seldom those of logits.
        if any(isinstance(item, torch.Tensor) for item in wanted) or not all(map(self._is_here, places)):
            self._refuse("to")
        if any(not self._holds(dtype) for dtype in dtypes):
            self._refuse(f"to {dtypes[0]}")
        return self._with(self._hidden, dtypes[0] if dtypes else None)

    def _is_here(self, place: torch.device) -> bool:
        return place.type == self.device.type and place.index in (None, self.device.index or 0)

    def _holds(self, dtype: torch.dtype) -> bool:
        return dtype in (self.dtype, torch.float32) and torch.promote_types(self.dtype, dtype) is dtype

    def view(self, *shape: Any) -> Logits:
        """Laid out in other rows; the classes stay the last dimension."""
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        numbers = bool(sizes) and all(isinstance(size, int) for size in sizes)
        if not numbers or sizes[-1] not in (self._shape[-1], -1) or sizes.count(-1) > 1:
            self._refuse(f"view to {sizes}")
        rows = sizes[:-1]
        if sizes[-1] == -1 and torch.Size(rows).numel() != self._hidden.shape[:-1].numel():
            self._refuse(f"view to {sizes}")
        return self._with(self._hidden.reshape(*rows, self._hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Logits:
        """Rows in fewer dimensions; the classes stay the last one."""
        if end_dim % self.ndim == self.ndim - 1:
            self._refuse("flatten of the classes")
        return self._with(self._hidden.flatten(start_dim, end_dim % self.ndim))

    def __getitem__(self, index: Any) -> Logits:
        parts = index if isinstance(index, tuple) else (index,)
        if any(not _is_plain(part) for part in parts) or parts.count(Ellipsis) > 1:
            self._refuse("indexing but by numbers, slices and ...")
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts = (*parts[:at], *[slice(None)] * (self.ndim - len(parts) + 1), *parts[at + 1 :])
        if len(parts) > self.ndim:
            self._refuse(f"indexing {self.ndim} dimensions with {len(parts)} indices")
        if len(parts) == self.ndim and parts[-1] != slice(None):
            self._refuse("indexing of the classes")
        return self._with(self._hidden[parts[: self.ndim - 1]])

    def __len__(self) -> int:
        return self._shape[0]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = next(_logits_in((*args, *kwargs.values())), None)
        if func is F.cross_entropy:
            asked = _CROSS_ENTROPY.bind(*args, **kwargs)
            asked.apply_defaults()
            if isinstance(asked.arguments["input"], Logits):
                return asked.arguments.pop("input")._loss(**asked.arguments)
        raise NoLogits(getattr(func, "__name__", str(func)), own.shape if own is not None else ())

    def _loss(
        self,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        size_average: Any,
        ignore_index: int,
        reduce: Any,
        reduction: str,
        label_smoothing: Any,
    ) -> torch.Tensor:
        if self.ndim > 2 or target.dtype is not torch.int64 or target.shape != self._shape[:-1]:
            self._refuse(f"cross_entropy of {tuple(self._shape)} against {tuple(target.shape)} {target.dtype}")
        if (
            weight is not None
            or label_smoothing
            or reduction not in REDUCTIONS
            or (size_average, reduce) != (None, None)
        ):
            self._refuse("cross_entropy with class weights, label smoothing or another reduction than mean and sum")
        self._on_loss(target.numel())
        layer = self._head
        loss = chunked_loss(
            self._hidden, layer.weight, target, layer.bias, ignore_index, self._chunk_rows, reduction, self._products
        )
        exact = torch.is_autocast_enabled(self.device.type)  # autocast has cross entropies in float32
        return loss if exact else loss.to(self.dtype)

    # ---- what may not ------------------------------------------------------------------------------------------------
    def _refuse(self, what: str) -> NoReturn:
        raise NoLogits(what, self._shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._refuse(name)


def _is_plain(index: object) -> bool:
    return index is Ellipsis or (isinstance(index, int | slice) and not isinstance(index, bool))


def _logits_in(items: Iterable[Any]) -> Iterator[Logits]:
    for item in items:
        if isinstance(item, Logits):
            yield item
        elif isinstance(item, tuple | list):
            yield from _logits_in(item)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Logits, *args: Any) -> NoReturn:
        self._refuse(name.strip("_"))

    return refuse


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_NUMBERS = ("float", "int", "index", "complex", "bool", "array")
_OTHERS = ("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne", "invert", "iter", "setitem", *_NUMBERS)
for _name in (
    *_OPERATORS,
    *(f"r{name}" for name in _OPERATORS),
    *(f"i{name}" for name in _OPERATORS),
    *_NUMBERS,
    *_OTHERS,
):
    setattr(Logits, f"__{_name}__", _refusal(_name))
Logits.__hash__ = object.__hash__  # type: ignore[method-assign]

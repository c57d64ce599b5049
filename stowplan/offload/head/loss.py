"""A linear layer and the cross entropy of its output, in chunks of rows: all logits are never there at once.

For each chunk: logits, the loss, and at once the gradient of the logits, from which those of hidden states, weight and
bias are made. So forward and backward are as many products as without chunks; what waits for backward is one gradient
of each. (The way of Hsu et al., "Liger Kernel", arXiv 2410.10989, section 3.2, without custom kernels.)

Note: what is scaled when
    Gradients are those of the sum of the losses until backward, which knows the incoming gradient and divides by the
    number of targets. So nothing is rounded to zero on the way in half precision, and each gradient is scaled once.
    That of the weight is summed over chunks in float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from stowplan.core.errors import InvalidArgument, NoGradients

__all__ = ["REDUCTIONS", "chunked_loss", "default_chunk_rows", "linear_cross_entropy", "product_dtype"]

REDUCTIONS = ("mean", "sum")
# Logits of a chunk: enough for a matrix product to run at full speed, little beside a model.
_CHUNK_ELEMENTS = 1 << 24
# Rows of the weight's gradient that are made at a time where they must be cast before they are added.
_SLAB_ROWS = 8192


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    *,
    reduction: str = "mean",
) -> torch.Tensor:
    """``cross_entropy(linear(hidden, weight, bias).float(), labels)`` without ever holding all logits.

    Not bit for bit the same: sums are in another order. The gradients are made during the forward pass, unless under
    ``torch.no_grad``; there is one backward pass, and no second derivatives. Under autocast products are in its dtype,
    as those of ``linear`` are.

    Args:
        hidden: ``(..., features)``, floating point. All tensors are on one device.
        weight: ``(classes, features)``, of the dtype of ``hidden`` unless under autocast; at least one class.
        labels: ``(...)``, int64, each ``ignore_index`` or a class, from 0 on. They are not shifted.
        bias: ``(classes,)``.
        ignore_index: the label of rows that do not count: neither for the loss nor for the mean nor for gradients.
        chunk_rows: rows whose logits are there at once, 1 or more; default: about 16 million logits.
        reduction: "mean" over the labels that are not ignored (NaN if all are, as torch's), or "sum".

    Returns the loss, ``()``, float32 (float64 for float64).

    Raises:
        InvalidArgument: for other shapes, types, devices or settings, and for labels that are no class. Such labels on
            a GPU are found by its kernels instead, as those of ``torch.nn.functional.cross_entropy`` are.
        NoGradients: at a second backward pass, and with ``create_graph=True``.
    """
    _check(hidden, weight, labels, bias, reduction)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(weight.shape[0])
    if type(chunk_rows) is not int or chunk_rows < 1:  # True is no number of rows
        raise InvalidArgument(f"chunk_rows={chunk_rows!r}; allowed: an int of 1 or more, or None.")
    products = product_dtype(hidden, weight)
    return chunked_loss(hidden, weight, labels, bias, ignore_index, chunk_rows, reduction, products)


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    reduction: str,
    products: torch.dtype,
) -> torch.Tensor:
    """``linear_cross_entropy`` with products in that dtype, whatever autocast says by now."""
    _check_labels(labels, weight.shape[0], ignore_index)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    loss: torch.Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, targets, ignore_index, chunk_rows, reduction, products, torch.is_grad_enabled()
    )
    return loss


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The type of ``linear(hidden, weight)``, which autocast decides. Raises InvalidArgument if there is none."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype is not weight.dtype:
        raise InvalidArgument(f"hidden is {hidden.dtype}, but weight {weight.dtype}: cast one, or use autocast.")
    return hidden.dtype


def default_chunk_rows(num_classes: int) -> int:
    """Rows of a chunk, a power of two, for that many classes."""
    return 1 << max(0, (_CHUNK_ELEMENTS // num_classes).bit_length() - 1)


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, reduction: str
) -> None:
    if reduction not in REDUCTIONS:
        raise InvalidArgument(f"reduction={reduction!r}; allowed: {', '.join(map(repr, REDUCTIONS))}.")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise InvalidArgument(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; allowed: (..., features) and "
            f"(classes, features)."
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype is not torch.int64:
        raise InvalidArgument(
            f"labels are {tuple(labels.shape)} {labels.dtype}; allowed: int64 of the shape {tuple(hidden.shape[:-1])}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InvalidArgument(f"bias is {tuple(bias.shape)}; allowed: ({weight.shape[0]},).")
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise InvalidArgument(f"hidden is {hidden.dtype} and weight {weight.dtype}; allowed: floating point.")
    if not weight.shape[0]:
        raise InvalidArgument(f"weight is {tuple(weight.shape)}, no class at all; allowed: one or more.")
    devices = {tensor.device for tensor in (hidden, weight, labels, bias) if tensor is not None}
    if len(devices) > 1:
        raise InvalidArgument(f"tensors are on {', '.join(sorted(map(str, devices)))}; allowed: one device.")


def _check_labels(labels: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Where looking at values does not wait for a device."""
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor) or not labels.numel():
        return
    lowest, highest = torch.aminmax(labels.where(labels != ignore_index, 0))
    if lowest < 0 or highest >= num_classes:
        wrong = int(lowest if lowest < 0 else highest)
        raise InvalidArgument(f"labels have {wrong}; allowed: 0 to {num_classes - 1}, and ignore_index={ignore_index}.")


class _ChunkedLoss(torch.autograd.Function):
    """Loss, and at once the gradients of its sum over rows; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignore_index: int,
        chunk_rows: int,
        reduction: str,
        products: torch.dtype,
        differentiated: bool,
    ) -> torch.Tensor:
        needed = tuple(differentiated and asked for asked in ctx.needs_input_grad[:3])
        with torch.autocast(rows.device.type, enabled=False):
            sums = _Sums(rows, weight, bias, products, needed, chunk_rows)
            for first in range(0, rows.shape[0], chunk_rows):
                sums.add(first, min(first + chunk_rows, rows.shape[0]), targets, ignore_index)
        num_targets = (targets != ignore_index).sum() if reduction == "mean" else None
        ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.num_targets = num_targets
        ctx.gradients = [sums.of_rows, sums.of_weight, sums.of_bias]
        return sums.loss if num_targets is None else sums.loss / num_targets

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NoGradients(
                "a cross entropy in chunks (stowplan.linear_cross_entropy, or a plan's chunked head) has no second "
                "derivatives: leave create_graph=True out, or plan without chunked_head=True."
            )
        if ctx.gradients is None:
            raise NoGradients(
                "a cross entropy in chunks (stowplan.linear_cross_entropy, or a plan's chunked head) goes backward "
                "once: its gradients were made in the forward pass and are gone. Ask for all of them at once, compute "
                "the loss again, or plan without chunked_head=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # No target at all: the loss is NaN, but no gradient is.
        scale = incoming if ctx.num_targets is None else incoming / ctx.num_targets.clamp(min=1)
        made: list[torch.Tensor | None] = []
        while gradients:
            gradient = gradients.pop(0)
            made.append(None if gradient is None else gradient.mul_(scale).to(ctx.dtypes[len(made)]))
            del gradient
        return (*made, *[None] * 6)


class _Sums:
    """Loss and gradients, summed chunk by chunk in buffers that all chunks share."""

    def __init__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        products: torch.dtype,
        needed: tuple[bool, ...],
        chunk_rows: int,
    ) -> None:
        self._rows, self._weight = rows, weight.to(products)
        self._bias = None if bias is None else bias.to(products)
        exact = torch.promote_types(products, torch.float32)
        # Logits as the layer gives them, and exactly: one buffer where these are of one type.
        shape = min(chunk_rows, rows.shape[0]), weight.shape[0]
        self._logits = torch.empty(shape, dtype=products, device=rows.device)
        self._exact = self._logits if exact is products else torch.empty(shape, dtype=exact, device=rows.device)
        kept = torch.promote_types(weight.dtype, torch.float32)
        for_rows, for_weight, for_bias = needed
        self.loss = torch.zeros((), dtype=exact, device=rows.device)
        self.of_rows = torch.empty_like(rows) if for_rows else None
        self.of_weight = torch.zeros_like(weight, dtype=kept) if for_weight else None
        self.of_bias = torch.zeros_like(bias, dtype=kept) if bias is not None and for_bias else None

    def add(self, first: int, last: int, targets: torch.Tensor, ignore_index: int) -> None:
        """Rows ``first`` to ``last``, without it."""
        rows = self._rows[first:last].to(self._weight.dtype)
        logits, exact = self._logits[: last - first], self._exact[: last - first]
        target = targets[first:last].unsqueeze(1)
        counted = target != ignore_index
        target = target.where(counted, 0)
        if self._bias is None:
            torch.mm(rows, self._weight.T, out=logits)
        else:
            torch.addmm(self._bias, rows, self._weight.T, out=logits)
        if exact is not logits:
            exact.copy_(logits)
        exact -= exact.amax(dim=1, keepdim=True)
        right = exact.gather(1, target)
        total = exact.exp_().sum(dim=1, keepdim=True)
        self.loss += (total.log() - right).where(counted, 0).sum()
        if self.of_rows is None and self.of_weight is None and self.of_bias is None:
            return
        # From here on ``logits`` holds their gradient. Rows that do not count are left out where they are short: of the
        # products, not of the logits.
        torch.div(exact, total, out=logits)
        logits.scatter_(1, target, (right.exp() / total - 1).to(logits.dtype))
        if self.of_bias is not None:
            self.of_bias += (logits.T @ counted.to(logits.dtype)).squeeze(1)
        if self.of_rows is not None:
            torch.mul(logits @ self._weight, counted, out=self.of_rows[first:last])
        if self.of_weight is not None:
            self._add_to_weight(self.of_weight, logits, rows * counted)

    def _add_to_weight(self, total: torch.Tensor, change: torch.Tensor, rows: torch.Tensor) -> None:
        if total.dtype is change.dtype:
            total.addmm_(change.T, rows)
            return
        for first in range(0, total.shape[0], _SLAB_ROWS):
            total[first : first + _SLAB_ROWS] += change[:, first : first + _SLAB_ROWS].T @ rows

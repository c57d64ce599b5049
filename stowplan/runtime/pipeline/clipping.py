"""Clipping by the norm of all gradients of a model whose parameters are spread over processes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from stowplan.core.errors import InvalidArgument

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    groups: Sequence[dist.ProcessGroup | None] = (),
    counted_elsewhere: Collection[nn.Parameter] = (),
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients so that their 2-norm over all processes is at most ``max_norm``; gives the norm before that.

    As ``torch.nn.utils.clip_grad_norm_`` does for a model in one process, up to the rounding of the norm's sum. All
    processes of ``groups`` must call it, also those without parameters or gradients.

    Args:
        parameters: of this process; those that are there twice count once. Gradients may be FSDP2's: of a distributed
            tensor the norm over its shards is taken, over its own mesh.
        max_norm: at least 0.
        groups: over which parameters are spread, such as the pipeline's; one after the other. Not those that hold the
            same parameters (the data-parallel one). None is the group of all processes.
        counted_elsewhere: parameters of this process that another process of ``groups`` has, too, and counts (tied
            ones). Scaled, not counted.
        error_if_nonfinite: raise RuntimeError where the norm is infinite or not a number, on every process.
        foreach: as torch's; None has torch choose.

    Returns:
        The norm, a float32 scalar on the device of the first parameter, the same on every process.

    Raises InvalidArgument for a negative ``max_norm``.
    """
    if not max_norm >= 0:
        raise InvalidArgument(f"max_norm={max_norm}: it must be a number that is at least 0")
    unique = list({id(p): p for p in parameters}.values())
    left_out = set(map(id, counted_elsewhere))
    with_gradient = [p for p in unique if p.grad is not None]
    device = unique[0].device if unique else _device_for(groups)
    counted = [p.grad for p in with_gradient if p.grad is not None and id(p) not in left_out]
    squared = torch.zeros((), dtype=torch.float64, device=device)
    for norm in _norms(counted, foreach):
        squared += norm.to(squared).square()
    for group in groups:
        dist.all_reduce(squared, group=group)
    total_norm = squared.sqrt().float()
    if error_if_nonfinite and not bool(total_norm.isfinite()):
        raise RuntimeError(
            f"the norm of all gradients is {total_norm.item()}, so they cannot be clipped; with "
            f"error_if_nonfinite=False they are scaled nevertheless"
        )
    torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, total_norm, foreach)
    return total_norm


def _norms(gradients: Sequence[torch.Tensor], foreach: bool | None) -> Iterator[torch.Tensor]:
    """The norm of all plain ones, and of the distributed ones on each mesh."""
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    for some in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(some, foreach=foreach)
        yield norm.full_tensor() if isinstance(norm, DTensor) else norm


def _device_for(groups: Sequence[dist.ProcessGroup | None]) -> torch.device:
    """Where a process without parameters keeps what it reduces."""
    on_gpu = any("nccl" in dist.get_backend(group) for group in groups)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

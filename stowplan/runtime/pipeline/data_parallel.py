"""The gradients of a stage, averaged over the processes that have the same stage and other data.

Weight gradients may be computed long after backward, so nothing can be reduced in backward: whoever carries out the
schedule says when the last one is there. ``reduction_of`` gives what a stage needs:

    reduction.prepare(sync=True)        as a step begins
    reduction.accumulate()              after each microbatch's weight gradients
    reduction.reduce()                  after the last of them
    reduction.finish()                  as the step ends, before gradients are clipped
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stowplan.core.errors import MissingDependency, UnsupportedModel
from stowplan.core.units import MIB

__all__ = ["AllReduce", "Reduction", "ShardedStage", "reduction_of", "refuse_wrappers"]

# Smaller gradients are reduced together: a collective of that size takes longer than it takes to begin one.
_ALONE_BYTES = 1 * MIB


class Reduction(Protocol):
    """What is done for one stage on the data-parallel axis, in every step."""

    def prepare(self, sync: bool = True) -> None:
        """Begin a step. Without ``sync`` its gradients are only added up, to be reduced in a later step."""

    def accumulate(self) -> None:
        """A microbatch's weight gradients are there."""

    def reduce(self) -> None:
        """All gradients of the step are there: begin to reduce them."""

    def finish(self) -> None:
        """Wait for what was begun. Afterwards ``.grad`` is the mean over the processes."""


def reduction_of(stage: nn.Module, group: dist.ProcessGroup | None, but: Collection[nn.Parameter] = ()) -> Reduction:
    """How the gradients of ``stage`` are reduced: by FSDP2 where ``fully_shard`` was called, else over ``group``.

    ``group`` has the processes with the same stage; None is all of them. Whole parameters in ``but`` are somebody
    else's business: other stages have them, too. Raises UnsupportedModel for stages that are wrapped, or sharded in
    part.
    """
    refuse_wrappers(stage)
    if any(isinstance(module, FSDPModule) for module in stage.modules()):
        return ShardedStage(stage)
    return AllReduce(stage, group, but)


def refuse_wrappers(stage: nn.Module) -> None:
    """Raise UnsupportedModel if any part of the stage reduces gradients in backward, whether they are there or not."""
    for name, module in stage.named_modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise UnsupportedModel(
                f"{name or 'the stage'} is wrapped by {type(module).__name__}, which reduces gradients in backward: "
                f"before the deferred ones are there, and once for each microbatch. Take the wrapper off and give the "
                f"pipeline a process group of the data-parallel ranks, or call FSDP2's fully_shard on the stage."
            )


class AllReduce:
    """One mean over a process group for each parameter of a stage that is whole in every process.

    A parameter that has a gradient in some processes only counts as zero in the others; one that has none in any keeps
    none. All processes must give the same parameters in the same order.

    Args:
        stage: its trained parameters must be plain tensors, their gradients dense.
        group: the processes with the same stage; None is all of them.
        but: parameters that are left alone.
    """

    def __init__(
        self, stage: nn.Module, group: dist.ProcessGroup | None = None, but: Collection[nn.Parameter] = ()
    ) -> None:
        left_out = set(map(id, but))
        self._parameters = [p for p in stage.parameters() if p.requires_grad and id(p) not in left_out]
        self._group = group
        self._sync = True
        self._works: list[Any] = []
        self._together: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._missing: list[int] = []
        self._num_holders = torch.empty(0)
        for name, parameter in stage.named_parameters():
            if isinstance(parameter, DTensor):
                raise UnsupportedModel(
                    f"{name} is a distributed tensor, but fully_shard was not called on the stage: data parallelism "
                    f"is for whole parameters, or for those that fully_shard has sharded."
                )

    def prepare(self, sync: bool = True) -> None:
        self._sync = sync

    def accumulate(self) -> None:
        """Nothing is to be done: ``.grad`` adds up by itself."""

    @torch.no_grad()
    def reduce(self) -> None:
        """Begin to average. Gradients must not be read or written before ``finish``. Raises UnsupportedModel for sparse
        gradients.
        """
        if not self._sync or not self._parameters:
            return
        self._missing = [i for i, p in enumerate(self._parameters) if p.grad is None]
        for i in self._missing:
            self._parameters[i].grad = torch.zeros_like(self._parameters[i])
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if any(g.layout is not torch.strided for g in gradients):
            raise UnsupportedModel("a gradient is sparse, which is not reduced: use sparse=False in embeddings")
        holders = [float(i not in set(self._missing)) for i in range(len(self._parameters))]
        self._num_holders = torch.tensor(holders, device=self._parameters[0].device)
        self._begin(self._num_holders)
        torch._foreach_div_(gradients, dist.get_world_size(self._group))
        small: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for gradient, parameter in zip(gradients, self._parameters, strict=True):
            # By the parameter: all processes must choose the same.
            if parameter.nbytes >= _ALONE_BYTES and parameter.is_contiguous():
                self._begin(gradient)
            else:
                small.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for many in small.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in many])
            self._together.append((flat, many))
            self._begin(flat)

    def _begin(self, tensor: torch.Tensor) -> None:
        self._works.append(dist.all_reduce(tensor, group=self._group, async_op=True))

    @torch.no_grad()
    def finish(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()
        together, self._together = self._together, []
        for flat, many in together:
            for part, gradient in zip(flat.split([g.numel() for g in many]), many, strict=True):
                gradient.copy_(part.view(gradient.shape))
        missing, self._missing = self._missing, []
        if missing and works:
            num_holders = self._num_holders.tolist()
            for i in missing:
                if not num_holders[i]:
                    self._parameters[i].grad = None


class ShardedStage:
    """A stage on which FSDP2's ``fully_shard`` was called; FSDP2 gathers its parameters and reduces its gradients.

    While microbatches are under way FSDP2 adds gradients up; ``reduce`` has it do what it would do after a backward.
    With ``reshard_after_forward=False`` parameters stay gathered from the first forward to ``reduce``.

    Note: by hand
        FSDP2 has no public call for what follows a backward, and a weight gradient that comes later is not noticed.
        torch's own pipelines call private methods of it (``torch/distributed/pipelining/stage.py``,
        ``_PipelineStage.perform_reduce_grad``). Of these the final callback of a root is enough: it does for every
        group of parameters what its backward has not done, and waits.

    Args:
        stage: every trained parameter must be in a module that ``fully_shard`` was called on. Raises UnsupportedModel
            otherwise, and MissingDependency with a torch whose FSDP2 cannot be called by hand.
    """

    def __init__(self, stage: nn.Module) -> None:
        self._roots = list(_sharded_roots(stage, ""))
        self._callbacks = [_final_callback(root) for root in self._roots]
        self._sync = True

    def prepare(self, sync: bool = True) -> None:
        self._sync = sync
        self._set(reduces=False)

    def accumulate(self) -> None:
        """Have FSDP2 add the gradients up in the dtype that it reduces them in (``MixedPrecisionPolicy``)."""
        for callback in self._callbacks:
            callback()

    def reduce(self) -> None:
        """Reduce and scatter gradients, and give gathered parameters back; on a GPU beside what comes next."""
        if self._sync:
            self._set(reduces=True)
        for callback in self._callbacks:
            callback()

    def finish(self) -> None:
        """Nothing is to be done: the current stream waits in ``reduce``."""

    def _set(self, reduces: bool) -> None:
        for root in self._roots:
            root.set_is_last_backward(reduces)
            root.set_reshard_after_backward(reduces)
            root.set_requires_gradient_sync(reduces)


def _sharded_roots(module: nn.Module, name: str) -> Iterator[FSDPModule]:
    """The outermost modules that ``fully_shard`` was called on; refuses trained parameters outside of them."""
    if isinstance(module, FSDPModule):
        yield module
        return
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            raise UnsupportedModel(
                f"fully_shard was called on parts of the stage, but {name}{own} is outside of them, so that nobody "
                f"would reduce its gradient: call fully_shard on the stage as a whole, too."
            )
    for child, submodule in module.named_children():
        yield from _sharded_roots(submodule, f"{name}{child}.")


def _final_callback(root: Any) -> Any:
    state = root._get_fsdp_state() if hasattr(root, "_get_fsdp_state") else None
    callback = getattr(state, "_root_post_backward_final_callback", None)
    if callback is None:
        raise MissingDependency(
            f"FSDP2 of torch {torch.__version__} cannot be told to reduce gradients after backward: pipelines with "
            f"fully_shard are tested with torch 2.13. Install that, or leave fully_shard out."
        )
    return callback

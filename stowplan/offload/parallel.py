"""What data parallelism puts around a model: DistributedDataParallel, FSDP2's ``fully_shard``, distributed tensors.

Note: parameters under FSDP2
    Between steps a sharded module's parameters are distributed tensors; while its forward and backward run they are
    plain ones, gathered before and given back after, by hooks around ``forward``. So what stands in ``forward`` meets
    plain parameters, as the op tape does; and what is counted between steps counts this process's part. FSDP2 shrinks
    the storages of gathered parameters to nothing when it gives them back, so a call that holds such a parameter for
    its replay keeps no bytes alive, and it is whole again when backward reaches the block.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stowplan.core.errors import UnsupportedModel

__all__ = [
    "bucket_bytes",
    "class_name",
    "inner_model",
    "is_sharded",
    "keeps_gradients",
    "like_distributed",
    "local_part",
    "num_processes",
    "refuse_fsdp1",
    "refuse_sharded_inside",
]


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``DistributedDataParallel``; any other model itself."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def bucket_bytes(model: torch.nn.Module) -> int:
    """Bytes that ``DistributedDataParallel`` holds beside the model, all the time: a copy of all gradients."""
    if not isinstance(model, DistributedDataParallel) or model.gradient_as_bucket_view:
        return 0
    left_out = model.parameters_to_ignore
    return sum(p.nbytes for name, p in model.module.named_parameters() if p.requires_grad and name not in left_out)


def keeps_gradients(model: torch.nn.Module) -> bool:
    """Are the gradients views of ``DistributedDataParallel``'s buckets, which are never freed?"""
    return isinstance(model, DistributedDataParallel) and bool(model.gradient_as_bucket_view)


def is_sharded(module: torch.nn.Module) -> bool:
    """Has ``fully_shard`` been called on the module itself?"""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported, where anybody uses it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def class_name(module: torch.nn.Module) -> str:
    """The name of the module's class; for what ``fully_shard`` was called on, of the class that it had before."""
    return (type(module).__bases__[1] if is_sharded(module) else type(module)).__name__


def local_part(tensor: Any) -> Any:
    """The part of this process of a distributed tensor; anything else itself."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return tensor._local_tensor
    return tensor


def like_distributed(part: torch.Tensor, whole: Any) -> Any:
    """``part`` as this process's part of a distributed tensor like ``whole``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def num_processes() -> int:
    """Processes of this training job, 1 where ``torch.distributed`` is not used."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_fsdp1(model: torch.nn.Module) -> None:
    """Raise UnsupportedModel if any part of the model is wrapped by the first FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModel(
            f"{type(model).__name__} is sharded by FullyShardedDataParallel, whose flat parameters the op tape cannot "
            f"follow: use FSDP2, torch.distributed.fsdp.fully_shard (Accelerate: fsdp_version=2)."
        )


def refuse_sharded_inside(name: str, block: torch.nn.Module) -> None:
    """Raise UnsupportedModel if ``fully_shard`` was called on a part of block ``name``.

    Its parameters are gathered and given back while the block runs; the storage that autograd saves is emptied then.
    """
    if any(is_sharded(module) for module in block.modules() if module is not block):
        raise UnsupportedModel(
            f"fully_shard was called on parts of {name}, so that parameters come and go while it runs, which a plan "
            f"cannot follow: call fully_shard on {name} as a whole, or leave it out of the plan (blocks=)."
        )

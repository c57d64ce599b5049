"""What is at odds with a plan and shows only while a block runs: others that checkpoint, compile or hook it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from stowplan.core.errors import UnsupportedModel

__all__ = ["refuse_callers", "refuse_checkpoint_inside", "refuse_hooks", "refuse_switched_on"]

_CHECKPOINTS = frozenset(
    {
        "torch.utils.checkpoint",
        "deepspeed.runtime.activation_checkpointing.checkpointing",
        "fairscale.nn.checkpoint.checkpoint_activations",
    }
)
# What torch.compile puts in front of a function that it has compiled: module and function.
_COMPILED = ("torch._dynamo.eval_frame", "compile_wrapper")


def refuse_hooks(name: str) -> None:
    """Raise UnsupportedModel if somebody else's hooks for saved tensors are around this call of block ``name``.

    A plan's own hooks would come first, and the others would not see what the block saves.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return
    module = str(hooks[0].__module__)
    if module in _CHECKPOINTS:
        raise _checkpointed(name)
    if not module.startswith("stowplan."):
        raise UnsupportedModel(
            f"{name} is called under torch.autograd.graph.saved_tensors_hooks of {module}, which would not see what "
            f"the block saves: a plan decides on that. Take the hooks away from around the model, or leave this block "
            f"out of the plan (blocks=)."
        )


def refuse_switched_on(name: str, block: torch.nn.Module) -> None:
    """Raise UnsupportedModel if Hugging Face's checkpointing was switched on in block ``name`` under a plan."""
    if block.training and block.__dict__.get("gradient_checkpointing") is True:
        raise _checkpointed(name)


def refuse_callers(name: str) -> None:
    """Raise UnsupportedModel if block ``name`` is being called by a checkpoint or by what torch.compile compiled."""
    refuse_hooks(name)
    for module, function in _callers():
        if module in _CHECKPOINTS:
            raise _checkpointed(name)
        if (module, function) == _COMPILED:
            raise UnsupportedModel(
                f"{name} is called by code that torch.compile compiled, which traces other ops than it runs: compile "
                f"neither the model nor the step around planned blocks (remove torch.compile or .compile())."
            )


def refuse_checkpoint_inside(name: str) -> None:
    """Raise UnsupportedModel if the op that is being recorded in block ``name`` is under a checkpoint in it."""
    for module, _ in _callers():
        if module == "stowplan.offload.recording":
            return
        if module in _CHECKPOINTS:
            raise UnsupportedModel(
                f"{name} checkpoints a part of itself ({module}), which hides from a plan what it saves; stowplan "
                f"decides what to recompute: call the part without the checkpoint (Hugging Face models: "
                f"gradient_checkpointing_disable())."
            )


def _checkpointed(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} is called by a checkpoint (torch.utils.checkpoint or its like), which runs it again in backward; "
        f"stowplan decides what to recompute: call the block without the checkpoint (Hugging Face models: "
        f"gradient_checkpointing_disable(); Trainer: leave gradient_checkpointing=True and "
        f"activation_checkpointing=True out of TrainingArguments), or leave it out of the plan (blocks=)."
    )


def _callers() -> Iterator[tuple[str, str]]:
    """Module and function of every Python frame, from the inside out."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]

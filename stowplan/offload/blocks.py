"""Finding the repeated blocks of a model, and refusing what cannot be planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stowplan.core.errors import InvalidArgument, UnsupportedModel

__all__ = ["Block", "find_blocks", "refuse_unsupported"]

Blocks = str | Sequence[torch.nn.Module] | None


class Block(NamedTuple):
    """A repeated module and its dotted name in the model."""

    name: str
    module: torch.nn.Module


def find_blocks(model: torch.nn.Module, blocks: Blocks = None) -> list[Block]:
    """The repeated blocks: the ModuleList or Sequential of like modules that holds the most parameters.

    Args:
        blocks: the dotted name of the container (``"model.layers"``), or the modules themselves; None to find them.

    Raises:
        InvalidArgument: the name or the modules are not in the model.
        UnsupportedModel: nothing in the model repeats.
    """
    if blocks is None:
        return _largest_stack(model)
    if isinstance(blocks, str):
        return _named_stack(model, blocks)
    names = {id(module): name for name, module in model.named_modules()}
    if len({id(module) for module in blocks}) != len(blocks):
        raise InvalidArgument("blocks= names a module twice; give each block once.")
    nested = [names[id(m)] for m in blocks for outer in blocks if m is not outer and m in set(outer.modules())]
    if nested:
        raise InvalidArgument(
            f"blocks= names {nested[0]}, which is inside another of the blocks; give the outer ones only."
        )
    missing = [type(module).__name__ for module in blocks if id(module) not in names]
    if missing or not blocks:
        raise InvalidArgument(
            f"blocks= names {missing[0] if missing else 'nothing'}, which is not in the model; give modules of the "
            f"model, or the dotted name of their container."
        )
    return [Block(names[id(module)], module) for module in blocks]


def _named_stack(model: torch.nn.Module, name: str) -> list[Block]:
    try:
        container = model.get_submodule(name)
    except AttributeError:
        containers = [stack for stack, _ in _stacks(model)]
        raise InvalidArgument(
            f"blocks={name!r} is not in the model; containers of repeated modules: {', '.join(containers) or 'none'}."
        ) from None
    prefix = f"{name}." if name else ""
    children = [Block(prefix + child, module) for child, module in container.named_children()]
    if not children:
        raise InvalidArgument(f"blocks={name!r} has no children; name a container of blocks.")
    return children


def _stacks(model: torch.nn.Module) -> list[tuple[str, list[Block]]]:
    """Containers in which at least two children are of one class, with those children."""
    stacks = []
    for name, container in model.named_modules():
        if not isinstance(container, torch.nn.ModuleList | torch.nn.Sequential):
            continue
        children = list(container.named_children())
        commonest = Counter(type(module) for _, module in children).most_common(1)
        if commonest and commonest[0][1] >= 2:
            prefix = f"{name}." if name else ""
            stacks.append((name, [Block(prefix + child, m) for child, m in children if type(m) is commonest[0][0]]))
    return stacks


def _largest_stack(model: torch.nn.Module) -> list[Block]:
    stacks = _stacks(model)
    if not stacks:
        raise UnsupportedModel(
            f"{type(model).__name__} has no ModuleList or Sequential of like modules to plan; name the blocks with "
            f'blocks="dotted.name" or blocks=[modules].'
        )
    return max((blocks for _, blocks in stacks), key=_num_parameters)


def _num_parameters(blocks: list[Block]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.module.parameters())


def refuse_unsupported(model: torch.nn.Module, blocks: Sequence[Block]) -> None:
    """Raise UnsupportedModel for what the op tape cannot follow: compiled models and blocks, models that checkpoint
    themselves, models that are spread over devices. What shows only in a call is refused there (``refusals``).
    """
    if isinstance(model, torch.nn.DataParallel):
        raise UnsupportedModel(
            "DataParallel copies its model to other devices at every call; stowplan plans for one device a process: "
            "use DistributedDataParallel, and plan the model inside it."
        )
    if _is_compiled(model):
        raise UnsupportedModel(
            f"{type(model).__name__} is compiled by torch.compile, which traces other ops than it runs. Plan the "
            f"uncompiled model (remove torch.compile or .compile(), or pass the module that it was given), and train "
            f"that one."
        )
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise UnsupportedModel(
            f"{type(model).__name__} has gradient checkpointing on; stowplan decides what to recompute itself: call "
            f"model.gradient_checkpointing_disable() first."
        )
    kinds = {(name.rpartition(".")[0], type(block)) for name, block in blocks}
    siblings = [  # one that torch.compile wrapped is none of the blocks, but was meant to be
        Block(name, module)
        for name, module in model.named_modules()
        if (name.rpartition(".")[0], type(_original(module))) in kinds
    ]
    for name, block in dict.fromkeys((*blocks, *siblings)):
        if any(_is_compiled(module) for module in block.modules()):
            raise UnsupportedModel(
                f"{name} is compiled by torch.compile: its kernels bypass the op tape. Plan the uncompiled model "
                f"(remove .compile() from the blocks)."
            )


def _original(module: torch.nn.Module) -> Any:
    """What ``torch.compile(module)`` was given; the module itself otherwise."""
    return getattr(module, "_orig_mod", module)


def _is_compiled(module: torch.nn.Module) -> bool:
    """By ``module.compile()``, ``torch.compile(module)`` or ``torch.compile`` of its forward."""
    own = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    return own or hasattr(module.forward, "_torchdynamo_orig_callable")

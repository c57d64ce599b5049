"""Finding the repeated blocks of a model, and refusing what cannot be planned."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.offload.parallel import refuse_fsdp1, refuse_sharded_inside

__all__ = ["Block", "find_blocks", "likeness", "refuse_compiled", "refuse_unsupported"]

Blocks = str | Sequence[str | torch.nn.Module] | None

_LIKE_SHARE = 0.5  # of the parameters' shapes that two blocks of a stack have in common
_NOTABLE_SHARE = 0.1  # of the largest stack's parameters that a stack of another kind has


class Block(NamedTuple):
    """A repeated module and its dotted name in the model."""

    name: str
    module: torch.nn.Module


def find_blocks(model: torch.nn.Module, blocks: Blocks = None) -> list[Block]:
    """The repeated blocks, of all stacks: an encoder's and its decoder's, those of each stage of a vision model.

    A stack is a ModuleList or Sequential with at least two children that are alike (one class, mostly equal shapes of
    parameters); its blocks are all of its children that have parameters. Stacks inside blocks do not count, and
    neither do small ones of another kind than the largest (the layers of a head, say).

    Args:
        blocks: the dotted name of a container (``"model.layers"``), several of them, or the modules themselves; None
            to find them.

    Raises:
        InvalidArgument: a name or module is not in the model.
        UnsupportedModel: nothing in the model repeats, or its parameters were flattened by the first FSDP.
    """
    refuse_fsdp1(model)
    if blocks is None:
        return _main_stacks(model)
    if isinstance(blocks, str):
        return _named_stack(model, blocks)
    names = {id(module): name for name, module in model.named_modules()}
    given = [block for item in blocks for block in (_named_stack(model, item) if isinstance(item, str) else [item])]
    modules = [item.module if isinstance(item, Block) else item for item in given]
    if len({id(module) for module in modules}) != len(modules):
        raise InvalidArgument("blocks= names a module twice; give each block once.")
    nested = [names[id(m)] for m in modules for outer in modules if m is not outer and m in set(outer.modules())]
    if nested:
        raise InvalidArgument(
            f"blocks= names {nested[0]}, which is inside another of the blocks; give the outer ones only."
        )
    missing = [type(module).__name__ for module in modules if id(module) not in names]
    if missing or not modules:
        raise InvalidArgument(
            f"blocks= names {missing[0] if missing else 'nothing'}, which is not in the model; give modules of the "
            f"model, or the dotted names of their containers."
        )
    return [Block(names[id(module)], module) for module in modules]


def _named_stack(model: torch.nn.Module, name: str) -> list[Block]:
    try:
        container = model.get_submodule(name)
    except AttributeError:
        containers = [stack for stack, _ in _stacks(model, "")]
        raise InvalidArgument(
            f"blocks={name!r} is not in the model; containers of repeated modules: {', '.join(containers) or 'none'}."
        ) from None
    prefix = f"{name}." if name else ""
    children = [Block(prefix + child, module) for child, module in container.named_children()]
    if not children:
        raise InvalidArgument(f"blocks={name!r} has no children; name a container of blocks.")
    return children


def _stacks(module: torch.nn.Module, name: str) -> Iterator[tuple[str, list[Block]]]:
    """Containers of like modules with those of their children that have parameters; the outermost ones only."""
    prefix = f"{name}." if name else ""
    children = [Block(prefix + child, m) for child, m in module.named_children()]
    if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential):
        shapes = [_shapes(child.module) for child in children]
        pairs = itertools.combinations(zip(children, shapes, strict=True), 2)
        if any(type(a.module) is type(b.module) and _alike(ours, theirs) for (a, ours), (b, theirs) in pairs):
            yield name, [child for child, own in zip(children, shapes, strict=True) if own]
            return
    for child in children:
        yield from _stacks(child.module, child.name)


def _shapes(module: torch.nn.Module) -> Counter[torch.Size]:
    return Counter(parameter.shape for parameter in module.parameters())


def _alike(ours: Counter[torch.Size], theirs: Counter[torch.Size]) -> bool:
    """Do two modules have most shapes of parameters in common? Stages of a vision model do not: their widths differ."""
    return bool(ours) and (ours & theirs).total() > _LIKE_SHARE * max(ours.total(), theirs.total())


def _main_stacks(model: torch.nn.Module) -> list[Block]:
    stacks = [blocks for _, blocks in _stacks(model, "")]
    if not stacks:
        raise UnsupportedModel(
            f"{type(model).__name__} has no ModuleList or Sequential of like modules to plan; name the blocks with "
            f'blocks="dotted.name" or blocks=[modules].'
        )
    largest = max(stacks, key=_num_parameters)
    kinds = {type(block.module) for block in largest}
    least = _NOTABLE_SHARE * _num_parameters(largest)
    return [
        block
        for stack in stacks
        if _num_parameters(stack) >= least or kinds & {type(block.module) for block in stack}
        for block in stack
    ]


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
    refuse_fsdp1(model)
    if _is_compiled(model):
        raise UnsupportedModel(
            f"{type(model).__name__} is compiled by torch.compile, which traces other ops than it runs. Plan the "
            f"uncompiled model (remove torch.compile or .compile(), or pass the module that it was given), and train "
            f"that one."
        )
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise UnsupportedModel(
            f"{type(model).__name__} has gradient checkpointing on; stowplan decides what to recompute itself: call "
            f"model.gradient_checkpointing_disable() first (Trainer: leave gradient_checkpointing=True and "
            f"activation_checkpointing=True out of TrainingArguments)."
        )
    for name, block in blocks:
        refuse_sharded_inside(name, block)
        _refuse_flex_attention(name, block)
    kinds = {(name.rpartition(".")[0], type(block)) for name, block in blocks}
    siblings = [  # one that torch.compile wrapped is none of the blocks, but was meant to be
        Block(name, module)
        for name, module in model.named_modules()
        if (name.rpartition(".")[0], type(_original(module))) in kinds
    ]
    for name, block in dict.fromkeys((*blocks, *siblings)):
        refuse_compiled(name, block)


def _refuse_flex_attention(name: str, block: torch.nn.Module) -> None:
    """Raise UnsupportedModel if Hugging Face's block ``name`` is set to FlexAttention."""
    for module in block.modules():
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "flex_attention":
            raise UnsupportedModel(
                f"{name} computes FlexAttention, which torch.compile compiles: while a block is recorded, torch would "
                f"run another kernel than in training. Load the model with attn_implementation='sdpa' or "
                f"'flash_attention_2'."
            )


def refuse_compiled(name: str, block: torch.nn.Module) -> None:
    """Raise UnsupportedModel if block ``name``, or a part of it, is compiled."""
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


_POSITION_NAMES = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "idx", "index"})


def likeness(module: torch.nn.Module) -> tuple[object, ...]:
    """What blocks must have in common to count as doing the same: classes, parameters, numbers; not their position.

    It serves planning alone: the engine records and proves every block by itself.
    """
    parts: list[object] = []
    for name, child in module.named_modules():
        own = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in child.named_parameters(recurse=False)]
        numbers = [
            (key, value)
            for key, value in child.__dict__.items()
            if isinstance(value, bool | int | float | str) and key not in _POSITION_NAMES
        ]
        parts.append((name, type(child), tuple(own), tuple(sorted(numbers))))
    return tuple(parts)

"""Cutting a model, or a sequence of modules, into the stages of a pipeline, and a batch into microbatches; one process.

No process groups here: a stage takes a tensor and gives one, whoever carries them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.offload.arguments import flatten, map_tree
from stowplan.offload.blocks import find_blocks, refuse_compiled
from stowplan.offload.parallel import is_sharded, refuse_fsdp1
from stowplan.runtime.pipeline.layout import examine
from stowplan.runtime.pipeline.model_stage import ModelStage, refuse_outputs_of_all_layers
from stowplan.runtime.pipeline.stage import LossFunction, SequenceStage, Stage, Tied

__all__ = ["Stage", "divide", "microbatches", "split", "tie"]


def split(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    num_stages: int,
    *,
    keep: Collection[int] | None = None,
    layers: Sequence[int] | None = None,
    loss_fn: LossFunction | None = None,
) -> dict[int, Stage]:
    """Stages of a Hugging Face causal language model, or of a sequence of modules (``torch.nn.Sequential`` too).

    Args:
        keep: the stages to build, all by default. They refer to nothing of the other stages: once the caller lets go of
            the model, the memory of those is free.
        layers: number of layers (modules of the sequence) of each stage; by default as even as possible, fewer on the
            first and last stage, which have the embedding and the head, too.
        loss_fn: ``loss_fn(output, inputs)``, a scalar, instead of the model's own loss; for a sequence of modules
            ``loss_fn(output, target)``.

    The model itself is not changed. Stages share its parameters; those of one process share tied ones.

    Raises:
        InvalidArgument: more stages than layers; ``layers`` or ``keep`` that do not fit.
        UnsupportedModel: the model cannot be cut into stages, or would compute something else in them.
    """
    if isinstance(model, torch.nn.Module) and not isinstance(model, torch.nn.Sequential | torch.nn.ModuleList):
        _refuse(model)
        names = _layer_names(model)
        _refuse_checkpoints_around_layers(model, names)
        bounds = divide(len(names), num_stages, layers)
        layout = examine(model, names, bounds)
        tied = _tied(model, layout.stages)
        return {k: ModelStage(model, layout, k, tied, loss_fn) for k in _kept(keep, num_stages)}
    modules: dict[str, Any] = {str(position): module for position, module in enumerate(model)}
    if isinstance(model, torch.nn.Module):  # Sequential's modules may have names
        modules = dict(model._modules)
    whole = torch.nn.Module()
    for name, module in modules.items():
        whole.add_module(name, module)
    _refuse(whole)
    bounds = divide(len(modules), num_stages, layers)
    groups = [dict(list(modules.items())[bounds[k] : bounds[k + 1]]) for k in range(num_stages)]
    stages = {
        f"{name}.{parameter}": frozenset({k})
        for k, group in enumerate(groups)
        for name, module in group.items()
        for parameter, _ in module.named_parameters(remove_duplicate=False)
    }
    tied = _tied(whole, stages)
    return {k: SequenceStage(groups[k], k, num_stages, tied, loss_fn) for k in _kept(keep, num_stages)}


def divide(num_layers: int, num_stages: int, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The first layer of each stage, and at the end the number of layers.

    Args:
        layers: of each stage, one or more; None for as even as possible, with what remains in the middle first, then on
            the first stage.

    Raises:
        InvalidArgument: more stages than layers, or ``layers`` that are not all of them.
    """
    if not 1 <= num_stages <= num_layers:
        raise InvalidArgument(
            f"num_stages={num_stages}, and there are {num_layers} layers; give 1 to {num_layers} stages: each has a "
            f"layer at least."
        )
    if layers is None:
        least, rest = divmod(num_layers, num_stages)
        more = [*range(1, num_stages - 1), 0][:rest]
        layers = [least + (stage in more) for stage in range(num_stages)]
    elif len(layers) != num_stages or min(layers) < 1 or sum(layers) != num_layers:
        raise InvalidArgument(
            f"layers={list(layers)}, {sum(layers)} in {len(layers)} stages; give {num_stages} numbers, each 1 or more, "
            f"that add up to {num_layers}."
        )
    return tuple(sum(layers[:stage]) for stage in range(num_stages + 1))


def microbatches(batch: Any, count: int) -> list[Any]:
    """``count`` equal parts of a batch along its tensors' first dimension, as views; anything else is in each part.

    Args:
        batch: a tensor, or tuples, lists and mappings of tensors, numbers, anything.

    Raises:
        InvalidArgument: the tensors have no first dimension in common, or ``count`` does not divide it.
    """
    tensors = [leaf for leaf in flatten((batch,), {}) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    sizes = sorted({len(tensor) for tensor in tensors})
    if len(sizes) != 1:
        raise InvalidArgument(
            f"the batch's tensors have {sizes or 'no'} samples (their first dimension); give all of them one number of "
            f"samples (expand() repeats without memory)."
        )
    if count < 1 or sizes[0] % count:
        allowed = [n for n in range(1, sizes[0] + 1) if sizes[0] % n == 0]
        raise InvalidArgument(
            f"a batch of {sizes[0]} samples has no {count} equal microbatches; give one of {allowed}, or a batch of a "
            f"multiple of {max(count, 1)} samples (drop_last=True)."
        )
    size = sizes[0] // count

    def part(index: int) -> Any:
        def cut(leaf: Any) -> Any:
            return leaf.narrow(0, index * size, size) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf

        return map_tree(batch, cut)

    return [part(index) for index in range(count)]


def tie(stages: Mapping[int, Stage]) -> None:
    """Let stages of one process share tied parameters again, after what makes new ones (``to_empty`` from meta)."""
    for holders in next(iter(stages.values())).tied.values():
        here = [(stages[k], name) for k, name in holders.items() if k in stages]
        for stage, name in here[1:]:
            owner, _, own = name.rpartition(".")
            _module_of(stage, owner)._parameters[own] = here[0][0].get_parameter(here[0][1])


def _module_of(stage: Stage, name: str) -> torch.nn.Module:
    return stage.get_submodule(name) if name else stage


def _kept(keep: Collection[int] | None, num_stages: int) -> list[int]:
    kept = sorted(set(range(num_stages) if keep is None else keep))
    if not kept or kept[0] < 0 or kept[-1] >= num_stages:
        raise InvalidArgument(f"keep={kept}; give stages from 0 to {num_stages - 1}, one at least.")
    return kept


def _tied(model: torch.nn.Module, stages: Mapping[str, frozenset[int]]) -> Tied:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    holders = [(aliases, sorted({k for name in aliases for k in stages[name]})) for aliases in names.values()]
    return {
        aliases[0]: {k: next(name for name in aliases if k in stages[name]) for k in having}
        for aliases, having in holders
        if len(having) > 1
    }


def _layer_names(model: torch.nn.Module) -> list[str]:
    """Of the one stack's layers, all of them."""
    try:
        blocks = find_blocks(model)
    except UnsupportedModel:
        raise UnsupportedModel(
            f"{type(model).__name__} has no ModuleList or Sequential of like layers to cut at: give split() a sequence "
            f"of modules that take and give one tensor."
        ) from None
    containers = list(dict.fromkeys(block.name.rpartition(".")[0] for block in blocks))
    if len(containers) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has several stacks of layers ({', '.join(containers)}), of which a pipeline can "
            f"follow one: train it without a pipeline, or give split() a sequence of modules."
        )
    return [f"{containers[0]}.{child}" for child in model.get_submodule(containers[0])._modules]


def _refuse(model: torch.nn.Module) -> None:
    """Raise UnsupportedModel for what is around the model, or set in it, and at odds with stages."""
    refuse_fsdp1(model)
    for name, module in model.named_modules():
        called = name or type(module).__name__
        if isinstance(module, DistributedDataParallel | torch.nn.DataParallel):
            raise UnsupportedModel(
                f"{called} is wrapped by {type(module).__name__}, which would reduce gradients before a split backward "
                f"pass has all of them: split the model inside (.module), and apply data parallelism to its stages."
            )
        if is_sharded(module):
            raise UnsupportedModel(
                f"fully_shard was called on {called}, whose parameters come and go with the whole model's forward: "
                f"split the model first, then call fully_shard on the layers of its stages."
            )
    refuse_compiled(type(model).__name__, model)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has parameters on {', '.join(sorted(map(str, devices)))}: split it on one device "
            f"(the meta device, say), and move its stages."
        )
    for config in _configs(model):
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"{type(model).__name__} is an encoder and decoder, whose layers take more than one hidden state: "
                f"train it without a pipeline, or give split() a sequence of modules."
            )
        refuse_outputs_of_all_layers(type(model).__name__, config.to_dict())


def _configs(model: torch.nn.Module) -> Iterator[Any]:
    configs = (module.__dict__.get("config") for module in model.modules())
    return (config for config in configs if hasattr(config, "to_dict"))


def _refuse_checkpoints_around_layers(model: torch.nn.Module, layers: Sequence[str]) -> None:
    """Raise UnsupportedModel if checkpoints are on, and not those that layers put around their own forward."""
    if all(hasattr(model.get_submodule(layer), "gradient_checkpointing") for layer in layers):
        return
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            raise UnsupportedModel(
                f"{name or type(module).__name__} puts gradient checkpoints around its layers from outside, and a "
                f"stage ends within them: call model.gradient_checkpointing_disable()."
            )

"""Models and optimizers by name: the names of torch.distributed.checkpoint without its copies and side effects.

``torch.distributed.checkpoint.state_dict.get_state_dict`` steps an optimizer that has no states yet, which would make a
snapshot before the first step change the training. So modules are walked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stowplan.core.errors import InvalidArgument
from stowplan.runtime.pipeline.pipeline import Pipeline
from stowplan.runtime.snapshot.state.engines import EngineState, is_engine, is_partitioned

__all__ = ["Models", "models_of", "named", "parameter_groups"]

_WRAPPERS = (DistributedDataParallel, DataParallel)
_HIDDEN = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile, and of torch's checkpointing as a module
EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True)
class Models:
    """All models of a training, by the names of what is in them.

    Attributes:
        tensors: parameters and persistent buffers; tied ones under each of their names.
        stateful: modules with an extra state (``get_extra_state``), and what DeepSpeed engines have beside modules.
        names: the first name of each parameter.
        replicas: the ranks that have the same of a parameter, of those of DistributedDataParallel.
    """

    tensors: dict[str, torch.Tensor]
    stateful: dict[str, nn.Module | EngineState]
    names: dict[nn.Parameter, str]
    replicas: dict[nn.Parameter, tuple[int, ...]]

    @property
    def engines(self) -> list[EngineState]:
        return [each for each in self.stateful.values() if isinstance(each, EngineState)]


def named(given: Any, kind: str) -> dict[str, Any]:
    """One thing under the empty name, or several under their own (a mapping) or their number (a sequence)."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        for name in given:
            if not isinstance(name, str) or not name:
                raise InvalidArgument(f"{kind}={{{name!r}: …}}: give each a name, a text that is not empty.")
        return dict(given)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | nn.Module):
        return {str(number): thing for number, thing in enumerate(given)}
    return {"": given}


def models_of(model: Any) -> Models:
    """Everything persistent in one or more modules and pipelines; FSDP2's parameters are sharded for it.

    Raises:
        InvalidArgument: something else was given, or FSDP1, or two tensors have one name.
    """
    models = Models({}, {}, {}, {})
    for name, part in named(model, "model").items():
        roots = list(part.stages.values()) if isinstance(part, Pipeline) else [part]
        for root in roots:
            if not isinstance(root, nn.Module):
                raise InvalidArgument(
                    f"model is a {type(root).__name__}: give a torch.nn.Module (a DeepSpeed engine is one), a "
                    f"stowplan.Pipeline, or a dict of them."
                )
            path = f"{name}." if name else ""
            if is_engine(root):
                models.stateful[f"{path}deepspeed.{EXTRA_STATE}"] = EngineState(root)
            for prefix, module in _walk(root.get_submodule("module") if is_engine(root) else root, path):
                _add(models, prefix, module)
                if isinstance(module, DistributedDataParallel):
                    ranks = tuple(dist.get_process_group_ranks(module.process_group))
                    ignored = module.parameters_to_ignore
                    own = module.module.named_parameters(remove_duplicate=False)
                    models.replicas.update({parameter: ranks for name, parameter in own if name not in ignored})
    return models


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, FullyShardedDataParallel):
        raise InvalidArgument(
            f"{prefix or 'the model'} is wrapped by FSDP1 (FullyShardedDataParallel), which snapshots do not know. Use "
            f"FSDP2, torch.distributed.fsdp.fully_shard."
        )
    if isinstance(module, FSDPModule):
        module.reshard()
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            hidden = isinstance(module, _WRAPPERS) or name in _HIDDEN
            yield from _walk(child, prefix if hidden else f"{prefix}{name}.")


def _add(models: Models, prefix: str, module: nn.Module) -> None:
    passing = module._non_persistent_buffers_set
    own = [(name, tensor) for name, tensor in module._buffers.items() if name not in passing]
    for name, tensor in (*module._parameters.items(), *own):
        if tensor is None or is_partitioned(tensor):
            continue
        path = prefix + name
        if models.tensors.setdefault(path, tensor) is not tensor:
            raise InvalidArgument(
                f"two tensors are named {path!r}. Give models as a dict, each under a name of its own."
            )
        if isinstance(tensor, nn.Parameter):
            models.names.setdefault(tensor, path)
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        models.stateful[prefix + EXTRA_STATE] = module


def parameter_groups(optimizers: Mapping[str, Any], models: Models) -> list[tuple[Any, dict[str, Any], list[str]]]:
    """All parameter groups of all optimizers in order: optimizer, group, its parameters' names.

    Raises:
        InvalidArgument: no optimizer, or an engine's is missing, or it has parameters or states that are of no model.
    """
    groups: list[tuple[Any, dict[str, Any], list[str]]] = []
    if any(engine.needs(optimizers) for engine in models.engines):
        raise InvalidArgument("the states of a DeepSpeed engine without ZeRO are missing: pass its optimizer, too.")
    for label, optimizer in optimizers.items():
        if any(engine.owns(optimizer) for engine in models.engines):
            continue
        of = f"optimizer {label!r}" if label else "the optimizer"
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidArgument(f"{of} is a {type(optimizer).__name__}: give a torch.optim.Optimizer.")
        for index, group in enumerate(optimizer.param_groups):
            unknown = [tuple(parameter.shape) for parameter in group["params"] if parameter not in models.names]
            if unknown:
                raise InvalidArgument(
                    f"group {index} of {of} has {len(unknown)} parameters that are in no model, the first of shape "
                    f"{unknown[0]}. Pass every model whose parameters it has, and build it after fully_shard."
                )
            groups.append((optimizer, group, [models.names[parameter] for parameter in group["params"]]))
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        strange = [key for key in optimizer.state if key not in known]
        if strange:
            raise InvalidArgument(
                f"{of} keeps a state for {str(strange[0])[:60]!r}, which is none of its parameters. Pass that state as "
                f"an extra with state_dict and load_state_dict."
            )
    return groups

"""DeepSpeed engines in snapshots: what this process has of a training, which is in no module and no torch optimizer.

That are ZeRO's partitions of parameters (stage 3), of their fp32 copies and of the optimizer's states, its options, the
loss scaler, the scheduler and counters. They are taken and put back where they lie: a state dict of DeepSpeed's own has
objects that only pickle can hold, and copies. DeepSpeed is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from stowplan.core.errors import InvalidArgument, SnapshotMismatch

__all__ = ["EngineState", "is_engine", "is_partitioned"]

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_MASTERS = {"single_partition_of_fp32_groups": (1, 2), "fp32_partitioned_groups_flat": (3,)}  # by ZeRO's stages


def is_engine(thing: Any) -> bool:
    """Whether it is a ``deepspeed.DeepSpeedEngine``."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(thing, deepspeed.DeepSpeedEngine)


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3, whose own data are there only while it is gathered."""
    return hasattr(tensor, "ds_tensor")


class EngineState:
    """What a snapshot has of an engine beside its module.

    Raises InvalidArgument: an engine that snapshots do not know.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self.optimizer = engine, engine.optimizer
        self.stage = int(engine.zero_optimization_stage())
        kind = type(self.optimizer).__name__
        if hasattr(engine, "pipe_buffers"):
            raise _unknown("a DeepSpeed PipelineEngine", "use stowplan.Pipeline, or ZeRO")
        if self.stage == 0 and not isinstance(self.optimizer, torch.optim.Optimizer | None):
            raise _unknown(f"a DeepSpeed engine with a {kind}", 'set "zero_optimization": {"stage": 1}, 2 or 3')
        if self.stage and self._masters is None:
            raise _unknown(f"a DeepSpeed engine of ZeRO-{self.stage} with a {kind}", "take another ZeRO stage or dtype")
        if getattr(self.optimizer, "swap_optimizer", False) or getattr(self.optimizer, "params_in_nvme_and_cpu", False):
            raise _unknown("a DeepSpeed engine that offloads to NVMe", "offload to the CPU")

    def owns(self, optimizer: Any) -> bool:
        """Whether it is ZeRO's optimizer, or the one inside, whose states are here."""
        return self.stage > 0 and (optimizer is self.optimizer or optimizer is self._base)

    def needs(self, optimizers: Mapping[str, Any]) -> bool:
        """Whether the engine has an optimizer of torch whose states are not here, and not given either."""
        return self.stage == 0 and self.optimizer is not None and self.optimizer not in optimizers.values()

    def get_extra_state(self) -> dict[str, Any]:
        """Everything by reference. Raises InvalidArgument while gradients are being accumulated."""
        engine = self._engine
        micro_steps, every = engine.micro_steps, engine.gradient_accumulation_steps()
        if micro_steps % every:
            raise InvalidArgument(
                f"a DeepSpeed engine has accumulated {micro_steps % every} of {every} micro-batches' gradients, which "
                f"are in no snapshot: take them after the engine.step() that steps the optimizer."
            )
        state: dict[str, Any] = {
            "stage": self.stage,
            "counters": {name: getattr(engine, name) for name in _COUNTERS},
            "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        }
        if self.stage:
            state |= {
                "partition": self._partition,
                "tensors": dict(self._tensors()),
                "states": [dict(self._base.state.get(master, {})) for master in self._masters or ()],
                "groups": [_options(group) for group in self._base.param_groups],
                "scaler": dict(vars(self.optimizer.loss_scaler)),
                "overflow": bool(self.optimizer.overflow),
            }
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put it back; all processes of the engine call it. Raises SnapshotMismatch before anything is changed."""
        self._check(state)
        engine = self._engine
        for name in _COUNTERS:
            setattr(engine, name, state["counters"][name])
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(state["scheduler"])
        if not self.stage:
            return
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # gathered parameters are given back
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(state["tensors"][name])
            for master, given in zip(self._masters or (), state["states"], strict=True):
                self._set_state(master, given)
        for group, options in zip(self._base.param_groups, state["groups"], strict=True):
            group.update(options)
        vars(self.optimizer.loss_scaler).update(state["scaler"])
        self.optimizer.overflow = state["overflow"]
        if self.stage == 3:
            self.optimizer.checkpoint_event_epilogue()  # those that stay gathered are gathered again

    @property
    def _base(self) -> Any:
        return self.optimizer.optimizer

    @property
    def _masters(self) -> list[torch.Tensor] | None:
        """The fp32 partitions that the optimizer steps, one for each group or part of one."""
        for name, stages in _MASTERS.items():
            if self.stage in stages and hasattr(self.optimizer, name):
                found: list[torch.Tensor] = list(getattr(self.optimizer, name))
                return found
        return None

    @property
    def _partition(self) -> list[int]:
        group = self.optimizer.dp_process_group
        return [dist.get_rank(group), dist.get_world_size(group)]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Partitions by name."""
        for number, master in enumerate(self._masters or ()):
            yield f"fp32.{number}", master.detach()
        for name, parameter in self._engine.module.named_parameters():
            if is_partitioned(parameter):
                yield f"parameter.{name}", parameter.ds_tensor.detach()

    def _set_state(self, master: torch.Tensor, given: dict[str, Any]) -> None:
        """In place where a tensor is there, as ZeRO has views of them."""
        state = self._base.state[master]
        for name in state.keys() - given.keys():
            del state[name]
        for name, value in given.items():
            live = state.get(name)
            if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor) and live.shape == value.shape:
                live.copy_(value)
            else:
                moves = isinstance(value, torch.Tensor) and value.dim() > 0
                state[name] = value.to(master.device) if moves else value

    def _check(self, state: dict[str, Any]) -> None:
        problems = []
        if state["stage"] != self.stage:
            problems.append(f"the engine was of ZeRO-{state['stage']}, and is of ZeRO-{self.stage} here")
        elif (state["scheduler"] is None) != (self._engine.lr_scheduler is None):
            problems.append("an engine with lr_scheduler, and one without")
        elif self.stage:
            problems += self._differences(state)
        if problems:
            raise SnapshotMismatch([f"DeepSpeed: {problem}" for problem in problems])

    def _differences(self, state: dict[str, Any]) -> Iterator[str]:
        if list(state["partition"]) != self._partition:
            was, now = (f"partition {index} of {count}" for index, count in (state["partition"], self._partition))
            yield f"ZeRO's {was}, and {now} here: snapshots of engines are for the same ranks only"
            return
        live = dict(self._tensors())
        for name in live.keys() ^ state["tensors"].keys():
            yield f"{name} is not on both sides"
        for name in live.keys() & state["tensors"].keys():
            there, here = state["tensors"][name], live[name]
            if (there.shape, there.dtype) != (here.shape, here.dtype):
                was, now = (f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in (there, here))
                yield f"{name} is {was} in the snapshot, and {now} here"
        if len(state["groups"]) != len(self._base.param_groups):
            yield f"{len(state['groups'])} parameter groups, and {len(self._base.param_groups)} here"


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _unknown(what: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(f"the model is {what}, which snapshots do not know: {remedy}, or save it with DeepSpeed.")

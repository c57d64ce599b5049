"""Parameters that several stages share, such as an embedding that is the head's matrix, too.

Each device that holds one has a copy. The gradient of one step is the sum of all holders' parts, in the order of
devices: the first holder adds them up, has the sum averaged over data-parallel processes, and tells the others, so that
copies that were equal stay so. Sums are in another order than in one process: equal up to rounding, not bit for bit.
(In a V the first and the last stage are on one device, and share the parameter itself.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
import torch.distributed as dist

from stowplan.offload.parallel import local_part
from stowplan.runtime.pipeline.data_parallel import AllReduce
from stowplan.runtime.pipeline.transfers import Link

__all__ = ["TiedGradients"]


class TiedGradients:
    """The gradients of this device's shared parameters. ``begin`` and ``finish`` each step.

    ``holders``: the devices that hold a parameter, by its name, for all of the pipeline; ``parameters``: those of them
    that are here. ``data_parallel``: the group over which whole (not sharded) parameters' gradients are averaged.
    """

    def __init__(
        self,
        link: Link,
        holders: Mapping[str, Sequence[int]],
        parameters: Mapping[str, torch.nn.Parameter],
        data_parallel: dist.ProcessGroup | None = None,
    ) -> None:
        self._link = link
        self._holders = {name: sorted(holders[name]) for name in sorted(holders)}
        self._parameters = parameters
        self._before: dict[str, torch.Tensor | None] = {}
        self._reductions: dict[str, AllReduce] = {}
        if data_parallel is not None:
            for name, parameter in parameters.items():
                if self._holders[name][0] == link.rank and local_part(parameter) is parameter:
                    self._reductions[name] = AllReduce(torch.nn.ParameterList([parameter]), data_parallel)
        link.connect([pair for devices in self._holders.values() for pair in permutations(devices, 2)])

    def counted_elsewhere(self) -> list[torch.nn.Parameter]:
        """Parameters here of which another device is the first holder: they count once in a norm."""
        return [self._parameters[name] for name, devices in self._holders.items() if self._link.rank in devices[1:]]

    def begin(self) -> None:
        """What is there of earlier steps is whole already, and set aside."""
        for name, parameter in self._parameters.items():
            if len(self._holders[name]) > 1:
                self._before[name], parameter.grad = parameter.grad, None

    @torch.no_grad()
    def finish(self, sync: bool = True) -> None:
        """Add the parts of all holders to what was there before, and average that if ``sync``."""
        for name, devices in self._holders.items():
            if self._link.rank not in devices or not self._parameters[name].requires_grad:
                continue
            if self._link.rank == devices[0]:
                self._collect(name, devices[1:])
                if name in self._reductions:
                    self._reductions[name].prepare(sync)
                    self._reductions[name].reduce()
                    self._reductions[name].finish()
                self._tell(self._parameters[name], devices[1:])
            else:
                self._follow(self._parameters[name], devices[0])
        self._before.clear()

    def _collect(self, name: str, others: Sequence[int]) -> None:
        if others:
            gradient = _gradient_of(self._parameters[name])
            total = local_part(gradient)
            for device in others:
                part = torch.empty(total.shape, dtype=total.dtype, device=total.device)
                self._link.receive(part, device).wait()
                total += part
            earlier = self._before[name]
            if earlier is not None:
                self._parameters[name].grad = earlier.add_(gradient)

    def _tell(self, parameter: torch.nn.Parameter, others: Sequence[int]) -> None:
        if others:
            whole = local_part(_gradient_of(parameter)).contiguous()
            for work in [self._link.send(whole, device) for device in others]:
                work.wait()

    def _follow(self, parameter: torch.nn.Parameter, first: int) -> None:
        own = local_part(_gradient_of(parameter))
        part = own.contiguous()
        self._link.send(part, first).wait()
        self._link.receive(part, first).wait()
        if part is not own:
            own.copy_(part)


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Zeros where there is none: another holder may have a part."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad

"""Parameters that stages of several devices share, such as an embedding that is the head's matrix, too.

Each holder has a copy, and the gradient of one step is the sum of all holders' parts, added in the order of devices, so
that copies that were equal stay so. Sums are in another order than in one process: equal up to rounding, not bit for
bit. (In a V the first and the last stage are on one device, and share the parameter itself.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch

from stowplan.offload.parallel import local_part
from stowplan.runtime.pipeline.transfers import Link

__all__ = ["TiedGradients"]


class TiedGradients:
    """The gradients of this device's shared parameters. ``begin`` and ``finish`` each step.

    ``holders``: the devices that hold a parameter, by its name, for all of the pipeline; ``parameters``: those of them
    that are here.
    """

    def __init__(
        self, link: Link, holders: Mapping[str, Sequence[int]], parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        self._link = link
        self._holders = {name: sorted(holders[name]) for name in sorted(holders)}
        self._parameters = parameters
        self._before: dict[str, torch.Tensor | None] = {}
        link.connect([pair for devices in self._holders.values() for pair in permutations(devices, 2)])

    def counted_elsewhere(self) -> list[torch.nn.Parameter]:
        """Parameters here of which another device is the first holder: they count once in a norm."""
        return [self._parameters[name] for name, devices in self._holders.items() if self._link.rank in devices[1:]]

    def begin(self) -> None:
        """What is there of earlier steps is whole already, and set aside."""
        for name, parameter in self._parameters.items():
            self._before[name], parameter.grad = parameter.grad, None

    def finish(self) -> None:
        """Add the parts of all holders, and what was there before."""
        for name, devices in self._holders.items():
            if self._link.rank in devices:
                self._exchange(self._parameters[name], devices)
                earlier = self._before.pop(name, None)
                gradient = self._parameters[name].grad
                if earlier is not None and gradient is not None:
                    self._parameters[name].grad = earlier.add_(gradient)

    def _exchange(self, parameter: torch.nn.Parameter, devices: Sequence[int]) -> None:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        own = local_part(parameter.grad).contiguous()
        parts = {device: own if device == self._link.rank else torch.empty_like(own) for device in devices}
        others = [device for device in devices if device != self._link.rank]
        sends = [self._link.send(own, device) for device in others]
        receives = [self._link.receive(parts[device], device) for device in others]
        for work in [*sends, *receives]:
            work.wait()
        total = parts[devices[0]].clone()
        for device in devices[1:]:
            total += parts[device]
        local_part(parameter.grad).copy_(total)

"""Looking into a model on the meta device, whose forward reads values: what comes before its layers runs on the CPU.

Parameters are ones in the memory of one element there, buffers ones. After the layers all is on the meta device again,
where a head takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from stowplan.runtime.pipeline.hollow import Passage, shallow_copy

__all__ = ["MetaPassage", "buffers_on_cpu"]


class MetaPassage(Passage):
    """Stands in for all parameters; ``note`` learns which of them are read, and says whether that is before the end."""

    def __init__(self, model: torch.nn.Module, note: Callable[[str], bool]) -> None:
        super().__init__(type(model).__name__, 0, False)
        self._model, self._note = model, note

    def stand_in(self, name: str, zero: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Ones on the CPU before the last layer, the parameter itself after it."""
        if self._note(name):
            return torch.ones((), dtype=zero.dtype).expand(shape)
        return self._model.get_parameter(name)


def buffers_on_cpu(copied: torch.nn.Module, model: torch.nn.Module, name: str, layers: Collection[str]) -> None:
    """Give ``copied``, a partial copy of ``model``, buffers on the CPU; the model's own modules stay as they are."""
    for key, buffer in copied._buffers.items():
        if buffer is not None and buffer.is_meta and key in model._buffers:
            copied._buffers[key] = torch.ones((), dtype=buffer.dtype).expand(buffer.shape)
    for key, original in model._modules.items():
        child = copied._modules[key]
        path = f"{name}.{key}" if name else key
        if child is None or original is None or path in layers:
            continue
        if child is not original:
            buffers_on_cpu(child, original, path, layers)
        elif next(child.parameters(), None) is None:
            copied._modules[key] = twin = shallow_copy(child, type(child))
            buffers_on_cpu(twin, original, path, layers)

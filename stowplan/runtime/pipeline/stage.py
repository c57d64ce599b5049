"""A stage of a pipeline: what all kinds have in common, and the kind that is a sequence of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stowplan.core.errors import InvalidArgument, UnsupportedModel

__all__ = ["LossFunction", "SequenceStage", "Stage", "Tied"]

LossFunction = Callable[[Any, Any], torch.Tensor]
Tied = dict[str, dict[int, str]]


class Stage(torch.nn.Module):
    """A part of a model that begins with what the stage before gives, and gives one tensor.

    Its parameters and buffers are the model's own, under the names that they have in the model.

    Attributes:
        index, num_stages: which stage it is, from 0, and of how many.
        tied: parameters that lie on several stages (an embedding that is also the head), whichever were built: the
            name in the model, and for each stage that has it the name there. Their gradients are to be added up.
    """

    def __init__(self, index: int, num_stages: int, tied: Tied, loss_fn: LossFunction | None) -> None:
        super().__init__()
        self.index, self.num_stages, self.tied, self.loss_fn = index, num_stages, tied, loss_fn

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The model's layers that are here, in order."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor | None = None, inputs: Any = None) -> torch.Tensor:
        """What the next stage takes as ``hidden``; from the last stage the loss, a scalar.

        Args:
            hidden: what the stage before gave for this microbatch; None on the first stage.
            inputs: the microbatch, as for the model; for a sequence of modules (input, target). Stages in the middle
                need it only where their layers read more of it than the tokens (an attention mask).

        Without gradients, the last stage gives the model's output itself where nothing is there to compute a loss
        from: no labels, or no inputs (no target) for ``loss_fn``.

        Raises:
            InvalidArgument: ``hidden`` is there on the first stage or missing on another; no scalar loss comes out.
            UnsupportedModel: the model does something with these inputs that it did not do when it was split.
        """
        if (hidden is None) != self.is_first:
            raise InvalidArgument(
                f"stage {self.index} of {self.num_stages} was called {'without' if hidden is None else 'with'} hidden; "
                f"the first stage takes None, every other what the stage before gave."
            )
        output = self._run(hidden, inputs)
        return self._loss(output, inputs) if self.is_last else output

    def _run(self, hidden: torch.Tensor | None, inputs: Any) -> Any:
        raise NotImplementedError

    def _loss(self, output: Any, inputs: Any) -> torch.Tensor:
        raise NotImplementedError

    def _scalar(self, loss: Any, origin: str) -> torch.Tensor:
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return loss
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise InvalidArgument(
            f"the last stage has no scalar loss: {origin} is {given}. Give labels in the batch, or "
            f"loss_fn(output, inputs) that gives one number; without gradients, leave both out for the output itself."
        )


class SequenceStage(Stage):
    """Modules that are called one after the other."""

    def __init__(
        self, modules: Mapping[str, torch.nn.Module], index: int, num: int, tied: Tied, loss_fn: LossFunction | None
    ) -> None:
        super().__init__(index, num, tied, loss_fn)
        for name, module in modules.items():
            self.add_module(name, module)

    @property
    def layers(self) -> list[torch.nn.Module]:
        return list(self.children())

    def _run(self, hidden: torch.Tensor | None, inputs: Any) -> torch.Tensor:
        value = hidden
        if hidden is None:
            value = inputs[0] if isinstance(inputs, tuple | list) and inputs else inputs
        for name, module in self._modules.items():
            assert module is not None
            if not isinstance(value, torch.Tensor):
                raise UnsupportedModel(
                    f"stage {self.index} of {self.num_stages}: module {name} would be called with "
                    f"{type(value).__name__}; modules of a sequence take and give one tensor, the first one inputs[0]."
                )
            value = module(value)
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(
                f"stage {self.index} of {self.num_stages} gives {type(value).__name__}; stages hand over one tensor."
            )
        return value

    def _loss(self, output: torch.Tensor, inputs: Any) -> torch.Tensor:
        target = inputs[1] if isinstance(inputs, tuple | list) and len(inputs) > 1 else None
        if target is None and not torch.is_grad_enabled():
            return output
        if self.loss_fn is None:
            return self._scalar(output, "the output of the last module")
        return self._scalar(self.loss_fn(output, target), "what loss_fn gives")

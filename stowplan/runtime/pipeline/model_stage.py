"""A stage of a model that has a forward of its own: Hugging Face's causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.offload.arguments import flatten
from stowplan.runtime.pipeline.hollow import AbsentLayer, Passage
from stowplan.runtime.pipeline.layout import Layout, reaches, refuse_more
from stowplan.runtime.pipeline.probe import arguments_of
from stowplan.runtime.pipeline.stage import LossFunction, Stage, Tied

__all__ = ["ModelStage", "refuse_outputs_of_all_layers"]


def refuse_outputs_of_all_layers(where: str, options: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel if outputs are asked for that are collected from the layers of all stages."""
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if options.get(name):
            raise UnsupportedModel(
                f"{where}: {name}={options[name]} asks for outputs of all layers, which lie on many stages: set it to "
                f"False in the model's config and in its arguments."
            )


class _Left(BaseException):
    """Leaves the model's forward behind a stage's last layer; carries nothing, so that it keeps nothing alive."""


class ModelStage(Stage):
    """A stage that runs the model's own forward (``hollow``: Note: a stage runs the model's own forward)."""

    _root: torch.nn.Module

    def __init__(
        self, model: torch.nn.Module, layout: Layout, index: int, tied: Tied, loss_fn: LossFunction | None
    ) -> None:
        super().__init__(index, layout.num_stages, tied, loss_fn)
        first, end = layout.bounds[index : index + 2]
        self._where = layout.where(index)
        self._as_tuple = layout.as_tuple
        self._passage = Passage(self._where, first, layout.as_tuple)
        absent = {
            name: AbsentLayer(model.get_submodule(name), self._passage, position)
            for position, name in enumerate(layout.layers)
            if not first <= position < end
        }
        root = layout.part(model, index, absent, self._passage)
        self._layers = layout.layers[first:end]
        self._checked = False
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._token = int(pad == 0)
        # Modules, parameters and buffers are those of the copied model, under its names.
        self.__dict__["_root"] = root
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = root.__dict__[registry]
        self.training = model.training  # of this module alone: parts may be in eval mode on purpose

    @property
    def layers(self) -> list[torch.nn.Module]:
        return [self._root.get_submodule(name) for name in self._layers]

    def train(self, mode: bool = True) -> ModelStage:
        super().train(mode)
        self._root.training = mode
        return self

    def _run(self, hidden: torch.Tensor | None, inputs: Any) -> Any:
        arguments = self._arguments(hidden, inputs)
        given: list[torch.Tensor] = []

        def leave(_: torch.nn.Module, __: Any, output: Any) -> None:
            given.append(self._hidden_of(output))
            raise _Left

        checks = not (self.is_first or self._checked) and torch.is_grad_enabled()
        handles = self._look_at_arguments() if checks else []
        if not self.is_last:
            handles.append(self._root.get_submodule(self._layers[-1]).register_forward_hook(leave))
        self._passage.enter(hidden)
        output = None
        try:
            output = self._root(**arguments)
            self._refuse_if_reached(output, "the output")
        except _Left:
            output = given.pop()
        finally:
            skipped = self._passage.waits
            self._passage.leave()
            self._passage.leaves = None
            for handle in handles:
                handle.remove()
        if skipped:
            raise UnsupportedModel(f"{self._where}: the model did not call the layers of the stages before.")
        self._checked |= checks
        return output

    def _look_at_arguments(self) -> list[Any]:
        """Check this call as splitting did those of a few tokens: a model may do something else with a real batch."""
        self._passage.leaves = []

        def look(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            name = next(name for name in self._layers if self._root.get_submodule(name) is module)
            self._refuse_if_reached((args, kwargs), f"an argument of {name}")

        layers = [self._root.get_submodule(name) for name in self._layers]
        return [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]

    def _refuse_if_reached(self, tree: Any, what: str) -> None:
        leaves = self._passage.leaves
        if leaves and any(isinstance(leaf, torch.Tensor) and reaches(leaf, leaves) for leaf in flatten((tree,), {})):
            refuse_more(self._where, what)

    def _arguments(self, hidden: torch.Tensor | None, inputs: Any) -> dict[str, Any]:
        if not isinstance(inputs, Mapping) and (inputs is not None or self.is_first):
            raise InvalidArgument(
                f"{self._where}: inputs are {type(inputs).__name__}; give a dict of the model's arguments, such as "
                f"{{'input_ids': ..., 'labels': ...}}."
            )
        arguments = dict(inputs or {})
        refuse_outputs_of_all_layers(self._where, arguments)
        if not self.is_last:
            arguments.pop("labels", None)
        if hidden is None:
            return arguments | arguments_of(self._root, None)
        arguments.pop("inputs_embeds", None)
        ids = torch.full((), self._token, device=hidden.device).expand(hidden.shape[:2])
        return arguments | arguments_of(self._root, ids)

    def _hidden_of(self, output: Any) -> torch.Tensor:
        """What the model goes on with: a layer's output, or its first item and nothing else, as ``layout`` proved."""
        hidden = output[0] if self._as_tuple and isinstance(output, tuple | list) and output else output
        if not isinstance(hidden, torch.Tensor):
            raise UnsupportedModel(
                f"{self._where}: {self._layers[-1]} gives {type(output).__name__}; stages hand over one tensor."
            )
        return hidden

    def _loss(self, output: Any, inputs: Any) -> torch.Tensor:
        labels = inputs is not None and inputs.get("labels") is not None
        enough = inputs is not None if self.loss_fn is not None else labels
        if not enough and not torch.is_grad_enabled():
            whole: torch.Tensor = output
            return whole
        if self.loss_fn is not None:
            return self._scalar(self.loss_fn(output, inputs), "what loss_fn gives")
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        return self._scalar(loss, "the output's loss")

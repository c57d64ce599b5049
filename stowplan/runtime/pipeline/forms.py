"""What travels between stages: found out by one forward pass of one microbatch, before the first step of a shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.runtime.pipeline.transfers import Form, Link

__all__ = ["learn_forms", "refuse_no_loss", "undisturbed"]

_FAILED = "failed: "


def learn_forms(
    stages: Mapping[int, torch.nn.Module], stage_devices: tuple[int, ...], inputs: Any, link: Link
) -> list[Form | None]:
    """The forms of all stages' inputs, None for the first. All devices of the pipeline ask at once.

    ``inputs`` are those of one microbatch. Nothing changes: no gradients, no generator, no buffers. The last stage is
    tried out, too, so that all hear of a loss that is missing before anybody waits for it.

    Raises UnsupportedModel if a stage gives something else than one floating-point tensor; where a stage fails, its
    device raises that error, and all others InvalidArgument that tells of it.
    """
    forms: list[Form | None] = [None]
    for stage, holder in enumerate(stage_devices):
        told: Form | str | None = None
        failure: Exception | None = None
        if holder == link.rank:
            try:
                output = _output(stages[stage], forms[stage], inputs, link)
                if stage == len(stage_devices) - 1:
                    refuse_no_loss(output)
                told = _form_of(output, stage)
                del output
            except Exception as error:  # noqa: BLE001 - raised below: the others wait to hear of it
                told, failure = f"{_FAILED}{type(error).__name__}: {error}", error
        told = link.told(told, holder)
        if failure is not None:
            failure.add_note(f"in stage {stage}, on device {holder} of the pipeline, as it was tried out")
            raise failure
        if not isinstance(told, Form):
            said = str(told)
            if said.startswith(_FAILED):
                raise InvalidArgument(
                    f"stage {stage}, on device {holder} of the pipeline, fails with the first microbatch "
                    f"({said.removeprefix(_FAILED)}): its traceback is on that device."
                )
            raise UnsupportedModel(said)
        forms.append(told)
    return forms[:-1]


def refuse_no_loss(output: Any) -> None:
    """Raise InvalidArgument if the last stage gives something else than one number."""
    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return
    given = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    raise InvalidArgument(
        f"the last stage gives {given}, no loss: batches need labels, or a target for loss_fn, and loss_fn gives one "
        f"number."
    )


def _output(stage: torch.nn.Module, form: Form | None, inputs: Any, link: Link) -> Any:
    hidden = None if form is None else torch.zeros(form.size, dtype=form.dtype, device=link.device)
    with undisturbed(stage, link.device), torch.no_grad():
        return stage(hidden, inputs)


def _form_of(output: Any, stage: int) -> Form | str:
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        return Form.of(output)
    kind = f"a tensor of {output.dtype}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
    return (
        f"stage {stage} gives {kind}, but only one floating-point tensor can go to the next stage: cut the model where "
        f"one is all that goes on (no skip connections across stages)."
    )


@contextmanager
def undisturbed(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Random generators and the module's buffers are afterwards as before."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])

"""What a stage costs, measured: one microbatch forth and back, through the very code that a step runs.

Bytes are those of live tensors and kernels' scratch, as ``stowplan.measure`` counts them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from stowplan.offload.memory_log import memory_log, synchronize
from stowplan.offload.storages import storage_bytes
from stowplan.planner.schedule import StageCosts
from stowplan.runtime.pipeline.data_parallel import Reduction
from stowplan.runtime.pipeline.deferred import WeightGradients
from stowplan.runtime.pipeline.executor import InFlight
from stowplan.runtime.pipeline.forms import undisturbed
from stowplan.runtime.pipeline.stage import Stage
from stowplan.runtime.pipeline.transfers import Form, Link

__all__ = ["Subject", "communication_seconds", "probe"]

_NUM_TIMED = 5  # the same on all processes: stages may hold collectives
_NUM_WARM = 3  # gradients and whatever is made once are there then, and an activation plan records no more
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Subject:
    """A stage to be probed: what goes in, what comes out, and what is done with its gradients."""

    stage: Stage
    deferred: WeightGradients
    inputs: Any
    form: Form | None
    output_form: Form | None
    device: torch.device
    reduction: Reduction | None = None

    def hidden(self) -> torch.Tensor | None:
        return None if self.form is None else _random(self.form, self.device)

    def gradient(self, output: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(output) if self.output_form is None else _random(self.output_form, self.device)

    def in_flight(self) -> InFlight:
        return InFlight(self.stage, self.deferred.collect)


def probe(subject: Subject) -> StageCosts:
    """Seconds and bytes of F, I and W of one stage; parameters, gradients and generators are afterwards as before.

    Of a stage that ``fully_shard`` was called on, shards, gathered parameters and the gradients of these count as there
    all the time; all processes with the same stage probe at once.
    """
    shards = list(subject.stage.parameters())
    with (
        subject.deferred.resumed(),
        undisturbed(subject.stage, subject.device),
        _own_gradients(subject.stage.parameters()),
        _reduced(subject),
    ):
        for _ in range(_NUM_WARM):
            _run(subject)
        bytes_of = _measure_bytes(subject)
        columns = zip(*(_run(subject) for _ in range(_NUM_TIMED)), strict=True)
        forward, backward, weights = (max(statistics.median(column), _LEAST_SECONDS) for column in columns)
        static = [
            *shards,
            *subject.stage.parameters(),
            *subject.stage.buffers(),
            *(p.grad for p in subject.stage.parameters()),
        ]
        return replace(
            bytes_of,
            forward_seconds=forward,
            input_gradient_seconds=backward,
            weight_gradient_seconds=weights,
            static_bytes=storage_bytes(static),
        )


def _run(subject: Subject) -> tuple[float, float, float]:
    """Seconds of F, I and W."""
    in_flight = subject.in_flight()
    hidden = subject.hidden()
    start = _now(subject.device)
    output = in_flight.forward(hidden, subject.inputs)
    forward = _now(subject.device)
    del hidden
    gradient = subject.gradient(output)
    del output
    middle = _now(subject.device)
    in_flight.backward(gradient)
    backward = _now(subject.device)
    in_flight.weights()
    return forward - start, backward - middle, _now(subject.device) - backward


def _measure_bytes(subject: Subject) -> StageCosts:
    with memory_log(subject.device) as log:
        log.mark("input")
        hidden = subject.hidden()
        in_flight = subject.in_flight()
        log.mark("forward")
        output = in_flight.forward(hidden, subject.inputs)
        del hidden
        log.mark("forwarded")
        template = output if subject.output_form is None else torch.empty_like(output, device="meta")
        del output
        log.mark("gradient")
        gradient = subject.gradient(template)
        del template
        log.mark("backward")
        before = in_flight.backward(gradient)
        del gradient
        log.mark("backwarded")
        del before
        log.mark("weights")
        in_flight.weights()
        log.mark("end")
    segments = {segment.name: segment for segment in log.segments}
    held = max(0, segments["forwarded"].end_bytes)
    pending = max(0, segments["backwarded"].end_bytes)
    return StageCosts(
        forward_bytes=held,
        input_gradient_bytes=pending - held,
        transient_bytes=(
            max(0, segments["forward"].peak_bytes - held),
            max(0, segments["backward"].peak_bytes - max(held, pending)),
            max(0, segments["weights"].peak_bytes - pending),
        ),
        input_bytes=0 if subject.form is None else subject.form.num_bytes,
    )


def _random(form: Form, device: torch.device) -> torch.Tensor:
    return form.empty(device).normal_()


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


@contextmanager
def _reduced(subject: Subject) -> Iterator[None]:
    """As within a step; then gathered parameters and what was added up for them are given back."""
    if subject.reduction is None:
        yield
        return
    subject.reduction.prepare(sync=True)
    yield
    subject.reduction.reduce()
    subject.reduction.finish()


@contextmanager
def _own_gradients(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """The parameters' gradients are set aside meanwhile."""
    held = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def communication_seconds(link: Link, forms: Sequence[Form | None]) -> float:
    """Seconds of the largest tensor between stages from the first device to the second, and of its way back, halved.

    0 where there is one stage, or one device.
    """
    known = [form for form in forms if form is not None]
    if link.size == 1 or not known:
        return 0.0
    times = []
    if link.rank < 2:
        largest = max(known, key=lambda form: form.num_bytes)
        tensor = largest.empty(link.device).zero_()
        for _ in range(_NUM_TIMED):
            start = _now(link.device)
            first, second = (link.send, link.receive) if link.rank == 0 else (link.receive, link.send)
            first(tensor, 1 - link.rank).wait()
            second(tensor, 1 - link.rank).wait()
            times.append((_now(link.device) - start) / 2)
    return link.told(statistics.median(times) if times else 0.0)

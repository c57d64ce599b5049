"""A model as a pipeline: this process's stages, and a step that all processes take together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from stowplan.core.errors import InvalidArgument, UnsupportedModel
from stowplan.core.schedule import Kind, Schedule
from stowplan.offload.capture.instruments import RealInstruments
from stowplan.offload.capture.optimizers import optimizer_cost, state_bytes
from stowplan.offload.parallel import is_sharded
from stowplan.offload.storages import storage_bytes
from stowplan.planner.schedule import Costs, StageCosts, Timeline, check, generate, simulate
from stowplan.runtime.pipeline.clipping import clip_grad_norm_
from stowplan.runtime.pipeline.data_parallel import Reduction, reduction_of, refuse_wrappers
from stowplan.runtime.pipeline.deferred import WeightGradients
from stowplan.runtime.pipeline.executor import Executor, unwatched
from stowplan.runtime.pipeline.forms import learn_forms
from stowplan.runtime.pipeline.measure import Recorder, StepTrace
from stowplan.runtime.pipeline.stage import LossFunction, Stage
from stowplan.runtime.pipeline.stage_costs import Subject, communication_seconds, probe
from stowplan.runtime.pipeline.stages import microbatches, split
from stowplan.runtime.pipeline.tied import TiedGradients
from stowplan.runtime.pipeline.transfers import Form, Link, Transfers

__all__ = ["Pipeline"]

Model = torch.nn.Module | Sequence[torch.nn.Module]


class Pipeline:
    """A model whose layers are spread over the processes of a group, one device each.

    Every process of the group builds it from the same model at the same time, and keeps its own stages' parameters:
    ``torch.optim`` takes ``parameters()``. Then ``step`` stands for forward, loss and backward of a whole batch.

        pipeline = stowplan.Pipeline(model, num_microbatches=16, schedule="v-half")
        optimizer = torch.optim.AdamW(pipeline.parameters())
        for batch in loader:
            loss = pipeline.step(batch)
            pipeline.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: a Hugging Face causal language model, or a sequence of modules of which each takes and gives one tensor.
            It may be let go of afterwards; other processes' parts are freed then.
        num_microbatches: into how many equal parts ``step`` cuts a batch.
        schedule: the name of one (docs/schedules.md), or one that ``search`` or a file gave. ``v-half``: half the
            activations of 1F1B, and less bubble.
        loss_fn: ``loss_fn(output, inputs)`` gives a scalar for a microbatch, of a sequence of modules
            ``loss_fn(output, target)`` for batches ``(input, target)``. Default: the model's own loss.
        layers: how many of the model's layers each stage has. Default: as even as possible.
        group: the processes of the pipeline, in the order of its devices. Default: all.
        data_parallel: the processes with the same stages and other data: gradients are averaged over them.
        prepare: called with each stage once it is cut, to move, shard (``fully_shard``) or freeze it.

    Attributes:
        schedule: who computes what, in which order.
        stages: this process's stages by their number.
        link: the processes of the pipeline, and this one's place among them.

    Raises:
        InvalidArgument: torch.distributed is not initialised; counts that do not go together.
        InvalidSchedule: the schedule cannot be run.
        UnsupportedModel: the model cannot be cut, or is wrapped by what needs whole backward passes.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_microbatches: int,
        schedule: str | Schedule = "v-half",
        loss_fn: LossFunction | None = None,
        layers: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
        data_parallel: dist.ProcessGroup | None = None,
        prepare: Callable[[Stage], object] | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise InvalidArgument(
                "torch.distributed is not initialised: start the script with torchrun, and call "
                "torch.distributed.init_process_group() before the pipeline is built."
            )
        if dist.get_rank(group) < 0:
            raise InvalidArgument(
                "this process is not in group=: build the pipeline on the processes of its group only."
            )
        self.schedule = _schedule(schedule, dist.get_world_size(group), num_microbatches)
        own = self.schedule.stages_of(dist.get_rank(group))
        self.stages: dict[int, Stage] = split(model, self.schedule.num_stages, keep=own, layers=layers, loss_fn=loss_fn)
        if prepare is not None:
            for stage in self.stages.values():
                prepare(stage)
        self.link = Link(group, _device_of(self.stages.values(), group))
        self._deferred = {number: WeightGradients() for number in self.stages}
        weakref.finalize(self, _remove_all, tuple(self._deferred.values()))  # modules may outlive their pipeline
        holders, shared = self._shared()
        self._reductions: dict[int, Reduction] = {}
        for number, stage in self.stages.items():
            refuse_wrappers(stage)
            if data_parallel is not None or any(map(is_sharded, stage.modules())):
                self._reductions[number] = reduction_of(stage, data_parallel, shared.values())
        self._tied = TiedGradients(self.link, holders, shared, data_parallel)
        self._forms: list[Form | None] = []
        self._signature: Any = None
        self._everybody_has_batches = False
        self._failed: str | None = None
        self._evaluator: Executor | None = None
        self.use(self.schedule)

    # ---- what is here ------------------------------------------------------------------------------------------------
    @property
    def index(self) -> int:
        return self.link.rank

    @property
    def size(self) -> int:
        return self.link.size

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.link.device

    @property
    def num_microbatches(self) -> int:
        return self.schedule.num_microbatches

    @property
    def has_loss(self) -> bool:
        return self.schedule.num_stages - 1 in self.stages

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of this process, each once, under the names that they have in the whole model."""
        seen: set[int] = set()
        for number, stage in self.stages.items():
            names = {places[number]: name for name, places in stage.tied.items() if number in places}
            for name, parameter in stage.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield names.get(name, name), parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of this process, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What this process has of the whole model's state, under the model's own names."""
        return {name: value for stage in self.stages.values() for name, value in stage.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this process's part out of ``state``, which may be that of the whole model.

        Raises InvalidArgument that names what is missing.
        """
        for stage in self.stages.values():
            own = stage.state_dict()
            missing = sorted(set(own) - set(state))
            if missing:
                raise InvalidArgument(
                    f"the state has no {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}, which stage "
                    f"{stage.index} needs: give the state of the whole model, or of this process."
                )
            stage.load_state_dict({name: state[name] for name in own})

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of all modules here."""
        for stage in self.stages.values():
            stage.train(mode)

    def eval(self) -> None:
        self.train(False)

    # ---- steps -------------------------------------------------------------------------------------------------------
    def step(
        self,
        batch: Any = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        weight: float = 1.0,
        sync: bool = True,
    ) -> torch.Tensor | None:
        """Forward and backward of ``batch``; gradients are those of the mean of the microbatches' losses.

        Args:
            batch: as the model takes it, all microbatches together; its size is a multiple of ``num_microbatches``.
                Devices that hold neither the first nor the last stage may give None, if what comes with it beside
                inputs and labels is not needed there (a mask is).
            scaler: multiplies gradients by its scale. Unscaling finds infinities on this process only: use
                ``torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler(process_group=...)``.
            weight: of this batch among those that are accumulated before an optimizer step.
            sync: whether gradients are averaged over the data-parallel group; False for all but the last of them.

        Returns:
            The mean loss of the microbatches, detached, on the device of the last stage; None elsewhere.

        Raises:
            InvalidArgument: an uneven batch, another shape than before while some devices get no batches, or an
                earlier step failed.
        """
        parts = self._parts(batch)
        if not torch.is_grad_enabled():
            raise InvalidArgument("step() computes gradients, which are off here: leave no_grad(), or call evaluate().")
        # Rounded once, to the loss's dtype.
        loss_gradient = torch.full((), weight / self.num_microbatches, dtype=torch.float64, device=self.device)
        if scaler is not None:
            loss_gradient = scaler.scale(loss_gradient)
        with self._in_step():
            self._tied.begin()
            for reduction in self._reductions.values():
                reduction.prepare(sync)
            losses = self._executor.step(self._forms, parts, loss_gradient, self._on_weights)
            for reduction in self._reductions.values():
                reduction.finish()
            self._tied.finish(sync)
        return _mean(losses)

    def evaluate(self, batch: Any = None) -> torch.Tensor | None:
        """The loss of ``batch`` without gradients, as ``step`` gives it. Set ``eval()`` before."""
        parts = self._parts(batch)
        if self._evaluator is None:
            self._evaluator = self._new_executor(_forwards(self.schedule))
        with self._in_step(), torch.no_grad():
            losses = self._evaluator.step(self._forms, parts, torch.ones((), device=self.device))
        return _mean(losses)

    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> torch.Tensor:
        """Scale all gradients so that their norm over all stages is ``max_norm`` at most; gives the norm before."""
        return clip_grad_norm_(
            self.parameters(),
            max_norm,
            groups=[self.link.group],
            counted_elsewhere=self._tied.counted_elsewhere(),
            error_if_nonfinite=error_if_nonfinite,
        )

    # ---- what it costs -----------------------------------------------------------------------------------------------
    def subjects(self, batch: Any = None) -> dict[int, Subject]:
        """Each stage here with what one microbatch of ``batch`` brings it, to be probed. All devices at once."""
        parts = self._parts(batch)
        forms = [*self._forms, None]
        return {
            number: Subject(
                stage,
                self._deferred[number],
                parts[0],
                forms[number],
                forms[number + 1],
                self.device,
                self._reductions.get(number),
            )
            for number, stage in self.stages.items()
        }

    def probe(self, batch: Any = None, *, optimizer: torch.optim.Optimizer | None = None) -> Costs:
        """Measure what each stage costs, with one microbatch of ``batch``; all devices at once, the same on all.

        What ``optimizer`` has, or will have, in states counts for the first stage of its process.
        """
        subjects = self.subjects(batch)
        mine = self.link.together(
            lambda: {number: [probe(subject)] for number, subject in subjects.items()}, in_turns=True
        )
        stages = tuple(column[0] for column in self.of_all_stages(mine, optimizer))
        return Costs(stages, self.communication_seconds())

    def of_all_stages(
        self, mine: Mapping[int, Sequence[StageCosts]], optimizer: torch.optim.Optimizer | None
    ) -> list[list[StageCosts]]:
        """Columns of costs of all stages, from those of this process's; the optimizer's states lie beside its first."""
        states = optimizer_cost(optimizer, RealInstruments(self.device)).state_bytes
        first = min(mine)
        own = {
            number: [cost.with_static(states if number == first else 0) for cost in column]
            for number, column in mine.items()
        }
        every = {number: column for part in self.link.gathered(own) for number, column in part.items()}
        return [every[number] for number in range(self.schedule.num_stages)]

    def communication_seconds(self) -> float:
        """Seconds that the largest tensor between stages takes to another process. All devices at once."""
        return communication_seconds(self.link, self._forms)

    def predict(self, costs: Costs) -> Timeline:
        """What a step takes, and what each device holds, at ``costs``."""
        return simulate(self.schedule, costs)

    def measure(self, batch: Any = None, *, optimizer: torch.optim.Optimizer | None = None) -> StepTrace:
        """Take one step of ``batch`` and watch it: times of all actions, live bytes of all devices.

        Gradients add up as in ``step``. The states of ``optimizer`` are counted, too. Not under another profiler.
        """
        static = [*self.parameters(), *(b for stage in self.stages.values() for b in stage.buffers())]
        static += [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        recorder = Recorder(self.device, storage_bytes(static) + (0 if optimizer is None else state_bytes(optimizer)))
        self._parts(batch)  # what is found out once is not part of a step
        self.link.together(recorder.check)
        dist.barrier(self.link.group)
        self._executor.watch = recorder.watch
        try:
            with recorder.step():
                self.step(batch)
        finally:
            self._executor.watch = unwatched
        traces = self.link.gathered(recorder.trace(self.schedule.orders[self.index]))
        return StepTrace(self.schedule, tuple(traces))

    # ---- within ------------------------------------------------------------------------------------------------------
    def use(self, schedule: Schedule) -> None:
        """Take ``schedule`` from the next step on: of the same placement. All devices at once.

        What was probed before holds if both schedules put weight gradients off, or both do not.

        Raises InvalidSchedule if it cannot be run, InvalidArgument for another placement.
        """
        check(schedule)
        if schedule.stage_devices != self.schedule.stage_devices:
            raise InvalidArgument(
                f"the schedule places its stages on devices {schedule.stage_devices}, the pipeline was built for "
                f"{self.schedule.stage_devices}: build it with this schedule."
            )
        self.schedule = schedule
        for number, deferred in self._deferred.items():
            deferred.remove()
            deferred.active = False  # but in steps and probes: modules may be called by others in between
            if schedule.splits_backward:
                deferred.install(self.stages[number])
        self._executor = self._new_executor(schedule)
        self._evaluator = None

    def _new_executor(self, schedule: Schedule) -> Executor:
        collects = {number: deferred.collect for number, deferred in self._deferred.items()}
        return Executor(schedule, Transfers(schedule, self.link), self.stages, collects)

    def _on_weights(self, stage: int, complete: bool) -> None:
        if stage in self._reductions:
            self._reductions[stage].accumulate()
            if complete:
                self._reductions[stage].reduce()

    def _shared(self) -> tuple[dict[str, list[int]], dict[str, torch.nn.Parameter]]:
        """(devices of each parameter that several stages hold, those of them that are here). All devices at once."""
        devices: dict[str, list[int]] = {}
        own: dict[str, torch.nn.Parameter] = {}
        apart = None
        for name, stages in next(iter(self.stages.values())).tied.items():
            devices[name] = sorted({self.schedule.stage_devices[stage] for stage in stages})
            here = [stage.get_parameter(stages[number]) for number, stage in self.stages.items() if number in stages]
            if here:
                own[name] = here[0]
            if any(parameter is not here[0] for parameter in here):
                apart = name
        for name in filter(None, self.link.gathered(apart)):  # raised everywhere: nobody waits for the others
            raise UnsupportedModel(
                f"{name} is shared by stages of one device, and prepare() has made it a parameter of its own in each: "
                f"call stages.tie() after to_empty(); with fully_shard take a schedule in a loop (1f1b, zb-h1), or a "
                f"model that is not tied."
            )
        return devices, own

    def _parts(self, batch: Any) -> list[Any]:
        """The microbatches of ``batch``, once it is known what travels between stages."""
        if self._failed is not None:
            raise InvalidArgument(
                f"an earlier step failed ({self._failed}), and processes are no longer at the same place: build the "
                f"pipeline anew."
            )
        parts = [None] * self.num_microbatches if batch is None else microbatches(batch, self.num_microbatches)
        signature = None if batch is None else (_signature(parts[0]), _autocast(self.device.type))
        if not self._forms:
            self._everybody_has_batches = all(self.link.gathered(batch is not None))
        elif batch is None or signature == self._signature:
            return parts
        elif not self._everybody_has_batches:
            raise InvalidArgument(
                f"a microbatch is {signature}, those before were {self._signature}, and devices that get no batches "
                f"cannot know: pad batches to one shape, or give them to all devices."
            )
        self._forms = learn_forms(self.stages, self.schedule.stage_devices, parts[0], self.link)
        self._signature = signature
        return parts

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        with ExitStack() as stack:
            for deferred in self._deferred.values():
                stack.enter_context(deferred.resumed())
            try:
                yield
            except BaseException as error:
                self._failed = f"{type(error).__name__}: {error}"
                raise


def _remove_all(deferred: Iterable[WeightGradients]) -> None:
    for gradients in deferred:
        gradients.remove()


def _schedule(schedule: str | Schedule, num_devices: int, num_microbatches: int) -> Schedule:
    if isinstance(schedule, str):
        return generate(schedule, num_devices, num_microbatches)
    if (schedule.num_devices, schedule.num_microbatches) != (num_devices, num_microbatches):
        raise InvalidArgument(
            f"the schedule is for {schedule.num_devices} devices and {schedule.num_microbatches} microbatches, the "
            f"group has {num_devices} and num_microbatches={num_microbatches}: give one that fits."
        )
    check(schedule)
    return schedule


def _mean(losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack([loss.reshape(()) for loss in losses]).mean() if losses else None


def _forwards(schedule: Schedule) -> Schedule:
    orders = tuple(tuple(action for action in order if action.kind is Kind.FORWARD) for order in schedule.orders)
    return Schedule(orders, schedule.stage_devices, schedule.num_microbatches)


def _device_of(stages: Iterable[Stage], group: dist.ProcessGroup | None) -> torch.device:
    """Where parameters are, or buffers; with neither, where the group's backend exchanges tensors."""
    stages = tuple(stages)
    for tensors in (torch.nn.Module.parameters, torch.nn.Module.buffers):
        for stage in stages:
            for tensor in tensors(stage):
                return tensor.device
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _signature(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return tuple(part.shape), str(part.dtype)
    if isinstance(part, Mapping):
        return tuple((name, _signature(value)) for name, value in part.items())
    if isinstance(part, tuple | list):
        return tuple(map(_signature, part))
    return type(part).__name__

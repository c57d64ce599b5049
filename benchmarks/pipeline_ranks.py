"""What runs in the processes of ``benchmarks.pipeline``: steps of ours, and of torch's runtimes, of one model."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as theirs

from stowplan.core.schedule import Kind, loop_placement, v_placement
from stowplan.offload.memory_log import memory_log
from stowplan.offload.storages import storage_bytes
from stowplan.planner.schedule import generate
from stowplan.runtime.pipeline.executor import Executor
from stowplan.runtime.pipeline.pipeline import Pipeline
from stowplan.runtime.pipeline.stages import split
from stowplan.runtime.pipeline.transfers import Form, Link, Transfers

__all__ = ["OURS", "THEIRS", "Setting", "makespans", "on_ranks", "peaks", "seconds"]

# What each contender stands for: how many stages a device has, and where.
OURS = ("v-zb", "v-half", "v-min", "1f1b", "interleaved")
THEIRS = {
    "torch ZBV": ("v", theirs.ScheduleZBVZeroBubble),
    "torch 1F1B": ("loop", theirs.Schedule1F1B),
    "torch Interleaved1F1B": ("two", theirs.ScheduleInterleaved1F1B),
    "torch runtime, our v-half": ("v", None),
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """The sizes of a model and its batch; times of a stage that sleeps, in seconds."""

    num_microbatches: int
    hidden: int = 64
    sequence: int = 128
    rows: int = 2
    vocabulary: int = 128
    sleeps: tuple[float, float, float] = (0.020, 0.026, 0.016)


def on_ranks(size: int, function: Callable[..., Any], *args: Any, daemon: bool = True) -> list[Any]:
    """``function(*args)`` in ``size`` processes of one gloo group; gives their results. Daemons start no processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.pipeline_ranks", "transformers.models.llama.modeling_llama"])
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (size, str(Path(folder) / "store"), answers, function, args)
        processes = [context.Process(target=_serve, args=(rank, *given), daemon=daemon) for rank in range(size)]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        for _ in processes:
            rank, fine, answer = answers.get()
            if not fine:
                for process in processes:
                    process.kill()
                raise RuntimeError(f"rank {rank}: {answer}")
            found[rank] = answer
        for process in processes:
            process.join()
    return [found[rank] for rank in range(size)]


def _serve(rank: int, size: int, store: str, answers: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        answer: tuple[int, bool, Any] = rank, True, function(*args)
        dist.barrier()
    except Exception:  # noqa: BLE001 - raised where processes were started
        answer = rank, False, traceback.format_exc()
    answers.put(answer)


# ---- a real model ----------------------------------------------------------------------------------------------------


def _llama(setting: Setting, size: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=setting.hidden, intermediate_size=3 * setting.hidden, num_hidden_layers=2 * size,
        vocab_size=setting.vocabulary, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def _ids(setting: Setting) -> torch.Tensor:
    shape = (setting.num_microbatches * setting.rows, setting.sequence)
    return torch.randint(setting.vocabulary, shape, generator=torch.Generator().manual_seed(1))


class _ForTorch(torch.nn.Module):
    """One of our stages, called as torch's runtime calls modules; the last one gives the loss."""

    def __init__(self, stage: torch.nn.Module, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.stage, self.is_first, self.is_last = stage, is_first, is_last

    def forward(self, given: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self.is_first:
            return self.stage(None, {"input_ids": given})
        return self.stage(given, {"labels": labels} if self.is_last else None)


@dataclass
class _Contender:
    step: Callable[[], object]
    modules: list[torch.nn.Module]


def _ours(name: str, setting: Setting) -> _Contender:
    size = dist.get_world_size()
    pipeline = Pipeline(_llama(setting, size), num_microbatches=setting.num_microbatches, schedule=name)
    ids = _ids(setting)
    return _Contender(lambda: pipeline.step({"input_ids": ids, "labels": ids}), list(pipeline.stages.values()))


def _placement(name: str, size: int) -> tuple[int, ...]:
    return {"v": v_placement(size), "loop": loop_placement(size), "two": loop_placement(size, 2)}[THEIRS[name][0]]


def _runtime(name: str, stages: list[PipelineStage], num_microbatches: int) -> Any:
    """Torch's runtime at its best: no gradients are scaled, no outputs kept."""
    kind = THEIRS[name][1]

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.mean() / num_microbatches

    if kind is theirs.Schedule1F1B:
        return kind(stages[0], num_microbatches, loss_fn=loss_fn, scale_grads=False)
    if kind is not None:
        return kind(stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
    runtime = theirs._PipelineScheduleRuntime(stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.csv"
        generate("v-half", stages[0].group_size, num_microbatches).save_csv(path)
        runtime._load_csv(str(path), "compute_only")
    return runtime


def _torchs(name: str, setting: Setting) -> _Contender:
    size = dist.get_world_size()
    placement = _placement(name, size)
    own = [stage for stage, device in enumerate(placement) if device == dist.get_rank()]
    count = len(placement)
    parts = split(_llama(setting, size), count, keep=own)
    modules = {stage: _ForTorch(part, stage == 0, stage == count - 1) for stage, part in parts.items()}
    stages = [PipelineStage(module, stage, count, CPU) for stage, module in modules.items()]
    runtime = _runtime(name, stages, setting.num_microbatches)
    ids = _ids(setting)

    def step() -> None:
        target = {"target": ids} if count - 1 in own else {}
        runtime.step(*([ids] if 0 in own else []), labels=ids, return_outputs=False, **target)

    return _Contender(step, list(modules.values()))


def _contender(name: str, setting: Setting) -> _Contender:
    return _ours(name, setting) if name in OURS else _torchs(name, setting)


def peaks(names: Sequence[str], setting: Setting) -> dict[str, int]:
    """The most live bytes of this process in the second step of each contender: parameters, gradients, all else."""
    found = {}
    for name in names:
        gc.collect()
        dist.barrier()
        contender = _contender(name, setting)
        tensors = [t for module in contender.modules for t in (*module.parameters(), *module.buffers())]
        with memory_log(CPU) as log:
            contender.step()  # whatever is made once, and stays, is made while the log is open
            dist.barrier()
            log.mark("second")
            contender.step()
            log.mark("end")
        (second,) = (segment for segment in log.segments if segment.name == "second")
        found[name] = storage_bytes(tensors) + second.peak_bytes
    return found


def seconds(names: Sequence[str], setting: Setting, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of steps of all contenders in turns."""
    return _in_turns({name: _contender(name, setting).step for name in names}, num_rounds)


def _in_turns(steps: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - begin)
    return found


# ---- stages that sleep -----------------------------------------------------------------------------------------------


class _Sleep(torch.autograd.Function):
    """Takes its time instead of computing."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        time.sleep(ctx.backward_seconds)
        return gradients[0], None, None, None


class _Sleeper(torch.nn.Module):
    """``size`` stages' worth of sleep."""

    def __init__(self, sleeps: Sequence[float], size: int, is_last: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.forward_seconds, self.backward_seconds, self.weight_seconds = (size * value for value in sleeps)
        self.is_last = is_last

    def forward(self, given: torch.Tensor | None, inputs: torch.Tensor | None = None) -> torch.Tensor:
        out = _Sleep.apply(inputs if given is None else given, self.weight, self.forward_seconds, self.backward_seconds)
        return out.mean() if self.is_last else out

    def run(self) -> None:
        """The weight gradient."""
        time.sleep(self.weight_seconds)

    def tensors(self) -> list[torch.Tensor]:
        """Nothing is held for it."""
        return []


_WIDTH = 4096


def _sleeping_ours(name: str, link: Link, setting: Setting) -> Callable[[], object]:
    schedule = generate(name, link.size, setting.num_microbatches)
    forward, backward, weights = setting.sleeps
    if all(action.kind is not Kind.WEIGHT_GRADIENT for order in schedule.orders for action in order):
        backward, weights = backward + weights, 0.0  # then nothing is put off, as in Pipeline
    stages = _sleepers(schedule.stage_devices, (forward, backward, weights))
    collects = {number: (lambda stage=stage: stage) for number, stage in stages.items()}
    executor = Executor(schedule, Transfers(schedule, link), stages, collects)
    forms = [None, *[Form((1, _WIDTH), torch.float32)] * (schedule.num_stages - 1)]
    inputs = [torch.ones(1, _WIDTH)] * setting.num_microbatches
    return lambda: executor.step(forms, inputs, torch.ones(()))


def _sleepers(placement: Sequence[int], sleeps: Sequence[float]) -> dict[int, _Sleeper]:
    """Stages of this process: as many seconds a device, however many stages it has."""
    size = 2 * dist.get_world_size() // len(placement)
    last = len(placement) - 1
    own = [stage for stage, device in enumerate(placement) if device == dist.get_rank()]
    return {stage: _Sleeper(sleeps, size, stage == last) for stage in own}


def _sleeping_torchs(name: str, setting: Setting) -> Callable[[], object]:
    placement = _placement(name, dist.get_world_size())
    sleepers = _sleepers(placement, setting.sleeps)
    stages = [
        PipelineStage(sleeper, number, len(placement), CPU, dw_builder=lambda sleeper=sleeper: sleeper.run)
        for number, sleeper in sleepers.items()
    ]
    runtime = _runtime(name, stages, setting.num_microbatches)
    inputs = torch.ones(setting.num_microbatches, _WIDTH)

    def step() -> None:
        target = {"target": inputs} if len(placement) - 1 in sleepers else {}
        runtime.step(*([inputs] if 0 in sleepers else []), return_outputs=False, **target)

    return step


def makespans(names: Sequence[str], setting: Setting, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of steps in which all work is sleep, in turns."""
    link = Link(None, CPU)
    steps = {
        name: _sleeping_ours(name, link, setting) if name in OURS else _sleeping_torchs(name, setting) for name in names
    }
    return _in_turns(steps, num_rounds)

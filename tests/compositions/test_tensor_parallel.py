"""Tensor parallel blocks (DTensor): they keep what they save, with a warning, and their collectives run once."""

from __future__ import annotations

import time
import warnings
from typing import Any
from unittest.mock import patch

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stowplan
from stowplan.core.program import Action
from stowplan.offload.capture.instruments import RealInstruments
from tests import models
from tests.compositions.loops import assert_moved, assert_same, plan_for, steps, text_batch
from tests.distributed import Ranks


def parallelize(model: Any, num_blocks: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    ways = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for block in model.model.layers[:num_blocks]:
        parallelize_module(block, mesh, ways)
    return model


def planning(rank: int) -> None:
    model = parallelize(models.llama(), 3)
    plan = stowplan.plan(model, text_batch(0), budget="1GiB", host_budget="1GiB")
    assert all(program.values[i].actions == (Action.KEEP,) for program in plan.step.programs for i in program.saved)
    assert any("keeps everything: autograd saves a DTensor" in line for line in plan.assumptions)


def test_planning_says_that_tensor_parallel_blocks_keep_everything(ranks: Ranks) -> None:
    ranks.run(planning)


def planning_on_a_slow_rank(rank: int) -> None:
    slowness = 1 if rank == 0 else 10_000
    with patch.object(RealInstruments, "seconds", lambda self: slowness * time.perf_counter()):
        planning(rank)


def test_planning_runs_collectives_as_often_on_a_slow_rank(ranks: Ranks) -> None:
    ranks.run(planning_on_a_slow_rank)


def training(rank: int) -> None:
    expected = steps(parallelize(models.llama(), 2))
    model = parallelize(models.llama(), 2)
    with stowplan.apply(plan_for(seed=2), model) as handle, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert_same(steps(model), expected)
    said = [str(warning.message) for warning in warned]
    assert sum("keeps everything it saves: autograd saves a DTensor" in line for line in said) == 2
    assert_moved(handle)  # the third block is an ordinary one


def test_a_plan_of_the_whole_model_keeps_what_parallel_blocks_save(ranks: Ranks) -> None:
    ranks.run(training)

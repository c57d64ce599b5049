from __future__ import annotations

import json
from pathlib import Path

import pytest

import stowplan
from stowplan.core.plan import Plan
from stowplan.reports.text import render
from tests.cli.commands import run, told

JOB = """
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


def job():
    model = Model()
    return {"model": model, "batch": {"x": torch.randn(256, 32)}, "optimizer": torch.optim.AdamW(model.parameters())}


def failing():
    raise RuntimeError("no data")


def wrong():
    return 1, 2
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "the_job.py"
    path.write_text(JOB)
    return path


# ---- plan: what is refused before anything is made -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either --model PLACE:FUNCTION or --model-config PATH."),
        (["--model", "a:b", "--model-config", "c"], "give either --model PLACE:FUNCTION or --model-config PATH."),
        (["--model", "a:b", "--seq-len", "8"], "go with --model-config only"),
        (["--model", "a:b", "--budget", "0.5"], "--budget='0.5' has a fraction but no unit"),
        (["--model", "a:b", "--host-budget", "lots"], "--host-budget='lots' is not a size"),
        (["--model", "a:b", "--tolerance", "1e-5"], "--tolerance goes with --inexact."),
        (["--model", "a:b", "--snapshot-m", "2"], "go with --snapshots NODES"),
        (["--model", "a:b", "--snapshots", "2", "--snapshot-m", "2"], "rs takes 3 or more"),
        (["--model", "a:b", "--hardware", "tpu"], "hardware='tpu' is not known; allowed: a100-sxm"),
        (["--model", "a:b", "--out", "/nowhere/plan.json"], "give a file in a directory that exists"),
        (["--model", "nothing"], "'nothing' is no function; allowed: module:function or path/to/file.py:function"),
        (["--model", "/nowhere/job.py:job"], "there is no file '/nowhere/job.py'"),
        (["--model", "no_such_module:job"], "no_such_module raised ModuleNotFoundError"),
        (["--model-config", "/nowhere"], "there is no file '/nowhere'"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], reason: str) -> None:
    assert reason in told(run("plan", *arguments), 2)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("failing", "raised RuntimeError: no data"),
        ("wrong", "gave a int as model; allowed: a dict or object with model, batch"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_function_that_makes_no_job(function: str, reason: str, job_file: Path) -> None:
    assert reason in told(run("plan", "--model", f"{job_file}:{function}"), 2)


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_a_report_and_writes_the_plan(job_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run("plan", "--model", f"{job_file}:job", "--budget", "1GiB", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == render(Plan.load(out))
    assert "making the model" in result.stderr


def test_plan_writes_the_buffers_of_the_step(job_file: Path, tmp_path: Path) -> None:
    out, plan_file = tmp_path / "step.csv", tmp_path / "plan.json"
    result = run("plan", "--model", f"{job_file}:job", "--budget", "1GiB", "--allocations", out, "--out", plan_file)
    assert result.exit_code == 0, result.output
    assert "ADDRESSES" in result.stdout
    trace = stowplan.allocations(Plan.load(plan_file))
    assert out.read_text() == trace.to_csv()
    assert out.read_text().startswith("id,lower,upper,size,kind,segment\n0,0,")
    assert run("report", plan_file).stdout == result.stdout
    for solver in ("greedy", "bilevel"):
        packed = run("pack", out, "--solver", solver, "--time-limit", "1")
        assert packed.exit_code == 0, packed.output


def test_the_buffers_of_the_step_go_to_a_file(job_file: Path) -> None:
    message = told(run("plan", "--model", f"{job_file}:job", "--budget", "1GiB", "--allocations", "-"), 2)
    assert message == "stowplan: --allocations takes the name of a file: stdout is for the report."


def test_plan_as_json_has_stdout_to_itself(job_file: Path) -> None:
    result = run("plan", "--model", f"{job_file}:job", "--budget", "1GiB", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["budget_bytes"] == 2**30
    assert Plan.from_json(result.stdout).model == "Model"


def test_a_plan_need_not_be_exact(job_file: Path) -> None:
    result = run("plan", "--model", f"{job_file}:job", "--budget", "1GiB", "--json", "--inexact", "--tolerance", "1e-4")
    assert result.exit_code == 0, result.output
    plan = Plan.from_json(result.stdout)
    assert (plan.exact, plan.tolerance) == (False, 1e-4)


def test_snapshots_are_counted(job_file: Path) -> None:
    planned = ("plan", "--model", f"{job_file}:job", "--budget", "1GiB", "--json")
    result = run(*planned, "--host-budget", "1GiB", "--snapshots", "4", "--snapshot-m", "2", "--snapshot-code", "rs")
    assert result.exit_code == 0
    snapshots = Plan.from_json(result.stdout).snapshots
    assert snapshots is not None
    assert 0 < snapshots.data_bytes <= snapshots.parity_bytes < snapshots.data_bytes + 1024
    assert run(*planned, "--host-budget", "1MiB", "--snapshots", "4").exit_code == 3


def test_an_infeasible_budget_names_the_least(job_file: Path) -> None:
    line = told(run("plan", "--model", f"{job_file}:job", "--budget", "1KiB"), 3)
    assert "no plan fits a budget of 1.00 KiB" in line
    assert "the least feasible budget is" in line


def test_blocks_that_are_not_there(job_file: Path) -> None:
    assert "decoder.layers" in told(run("plan", "--model", f"{job_file}:job", "--blocks", "decoder.layers"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bf16-autocast"])
def test_plan_of_a_config(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ["--seq-len", "64", "--batch-size", "2", "--dtype", dtype]
    result = run("plan", "--model-config", tmp_path, *shape, "--budget", "1GiB", "--json")
    assert result.exit_code == 0, result.output
    plan = Plan.from_json(result.stdout)
    assert plan.step.num_blocks == 3
    num_bytes = 2 if dtype == "bfloat16" else 4
    assert plan.step.parameter_bytes == num_bytes * (
        2 * 100 * 64 + 3 * (64 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 64) + 64
    )

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from stowplan.core.errors import InvalidArgument  # noqa: E402
from stowplan.jobs import Job, OptimizerName, Precision, job_from_config, job_from_function  # noqa: E402

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def _function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / f"made_for_{tmp_path.name}.py"  # modules stay loaded: every test has its own
    path.write_text(f"import torch\nmodel, batch = torch.nn.Linear(2, 2), torch.ones(1, 2)\n{body}\n")
    return str(path)


@pytest.mark.parametrize(
    "body",
    [
        "job = lambda: (model, batch)",
        "job = lambda: {'model': model, 'batch': batch}",
        "class job:\n    def __init__(self):\n        self.model, self.batch = model, batch",
        "job = lambda: (model, batch, torch.optim.SGD(model.parameters()))",
    ],
)
def test_a_function_may_return_a_tuple_a_dict_or_an_object(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_from_function(f"{_function(tmp_path, monkeypatch, body)}:job")
    assert isinstance(job.model, torch.nn.Linear)
    assert job.batch.shape == (1, 2)
    assert (job.optimizer is not None) == ("SGD" in body)


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path(_function(tmp_path, monkeypatch, "job = lambda: (model, batch)")).stem
    monkeypatch.chdir(tmp_path)
    assert isinstance(job_from_function(f"{name}:job"), Job)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("None", "gave a NoneType as model"),
        ("(model,)", "gave a NoneType as model"),
        ("(model, None)", "gave no batch"),
        ("(model, batch, 'adam')", "gave a str as optimizer"),
    ],
)
def test_what_is_no_job_is_refused(returned: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _function(tmp_path, monkeypatch, f"job = lambda: {returned}")
    with pytest.raises(InvalidArgument, match=reason):
        job_from_function(f"{path}:job")


def test_an_error_in_the_function_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _function(tmp_path, monkeypatch, "def job():\n    return 1 / 0")
    with pytest.raises(InvalidArgument, match=r"raised ZeroDivisionError: .* \(.*made_for_\w+\.py, line 4\)"):
        job_from_function(f"{path}:job")


def test_a_config_makes_a_model_that_trains(config: Path) -> None:
    job = job_from_config(config, seq_len=16, batch_size=2)
    assert {name: tuple(tensor.shape) for name, tensor in job.batch.items()} == {
        "input_ids": (2, 16),
        "labels": (2, 16),
    }
    assert isinstance(job.optimizer, torch.optim.AdamW)
    assert job.model.training
    output = job.model(**job.batch)
    output.loss.backward()
    assert output.get("past_key_values") is None


def test_a_directory_of_a_config_will_do(config: Path) -> None:
    again: list[Any] = [
        job_from_config(path, seq_len=8, batch_size=1).batch["input_ids"] for path in (config, config.parent)
    ]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("precision", "weights", "logits"),
    [
        (Precision.FLOAT32, torch.float32, torch.float32),
        (Precision.BFLOAT16, torch.bfloat16, torch.bfloat16),
        (Precision.BF16_AUTOCAST, torch.float32, torch.bfloat16),
    ],
)
def test_precisions(config: Path, precision: Precision, weights: Any, logits: Any) -> None:
    job = job_from_config(config, seq_len=8, batch_size=1, precision=precision)
    assert {parameter.dtype for parameter in job.model.parameters()} == {weights}
    with job.surroundings():
        assert job.model(**job.batch).logits.dtype == logits


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("none", type(None))])
def test_optimizers(config: Path, name: str, kind: type) -> None:
    job = job_from_config(config, seq_len=8, batch_size=1, optimizer=OptimizerName(name))
    assert isinstance(job.optimizer, kind)


def test_a_sequence_longer_than_the_positions_is_refused(config: Path) -> None:
    with pytest.raises(InvalidArgument, match="--seq-len 65 is more than the 64 positions"):
        job_from_config(config, seq_len=65, batch_size=1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no config that transformers reads"),
        ('{"model_type": "unheard-of"}', "is no config that transformers reads"),
        ("{}", "is no config that transformers reads"),
        ('{"model_type": "vit"}', "no causal language model"),
        ('{"model_type": "bart", "is_encoder_decoder": true, "vocab_size": -1}', "no causal language model"),
        (json.dumps({**LLAMA, "hidden_size": -32}), "makes no causal language model"),
    ],
)
def test_what_is_no_language_model_is_refused(text: str, reason: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(InvalidArgument, match=reason):
        job_from_config(config, seq_len=8, batch_size=1)

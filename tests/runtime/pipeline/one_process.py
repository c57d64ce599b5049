"""What one process computes with the whole model: the truth for pipelines, which ranks read from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from stowplan.core.schedule import Schedule
from stowplan.planner.schedule import Costs, search

__all__ = ["Case", "adaptive", "batch_of", "build", "differing", "optimizer_of", "truth"]

VOCABULARY = 64


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    model: str = "llama"  # or gpt2, dropout off
    num_layers: int = 4
    num_microbatches: int = 6
    num_steps: int = 3
    tied: bool = False
    amp: bool = False
    rows: int = 1  # of a microbatch
    sequence: int = 8
    hidden: int = 16
    max_norm: float | None = None


def build(case: Case) -> Any:
    """The model in training mode, always with the same weights."""
    torch.manual_seed(0)
    if case.model == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=case.hidden, n_layer=case.num_layers, n_head=4, vocab_size=VOCABULARY, n_positions=128,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM", tie_word_embeddings=case.tied,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).train()
    config = transformers.LlamaConfig(
        hidden_size=case.hidden, num_hidden_layers=case.num_layers, intermediate_size=3 * case.hidden,
        vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=case.tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch_of(case: Case, step: int = 0, shift: int = 0) -> dict[str, torch.Tensor]:
    """Tokens of all microbatches; another ``shift`` gives other tokens."""
    generator = torch.Generator().manual_seed(1000 * shift + step)
    ids = torch.randint(VOCABULARY, (case.num_microbatches * case.rows, case.sequence), generator=generator)
    return {"input_ids": ids, "labels": ids}


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def truth(case: Case, path: Path, prepare: Callable[[Any], object] = lambda model: None) -> str:
    """Train the whole model; losses, gradients of each step, norms and final parameters go to ``path``."""
    model = build(case)
    prepare(model)
    optimizer = optimizer_of(model.parameters())
    found: dict[str, Any] = {"losses": [], "gradients": [], "norms": []}
    for step in range(case.num_steps):
        batch = batch_of(case, step)
        losses = []
        for part in range(case.num_microbatches):
            rows = slice(part * case.rows, (part + 1) * case.rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
                loss = model(**{name: value[rows] for name, value in batch.items()}, use_cache=False).loss
            losses.append(loss.detach())
            (loss / case.num_microbatches).backward()
        found["losses"].append(torch.stack(losses).mean())
        if case.max_norm is not None:
            found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_norm))
        found["gradients"].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    found["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.save(found, path)
    return str(path)


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float = 0.0) -> list[str]:
    """Names in ``ours`` whose tensors are not ``theirs``: bit for bit, or up to ``relative`` of the largest element."""
    found = []
    for name, tensor in ours.items():
        truth = theirs[name]
        near = relative and (tensor - truth).abs().max() <= relative * truth.abs().max()
        if not (near or torch.equal(tensor, truth)):
            found.append(name)
    return found


def adaptive(
    num_devices: int, num_microbatches: int, limit: int, seconds: Sequence[float] = (10, 13, 8), steps: int = 20_000
) -> Schedule:
    """What the search finds for a limit of microbatches."""
    costs = replace(Costs.uniform(2 * num_devices, seconds), communication_seconds=1.0)
    return search(costs, num_devices, num_microbatches, limit_microbatches=limit, steps=steps).schedule

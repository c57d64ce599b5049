"""Small random-initialised models of real architectures, and the loop that trains them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

__all__ = ["batch_for", "gpt2", "llama", "train"]

VOCABULARY = 64


def llama(num_blocks: int = 3, hidden: int = 32, attention: str = "sdpa") -> torch.nn.Module:
    """A Llama with grouped-query attention."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=num_blocks,
        intermediate_size=hidden * 11 // 4,
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def gpt2(num_blocks: int = 3, hidden: int = 32, attention: str = "sdpa") -> torch.nn.Module:
    """A GPT-2 with its usual dropout of 0.1 in attention, residuals and embeddings."""
    config = transformers.GPT2Config(
        n_embd=hidden,
        n_layer=num_blocks,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).train()


def batch_for(step: int, batch: int = 2, sequence: int = 16) -> dict[str, Any]:
    """Random tokens, the same for the same step."""
    ids = torch.randint(VOCABULARY, (batch, sequence), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def train(model: torch.nn.Module, num_steps: int = 3, amp: bool = False, **batch: int) -> list[torch.Tensor]:
    """Train with AdamW; everything that must not differ: losses, gradients, parameters, the generator's position."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(7)
    seen: list[torch.Tensor] = []
    for step in range(num_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(**batch_for(step, **batch)).loss
        loss.backward()
        seen.append(loss.detach().clone())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(p.detach().clone() for p in model.parameters()), torch.rand(1)]

"""Models of several architectures with a few layers, and steps of them: whole, and stage after stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers

from stowplan.runtime.pipeline.stages import Stage, microbatches

__all__ = ["MODELS", "NUM_LAYERS", "Step", "batch_of", "build", "staged_step", "whole_step"]

NUM_LAYERS = 6
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "attention_dropout": 0.1}
_OPT = {**_COMMON, "ffn_dim": 64, "dropout": 0.1, "layerdrop": 0.0}

t = transformers
MODELS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", t.LlamaConfig, {**_GROUPED, "attention_dropout": 0.1}),
    "qwen3": ("Qwen3ForCausalLM", t.Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", t.MistralConfig, {**_GROUPED, "sliding_window": 5}),
    "gemma2": ("Gemma2ForCausalLM", t.Gemma2Config, _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", t.Gemma3TextConfig, _GEMMA),
    "phi": ("PhiForCausalLM", t.PhiConfig, {**_GROUPED, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
    "neox": ("GPTNeoXForCausalLM", t.GPTNeoXConfig, {**_COMMON, "intermediate_size": 64, "hidden_dropout": 0.1}),
    "mixtral": ("MixtralForCausalLM", t.MixtralConfig, {**_GROUPED, "num_local_experts": 4}),
    "gpt2": ("GPT2LMHeadModel", t.GPT2Config, {**_COMMON, "loss_type": "ForCausalLM"}),  # dropout of 0.1
    "opt": ("OPTForCausalLM", t.OPTConfig, _OPT),
    # Projections from the embedding, and back to it.
    "opt, narrow embedding": ("OPTForCausalLM", t.OPTConfig, {**_OPT, "word_embed_proj_dim": 16}),
    # A norm after the embedding, and a bias for all layers that is made of the mask.
    "bloom": ("BloomForCausalLM", t.BloomConfig, {**_COMMON, "hidden_dropout": 0.1}),
    # Layers that give tuples.
    "gptj": ("GPTJForCausalLM", t.GPTJConfig, {**_COMMON, "rotary_dim": 4}),
}


def build(name: str, **options: Any) -> torch.nn.Module:
    """A model in training mode, always with the same weights."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(transformers, kind)(config(**settings | options))
    return model.train()


def batch_of(size: int = 4, sequence: int = 12, padded: bool = False) -> dict[str, Any]:
    """Random tokens; rows of unequal lengths if padded, the padding masked and without labels."""
    ids = torch.randint(3, 64, (size, sequence), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    mask = (torch.arange(sequence) < sequence - torch.arange(size)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


class Step(NamedTuple):
    """What must not differ: losses, gradients by the parameters' names, where the random generator stands."""

    losses: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    random: torch.Tensor

    def differs(self, other: Step, but: Sequence[str] = ()) -> list[str]:
        """Where two steps are not the same bit for bit."""
        found = [f"loss {i}" for i, pair in enumerate(zip(self.losses, other.losses, strict=True)) if not _same(*pair)]
        found += [] if torch.equal(self.random, other.random) else ["random numbers"]
        names = {*self.gradients, *other.gradients} - {*but}
        return found + sorted(name for name in names if not _same(self.gradients.get(name), other.gradients.get(name)))


def _same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return ours is theirs or (ours is not None and theirs is not None and torch.equal(ours, theirs))


def whole_step(model: torch.nn.Module, batch: dict[str, Any], count: int = 2, amp: bool = False) -> Step:
    """Forward and backward of each microbatch; gradients are taken away again."""
    torch.manual_seed(7)
    losses = []
    for part in microbatches(batch, count):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(**part, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return _finished([model], losses)


def staged_step(
    stages: Mapping[int, Stage], batch: Any, count: int = 2, amp: bool = False, middle: bool = True
) -> Step:
    """The same through stages, each cut off from the others as in processes of their own.

    ``middle``: do stages in the middle get the batch, too?
    """
    torch.manual_seed(7)
    losses = []
    for part in microbatches(batch, count):
        pairs: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        given = None
        for stage in stages.values():
            hidden = None if given is None else given.detach().requires_grad_()
            wanted = middle or stage.is_first or stage.is_last
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                given = stage(hidden, part if wanted else None)
            pairs.append((hidden, given))
        assert given is not None
        losses.append(given.detach())
        gradient = None
        for hidden, given in reversed(pairs):
            given.backward(gradient)
            gradient = None if hidden is None else hidden.grad
    return _finished(list(stages.values()), losses)


def _finished(modules: Sequence[torch.nn.Module], losses: list[torch.Tensor]) -> Step:
    parameters = [named for module in modules for named in module.named_parameters(remove_duplicate=False)]
    gradients = {name: parameter.grad for name, parameter in parameters}
    for _, parameter in parameters:
        parameter.grad = None
    return Step(losses, gradients, torch.rand(1))

"""Small random-initialised models of many real architectures, a training batch for each, and the loop for all.

Sizes are small, shapes are odd on purpose: padded and unpadded batches, encoders and decoders of unequal lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

__all__ = ["ZOO", "Specimen", "train"]

VOCABULARY = 64
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}

Batch = dict[str, Any]


@dataclass(frozen=True)
class Specimen:
    """A model and its batches. ``attentions`` are the implementations that it can be asked for.

    ``build(attention)`` gives the model in training mode, always with the same weights; ``batch(step)`` the arguments
    of its forward, always the same for the same step.
    """

    build: Callable[[str], nn.Module]
    batch: Callable[[int], Batch]
    num_blocks: int
    attentions: tuple[str, ...] = ("sdpa", "eager")
    blocks: str | None = None


def _of_config(kind: str, config: Callable[[], Any]) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        torch.manual_seed(0)
        made = config()
        made._attn_implementation = attention
        model: nn.Module = getattr(transformers, kind)(made)
        return model.train()

    return build


def _numbers(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def tokens(step: int, batch: int = 2, sequence: int = 12) -> Batch:
    """What a decoder is trained on."""
    ids = torch.randint(1, VOCABULARY, (batch, sequence), generator=_numbers(step))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def padded(step: int, batch: int = 3, sequence: int = 12) -> Batch:
    """What an encoder is trained on: rows of unequal lengths, padded, the padding masked and without labels."""
    ids = torch.randint(1, VOCABULARY, (batch, sequence), generator=_numbers(step))
    mask = (torch.arange(sequence) < torch.tensor([sequence, sequence - 3, sequence - 7])[:batch, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def pairs(step: int) -> Batch:
    """What an encoder and decoder are trained on; the two sides have unequal lengths."""
    source = padded(step, 2, 12)
    source["labels"] = torch.randint(1, VOCABULARY, (2, 7), generator=_numbers(step + 1000))
    return {**source, "use_cache": False}


def packed(step: int) -> Batch:
    """Three texts in one row: positions begin anew with each, and no text sees another."""
    lengths = torch.tensor([5, 3, 4])
    text = torch.repeat_interleave(torch.arange(3), lengths)
    inside = (text[:, None] == text) & torch.ones(12, 12, dtype=torch.bool).tril()
    mask = torch.zeros(12, 12).masked_fill(~inside, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    batch = tokens(step, batch=1)
    return {**batch, "attention_mask": mask[None, None], "position_ids": positions}


def images(step: int) -> Batch:
    pixels = torch.randn(2, 3, 32, 32, generator=_numbers(step))
    return {"pixel_values": pixels, "labels": torch.randint(5, (2,), generator=_numbers(step))}


class PlainEncoder(nn.Module):
    """torch's own encoder between an embedding and a head, with a padding mask and its usual dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"loss": nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())}


def _plain_encoder(attention: str) -> nn.Module:
    torch.manual_seed(0)
    return PlainEncoder().train()


t = transformers
ZOO: dict[str, Specimen] = {
    "bert": Specimen(
        _of_config("BertForMaskedLM", lambda: t.BertConfig(**COMMON, intermediate_size=64)), padded, num_blocks=2
    ),
    "vit": Specimen(
        _of_config(
            "ViTForImageClassification",
            lambda: t.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
                num_labels=5,
                hidden_dropout_prob=0.1,
            ),
        ),
        images,
        num_blocks=2,
    ),
    "t5": Specimen(
        _of_config(
            "T5ForConditionalGeneration",
            lambda: t.T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            ),
        ),
        pairs,
        num_blocks=4,
    ),
    "qwen3": Specimen(_of_config("Qwen3ForCausalLM", lambda: t.Qwen3Config(**LLAMA_LIKE, head_dim=8)), tokens, 2),
    "llama, packed": Specimen(_of_config("LlamaForCausalLM", lambda: t.LlamaConfig(**LLAMA_LIKE)), packed, 2),
    "neox": Specimen(
        _of_config("GPTNeoXForCausalLM", lambda: t.GPTNeoXConfig(**COMMON, intermediate_size=64, hidden_dropout=0.1)),
        tokens,
        num_blocks=2,
    ),
    "mistral": Specimen(
        _of_config("MistralForCausalLM", lambda: t.MistralConfig(**LLAMA_LIKE, sliding_window=5)), tokens, num_blocks=2
    ),
    # Two kinds of attention in turn: over a window, and over everything.
    "gemma3": Specimen(
        _of_config(
            "Gemma3ForCausalLM",
            lambda: t.Gemma3TextConfig(
                **LLAMA_LIKE,
                head_dim=8,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
            ),
        ),
        tokens,
        num_blocks=2,
    ),
    "opt": Specimen(
        _of_config(
            "OPTForCausalLM",
            lambda: t.OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32),
        ),
        tokens,
        num_blocks=2,
    ),
    "mixtral": Specimen(
        _of_config(
            "MixtralForCausalLM", lambda: t.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
        ),
        tokens,
        num_blocks=2,
    ),
    # Tokens are gathered for each expert, as many as there are: shapes depend on data.
    "mixtral, looping": Specimen(
        _of_config(
            "MixtralForCausalLM",
            lambda: t.MixtralConfig(
                **LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
            ),
        ),
        tokens,
        num_blocks=2,
    ),
    "torch encoder": Specimen(_plain_encoder, padded, num_blocks=2, attentions=("sdpa",)),
    "convnext": Specimen(
        _of_config(
            "ConvNextForImageClassification",
            lambda: t.ConvNextConfig(
                hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=32, num_labels=5, drop_path_rate=0.1
            ),
        ),
        images,
        num_blocks=4,
        attentions=("eager",),
    ),
    # Batch norms: their running statistics are among what is compared.
    "resnet": Specimen(
        _of_config(
            "ResNetForImageClassification",
            lambda: t.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5
            ),
        ),
        images,
        num_blocks=4,
        attentions=("eager",),
    ),
    # One block for all layers.
    "albert": Specimen(
        _of_config(
            "AlbertForMaskedLM",
            lambda: t.AlbertConfig(**COMMON, embedding_size=16, intermediate_size=64, hidden_dropout_prob=0.1),
        ),
        padded,
        num_blocks=2,
        blocks="albert.encoder.albert_layer_groups",
    ),
}


def train(specimen: Specimen, model: nn.Module, amp: bool, num_steps: int = 3) -> list[torch.Tensor]:
    """Train with AdamW; everything that must not differ: losses, gradients, parameters, buffers, the generator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(7)
    seen: list[torch.Tensor] = []
    for step in range(num_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            output = model(**specimen.batch(step))
        loss = output["loss"]
        loss.backward()
        seen.append(loss.detach().clone())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())), torch.rand(1)]

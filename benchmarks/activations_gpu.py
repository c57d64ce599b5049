"""Step time and peak allocated bytes of a larger Llama on a CUDA device: stowplan beside torch's own ways.

Nothing in ``benchmarks/results`` comes from this yet: it has not been run.
``python -m benchmarks.activations_gpu --help``
"""

from __future__ import annotations

import functools
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.activations import Setting, arguments, show, take_turns
from stowplan import demo


def make_model(hidden: int, num_blocks: int, sequence: int) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=num_blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=sequence,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).train()


def main() -> None:
    parser = arguments(__doc__, "benchmarks/results/activations_gpu.json")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=8192)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("activations_gpu needs a CUDA device; activations_cpu runs anywhere.")
    size = demo.Size(hidden=options.hidden, num_blocks=options.blocks, sequence=options.sequence, batch=1)
    batch = demo.make_batch(size, demo.read_corpus(), 0)
    on_device = {name: item.cuda() if isinstance(item, torch.Tensor) else item for name, item in batch.items()}
    make = functools.partial(make_model, options.hidden, options.blocks, options.sequence)
    setting = Setting(make, on_device, torch.device("cuda"), options.bf16)
    show(take_turns(setting, options.rounds, options.only), options.out, size=str(size), bf16=options.bf16)


if __name__ == "__main__":
    main()

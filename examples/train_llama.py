"""An ordinary training loop, and the lines that make it fit.

python examples/train_llama.py                      # as it was
python examples/train_llama.py --budget 300MiB      # planned at the first batch, same losses to the last bit
python examples/train_llama.py --arena --steps 6    # its memory at planned addresses, same losses, too
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import stowplan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", help="device bytes, such as 300MiB; without it nothing is planned")
    parser.add_argument("--arena", action="store_true", help="serve what steps ask for at planned addresses")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.arena:
        stowplan.arena.install()  # before anything is on a GPU

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, num_hidden_layers=8, intermediate_size=704, vocab_size=256,
                         num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if arguments.budget:
        model = stowplan.wrap(model, budget=arguments.budget, optimizer=optimizer)

    for step in range(arguments.steps):
        ids = torch.randint(256, (4, 512))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.9f}")

    applied = stowplan.applied(model)
    if applied is not None:
        print(stowplan.report(applied.plan))
    if arguments.arena:
        print(stowplan.arena.stats())


if __name__ == "__main__":
    main()

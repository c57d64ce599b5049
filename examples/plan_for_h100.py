"""Does Llama-3-8B fit on an H100 at this length? Asked on a machine without a GPU: nothing is run, nothing allocated.

python examples/plan_for_h100.py                    # 8192 tokens
python examples/plan_for_h100.py --length 131072    # says why not, and what would fit
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import stowplan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens in the one sequence of a batch")
    length = parser.parse_args().length

    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
                         use_cache=False)  # fmt: skip
    with stowplan.dry("h100-sxm"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.zeros(1, length, dtype=torch.long)
    try:
        plan = stowplan.plan(
            model, {"input_ids": tokens, "labels": tokens}, optimizer=optimizer, hardware="h100-sxm", on_progress=print
        )
    except stowplan.InfeasibleBudget as error:
        print(error)
    else:
        print(stowplan.report(plan))


if __name__ == "__main__":
    main()

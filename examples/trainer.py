"""Hugging Face's Trainer on real text, and the line that makes it fit.

python examples/trainer.py                      # as it was
python examples/trainer.py --budget 150MiB      # planned at the first batch, same losses to the last bit

The text is the source code of Python's standard library, byte by byte. Needs transformers and accelerate.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import stowplan
from stowplan.demo import read_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", help="device bytes, such as 150MiB; without it nothing is planned")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, num_hidden_layers=8, intermediate_size=704, vocab_size=256,
                         num_attention_heads=8, num_key_value_heads=4, use_cache=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    if arguments.budget:
        model = stowplan.wrap(model, budget=arguments.budget, hold_gradients=True)

    rows = read_corpus()[: 256 * 256].view(-1, 256).long()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        trainer.train()
    for logged in trainer.state.log_history:
        if "loss" in logged:
            print(f"step {logged['step']}: loss {logged['loss']:.9f}")

    applied = stowplan.applied(model)
    if applied is not None:
        print(stowplan.report(applied.plan))


if __name__ == "__main__":
    main()

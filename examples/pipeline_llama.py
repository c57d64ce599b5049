"""A Llama as a pipeline of several processes: the same losses, less memory on each.

python examples/pipeline_llama.py                        # 4 processes on this machine, half of 1F1B's activations
python examples/pipeline_llama.py --schedule v-min       # still less
python examples/pipeline_llama.py --budget 34MiB         # schedule and activation plans chosen together
python examples/pipeline_llama.py --picture step.html    # the last step as it was measured, to look at
torchrun --nproc-per-node 8 examples/pipeline_llama.py   # or started by torchrun
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import stowplan
from stowplan.reports.pipeline_files import to_html


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="processes, if torchrun does not start them")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", default="v-half", help="such as 1f1b, v-half, v-min (docs/schedules.md)")
    parser.add_argument("--budget", help="device bytes of each process: choose schedule and activation plans for it")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--picture", help="OUT.html")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        train(int(os.environ["RANK"]), arguments)
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    os.environ["WORLD_SIZE"] = str(arguments.devices)
    torch.multiprocessing.spawn(train, (arguments,), arguments.devices)


def train(rank: int, arguments: argparse.Namespace) -> None:
    os.environ["RANK"] = str(rank)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > int(os.environ.get("LOCAL_RANK", rank))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, num_hidden_layers=16, intermediate_size=352, vocab_size=256,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    pipeline = stowplan.Pipeline(
        model,
        num_microbatches=arguments.microbatches,
        schedule=arguments.schedule,
        prepare=lambda stage: stage.cuda() if on_gpu else stage,
    )
    del model  # the other processes' parts
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-3)

    def batch(step: int) -> dict[str, torch.Tensor]:  # the same on all processes
        ids = torch.randint(256, (2 * arguments.microbatches, 128), generator=torch.Generator().manual_seed(step))
        return {"input_ids": ids.to(pipeline.device), "labels": ids.to(pipeline.device)}

    if arguments.budget:
        say = print if rank == 0 else None
        plan = stowplan.plan(pipeline, batch(0), budget=arguments.budget, optimizer=optimizer, on_progress=say)
        stowplan.apply(plan, pipeline)
        predicted = plan.timeline
        if rank == 0:
            print(stowplan.report(plan))
    else:
        predicted = pipeline.predict(pipeline.probe(batch(0), optimizer=optimizer))

    for step in range(arguments.steps):
        loss = pipeline.step(batch(step))
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # so that the step measured below finds gradients, as predicted
        if loss is not None:
            print(f"step {step}: loss {loss.item():.9f}", flush=True)

    report = pipeline.measure(batch(0), optimizer=optimizer).report("measured", predicted)
    if rank == 0:
        print(report.render())
        if arguments.picture:
            Path(arguments.picture).write_text(to_html(report), encoding="utf-8")
            print(f"picture written to {arguments.picture}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

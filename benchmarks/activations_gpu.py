"""Step time, peak allocated bytes and the longest context of Llama blocks on one CUDA device, beside every peer.

    python -m benchmarks.activations_gpu                                  1B-shaped blocks at 8k, 32k and 128k tokens
    python -m benchmarks.activations_gpu --shape 8b --blocks 4 --tokens 32768
    python -m benchmarks.activations_gpu --longest                        how many tokens each contender can take

Peers at their best setting; TRL's OffloadActivations takes part where trl is installed. For each peer there is a plan
for the very peak that the peer was seen to have. Nothing in ``benchmarks/results`` comes from this yet: it has not been
run.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.activations import Contender, Setting, arguments, peers, planned, show, take_turns
from benchmarks.record import write_record
from stowplan import demo, session
from stowplan.core.errors import InfeasibleBudget
from stowplan.demo import make_optimizer

_TOKEN_STEP = 4096  # of the search for the longest context


class Shape(NamedTuple):
    """The blocks of one of the published Llama 3 models."""

    hidden: int
    intermediate: int
    num_heads: int


SHAPES = {"1b": Shape(2048, 8192, 32), "3b": Shape(3072, 8192, 24), "8b": Shape(4096, 14336, 32)}


def make_model(shape: Shape, num_blocks: int, sequence: int, dtype: torch.dtype) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=256,  # bytes: what is compared here is the blocks, not the head
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=8,
        max_position_embeddings=sequence,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(dtype).train()


def setting_of(shape: Shape, num_blocks: int, amp: bool, sequence: int) -> Setting:
    size = demo.Size(hidden=shape.hidden, num_blocks=num_blocks, sequence=sequence, batch=1)
    batch = demo.make_batch(size, demo.read_corpus(), 0)
    on_device = {name: item.cuda() if isinstance(item, torch.Tensor) else item for name, item in batch.items()}
    dtype = torch.float32 if amp else torch.bfloat16
    make = functools.partial(make_model, shape, num_blocks, sequence, dtype)
    return Setting(make, on_device, torch.device("cuda"), amp)


def auto_planned(setting: Setting) -> Contender:
    model = setting.make()
    with setting.autocast():
        plan = session.plan(model, setting.batch, optimizer=make_optimizer(model), hold_output=False)
    del model
    return planned(setting, plan)


def longest(at: Callable[[int], Setting], most: int) -> list[dict[str, Any]]:
    """The most tokens, in steps of 4096, at which each contender still makes three steps."""
    names = ["no limit", *peers(at(_TOKEN_STEP)), "stowplan"]
    rows = []
    for name in names:

        def fits(sequence: int, name: str = name) -> bool:
            setting = at(sequence)
            makers = peers(setting) | {
                "no limit": lambda: Contender(setting, setting.make()),
                "stowplan": lambda: auto_planned(setting),
            }
            contender = None
            try:
                contender = makers[name]()
                for _ in range(3):
                    contender.step()
            except (torch.OutOfMemoryError, InfeasibleBudget):
                return False
            finally:
                del contender
                gc.collect()
                torch.cuda.empty_cache()
            return True

        low, high = 0, most // _TOKEN_STEP + 1  # fits, does not fit
        guess = 2
        while low + 1 < high:
            if fits(guess * _TOKEN_STEP):
                low = guess
            else:
                high = guess
            guess = min(2 * low, high - 1) if high > most // _TOKEN_STEP else (low + high) // 2
            guess = max(guess, low + 1)
        rows.append({"contender": name, "longest_tokens": low * _TOKEN_STEP})
        print(f"{name:<44}{low * _TOKEN_STEP:>10} tokens", flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__, "benchmarks/results/activations_gpu.json")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="whose blocks (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768, 131072], help="lengths to measure at")
    parser.add_argument("--longest", action="store_true", help="search the longest context instead of timing steps")
    parser.add_argument("--most", type=int, default=1 << 20, help="where that search ends (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("activations_gpu needs a CUDA device; activations_cpu runs anywhere.")
    at = functools.partial(setting_of, SHAPES[options.shape], options.blocks, options.bf16)
    more = {"shape": options.shape, "num_blocks": options.blocks, "bf16_autocast": options.bf16}
    if options.longest:
        write_record(options.out.with_stem(options.out.stem + "_longest"), longest(at, options.most), **more)
        return
    for sequence in options.tokens:
        print(f"== {options.shape}, {options.blocks} blocks, {sequence} tokens", flush=True)
        out = options.out.with_stem(f"{options.out.stem}_{options.shape}_{sequence // 1024}k")
        show(take_turns(at(sequence), options.rounds, options.only), out, sequence=sequence, **more)


if __name__ == "__main__":
    main()

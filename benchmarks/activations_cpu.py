"""Step time and peak live bytes of the demo's Llama on the CPU: stowplan beside torch's own ways.

Peaks are from torch's profiler memory events. ``save_on_cpu`` copies to the host, which on the CPU is where the tensors
are already: its row shows its overhead alone. ``python -m benchmarks.activations_cpu --help``
"""

from __future__ import annotations

import functools

import torch

from benchmarks.activations import Setting, arguments, show, take_turns
from stowplan import demo
from stowplan.offload.pages import keep_freed_pages


def main() -> None:
    parser = arguments(__doc__, "benchmarks/results/activations_cpu.json")
    parser.add_argument("--quick", action="store_true", help="the demo's small model")
    options = parser.parse_args()
    keep_freed_pages()
    size = demo.QUICK if options.quick else demo.FULL
    setting = Setting(
        functools.partial(demo.make_model, size),
        demo.make_batch(size, demo.read_corpus(), 0),
        torch.device("cpu"),
        options.bf16,
    )
    rows = take_turns(setting, options.rounds, options.only)
    show(rows, options.out, size=str(size), bf16=options.bf16, num_threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

"""What snapshots cost a training, beside torch's ways to save it to a tmpfs.

    python -m benchmarks.snapshots                  # a quarter of an hour
    python -m benchmarks.snapshots --quick

Three trainings: a plain Llama in one process, and one sharded by FSDP2, and one replicated by DistributedDataParallel,
over processes on two "nodes" of this machine, of which either may be lost. Contenders take turns, by rounds, in the
same processes:

    stowplan        Snapshotter.save; whole when it is GLOBAL, coded on the other node
    dcp thread      torch.distributed.checkpoint.async_save with cached staging, written by a thread
    dcp process     the same, staged in shared memory, written by a process
    torch.save      model and optimizer of each rank (replicated: of the first), nothing in the background

*Blocked* is how long training cannot go on, state dicts included; *whole* is until all is where it is to be, training
standing still. Each is compared with a memcpy, on all ranks at once and right before, of the bytes that our snapshot of
a rank has: where the training is replicated those are its share, and a copy of another's. *Beside* is the time
of training's steps from when it goes on, over that of steps without any contender in the same round. Of the ranks the
slowest counts, of the rounds the median. Results go to benchmarks/results/snapshots.json and, as a table, .md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stowplan
from benchmarks.pipeline_ranks import on_ranks
from benchmarks.record import write_record

RESULTS = Path(__file__).parent / "results"
TMPFS = Path("/dev/shm")
CONTENDERS = ("stowplan", "dcp thread", "dcp process", "torch.save")


@dataclass(frozen=True)
class Case:
    name: str
    num_ranks: int
    num_nodes: int
    hidden: int
    sequence: int
    num_blocks: int = 1


CASES = (Case("plain", 1, 1, 512, 64), Case("fsdp2", 4, 2, 640, 64), Case("ddp", 4, 2, 640, 64))
QUICK = (Case("plain", 1, 1, 64, 16), Case("fsdp2", 2, 2, 64, 16), Case("ddp", 2, 2, 64, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of all contenders, in turn")
    parser.add_argument("--steps", type=int, default=3, help="of training beside each")
    parser.add_argument("--blocks", type=int, default=8, help="of each model")
    parser.add_argument("--quick", action="store_true", help="tiny models of one block, two rounds")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--output", type=Path, default=RESULTS / "snapshots.json", help="where the JSON goes")
    given = parser.parse_args()
    num_rounds = 2 if given.quick else given.rounds
    rows = []
    with sockets() as environment:
        for case in QUICK if given.quick else [replace(case, num_blocks=given.blocks) for case in CASES]:
            rows += summary(
                case, on_ranks(case.num_ranks, rounds, case, num_rounds, given.steps, environment, daemon=False)
            )
    table = markdown(rows, f"{num_rounds} rounds. {given.note}".strip())
    print(table)
    write_record(given.output, rows, rounds=num_rounds, steps=given.steps, blocks=given.blocks, note=given.note)
    given.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")


@contextmanager
def sockets() -> Iterator[dict[str, str]]:
    """The environment with a place of its own for memory processes' sockets, and a token for their exchange."""
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        yield {"XDG_RUNTIME_DIR": path, "STOWPLAN_JOB_TOKEN": "a token for this benchmark only"}


# ---- on each rank ----------------------------------------------------------------------------------------------------


class Training:
    """A rank's, whose parameters and optimizer states are saved."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=case.hidden, intermediate_size=3 * case.hidden, num_hidden_layers=case.num_blocks,
            vocab_size=1024, num_attention_heads=8, num_key_value_heads=8, use_cache=False,
        )  # fmt: skip
        self.model: Any = transformers.LlamaForCausalLM(config).train()
        if case.name == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif case.name == "fsdp2":
            mesh = init_device_mesh("cpu", (case.num_ranks,))
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.ids = torch.randint(1024, (1, case.sequence), generator=generator)
        self.num_steps = 0

    def step(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return time.perf_counter() - begin

    def state(self) -> dict[str, Any]:
        """What torch saves, by reference."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}


Wait = Callable[[], object]


class Contenders:
    """``begin(name)`` saves the training and returns when it may go on, with what waits until all is done."""

    def __init__(self, case: Case, training: Training, folder: Path) -> None:
        self.case, self.training, self.folder = case, training, folder
        node = f"node-{dist.get_rank() * case.num_nodes // case.num_ranks}"
        self.snapshots = stowplan.Snapshotter(
            model=training.model, optimizer=training.optimizer, run=f"benchmark-{case.name}", node=node, idle_seconds=60
        )
        self.group = dist.new_group(backend="gloo")
        self.stagers = {
            "dcp thread": DefaultStager(StagingOptions(False, False, False, False)),
            "dcp process": DefaultStager(StagingOptions(False, True, False, False)),
        }
        self.num_saved = 0

    def begin(self, name: str) -> Wait:
        self.num_saved += 1
        place = self.folder / f"{name.replace(' ', '-')}-{self.num_saved}"
        if name == "stowplan":
            saved = self.snapshots.save(self.num_saved)
            assert not saved.skipped, saved
            return self.snapshots.wait
        if name == "torch.save":
            if self.case.name != "ddp" or dist.get_rank() == 0:
                torch.save(self.training.state(), f"{place}-{dist.get_rank()}")
            return lambda: None
        kind = AsyncCheckpointerType.PROCESS if name == "dcp process" else AsyncCheckpointerType.THREAD
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = dcp.async_save(
                self.training.state(), checkpoint_id=place, process_group=self.group,
                async_checkpointer_type=kind, async_stager=self.stagers[name],
            )  # fmt: skip
        return written.result

    def close(self) -> None:
        memory = self.snapshots.status().memory
        self.snapshots.close()
        for stager in self.stagers.values():
            stager.close()
        dist.barrier()
        if memory is not None and self.snapshots.place.local_rank == 0:
            os.kill(memory.pid, signal.SIGTERM)


def rounds(case: Case, num_rounds: int, num_steps: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Seconds of this rank, by round and contender; the first round warms up and is not among them."""
    os.environ |= environment  # which a fork server that was there before does not have
    warnings.filterwarnings("ignore", category=FutureWarning)
    training = Training(case)
    training.step()
    shared = [tempfile.mkdtemp(prefix="benchmark-", dir=TMPFS) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    found = []
    contenders = Contenders(case, training, folder)
    try:
        contenders.begin("stowplan")()
        num_bytes = contenders.snapshots.status().last.num_bytes
        source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
        for number in range(num_rounds + 1):
            alone = [training.step() for _ in range(num_steps)]
            for name in CONTENDERS[number % 4 :] + CONTENDERS[: number % 4]:
                memcpy = timed(partial(target.copy_, source))[0]
                blocked, wait = timed(partial(contenders.begin, name))
                whole = blocked + timed(wait, together=False)[0]
                dist.barrier()
                wait = contenders.begin(name)
                beside = [training.step() for _ in range(num_steps)]
                wait()
                dist.barrier()
                seconds = {"memcpy": memcpy, "blocked": blocked, "whole": whole, "beside": sum(beside) / sum(alone)}
                if number:
                    found.append({"round": number, "contender": name, "bytes": num_bytes, **seconds})
                if dist.get_rank() == 0:
                    for path in folder.iterdir():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                dist.barrier()
    finally:
        contenders.close()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    return found


def timed(action: Callable[[], Any], together: bool = True) -> tuple[float, Any]:
    """Seconds, and what it gave; all ranks begin at once."""
    if together:
        dist.barrier()
    begin = time.perf_counter()
    given = action()
    return time.perf_counter() - begin, given


# ---- of all ranks ----------------------------------------------------------------------------------------------------


def summary(case: Case, of_ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each contender: the slowest rank, the median round."""
    rows = []
    for name in CONTENDERS:
        whens = [each for each in zip(*of_ranks, strict=True) if each[0]["contender"] == name]

        def median(what: Callable[[dict[str, Any]], float], whens: list[Any] = whens) -> float:
            return statistics.median(max(map(what, ranks)) for ranks in whens)

        rows.append(
            {
                "case": case.name,
                "ranks": case.num_ranks,
                "nodes": case.num_nodes,
                "contender": name,
                "bytes_of_rank": whens[0][0]["bytes"],
                "blocked_seconds": median(lambda row: row["blocked"]),
                "whole_seconds": median(lambda row: row["whole"]),
                "blocked_over_memcpy": median(lambda row: row["blocked"] / row["memcpy"]),
                "whole_over_memcpy": median(lambda row: row["whole"] / row["memcpy"]),
                "beside": median(lambda row: row["beside"]),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], note: str) -> str:
    """A table; ratios first to memcpy, then to ours."""
    lines = [
        "# Snapshots beside torch's checkpoints",
        "",
        f"Made by `python -m benchmarks.snapshots`, which says what the columns are: {note}",
        "",
        "| training | | bandwidth, x memcpy | blocked, ÷ ours | whole, ÷ memcpy | whole, ÷ ours | steps beside, x |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {row["case"]: row for row in rows if row["contender"] == "stowplan"}
    for row in rows:
        own = ours[row["case"]]
        size = f"{row['ranks']} x {row['bytes_of_rank'] / 2**20:.0f} MiB, {row['nodes']} nodes"
        lines.append(
            f"| {row['case']}, {size} | {row['contender']} | {1 / row['blocked_over_memcpy']:.2f} "
            f"| {row['blocked_seconds'] / own['blocked_seconds']:.2f} | {row['whole_over_memcpy']:.2f} "
            f"| {row['whole_seconds'] / own['whole_seconds']:.2f} | {row['beside']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

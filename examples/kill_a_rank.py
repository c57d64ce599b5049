"""A Llama trained by 4 processes with FSDP2; one of them is killed in the middle of a step, and nothing is lost.

python examples/kill_a_rank.py                 # two nodes of two ranks each on this machine, rank 1 is killed
python examples/kill_a_rank.py --lose-node     # its node's memory, too: computed from the other node's
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import stowplan

WORLD_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kill-in", type=int, default=5, help="the step in which rank 1 is killed")
    parser.add_argument("--lose-node", action="store_true", help="kill its node's other rank and memory process, too")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        train(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="stow") as path:
        directory = Path(path)
        print(f"uninterrupted: {arguments.steps} steps")
        start("plain", directory, kill=False)
        print(f"killed: rank 1 in step {arguments.kill_in}{', with its node' * arguments.lose_node}")
        start("killed", directory, kill=True)
        print("started again")
        start("killed", directory, kill=False)
        compare(torch.load(directory / "plain.pt"), torch.load(directory / "killed.pt"))


def start(run: str, directory: Path, *, kill: bool) -> None:
    """Four processes; where one is killed the others end, as a launcher would see to."""
    meeting = directory / f"rendezvous-{secrets.token_hex(4)}"
    token = directory / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    (directory / "sockets").mkdir(mode=0o700, exist_ok=True)
    ranks = []
    for rank in range(WORLD_SIZE):
        environment = {
            **os.environ, "RANK": str(rank), "STOWPLAN_RUN": f"{run}-{os.getpid()}",
            "STOWPLAN_NODE": f"node-{rank % 2}",
            "STOWPLAN_JOB_TOKEN_FILE": str(token), "XDG_RUNTIME_DIR": str(directory / "sockets"),
            "MEETING": str(meeting), "RESULT": str(directory / f"{run}.pt"), "KILL": str(int(kill)),
            "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        errors = subprocess.DEVNULL if kill else None  # all that the others say is that rank 1 is gone
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=environment, stderr=errors))
    if kill:
        ranks[1].wait()
        for process in ranks:
            process.kill()
    codes = [process.wait() for process in ranks]
    if not kill and any(codes):
        raise SystemExit(f"processes ended with {codes}")


def train(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    meeting = f"file://{os.environ['MEETING']}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_hidden_layers=4, intermediate_size=176, vocab_size=256,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)  # of its data; the generator's state is in every snapshot
    with stowplan.Snapshotter(model=model, optimizer=optimizer) as snapshots:
        restored = snapshots.restore()
        if restored and rank == 0:
            print(f"  restored step {restored.step} from memory", flush=True)
        for step in range(restored.step if restored else 0, arguments.steps):
            tokens = torch.randint(0, 256, (2, 32))
            loss = model(tokens, labels=tokens).loss
            if os.environ["KILL"] == "1" and step + 1 == arguments.kill_in:
                die(rank, arguments.lose_node, snapshots)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            saved = snapshots.save(step + 1)
            snapshots.wait()  # only so that little models, faster than coding, do not skip snapshots
            if rank == 0:
                took = saved.skipped or f"snapshot of {saved.num_bytes} bytes on each rank"
                print(f"  step {step + 1}: loss {loss.item():.6f}, {took}", flush=True)
        parameters = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        if rank == 0:
            torch.save(parameters, os.environ["RESULT"])
        snapshots.end()  # the job is over: nobody needs the memory any more
    dist.destroy_process_group()


def die(rank: int, lose_node: bool, snapshots: stowplan.Snapshotter) -> None:
    memory = snapshots.status().memory
    if rank == 1 and lose_node and memory is not None:
        os.kill(memory.pid, signal.SIGKILL)
    if rank == 1 or (lose_node and rank == 3):
        os.kill(os.getpid(), signal.SIGKILL)


def compare(plain: dict[str, torch.Tensor], killed: dict[str, torch.Tensor]) -> None:
    print(f"{'parameter':<48} {'uninterrupted':>16} {'killed':>16}")
    for name, tensor in plain.items():
        equal = "equal" if torch.equal(tensor, killed[name]) else "DIFFERENT"
        print(f"{name:<48} {tensor.sum().item():>16.9f} {killed[name].sum().item():>16.9f} {equal}")
    same = sum(torch.equal(tensor, killed[name]) for name, tensor in plain.items())
    print(f"{same} of {len(plain)} parameters are equal to the last bit")


if __name__ == "__main__":
    main()

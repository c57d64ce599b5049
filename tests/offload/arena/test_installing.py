"""Installing: errors by name, other processes and threads, what happens without a compiler."""

from __future__ import annotations

import gc
import os
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stowplan
from stowplan import arena
from stowplan.offload.arena import library
from tests import models

HEADER = Path(library.__file__).with_name("arena.h").read_text(encoding="utf-8")


@pytest.fixture
def installed() -> Iterator[None]:
    arena.install("cpu", strict=True)
    yield
    arena.uninstall()


def _train(num_steps: int = 6) -> torch.Tensor:
    model = models.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        loss = model(**models.batch_for(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach().clone()


def test_twice_is_an_error(installed: None) -> None:
    with pytest.raises(stowplan.ArenaUnavailable, match="installed already, for cpu"):
        arena.install("cpu")


def test_without_an_arena_there_are_no_counters() -> None:
    for ask in (arena.stats, arena.step):
        with pytest.raises(stowplan.ArenaUnavailable, match=r"call stowplan\.arena\.install\(\) first"):
            ask()


@pytest.mark.parametrize("device", ["meta", "gpu", "mps"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(stowplan.InvalidArgument, match=f"device='{device}'"):
        arena.install(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_cuda_is_told() -> None:
    with pytest.raises(stowplan.ArenaUnavailable, match="torch sees no CUDA device"):
        arena.install("cuda")


@pytest.mark.parametrize(
    ("option", "value"),
    [("most_plans", 0), ("most_plans", "8"), ("most_plans", 1.5), ("slab", "1/2"), ("slab", -1), ("device", 1.5)],
)
def test_options_are_checked(option: str, value: object) -> None:
    with pytest.raises(stowplan.InvalidArgument, match=f"{option}={value!r}"):
        arena.install(**{"device": "cpu", option: value})


def test_all_is_compiled_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No step waits for a compiler; the one here copies what has been compiled."""
    fake = tmp_path / "compiler"
    fake.write_text('#!/bin/sh\nfor last; do :; done\ncp "$SOME_LIBRARY" "$last"\n', encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("SOME_LIBRARY", library.library("torch_cpu", lambda message: None)._name)
    monkeypatch.setenv("STOWPLAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake))
    told: list[str] = []
    arena.install("cpu", strict=True, on_progress=told.append)
    arena.uninstall()
    assert told == ["compiling arena_torch_cpu (once)", "compiling stowplan_pack (once)"]


def test_a_slab_may_be_reserved_at_once() -> None:
    arena.install("cpu", slab="64 MiB", strict=True)
    _train()
    stats = arena.stats()
    arena.uninstall()
    assert stats.slab_bytes == 64 * 2**20
    assert 0 < stats.peak_bytes == stats.height_bytes
    assert stats.slack_bytes == stats.slab_bytes - stats.peak_bytes


@pytest.mark.parametrize("num_bytes", [2**60 - 1, 2**64, 2**200])
def test_a_slab_that_cannot_be_had_is_an_error(num_bytes: int) -> None:
    with pytest.raises(stowplan.ArenaUnavailable, match="so much memory cannot be had"):
        arena.install("cpu", slab=num_bytes)
    assert torch.ones(5000).sum() == 5000
    arena.install("cpu")
    arena.uninstall()


def test_without_a_compiler_torchs_allocator_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STOWPLAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="torch's own allocator serves: .*no-such-compiler"):
        arena.install("cpu")
    arena.step()
    assert arena.stats() == arena.Stats()
    arena.uninstall()
    with pytest.raises(stowplan.CompilationFailed):
        arena.install("cpu", strict=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own
def test_an_optimizer_whose_step_is_compiled(installed: None) -> None:
    """What happens at the end of a step, planning above all, is no part of the compiled code."""
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(5):
        layer(torch.ones(32, 64)).sum().backward()
        step()
        optimizer.zero_grad()
    stats = arena.stats()
    assert (stats.steps, stats.plans) == (5, 1)
    assert stats.hits > 0


def test_threads_that_allocate_beside_training_are_strangers(installed: None) -> None:
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            torch.rand(3000)

    loader = threading.Thread(target=load)
    loader.start()
    _train(8)
    before = arena.stats()
    _train(1)
    done.set()
    loader.join()
    assert before.hits > 500
    assert before.strangers > 0
    assert before.misses < 0.01 * before.hits


def test_a_forked_child_goes_its_own_way(installed: None) -> None:
    expected = _train()
    steps = arena.stats().steps
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(_train(), expected) and arena.stats().steps == steps else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(_train(), expected)
    assert arena.stats().steps > steps


def test_workers_of_a_loader(installed: None) -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(4096.0).reshape(4, 1024))
    loaded = [batch.clone() for (batch,) in torch.utils.data.DataLoader(dataset, num_workers=2)]
    assert torch.equal(torch.cat(loaded), dataset.tensors[0])


def test_tensors_of_other_threads_find_their_way_back(installed: None) -> None:
    gc.collect()  # of what other tests left
    before = arena.stats().fallback_bytes
    made: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: made.append(torch.rand(5000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arena.stats().fallback_bytes - before == 8 * 20000
    made.clear()
    gc.collect()
    assert arena.stats().fallback_bytes == before
    assert arena.stats().unknown_frees == 0


@pytest.mark.parametrize("struct", [library.ArenaStats, library.ArenaStep])
def test_structs_are_those_of_the_header(struct: type) -> None:
    body = re.search(rf"struct {struct.__name__} {{(.*?)}};", HEADER, re.DOTALL)
    assert body is not None
    code = re.sub(r"//.*", "", body[1])
    names = [name for line in re.findall(r"int64_t ([^;]+);", code) for name in re.findall(r"\w+", line)]
    assert names == [name for name, *_ in struct._fields_]  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_tensors_keep_their_values_whatever_is_asked_for(installed: None, seed: int) -> None:
    """Steps that ask for nearly the same, in two threads; what is alive never changes."""

    def work(seed: int) -> None:
        chance = random.Random(seed)
        alive: list[tuple[int, torch.Tensor]] = []
        for _ in range(40):
            for place in range(30):
                size = 300 + 211 * (place % 7) if chance.random() < 0.95 else chance.randrange(5000)
                value = chance.randrange(1000)
                alive.append((value, torch.full((size,), float(value))))
                while alive and chance.random() < 0.6:
                    value, tensor = alive.pop(chance.randrange(len(alive)))
                    wrong.extend([tensor] * (not bool((tensor == value).all())))
            if seed % 2 == 0:
                arena.step()
            del alive[: chance.choice([0, len(alive)])]

    wrong: list[torch.Tensor] = []
    threads = [threading.Thread(target=work, args=(2 * seed + number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = arena.stats()
    assert stats.hits > 0
    assert stats.misses > 0
    assert stats.unknown_frees == stats.double_frees == 0

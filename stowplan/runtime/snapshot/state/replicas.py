"""Which tensors of a training several ranks have the same of: by how it is parallel, and by their bytes.

What should be the same is said by DistributedDataParallel, for its parameters and what optimizers keep for them, and by
the placements of DTensors (Replicate). What is the same is found by comparing digests of all their bytes, at each
snapshot. Buffers, and what is in no DistributedDataParallel, may differ, and count as one rank's own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from stowplan.runtime.snapshot.place import Agreement
from stowplan.runtime.snapshot.state.digests import digests
from stowplan.runtime.snapshot.state.modules import models_of, named, parameter_groups
from stowplan.runtime.snapshot.state.payload import Storage
from stowplan.runtime.snapshot.state.training_state import OptimizerStates, TrainingState

__all__ = ["Ranks", "Replica", "Same", "replicas_of", "same_replicas", "written_elsewhere"]

Ranks: TypeAlias = tuple[int, ...]
_LEAST_BYTES = 64  # what is smaller is held by all


@dataclass(frozen=True, slots=True)
class Replica:
    """A tensor of which several ranks should have the same.

    Attributes:
        path: its place in the state.
        tensor: of a DTensor the local part.
        ranks: all that have it; the same in each of them.
        distributed: whether it is a DTensor.
    """

    path: str
    tensor: torch.Tensor
    ranks: Ranks
    distributed: bool


@dataclass(frozen=True, slots=True)
class Same:
    """What ranks have the same of.

    Attributes:
        replicas: those with equal bytes, in an order that is the same on their ranks.
        differing: paths of those that should have, and have not.
        elsewhere: paths that a group of lower ranks has other tensors under.
        anywhere: whether any rank should have the same of anything.
    """

    replicas: tuple[Replica, ...]
    differing: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    anywhere: bool = True


def replicas_of(state: TrainingState, optimizer_states: OptimizerStates | None = None) -> list[Replica]:
    """Parameters and optimizer states that other ranks should have the same of, but for the smallest.

    ``optimizer_states`` are those that optimizers will have, by parameter: fake tensors.
    """
    return [replica for candidate in _candidates(state, optimizer_states) for replica in _replica(*candidate)]


def _candidates(
    state: TrainingState, foreseen: OptimizerStates | None = None
) -> Iterator[tuple[str, torch.Tensor, Ranks]]:
    """All tensors of models and optimizers by path, and the ranks that DistributedDataParallel keeps the same."""
    models = models_of(state.model)
    for name, tensor in models.tensors.items():
        yield f"model.{name}", tensor, models.replicas.get(tensor, ()) if isinstance(tensor, nn.Parameter) else ()
    for optimizer, group, names in parameter_groups(named(state.optimizer, "optimizer"), models):
        for name, parameter in zip(names, group["params"], strict=True):
            ranks = () if _is_zero(optimizer) else models.replicas.get(parameter, ())
            for path, tensor in _tensors(
                optimizer.state.get(parameter, (foreseen or {}).get(parameter, {})), f"optimizer.state.{name}"
            ):
                yield path, tensor, ranks


def same_replicas(agreement: Agreement, state: TrainingState) -> Same:
    """Compare all bytes of ``replicas_of`` with those of the other ranks; all ranks call it."""
    replicas: list[Replica] = []
    mine: dict[Ranks, dict[str, bytes]] = {}

    def looked() -> tuple[dict[Ranks, bytes], set[Ranks]]:
        replicas.extend(replicas_of(state))
        mine.update(_labels(replicas))
        short = {ranks: hashlib.blake2b(b"".join(labels.values())).digest() for ranks, labels in mine.items()}
        return short, {replica.ranks for replica in replicas if not replica.distributed}

    words = agreement.together("comparing what ranks should have the same of", looked)
    plain = words[agreement.rank][1]
    said: dict[Ranks, dict[int, bytes]] = {}
    for rank, (theirs, _) in enumerate(words):
        for ranks, word in theirs.items():
            said.setdefault(ranks, {})[rank] = word
    agreed = all(by.keys() == set(ranks) and len(set(by.values())) == 1 for ranks, by in said.items())
    families: set[Ranks] = set().union(*(theirs for _, theirs in words))
    if agreed and (not families or (len(families) == 1 and 0 in families.pop())):
        return Same(tuple(replicas), anywhere=bool(said))
    if agreement.rank == 0:  # which writes to disk what it has whole
        divided = {replica.path for replica in replicas}
        mine[0,] = {path: b"" for path, _, _ in _candidates(state) if path not in divided}
        plain.add((0,))
    return _compared(replicas, mine, agreement.gather((mine, plain)))


def written_elsewhere(agreement: Agreement, state: TrainingState) -> frozenset[str]:
    """Paths of plain tensors that a lower rank has, too, which writes them to disk; all ranks call it."""
    mine: list[str] = []

    def digest() -> bytes:
        mine.extend(path for path, tensor, _ in _candidates(state) if not isinstance(tensor, DTensor))
        return hashlib.blake2b("\0".join(mine).encode()).digest()

    if len(set(agreement.together("naming what is written to disk", digest))) == 1:
        return frozenset(mine if agreement.rank else ())
    others = agreement.gather(mine)  # stages of a pipeline, say
    return frozenset(mine).intersection(*[set().union(*others[: agreement.rank])])


def _labels(replicas: list[Replica]) -> dict[Ranks, dict[str, bytes]]:
    """All that has to be the same of each tensor, in short: bytes, dtype, shape, and with what it shares memory."""
    found: dict[Ranks, dict[str, bytes]] = {}
    first: dict[Storage, str] = {}
    for replica, digest in zip(replicas, digests([replica.tensor for replica in replicas]), strict=True):
        tensor = replica.tensor
        tied = first.setdefault(Storage.of(tensor), replica.path)
        text = f"{replica.path} {tied} {tensor.dtype} {tuple(tensor.shape)} ".encode()
        found.setdefault(replica.ranks, {})[replica.path] = hashlib.blake2b(text + digest, digest_size=16).digest()
    return found


def _compared(
    replicas: list[Replica],
    mine: Mapping[Ranks, Mapping[str, bytes]],
    words: list[tuple[dict[Ranks, dict[str, bytes]], set[Ranks]]],
) -> Same:
    """Tensor by tensor, where not all is the same, or where several groups may have other tensors under one name."""
    equal: dict[str, bool] = {}
    for ranks, labels in mine.items():
        others = [words[rank][0].get(ranks, {}) for rank in ranks]
        equal |= {path: all(other.get(path) == label for other in others) for path, label in labels.items()}
    first: dict[str, Ranks] = {}
    for ranks, labels in sorted({ranks: theirs[ranks] for theirs, plain in words for ranks in plain}.items()):
        first = dict.fromkeys(labels, ranks) | first
    here = [replica for replica in replicas if equal[replica.path]]
    # In one order on all of a replica's ranks, whichever came first here.
    here.sort(key=lambda replica: (replica.ranks, replica.path))
    return Same(
        tuple(here),
        tuple(path for path, same in equal.items() if not same),
        frozenset(each.path for each in here if not each.distributed and first[each.path] != each.ranks),
    )


def _replica(path: str, tensor: torch.Tensor, ranks: Ranks) -> Iterator[Replica]:
    distributed = isinstance(tensor, DTensor)
    if isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):
            return
        ranks, tensor = _mesh_ranks(tensor), tensor.to_local()
    known = type(tensor.detach()) in (torch.Tensor, FakeTensor)
    as_it_lies = not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    plain = known and tensor.layout is torch.strided and as_it_lies
    if len(ranks) > 1 and plain and tensor.device.type in ("cpu", "cuda") and tensor.nbytes > _LEAST_BYTES:
        yield Replica(path, tensor.detach(), ranks, distributed)


def _mesh_ranks(tensor: DTensor) -> Ranks:
    """The ranks with the same part of it."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    places = zip(tensor.placements, coordinate, strict=True)
    index = tuple(slice(None) if placement.is_replicate() else place for placement, place in places)
    return tuple(tensor.device_mesh.mesh[index].flatten().tolist())


def _tensors(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of an optimizer's state, by the paths that an ``Encoder`` gives them."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, member in tree.items():
            yield from _tensors(member, f"{path}.{key}")
    elif type(tree) in (list, tuple):
        for index, member in enumerate(tree):
            yield from _tensors(member, f"{path}[{index}]")


def _is_zero(optimizer: Any) -> bool:
    """Whether its states are one rank's each. Importing its module warns, and who has one has imported it."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)

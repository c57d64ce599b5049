"""What a step can be told, and what goes with it: accumulation, scalers, clipping, data parallelism, other stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from stowplan.core.errors import UnsupportedModel
from stowplan.planner.schedule import generate
from stowplan.runtime.pipeline.pipeline import Pipeline
from tests.distributed import Ranks
from tests.runtime.pipeline.one_process import Case, batch_of, build, differing, optimizer_of, truth

pytestmark = pytest.mark.slow  # processes of their own

CLOSE = 1e-6
CASE = Case(num_steps=1)

Gradients = dict[str, torch.Tensor]


def gradients_of(named: Any) -> Gradients:
    """Of ``named_parameters()`` that have some, whole."""
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in named
        if p.grad is not None
    }


def of(case: Case = CASE, **more: Any) -> Pipeline:
    return Pipeline(build(case), num_microbatches=case.num_microbatches, **more)


def whole_step(model: Any, case: Case, batch: dict[str, torch.Tensor], weight: float = 1.0) -> torch.Tensor:
    """One process: adds to the gradients as ``Pipeline.step`` does; gives the mean loss."""
    losses = []
    for rows in range(0, case.num_microbatches * case.rows, case.rows):
        part = {name: value[rows : rows + case.rows] for name, value in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
            losses.append(model(**part, use_cache=False).loss)
        (losses[-1] * (torch.tensor(weight) / case.num_microbatches)).backward()
    return torch.stack([loss.detach() for loss in losses]).mean()


# ---- tied parameters -------------------------------------------------------------------------------------------------


def tied(rank: int, case: Case, schedule: str, path: str) -> tuple[list[str], dict[str, list[float]]]:
    """Gives the names of gradients that differ from one process in a bit, and the tied gradients of this process."""
    expected = torch.load(path)
    pipeline = of(case, schedule=schedule)
    optimizer = optimizer_of(pipeline.parameters())
    found: list[str] = []
    copies: dict[str, list[float]] = {}
    for step in range(case.num_steps):
        pipeline.step(batch_of(case, step))
        gradients = gradients_of(pipeline.named_parameters())
        if not step:
            found = differing(gradients, expected["gradients"][0])
        assert differing(gradients, expected["gradients"][step], relative=CLOSE if not step else 1e-3) == []
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in pipeline.named_parameters():
        if name in {name for stage in pipeline.stages.values() for name in stage.tied}:
            copies[name] = parameter.flatten().tolist()
    return found, copies


TIED = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.mark.parametrize("schedule", ["v-half", "1f1b", "interleaved"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_tied_embeddings(ranks: Ranks, tmp_path: Path, model: str, schedule: str) -> None:
    """All other gradients are bitwise the same. That of the tied one is the same sum in another order: the head's part
    and the embedding's are not added up for each microbatch first."""
    case = Case(model, tied=True, num_steps=3)
    answers = ranks.run(tied, case, schedule, truth(case, tmp_path / "truth"))
    assert {name for found, _ in answers for name in found} == {TIED[model]}
    holders = [copies[TIED[model]] for _, copies in answers if TIED[model] in copies]
    assert len(holders) == (1 if schedule == "v-half" else 2)
    assert all(holder == holders[0] for holder in holders)  # after three steps of each one's optimizer


def one_microbatch(rank: int, path: str) -> list[str]:
    pipeline = of(Case(tied=True, num_microbatches=1), schedule="v-half")
    pipeline.step(batch_of(Case(num_microbatches=1)))
    return differing(gradients_of(pipeline.named_parameters()), torch.load(path)["gradients"][0])


def test_a_tied_embedding_of_one_microbatch(ranks: Ranks, tmp_path: Path) -> None:
    """There is but one order of two summands."""
    case = Case(tied=True, num_microbatches=1, num_steps=1)
    assert ranks.run(one_microbatch, truth(case, tmp_path / "truth")) == [[], []]


# ---- several batches, scalers, clipping ------------------------------------------------------------------------------


def accumulation(rank: int) -> None:
    pipeline, whole = of(), build(CASE)
    for step, weight in ((0, 0.25), (1, 0.75)):
        pipeline.step(batch_of(CASE, step), weight=weight, sync=step == 1)
        whole_step(whole, CASE, batch_of(CASE, step), weight)
    assert differing(gradients_of(pipeline.named_parameters()), gradients_of(whole.named_parameters())) == []


def test_two_batches_before_a_step(ranks: Ranks) -> None:
    ranks.run(accumulation)


def tied_accumulation(rank: int) -> list[float]:
    case = replace(CASE, tied=True)
    pipeline, whole = of(case, schedule="1f1b"), build(case)
    for step in (0, 1):
        pipeline.step(batch_of(case, step), weight=0.5)
        whole_step(whole, case, batch_of(case, step), 0.5)
    gradients = gradients_of(pipeline.named_parameters())
    assert differing(gradients, gradients_of(whole.named_parameters()), CLOSE) == []
    return gradients[TIED["llama"]].flatten().tolist()


def test_two_batches_with_a_tied_embedding(ranks: Ranks) -> None:
    first, second = ranks.run(tied_accumulation)
    assert first == second


def scaling(rank: int) -> tuple[list[float], list[bool]]:
    """Gives the scale after each step, and whether parameters changed; rank 1 alone meets an infinity in step 1."""
    pipeline, whole = of(), build(CASE)
    optimizer, alone = optimizer_of(pipeline.parameters()), optimizer_of(whole.parameters())
    scaler = ShardedGradScaler("cpu", init_scale=2.0**10, process_group=dist.group.WORLD, growth_interval=100)
    plain = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scales, changes = [], []
    for step in range(3):
        pipeline.step(batch_of(CASE, step), scaler=scaler)
        if step == 1 and rank == 1:
            next(pipeline.parameters()).grad[0] = torch.inf
        before = [p.detach().clone() for p in pipeline.parameters()]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        changes.append(not all(map(torch.equal, before, pipeline.parameters())))
        if step != 1:  # one process that leaves the same step out
            for rows in range(CASE.num_microbatches):
                part = {name: value[rows : rows + 1] for name, value in batch_of(CASE, step).items()}
                plain.scale(whole(**part, use_cache=False).loss / CASE.num_microbatches).backward()
            plain.step(alone)
            plain.update(2.0**9)
        optimizer.zero_grad()
        alone.zero_grad()
    own = {name: p.detach() for name, p in pipeline.named_parameters()}
    assert differing(own, {name: p.detach() for name, p in whole.named_parameters()}, 1e-5) == []
    return scales, changes


def test_an_infinity_on_one_rank_skips_the_step_on_all(ranks: Ranks) -> None:
    assert ranks.run(scaling) == [([1024.0, 512.0, 512.0], [True, False, True])] * 2


def clipping(rank: int, schedule: str, case: Case, path: str) -> None:
    expected = torch.load(path)
    pipeline = of(case, schedule=schedule)
    pipeline.step(batch_of(case))
    assert case.max_norm is not None
    norm = pipeline.clip_grad_norm_(case.max_norm)
    torch.testing.assert_close(norm, expected["norms"][0], rtol=CLOSE, atol=0)
    assert norm > 2 * case.max_norm
    assert differing(gradients_of(pipeline.named_parameters()), expected["gradients"][0], 2 * CLOSE) == []


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("schedule", ["v-zb", "1f1b"])
def test_clipping(ranks4: Ranks, tmp_path: Path, schedule: str, is_tied: bool) -> None:
    case = Case(num_layers=8, num_microbatches=4, num_steps=1, tied=is_tied, max_norm=0.1)
    ranks4.run(clipping, schedule, case, truth(case, tmp_path / "truth"))


# ---- evaluation, state, batches --------------------------------------------------------------------------------------


def evaluation(rank: int, schedule: str) -> None:
    case = replace(CASE, num_layers=8)
    pipeline, whole = of(case, schedule=schedule), build(case).eval()
    batch = batch_of(case, 5)
    pipeline.eval()
    assert not any(module.training for stage in pipeline.stages.values() for module in stage.modules())
    with torch.no_grad():
        parts = [whole(input_ids=ids, labels=ids).loss for ids in batch["input_ids"].chunk(case.num_microbatches)]
    for _ in range(2):
        loss = pipeline.evaluate(batch)
        assert (loss is not None) == pipeline.has_loss
        assert loss is None or torch.equal(loss, torch.stack(parts).mean())
        assert all(p.grad is None for p in pipeline.parameters())
        pipeline.train()
        pipeline.step(batch)
        pipeline.eval()
        for p in pipeline.parameters():
            p.grad = None


@pytest.mark.parametrize("schedule", ["v-half", "interleaved"])
def test_evaluation(ranks: Ranks, schedule: str) -> None:
    ranks.run(evaluation, schedule)


def states(rank: int) -> list[str]:
    whole = build(CASE)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    pipeline = of()
    pipeline.load_state_dict(whole.state_dict())
    own = pipeline.state_dict()
    assert differing(own, whole.state_dict()) == []
    other = of()
    assert differing(own, other.state_dict()) != []
    other.load_state_dict(own)
    assert differing(other.state_dict(), own) == []
    assert not any(p.data_ptr() == own[name].data_ptr() for name, p in other.named_parameters())
    return list(own)


def test_states_are_the_models(ranks: Ranks) -> None:
    names = [name for own in ranks.run(states) for name in own]
    assert sorted(names) == sorted(build(CASE).state_dict())


def without_batches(rank: int, schedule: str, path: str) -> bool:
    """Only those with the first or the last stage get some."""
    case = replace(CASE, num_layers=8)
    pipeline = of(case, schedule=schedule)
    gets = 0 in pipeline.stages or pipeline.has_loss
    for _ in range(2):
        for parameter in pipeline.parameters():
            parameter.grad = None
        pipeline.step(batch_of(case) if gets else None)
        assert differing(gradients_of(pipeline.named_parameters()), torch.load(path)["gradients"][0]) == []
    pipeline.evaluate(batch_of(case) if gets else None)
    pipeline.probe(batch_of(case) if gets else None)
    return gets


@pytest.mark.parametrize(("schedule", "gets"), [("v-half", [0]), ("1f1b", [0, 3])])
def test_batches_where_they_are_needed(ranks4: Ranks, tmp_path: Path, schedule: str, gets: list[int]) -> None:
    case = replace(CASE, num_layers=8)
    answers = ranks4.run(without_batches, schedule, truth(case, tmp_path / "truth"))
    assert [rank for rank, got in enumerate(answers) if got] == gets


def probing(rank: int) -> None:
    """Nothing that training sees is changed."""
    case = replace(CASE, num_layers=4, tied=True)
    one, other = of(case, schedule="1f1b"), of(case, schedule="1f1b")
    for pipeline in (one, other):
        pipeline.step(batch_of(case))
        if pipeline is other:
            torch.manual_seed(3)
            before = torch.get_rng_state()
            costs = pipeline.probe(batch_of(case))
            assert torch.equal(torch.get_rng_state(), before)
            assert [stage.static_bytes > 0 for stage in costs.stages] == [True] * 2
            assert 0 < costs.communication_seconds < 10
        pipeline.step(batch_of(case, 1))
    assert differing(gradients_of(one.named_parameters()), gradients_of(other.named_parameters())) == []


def test_probing_changes_nothing(ranks: Ranks) -> None:
    ranks.run(probing)


def measuring(rank: int) -> None:
    pipeline, other = of(), of()
    pipeline.step(batch_of(CASE))
    other.step(batch_of(CASE))
    trace = pipeline.measure(batch_of(CASE, 1))
    other.step(batch_of(CASE, 1))
    assert differing(gradients_of(pipeline.named_parameters()), gradients_of(other.named_parameters())) == []
    assert len(trace.devices) == 2
    for device, order in zip(trace.devices, pipeline.schedule.orders, strict=True):
        assert len(device.begins) == len(order)
        assert list(device.begins) == sorted(device.begins)
        assert all(begin < end for begin, end in zip(device.begins, device.ends, strict=True))
        assert device.ends[-1] < device.seconds <= trace.step_seconds
        assert max(device.peaks_bytes) <= device.peak_bytes
    text = trace.report("v-half", pipeline.predict(pipeline.probe(batch_of(CASE)))).render()
    assert "v-half" in text


def test_a_measured_step_is_a_step(ranks: Ranks) -> None:
    ranks.run(measuring)


# ---- autocast --------------------------------------------------------------------------------------------------------


def autocast(rank: int, case: Case, schedule: str, path: str) -> None:
    expected = torch.load(path)
    pipeline = of(case, schedule=schedule)
    with torch.autocast("cpu", torch.bfloat16):
        pipeline.step(batch_of(case))
    assert differing(gradients_of(pipeline.named_parameters()), expected["gradients"][0]) == []
    for parameter in pipeline.parameters():
        parameter.grad = None
    pipeline.step(batch_of(case))  # without: another dtype may travel
    assert differing(gradients_of(pipeline.named_parameters()), expected["gradients"][0]) != []


@pytest.mark.parametrize("schedule", ["v-half", "zb-h1"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_autocast(ranks: Ranks, tmp_path: Path, model: str, schedule: str) -> None:
    case = Case(model, amp=True, num_steps=1)
    ranks.run(autocast, case, schedule, truth(case, tmp_path / "truth"))


# ---- data parallelism ------------------------------------------------------------------------------------------------


def two_by_two(rank: int, sharded: bool, is_tied: bool) -> None:
    """Ranks 0 and 1 are one pipeline, 2 and 3 another one with other data."""
    case = Case(num_layers=4, num_microbatches=3, tied=is_tied)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    replica = mesh.get_local_rank("data")

    def shard(stage: Any) -> None:
        for module in list(stage.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh["data"], reshard_after_forward=False)
        fully_shard(stage, mesh=mesh["data"], reshard_after_forward=False)

    for schedule in ("1f1b", "v-half"):
        if is_tied and schedule == "v-half" and sharded:
            with pytest.raises(
                UnsupportedModel, match=r"model\.embed_tokens\.weight is shared by stages of one device"
            ):
                of(case, schedule=schedule, group=mesh.get_group("pipeline"), prepare=shard)
            continue
        pipeline = of(
            case,
            schedule=schedule,
            group=mesh.get_group("pipeline"),
            data_parallel=mesh.get_group("data"),
            prepare=shard if sharded else None,
        )
        whole = build(case)
        for step in range(2):
            pipeline.step(batch_of(case, step, shift=replica), sync=step == 1, weight=0.5)
            for shift in range(2):
                whole_step(whole, case, batch_of(case, step, shift), 0.25)
        expected = gradients_of(whole.named_parameters())
        gradients = gradients_of(pipeline.named_parameters())
        assert set(gradients) == {name for name, _ in pipeline.named_parameters()}
        assert differing(gradients, expected, 2 * CLOSE) == []
        norm = pipeline.clip_grad_norm_(0.05)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.05), rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_pipelines_of_two(ranks4: Ranks, sharded: bool, is_tied: bool) -> None:
    ranks4.run(two_by_two, sharded, is_tied)


# ---- other stages ----------------------------------------------------------------------------------------------------


def frozen(rank: int, schedule: str, num_frozen: int) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if "embed_tokens" in name or ("layers" in parts and int(parts[parts.index("layers") + 1]) < num_frozen):
                parameter.requires_grad_(False)

    model, whole = build(CASE), build(CASE)
    freeze(model)
    freeze(whole)
    pipeline = Pipeline(model, num_microbatches=CASE.num_microbatches, schedule=schedule)
    for _ in range(2):
        pipeline.step(batch_of(CASE))
        whole_step(whole, CASE, batch_of(CASE))
    gradients, expected = gradients_of(pipeline.named_parameters()), gradients_of(whole.named_parameters())
    assert set(gradients) == {name for name, _ in pipeline.named_parameters()} & set(expected)
    assert differing(gradients, expected) == []
    pipeline.probe(batch_of(CASE))


@pytest.mark.parametrize("schedule", ["v-half", "1f1b", "zb-h1"])
@pytest.mark.parametrize("num_frozen", [1, 2], ids=["a layer", "two layers"])
def test_frozen_layers(ranks: Ranks, schedule: str, num_frozen: int) -> None:
    ranks.run(frozen, schedule, num_frozen)


def sequence(rank: int, schedule: str) -> None:
    def modules() -> list[torch.nn.Module]:
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(5)]
        return [torch.nn.Embedding(10, 8), *layers, torch.nn.Linear(8, 3)]

    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(10, (12, 4), generator=generator), torch.randint(3, (12, 4), generator=generator)
    pipeline = Pipeline(
        modules(),
        num_microbatches=4,
        schedule=schedule,
        loss_fn=lambda output, target: loss_fn(output.flatten(0, 1), target.flatten()),
    )
    loss = pipeline.step(batch)
    whole = torch.nn.Sequential(*modules())
    losses = []
    for ids, target in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
        losses.append(loss_fn(whole(ids).flatten(0, 1), target.flatten()))
        (losses[-1] / 4).backward()
    assert loss is None or torch.equal(loss, torch.stack(losses).mean())
    assert differing(gradients_of(pipeline.named_parameters()), gradients_of(whole.named_parameters())) == []


@pytest.mark.parametrize("schedule", ["v-half", "gpipe"])
def test_a_sequence_of_modules(ranks: Ranks, schedule: str) -> None:
    ranks.run(sequence, schedule)


def deferring(rank: int) -> None:
    """Only schedules with W put weight gradients off: all linear layers, but a head that is tied."""
    pipeline = of(schedule="1f1b")
    assert [deferred.num_deferred for deferred in pipeline._deferred.values()] == [0]
    pipeline.use(generate("zb-h1", 2, CASE.num_microbatches))
    assert [deferred.num_deferred for deferred in pipeline._deferred.values()] == [2 * 7 + rank]
    pipeline.use(generate("1f1b", 2, CASE.num_microbatches))
    assert [deferred.num_deferred for deferred in pipeline._deferred.values()] == [0]


def test_weight_gradients_are_put_off(ranks: Ranks) -> None:
    ranks.run(deferring)


def changed_schedule(rank: int) -> None:
    pipeline, whole = of(schedule="v-min"), build(CASE)
    for step, name in enumerate(("v-min", "v-zb", "v-half")):
        pipeline.use(generate(name, 2, CASE.num_microbatches))
        loss = pipeline.step(batch_of(CASE, step))
        expected = whole_step(whole, CASE, batch_of(CASE, step))
        assert loss is None or torch.equal(loss, expected)
    assert differing(gradients_of(pipeline.named_parameters()), gradients_of(whole.named_parameters())) == []


def test_another_schedule_between_steps(ranks: Ranks) -> None:
    ranks.run(changed_schedule)


def alone(rank: int) -> None:
    """A group of one process is a pipeline, too."""
    own = [dist.new_group([other]) for other in range(2)][rank]
    for schedule in ("v-half", "1f1b", "zb-h1"):
        pipeline, whole = of(schedule=schedule, group=own), build(CASE)
        pipeline.probe(batch_of(CASE))
        loss = pipeline.step(batch_of(CASE))
        expected = whole_step(whole, CASE, batch_of(CASE))
        assert loss is not None
        assert torch.equal(loss, expected)
        assert differing(gradients_of(pipeline.named_parameters()), gradients_of(whole.named_parameters())) == []


def test_one_process(ranks: Ranks) -> None:
    ranks.run(alone)

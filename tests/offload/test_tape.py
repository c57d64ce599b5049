"""Tapes: what is recorded, what may be made again, the generated replay, and the proof."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from stowplan.core.program import Action
from stowplan.offload.copies import PlainCopies
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.recording import Recording, record_call
from stowplan.offload.tape.course import allowed_actions
from stowplan.offload.tape.proof import prove
from stowplan.offload.tape.replay import Replay, view_of
from stowplan.offload.tape.rng import draw_position, rewound
from stowplan.offload.tape.rules import rules_of
from stowplan.offload.tape.run import Counters
from stowplan.offload.tape.tape import Geometry, Origin, Slot, Tape, TapeOp, TapeValue

aten = torch.ops.aten
CPU = torch.device("cpu")
ROWS, WIDTH = 4, 8

Body = Callable[[Any, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def record(body: Body) -> tuple[Tape, Recording]:
    torch.manual_seed(0)
    block = Block(body)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    recording = record_call(block, block.forward, (x,), {}, PlainCopies(HostSlab(1)), Counters())
    return recording.recorder.finish(), recording


def named(tape: Tape, name: str) -> int:
    (number,) = [number for number, value in enumerate(tape.values) if value.name == name]
    return number


def recomputable_names(tape: Tape) -> set[str]:
    return {tape.values[value].name for value in tape.recomputable()}


def replay_of(tape: Tape, recording: Recording, *targets: str) -> tuple[Replay, list[torch.Tensor]]:
    """A replay that starts from what the block was given, and the tensors to start it with."""
    given = recording.given
    replay = Replay(tape, {named(tape, t): 0 for t in targets}, (), {v: tape.values[v].geometry for v in given})
    return replay, [given[value] for value in replay.sources]


def truth_of(tape: Tape, recording: Recording, name: str) -> torch.Tensor:
    value = named(tape, name)
    return view_of(recording.truth()[value], tape.values[value].geometry)


# ---- recording -----------------------------------------------------------------------------------------------------
def test_values_are_named_after_modules_and_ops() -> None:
    tape, _ = record(lambda block, x: torch.tanh(torch.tanh(block.linear(x))))
    assert {v.name: v.origin for v in tape.values} == {
        "x": Origin.INPUT,
        "linear.weight": Origin.PARAMETER,
        "linear.bias": Origin.PARAMETER,
        "linear.addmm": Origin.MADE,
        "tanh": Origin.MADE,
        "tanh#2": Origin.MADE,
    }
    assert tape.steady
    assert [op.module for op in tape.ops] == ["linear", "", ""]
    saved = [tape.values[value].name for value in tape.saved_versions()]
    assert sorted(saved) == ["linear.weight", "tanh", "tanh#2", "x"]


def test_writes_in_place_are_versions() -> None:
    tape, _ = record(lambda block, x: (x * 2).add_(1).relu_())
    (value,) = (v for v in tape.values if v.origin is Origin.MADE)
    assert value.writers == [0, 1, 2]
    assert value.last_version == 2
    assert [op.writes for op in tape.ops[1:]] == [((1, 1),), ((1, 2),)]


def test_views_are_no_ops() -> None:
    tape, _ = record(lambda block, x: x.t().unflatten(0, (2, -1))[1].exp())
    assert [op.func for op in tape.ops] == [aten.exp.default]


def _buffer_made_in_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    block.register_buffer("table", torch.arange(WIDTH) * 0.1)
    return x * block.table


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda block, x: x * float(x.detach().sum()), "depends on data"),
        (lambda block, x: x * x.detach().nonzero().sum(), "depends on data"),
        (_buffer_made_in_forward, "table was made by this very call"),
    ],
)
def test_what_a_later_call_may_do_otherwise_is_not_steady(body: Body, reason: str) -> None:
    tape, _ = record(body)
    assert not tape.steady
    assert reason in tape.unsteady_reason
    assert all(actions == (Action.KEEP,) for actions in allowed_actions(tape).values())


def test_what_comes_before_an_op_that_depends_on_data_is_steady() -> None:
    tape, _ = record(lambda block, x: x.exp().sin()[x.detach() > 0].cos())
    assert tape.steady
    assert tape.prefix is not None
    assert tape.prefix.reason == "index depends on data"
    assert [op.replayable for op in tape.ops] == [k < tape.prefix.num_ops for k in range(len(tape.ops))]
    actions = {tape.values[value].name: allowed for value, allowed in allowed_actions(tape).items()}
    assert actions["exp"] == (Action.KEEP, Action.SWAP, Action.RECOMPUTE)
    assert actions["index"] == (Action.KEEP,)
    again, _ = record(lambda block, x: x.exp().sin()[x.detach() > 0].cos())
    assert tape.does_the_same(again)
    other, _ = record(lambda block, x: x.exp().cos()[x.detach() > 0].cos())
    assert not tape.does_the_same(other)


def test_indexing_by_numbers_is_steady() -> None:
    tape, _ = record(lambda block, x: x[torch.tensor([0, 2])].exp())
    assert tape.steady


# ---- what may be made again, on tapes made by hand -----------------------------------------------------------------
def value(origin: Origin, *writers: int | None, **facts: Any) -> TapeValue:
    geometry = Geometry(torch.float32, (2,), (1,), 0)
    return TapeValue("", origin, 8, CPU, geometry, list(writers), **facts)


def op(reads: tuple[tuple[int, int], ...], makes: int | None, **facts: Any) -> TapeOp:
    made = () if makes is None else ((0, makes),)
    return TapeOp(aten.sin.default, (), {}, "", reads, makes=made, **facts)


def slots(tape: Tape, *saved: tuple[int, int]) -> Tape:
    tape.slots = [Slot(number, version, tape.values[number].geometry, False) for number, version in saved]
    return tape


def chain(first: TapeValue, **facts: Any) -> Tape:
    """``first`` -> 1 -> 2, with 2 saved; ``facts`` are those of value 1's op."""
    ops = [op(((0, first.last_version),), 1, **facts), op(((1, 0),), 2)]
    return slots(Tape(ops, [first, value(Origin.MADE, 0), value(Origin.MADE, 1)]), (2, 0))


def test_from_an_input_or_a_parameter() -> None:
    for origin in (Origin.INPUT, Origin.PARAMETER):
        assert chain(value(origin, None)).recomputable() == {2}


def test_not_from_an_outside_tensor_unless_it_has_no_bytes() -> None:
    assert chain(value(Origin.OUTSIDE, None)).recomputable() == set()
    assert chain(value(Origin.OUTSIDE, None, constant=torch.empty(0))).recomputable() == {2}


def test_an_outside_tensor_that_is_saved_is_at_hand() -> None:
    tape = chain(value(Origin.OUTSIDE, None))
    assert slots(tape, (0, 0), (2, 0)).recomputable() == {2}


def test_not_through_an_op_that_is_not_replayable() -> None:
    assert chain(value(Origin.INPUT, None), replayable=False).recomputable() == set()


def test_a_saved_value_cuts_the_way_to_what_is_not_replayable() -> None:
    tape = slots(chain(value(Origin.INPUT, None), replayable=False), (1, 0), (2, 0))
    assert tape.recomputable() == {2}
    assert tape.closure([2], {1}) == ([1], {1})


def test_not_through_memory_that_others_may_have_filled() -> None:
    tape = chain(value(Origin.INPUT, None))
    tape.values[1].opaque = True
    assert tape.recomputable() == set()


def test_not_from_an_input_that_the_block_changed() -> None:
    changed = value(Origin.INPUT, None, 2)
    tape = slots(Tape([op(((0, 0),), 1), op(((1, 0),), 2)], [changed, value(Origin.MADE, 0), value(Origin.MADE, 1)]))
    tape.ops.append(op(((0, 0),), None, writes=((0, 1),)))
    assert slots(tape, (2, 0)).recomputable() == set()


def test_not_a_value_saved_before_its_last_write() -> None:
    tape = chain(value(Origin.INPUT, None))
    tape.ops.append(op(((2, 0),), None, writes=((2, 1),)))
    tape.values[2].writers.append(2)
    assert tape.recomputable() == set()
    assert allowed_actions(tape)[2] == (Action.KEEP,)
    assert slots(tape, (2, 1)).recomputable() == {2}
    assert slots(tape, (2, 0), (2, 1)).recomputable() == set()


def test_not_what_somebody_else_keeps() -> None:
    tape = chain(value(Origin.INPUT, None))
    tape.values[2].pinned = True
    assert tape.recomputable() == set()
    assert allowed_actions(tape)[2] == (Action.KEEP,)


def test_allowed_actions() -> None:
    tape = slots(chain(value(Origin.INPUT, None)), (0, 0), (2, 0))
    assert allowed_actions(tape) == {
        0: (Action.KEEP, Action.SWAP),
        2: (Action.KEEP, Action.SWAP, Action.RECOMPUTE),
    }
    tape.values[0].origin = Origin.PARAMETER
    assert 0 not in allowed_actions(tape)
    tape.values[0].origin = Origin.OUTSIDE
    assert allowed_actions(tape)[0] == (Action.KEEP,)
    tape.forbid_steady("a test")
    assert set(allowed_actions(tape).values()) == {(Action.KEEP,)}


def test_a_closure_takes_every_write_of_a_value() -> None:
    values = [value(Origin.INPUT, None), value(Origin.MADE, 0, 1), value(Origin.MADE, 2)]
    ops = [op(((0, 0),), 1), op(((1, 0),), None, writes=((1, 1),)), op(((1, 1),), 2)]
    assert slots(Tape(ops, values), (2, 0)).closure([2], ()) == ([0, 1, 2], {0})


# ---- rules ---------------------------------------------------------------------------------------------------------
def test_rules_come_from_the_schema() -> None:
    assert rules_of(aten.add_.Tensor).writes == ((0, "self", False),)
    assert rules_of(aten.add.out).writes == ((3, "out", True),)
    assert rules_of(aten.bernoulli_.float).random
    assert not rules_of(aten.native_batch_norm.default).replayable
    assert rules_of(aten.nonzero.default).data_dependent
    assert rules_of(aten.resize_.default).reshapes


def test_an_op_of_another_library_is_not_replayed() -> None:
    with torch.library._scoped_library("stowplan_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        assert not rules_of(torch.ops.stowplan_tests.twice.default).replayable
    rules_of.cache_clear()


# ---- the generated function ----------------------------------------------------------------------------------------
def test_source_frees_each_variable_after_its_last_use() -> None:
    tape, recording = record(lambda block, x: block.linear(x).sin().exp().tanh())
    replay, sources = replay_of(tape, recording, "tanh")
    lines = [line.strip() for line in replay.source.splitlines()]
    assert re.fullmatch(r"def replay\((s\d+(, )?){3}\):", lines[0])
    made = [re.match(r"(v\d+) = ", line)[1] for line in lines if re.match(r"v\d+ = ", line)]  # type: ignore[index]
    assert len(made) == 4
    for before, after in itertools.pairwise(made):
        use = next(i for i, line in enumerate(lines) if line.startswith(f"{after} = "))
        assert before in lines[use]
        assert re.search(rf"\b{before}\b", lines[use + 1])
        assert lines[use + 1].startswith("del ")
    assert lines[-1] == f"return ({made[-1]}, )"
    assert torch.equal(replay(sources, {})[0], truth_of(tape, recording, "tanh"))


def test_results_that_nobody_reads_go_at_once() -> None:
    tape, recording = record(lambda block, x: functional.layer_norm(x, (WIDTH,)).exp())
    replay, sources = replay_of(tape, recording, "exp")
    unread = [named(tape, "native_layer_norm.1"), named(tape, "native_layer_norm.2")]
    lines = replay.source.splitlines()
    after_use = next(i for i, line in enumerate(lines) if "del r" in line) + 1
    assert all(re.search(rf"del .*\bv{number}\b", lines[after_use]) for number in unread)
    assert torch.equal(replay(sources, {})[0], truth_of(tape, recording, "exp"))


def _drops_twice(block: Any, x: torch.Tensor) -> torch.Tensor:
    first = functional.dropout(x, 0.5).tanh()
    return functional.dropout(first.detach() * block.linear(x), 0.5).sin().exp()


def test_skipped_random_ops_still_advance_the_generator() -> None:
    """Only the second dropout is wanted; its numbers come after those of the first."""

    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        functional.dropout(x, 0.5)
        return functional.dropout(x, 0.5).tanh()

    tape, recording = record(body)
    replay, sources = replay_of(tape, recording, "tanh")
    assert sum(tape.ops[k].random for k in replay.ops) == 1
    assert replay.source.count("advance(tape, ") == 1
    torch.manual_seed(77)
    expected = torch.get_rng_state()
    assert torch.equal(replay(sources, recording.position)[0], truth_of(tape, recording, "tanh"))
    assert torch.equal(torch.get_rng_state(), expected)


def test_random_ops_after_the_last_wanted_one_are_left_out() -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        first = functional.dropout(x, 0.5).tanh()
        return functional.dropout(first, 0.5)

    tape, recording = record(body)
    replay, sources = replay_of(tape, recording, "tanh")
    assert "advance" not in replay.source
    assert torch.equal(replay(sources, recording.position)[0], truth_of(tape, recording, "tanh"))


def test_a_replay_without_random_ops_needs_no_position() -> None:
    tape, recording = record(lambda block, x: functional.dropout(x.tanh(), 0.5))
    replay, sources = replay_of(tape, recording, "tanh")
    assert not replay.random
    assert torch.equal(replay(sources, {})[0], truth_of(tape, recording, "tanh"))


def test_a_replay_runs_outside_autocast_and_autograd() -> None:
    tape, recording = record(lambda block, x: block.linear(x).tanh())
    replay, sources = replay_of(tape, recording, "tanh")
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        (made,) = replay([source.requires_grad_() for source in sources], {})
    assert made.dtype is torch.float32
    assert not made.requires_grad
    assert torch.equal(made, truth_of(tape, recording, "tanh"))


def test_views_of_other_dtypes() -> None:
    whole = torch.arange(6, dtype=torch.float32)
    seen = view_of(whole, Geometry(torch.int32, (2, 2), (2, 1), 1))
    assert torch.equal(seen, whole.view(torch.int32)[1:5].view(2, 2))
    assert seen.untyped_storage()._cdata == whole.untyped_storage()._cdata
    assert view_of(whole, Geometry.of(whole)) is whole


# ---- the proof -----------------------------------------------------------------------------------------------------
def proved(tape: Tape, recording: Recording) -> None:
    prove(tape, recording.given, recording.truth(), recording.position)


BODIES: list[Body] = [
    lambda block, x: block.linear(x).sin().exp().tanh(),
    lambda block, x: (block.linear(x) * 2).add_(1).relu_().exp(),
    _drops_twice,
]


@pytest.mark.parametrize("body", BODIES)
def test_true_ops_pass_and_the_generator_stays(body: Body) -> None:
    tape, recording = record(body)
    before = recomputable_names(tape)
    assert before
    state = torch.get_rng_state()
    proved(tape, recording)
    assert recomputable_names(tape) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_op_that_gives_other_bits_is_not_replayed() -> None:
    tape, recording = record(lambda block, x: block.linear(x).sin().exp().tanh())
    (liar,) = [op for op in tape.ops if op.func is aten.sin.default]
    assert "exp" in recomputable_names(tape)
    liar.func = aten.cos.default
    proved(tape, recording)
    refuted = [op.func for op in tape.ops if not op.replayable]
    # What sin made was not saved: the first saved value made from it shows the lie.
    assert refuted == [aten.exp.default]
    assert "exp" not in recomputable_names(tape)
    assert "tanh" in recomputable_names(tape)  # it starts from exp, whose true bits are at hand


def test_negative_zero_and_nans_are_bits() -> None:
    tape, recording = record(lambda block, x: (x * 0.0).abs().neg().exp() * (x * float("nan")).tanh())
    before = recomputable_names(tape)
    proved(tape, recording)
    assert recomputable_names(tape) == before
    tape, recording = record(lambda block, x: (x.abs() * 0.0).neg().sin())
    (flipped,) = [op for op in tape.ops if op.func is aten.neg.default]
    assert "neg" in recomputable_names(tape)
    flipped.func = aten.abs.default  # +0 where -0 was: equal as numbers
    proved(tape, recording)
    assert "neg" not in recomputable_names(tape)


def test_ops_are_watched_one_by_one() -> None:
    tape, recording = record(lambda block, x: block.linear(x).sin().exp())
    seen = []

    @contextmanager
    def around(number: int) -> Iterator[None]:
        seen.append(tape.ops[number].func)
        yield

    prove(tape, recording.given, recording.truth(), recording.position, around)
    assert seen == [aten.addmm.default, aten.sin.default, aten.exp.default]


def test_rewinding_comes_back_after_an_exception() -> None:
    torch.manual_seed(3)
    position = draw_position([CPU])
    first = torch.rand(3)
    state = torch.get_rng_state()

    def draw_and_fail() -> None:
        with rewound(position):
            assert torch.equal(torch.rand(3), first)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), state)

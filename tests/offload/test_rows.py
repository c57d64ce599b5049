"""Token rows: what has them, which ops keep them apart, what the proof makes of the rules, and replays by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from stowplan.offload.copies import PlainCopies
from stowplan.offload.host_slab import HostSlab
from stowplan.offload.recording import Recording, record_call
from stowplan.offload.tape import proof, rows
from stowplan.offload.tape.proof import RowTrials, Tolerance, prove
from stowplan.offload.tape.replay import Replay, view_of
from stowplan.offload.tape.rows import grid, num_tokens, row_bytes, row_wise, rows_at, splits_of
from stowplan.offload.tape.run import Counters
from stowplan.offload.tape.tape import Geometry, Origin, Tape, TapeValue

CPU = torch.device("cpu")
SEQUENCE, WIDTH = 32, 16

Body = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.tokens = nn.Parameter(torch.randn(SEQUENCE, SEQUENCE))
        self.places = nn.Parameter(torch.randn(1, SEQUENCE, WIDTH))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def record(body: Body, batch: int = 1) -> tuple[Tape, Recording]:
    torch.manual_seed(0)
    block = Block(body)
    x = torch.randn(batch, SEQUENCE, WIDTH, requires_grad=True)
    recording = record_call(block, block.forward, (x,), {}, PlainCopies(HostSlab(1)), Counters())
    return recording.recorder.finish(), recording


def by_rows(tape: Tape) -> set[str]:
    """Names of the ops that keep rows apart."""
    return {tape.ops[k].func._schema.name.removeprefix("aten::") for k in row_wise(tape, num_tokens(tape))}


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def attention(x: torch.Tensor, **how: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(heads(x), heads(x), heads(x), **how)


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


# ---- what has rows ---------------------------------------------------------------------------------------------------
def value(
    shape: tuple[int, ...], stride: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> TapeValue:
    tensor = torch.empty(shape, dtype=dtype) if stride is None else torch.empty_strided(shape, stride, dtype=dtype)
    size_bytes = tensor.untyped_storage().nbytes()
    return TapeValue("it", Origin.MADE, size_bytes, CPU, Geometry.of(tensor), [0])


@pytest.mark.parametrize(
    ("made", "bytes_of_a_row"),
    [
        (value((2, 3, 8)), 32),
        (value((6, 8)), 32),
        (value((2, 3, 8), dtype=torch.bfloat16), 16),
        (value((2, 3, 1)), 4),
        (value((2, 4, 3, 8), (96, 8, 32, 1)), 128),  # heads between batch and sequence, tokens together in memory
        (value((2, 4, 3, 8)), 0),  # heads before tokens in memory
        (value((3, 2, 8)), 32),
        (value((3, 2, 8), (8, 24, 1)), 0),  # the sequence first, the batch first in memory
        (value((8, 6)), 0),
        (value((8,)), 0),
        (value((0, 6, 8)), 0),
    ],
)  # fmt: skip
def test_rows_are_equal_stretches_of_storage(made: TapeValue, bytes_of_a_row: int) -> None:
    assert row_bytes(made, 6) == bytes_of_a_row


def test_the_first_argument_tells_the_number_of_tokens() -> None:
    tape, _ = record(lambda block, x: x * 2, batch=2)
    assert num_tokens(tape) == 2 * SEQUENCE


@pytest.mark.parametrize(
    ("num_rows", "device", "points"),
    [
        (64, "cpu", (16, 32, 48)),
        (24, "cpu", (16,)),
        (16, "cpu", ()),
        (4096, "cpu", (448, 912, 1360, 1824, 2272, 2736, 3184, 3648)),
        (512, "cuda", (128, 256, 384)),
        (128, "cuda", ()),
    ],
)
def test_a_few_points_are_tried(num_rows: int, device: str, points: tuple[int, ...]) -> None:
    assert grid(num_rows, torch.device(device)) == points


# ---- rules -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("addmm", lambda block, x: block.linear(x)),
        ("mm", lambda block, x: block.wide(x)),
        ("mul", lambda block, x: x * 2),
        ("add", lambda block, x: x + block.linear.bias),
        ("_to_copy", lambda block, x: x.bfloat16()),
        ("clone", lambda block, x: x.clone()),
        ("gelu", lambda block, x: functional.gelu(x)),
        ("rsqrt", lambda block, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        ("mean", lambda block, x: x.pow(2).mean(-1)),
        ("amax", lambda block, x: x.amax(-1)),
        ("native_layer_norm", lambda block, x: functional.layer_norm(x, (WIDTH,))),
        ("_softmax", lambda block, x: x.softmax(-1)),
        ("glu", lambda block, x: functional.glu(x)),
        ("cat", lambda block, x: torch.cat([x, x * 2], dim=-1)),
    ],
)
def test_ops_that_keep_rows_apart(op: str, body: Body, batch: int) -> None:
    tape, _ = record(body, batch)
    assert op in by_rows(tape)


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("mm", lambda block, x: block.tokens @ x[0]),
        ("addmm", lambda block, x: torch.addmm(x[0], x[0], block.linear.weight)),
        ("add", lambda block, x: x + block.places),
        ("clone", lambda block, x: x.transpose(1, 2).contiguous()),
        ("mean", lambda block, x: x.mean(1)),
        ("mean", lambda block, x: x.mean()),
        ("native_layer_norm", lambda block, x: functional.layer_norm(x, (SEQUENCE, WIDTH))),
        ("_softmax", lambda block, x: x.softmax(1)),
        ("glu", lambda block, x: functional.glu(x, 1)),
        ("cat", lambda block, x: torch.cat([x, x], dim=1)),
        ("cat", lambda block, x: torch.cat([x, block.places], dim=-1)),
        ("bmm", lambda block, x: torch.bmm(x, x.transpose(1, 2))),
        ("mul", lambda block, x: x * block.places.transpose(0, 1)),  # of every row with every other
        ("mm", lambda block, x: torch.mm(square := torch.cat([x, x], -1)[0], square)),
        ("native_dropout", lambda block, x: torch.native_dropout(x, 0.5, True)[0]),
        ("add_", lambda block, x: x.clone().add_(1)),
        ("clone", lambda block, x: x.clone().add_(1)),  # its value changes afterwards
        (ATTENTION, lambda block, x: attention(x)),
        (ATTENTION, lambda block, x: attention(x, attn_mask=block.tokens.detach().tril() > 0)),
    ],
)
def test_ops_that_do_not(op: str, body: Body) -> None:
    tape, _ = record(body)
    assert op in {found.func._schema.name.removeprefix("aten::") for found in tape.ops}
    assert op not in by_rows(tape)


def test_causal_attention_within_one_sequence_keeps_rows_apart() -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return attention(x, is_causal=True)

    assert ATTENTION in by_rows(record(body, batch=1)[0])
    assert ATTENTION not in by_rows(record(body, batch=2)[0])


# ---- the proof -------------------------------------------------------------------------------------------------------
def tried(body: Body, batch: int = 1, tolerance: Tolerance | None = None) -> Tape:
    """The tape after its ops have been tried for 16 rows."""
    tape, recording = record(body, batch)
    num_rows = num_tokens(tape)
    rules = row_wise(tape, num_rows)
    trials = RowTrials(num_rows, rules, dict.fromkeys(rules, (16,)), tolerance)
    prove(tape, recording.given, recording.truth(), recording.position, trials=trials)
    return tape


def layers(block: Block, x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(block.linear(functional.layer_norm(x, (WIDTH,)))).sigmoid()


def test_rows_that_come_out_the_same_are_listed() -> None:
    tape = tried(layers, batch=2)
    assert [op.splits for op in tape.ops] == [(16,)] * 4
    splits = splits_of(tape, row_wise(tape, num_tokens(tape)), tape.saved_versions())
    assert {tape.values[v].name for v, points in splits.items() if points == (16,)} == {
        "native_layer_norm", "native_layer_norm.1", "native_layer_norm.2", "linear.addmm", "gelu", "sigmoid",
    }  # fmt: skip


def test_causal_attention_gives_the_same_bits_for_first_rows() -> None:
    tape = tried(lambda block, x: attention(x, is_causal=True).exp())
    assert [op.splits for op in tape.ops] == [(16,)] * 2


def test_one_number_all_over_proves_nothing() -> None:
    """Weights that begin at zero hide what rows do later."""
    tape = tried(lambda block, x: functional.linear(x, block.wide.weight * 0).sigmoid())
    assert all(op.splits == () for op in tape.ops if op.func._schema.name in ("aten::mm", "aten::sigmoid"))


@pytest.fixture
def wrong_rules() -> Iterator[None]:
    """Ops that mix tokens, declared to keep them apart."""
    right = dict(rows.RULES)
    rows.RULES.update(dict.fromkeys(("_softmax", "flip"), rows._pointwise))
    yield
    rows.RULES.clear()
    rows.RULES.update(right)


@pytest.mark.usefixtures("wrong_rules")
@pytest.mark.parametrize("body", [lambda block, x: x.softmax(1), lambda block, x: x.flip(1).exp()])
def test_a_wrong_rule_is_found_out(body: Body) -> None:
    tape = tried(body)
    assert by_rows(tape) & {"_softmax", "flip"}
    assert tape.ops[0].splits == ()


def test_what_is_made_on_the_way_by_an_op_that_runs_whole_is_not_split() -> None:
    """What the planner charges for rows must be true of all that is made on the way to them."""
    tape = tried(lambda block, x: (x.flip(1) * 2).exp())
    assert [op.splits for op in tape.ops] == [(), (16,), (16,)]
    assert splits_of(tape, row_wise(tape, num_tokens(tape)), tape.saved_versions()) == {}


def test_tolerance() -> None:
    """Rows whose bits differ pass if they differ by little, and only if that is allowed."""
    whole = torch.linspace(-4, 4, 64)
    trials = RowTrials(4, {}, {})
    for error, tolerance, agrees in [
        (0.0, None, True),
        (1e-6, None, False),
        (1e-6, Tolerance(), True),
        (1e-4, Tolerance(), False),
        (1e-4, Tolerance(1e-3), True),
    ]:
        part = whole[:32] * (1 + error)
        assert proof._agrees(whole, part.clone(), 128, trials._replace(tolerance=tolerance)) is agrees
    assert not proof._agrees(whole, whole[:16].clone(), 128, trials)  # too few


# ---- replay by rows --------------------------------------------------------------------------------------------------
def test_a_replay_runs_ops_for_the_rows_that_are_wanted() -> None:
    tape, recording = record(layers, batch=2)
    num_rows = num_tokens(tape)
    rules = row_wise(tape, num_rows)
    for op in tape.ops:
        op.splits = (16, 32, 48)
    names = {v.name: number for number, v in enumerate(tape.values)}
    truth = {n: recording.truth()[names[n]].clone() for n in ("linear.addmm", "sigmoid", "native_layer_norm.2")}
    wanted = {"linear.addmm": 16, "sigmoid": 48, "native_layer_norm.2": 0}
    targets = {names[name]: number for name, number in wanted.items()}
    given = recording.given
    replay = Replay(tape, targets, (), {v: tape.values[v].geometry for v in given}, num_rows, rules)
    # The norm is wanted whole for its deviation; what follows from the joined product, for 48 rows.
    assert replay.rows_at == {1: 16, 2: 48, 3: 48}
    joined = []
    for number in replay.joined:
        row = WIDTH * wanted[tape.values[number].name]
        whole = truth[tape.values[number].name].clone()
        whole.view(-1)[:row] = -1
        joined.append(view_of(whole, tape.values[number].geometry))
    (deviation,) = replay([given[v] for v in replay.sources], {}, joined=joined)
    assert torch.equal(deviation, view_of(truth["native_layer_norm.2"], Geometry.of(deviation)))
    for number, whole in zip(replay.joined, joined, strict=True):
        assert torch.equal(whole.reshape(-1), truth[tape.values[number].name].reshape(-1))


def test_an_op_runs_whole_where_it_was_not_proved() -> None:
    tape, _ = record(layers)
    rules = row_wise(tape, num_tokens(tape))
    for op, splits in zip(tape.ops, [(), (16,), (), (16,)], strict=True):
        op.splits = splits
    last = len(tape.values) - 1
    ops, sources = tape.closure([last], ())
    assert rows_at(tape, rules, ops, {last: 16}, sources) == {3: 16}
    assert rows_at(tape, rules, ops, {last: 16}, sources, proved=False) == {0: 16, 1: 16, 2: 16, 3: 16}

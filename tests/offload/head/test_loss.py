"""The loss of a linear layer in chunks, against float64 and against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stowplan import linear_cross_entropy
from stowplan.core.errors import InvalidArgument, StowplanError
from stowplan.offload.head import loss as head_loss
from stowplan.offload.head.chunked import chunk_sizes
from stowplan.offload.head.loss import default_chunk_rows
from stowplan.offload.memory_log import memory_log

ROWS, FEATURES, CLASSES, IGNORED = 23, 8, 50, -100
EXACT = 1e-5  # relative, of float32


def tensors(dtype: torch.dtype = torch.float32, bias: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    found = {"hidden": made(ROWS, FEATURES), "weight": made(CLASSES, FEATURES)}
    return found | ({"bias": made(CLASSES)} if bias else {})


def labels(ignored: slice = slice(3, 9)) -> torch.Tensor:
    found = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    found[ignored] = IGNORED
    return found


def reference(given: dict[str, torch.Tensor], target: torch.Tensor, reduction: str = "mean") -> list[torch.Tensor]:
    """Loss and gradients in float64."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    logits = F.linear(exact["hidden"], exact["weight"], exact.get("bias"))
    loss = F.cross_entropy(logits, target, reduction=reduction)
    return [loss.detach(), *torch.autograd.grad(loss, list(exact.values()))]


def chunked(given: dict[str, torch.Tensor], target: torch.Tensor, **settings: object) -> list[torch.Tensor]:
    loss = linear_cross_entropy(labels=target, **given, **settings)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, list(given.values()))]


def close(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> bool:
    return all((a.double() - b).norm() <= tolerance * b.norm() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("chunk_rows", [1, 7, ROWS, 1000])  # 7: an uneven last chunk
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_float64(chunk_rows: int, reduction: str, bias: bool) -> None:
    given = tensors(bias=bias)
    found = chunked(given, labels(), chunk_rows=chunk_rows, reduction=reduction)
    assert close(found, reference(given, labels(), reduction), EXACT)


def test_float64_stays_float64() -> None:
    given = tensors(torch.float64)
    found = chunked(given, labels(), chunk_rows=5)
    assert {tensor.dtype for tensor in found} == {torch.float64}
    assert close(found, reference(given, labels()), 1e-12)


def test_a_chunk_of_ignored_rows_adds_nothing() -> None:
    given = tensors()
    found = chunked(given, labels(slice(5, 10)), chunk_rows=5)
    assert close(found, reference(given, labels(slice(5, 10))), EXACT)
    assert not found[1][5:10].any()


def test_no_target_at_all_is_as_torch_has_it() -> None:
    given, target = tensors(), labels(slice(None))
    loss, *gradients = chunked(given, target, chunk_rows=5)
    expected, *expected_gradients = reference(given, target)
    assert loss.isnan()
    assert expected.isnan()
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(found.double(), wanted)


def test_another_index_may_be_ignored() -> None:
    given, target = tensors(), labels(slice(0, 0))
    loss = linear_cross_entropy(labels=target, ignore_index=int(target[0]), **given)
    expected = F.cross_entropy(F.linear(given["hidden"], given["weight"]), target, ignore_index=int(target[0]))
    assert torch.allclose(loss, expected, rtol=EXACT)


def test_large_logits_do_not_overflow() -> None:
    given = {name: (tensor.detach() * 40).requires_grad_() for name, tensor in tensors().items()}
    assert close(chunked(given, labels(), chunk_rows=7), reference(given, labels()), EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    """By distance from float64, where gradients are of the parameters' type."""
    given = tensors(dtype)
    found, exact = chunked(given, labels(), chunk_rows=7), reference(given, labels())
    loss = F.cross_entropy(F.linear(given["hidden"], given["weight"]).float(), labels())
    own = [loss.detach(), *torch.autograd.grad(loss, list(given.values()))]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in own]
    for one, other, wanted in zip(found, own, exact, strict=True):
        assert (one.double() - wanted).norm() <= 1.5 * (other.double() - wanted).norm() + 1e-6 * wanted.norm()


def test_autocast_is_followed() -> None:
    given = tensors(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(labels=labels(), chunk_rows=7, **given)
        own = F.cross_entropy(F.linear(given["hidden"], given["weight"], given["bias"]).float(), labels())
    assert torch.allclose(loss, own, rtol=EXACT)  # the logits are rounded alike
    found, wanted = (torch.autograd.grad(each, list(given.values())) for each in (loss, own))
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert close(list(found), [tensor.double() for tensor in wanted], 1e-2)


def test_what_is_frozen_has_no_gradient() -> None:
    given = tensors(bias=True)
    given["weight"].requires_grad_(False)
    given["bias"].requires_grad_(False)
    loss = linear_cross_entropy(labels=labels(), chunk_rows=7, **given)
    loss.backward()
    assert given["weight"].grad is None
    exact = reference(given, labels())
    assert close([given["hidden"].grad], [exact[1]], EXACT)
    given["hidden"].requires_grad_(False)
    assert not linear_cross_entropy(labels=labels(), **given).requires_grad


def test_gradients_accumulate_and_are_scaled_by_what_comes_in() -> None:
    given = tensors()
    for _ in range(2):
        (linear_cross_entropy(labels=labels(), chunk_rows=7, **given) * 3).backward()
    exact = reference(given, labels())
    assert close([given["hidden"].grad, given["weight"].grad], [6 * gradient for gradient in exact[1:]], EXACT)


def test_backward_a_second_time_is_refused() -> None:
    loss = linear_cross_entropy(labels=labels(), **tensors())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy, .* goes backward once") as told:
        loss.backward()
    assert isinstance(told.value, StowplanError)


def test_second_derivatives_are_refused() -> None:
    given = tensors()
    loss = linear_cross_entropy(labels=labels(), **given)
    with pytest.raises(RuntimeError, match="no second derivatives: leave create_graph=True out") as told:
        torch.autograd.grad(loss, given["hidden"], create_graph=True)
    assert isinstance(told.value, StowplanError)
    loss.backward()  # nothing was used up
    assert given["hidden"].grad is not None


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_made_where_none_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, without_gradients: type[torch.no_grad]
) -> None:
    made = []
    monkeypatch.setattr(head_loss._Sums, "_add_to_weight", lambda *args: made.append(args))
    given = tensors()
    with without_gradients():
        loss = linear_cross_entropy(labels=labels(), **given)
    assert not made
    assert torch.allclose(loss, reference(given, labels())[0].float(), rtol=EXACT)


def test_sequences_need_not_be_flattened() -> None:
    given = tensors()
    given["hidden"] = given["hidden"].detach()[:20].reshape(4, 5, FEATURES).requires_grad_()
    target = labels()[:20].reshape(4, 5)
    loss = linear_cross_entropy(labels=target, **given)
    assert torch.allclose(
        loss, F.cross_entropy(F.linear(given["hidden"], given["weight"]).flatten(0, 1), target.flatten())
    )


def test_no_more_than_a_chunk_of_logits_is_there() -> None:
    rows, features, classes, chunk_rows = 512, 16, 4096, 64
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features, requires_grad=True)
    target = torch.randint(classes, (rows,))
    with memory_log(torch.device("cpu")) as log:
        linear_cross_entropy(hidden, weight, target, chunk_rows=chunk_rows).backward()
    peak_bytes = max(segment.peak_bytes for segment in log.segments)
    expected_bytes = 4 * (chunk_rows * classes + rows * features + classes * features)
    assert expected_bytes <= peak_bytes <= 1.05 * expected_bytes


def test_chunks_hold_about_sixteen_million_logits() -> None:
    assert default_chunk_rows(32_000) == 512
    assert default_chunk_rows(128_256) == 128
    assert default_chunk_rows(1 << 30) == 1


def test_chunks_that_are_priced_are_few_and_smaller_than_all_rows() -> None:
    assert chunk_sizes(4096, 32_000) == [512, 2048]
    assert chunk_sizes(131_072, 128_256) == [1024, 4096, 16_384]
    assert chunk_sizes(256, 64) == [32]
    assert chunk_sizes(1, 64) == [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reduction": "none"}, "reduction='none'; allowed: 'mean', 'sum'"),
        ({"chunk_rows": 0}, "chunk_rows=0; allowed: an int of 1 or more"),
        ({"chunk_rows": 2.5}, "chunk_rows=2.5; allowed: an int"),
        ({"chunk_rows": True}, "chunk_rows=True; allowed: an int"),
        ({"labels": torch.full((ROWS,), CLASSES)}, "labels have 50; allowed: 0 to 49, and ignore_index=-100"),
        ({"labels": torch.full((ROWS,), -1)}, "labels have -1; allowed: 0 to 49"),
        ({"weight": torch.zeros(0, FEATURES)}, r"weight is \(0, 8\), no class at all; allowed: one or more"),
        ({"weight": torch.zeros(CLASSES, FEATURES, device="meta")}, "tensors are on cpu, meta; allowed: one device"),
        ({"weight": torch.zeros(CLASSES, 3)}, r"weight \(50, 3\); allowed"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels are \(4,\) torch.int64; allowed: int64 of the shape"),
        ({"labels": torch.zeros(ROWS)}, "torch.float32; allowed: int64"),
        ({"bias": torch.zeros(3)}, r"bias is \(3,\); allowed: \(50,\)"),
        ({"weight": torch.zeros(CLASSES, FEATURES, dtype=torch.bfloat16)}, "cast one, or use autocast"),
        ({"hidden": torch.zeros(ROWS, FEATURES, dtype=torch.long)}, "allowed: floating point"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        linear_cross_entropy(**({**tensors(), "labels": labels()} | change))  # type: ignore[arg-type]

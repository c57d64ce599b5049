"""What may be done with logits that are not there, and what is refused."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stowplan.core.errors import InvalidArgument, NoLogits
from stowplan.offload.head.logits import Logits

BATCH, TOKENS, FEATURES, CLASSES = 2, 6, 4, 10


def stand_in(**settings: Any) -> Logits:
    torch.manual_seed(0)
    return Logits(torch.randn(BATCH, TOKENS, FEATURES, requires_grad=True), nn.Linear(FEATURES, CLASSES), 5, **settings)


def real(logits: Logits) -> torch.Tensor:
    return logits._head(logits._hidden)


LABELS = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % CLASSES

ROADS: list[Callable[[Any], torch.Tensor]] = [
    lambda logits: F.cross_entropy(logits.view(-1, CLASSES), LABELS.view(-1)),
    lambda logits: F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), LABELS.flatten()),
    lambda logits: F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, CLASSES), LABELS[:, 1:].reshape(-1)),
    lambda logits: F.cross_entropy(logits[:, 1:].flatten(0, 1), LABELS[:, 1:].reshape(-1), reduction="sum"),
    lambda logits: F.cross_entropy(input=logits[0], target=LABELS[0], ignore_index=3),
    lambda logits: nn.CrossEntropyLoss()(logits.view((BATCH * TOKENS, -1)), LABELS.view(-1)),
    lambda logits: F.cross_entropy(logits.to(torch.float32).view(-1, logits.shape[-1]), LABELS.view(-1)),
]


@pytest.mark.parametrize("road", ROADS)
def test_a_loss_is_that_of_real_logits(road: Callable[[Any], torch.Tensor]) -> None:
    logits = stand_in()
    asked = [logits._hidden, *logits._head.parameters()]
    found, expected = road(logits), road(real(logits))
    assert torch.allclose(found, expected, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(found, asked), torch.autograd.grad(expected, asked), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_it_looks_like_logits() -> None:
    logits = stand_in()
    made = real(logits)
    assert (logits.shape, logits.dtype, logits.device) == (made.shape, made.dtype, made.device)
    assert (logits.ndim, logits.dim(), logits.size(), logits.numel()) == (3, 3, made.size(), made.numel())
    assert len(logits) == BATCH
    assert logits.is_floating_point()
    assert logits.requires_grad
    assert "never made" in repr(logits)


@pytest.mark.parametrize("amp", [False, True])
def test_types_are_those_of_the_layer_and_the_loss(amp: bool) -> None:
    logits = stand_in()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = Logits(logits._hidden, logits._head, 5)
        made = real(logits)
        assert logits.dtype is made.dtype
        losses = [F.cross_entropy(each.view(-1, CLASSES), LABELS.view(-1)) for each in (logits, made)]
    assert losses[0].dtype is losses[1].dtype
    half = Logits(logits._hidden.bfloat16(), logits._head.bfloat16(), 5)
    assert F.cross_entropy(half.view(-1, CLASSES), LABELS.view(-1)).dtype is torch.bfloat16


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_a_loss_outside_autocast_has_the_products_of_the_call(hidden: torch.dtype) -> None:
    torch.manual_seed(0)
    given, layer = torch.randn(BATCH * TOKENS, FEATURES, dtype=hidden, requires_grad=True), nn.Linear(FEATURES, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        logits, made = Logits(given, layer, 5), layer(given)
    found, expected = (F.cross_entropy(each.float(), LABELS.view(-1)) for each in (logits, made))
    assert torch.allclose(found, expected, rtol=1e-6)  # the products are rounded alike
    assert F.cross_entropy(logits, LABELS.view(-1)).dtype is F.cross_entropy(made, LABELS.view(-1)).dtype
    asked = [given, *layer.parameters()]
    for one, other in zip(torch.autograd.grad(found, asked), torch.autograd.grad(expected, asked), strict=True):
        assert one.dtype is other.dtype
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_types_that_do_not_go_together_are_refused_when_the_layer_is_called() -> None:
    with pytest.raises(InvalidArgument, match="cast one, or use autocast"):
        Logits(torch.randn(BATCH, FEATURES).bfloat16(), nn.Linear(FEATURES, CLASSES), 5)


def test_flags_of_a_cast_are_no_dimensions() -> None:
    logits = stand_in()
    assert logits.to(torch.float32, False, True).dtype is torch.float32
    assert logits.to("cpu", non_blocking=False, copy=True).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda logits: logits / 2, "truediv"),
        (lambda logits: 2 * logits, "rmul"),
        (lambda logits: logits.argmax(-1), "argmax"),
        (torch.tanh, "tanh"),
        (lambda logits: torch.ones(CLASSES) * logits, "mul"),
        (lambda logits: F.softmax(logits, -1), "softmax"),
        (lambda logits: logits[..., :5], "indexing of the classes"),
        (lambda logits: logits[LABELS > 3], "indexing"),
        (lambda logits: logits.view(-1), "view"),
        (lambda logits: logits.view(-1, CLASSES // 2), "view"),
        (lambda logits: logits.transpose(1, 2), "transpose"),
        (lambda logits: logits.flatten(), "flatten of the classes"),
        (lambda logits: logits.double(), "double"),
        (lambda logits: logits.to(torch.float16), "to"),
        (lambda logits: logits.to("meta"), "to"),
        (lambda logits: logits.detach(), "detach"),
        (lambda logits: logits.to(torch.zeros(1, dtype=torch.int64)), "to"),
        (lambda logits: logits[0, 0, :, 0], "indexing 3 dimensions with 4 indices"),
        (lambda logits: logits[..., 0, 0, 0, :], "indexing 3 dimensions with 4 indices"),
        (lambda logits: logits[True], "indexing but by numbers"),
        (lambda logits: logits.view(torch.int32), "view"),
        (lambda logits: torch.cat([logits, logits]), r"^cat: these logits \(2, 6, 10\)"),
        (lambda logits: torch.stack([logits]), r"^stack: these logits \(2, 6, 10\)"),
        (int, "^int:"),
        (complex, "^complex:"),
        (operator.index, "^index:"),
        (bool, "bool"),
        (float, "float"),
        (list, "iter"),
        (lambda logits: F.cross_entropy(logits, LABELS), "cross_entropy"),
        (lambda logits: F.cross_entropy(logits.view(-1, CLASSES), LABELS.view(-1), label_smoothing=0.1), "smoothing"),
        (
            lambda logits: F.cross_entropy(logits.view(-1, CLASSES), LABELS.view(-1), torch.ones(CLASSES)),
            "class weights",
        ),
        (lambda logits: F.cross_entropy(logits.view(-1, CLASSES), LABELS.view(-1), reduction="none"), "reduction"),
        (lambda logits: F.cross_entropy(logits.view(-1, CLASSES), torch.rand(12, CLASSES)), "cross_entropy"),
    ],
)
def test_everything_else_is_refused_by_name(use: Callable[[Any], Any], named: str) -> None:
    with pytest.raises(NoLogits, match=named) as told:
        use(stand_in())
    assert "never made" in str(told.value)
    assert "chunked_head=True" in str(told.value)


def test_logits_in_double_precision_are_not_cut_to_less() -> None:
    double = Logits(torch.randn(BATCH, FEATURES).double(), nn.Linear(FEATURES, CLASSES).double(), 5)
    with pytest.raises(NoLogits, match=r"to torch\.float32"):
        double.float()


def test_what_no_tensor_has_is_an_ordinary_attribute_error() -> None:
    assert not hasattr(stand_in(), "vocabulary")
    assert not hasattr(stand_in(), "__array_interface__")


def test_the_error_survives_a_process_boundary() -> None:
    error = NoLogits("argmax", (2, 3))
    again = pickle.loads(pickle.dumps(error))
    assert (again.asked, again.shape, str(again)) == ("argmax", (2, 3), str(error))


def test_it_can_be_copied_and_hashed() -> None:
    logits = stand_in()
    assert copy.copy(logits).shape == logits.shape
    assert len({logits, logits}) == 1

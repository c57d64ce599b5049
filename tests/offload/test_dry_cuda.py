"""Steps of fake tensors on a CUDA device that is not there: which ops run, what autograd saves, what is left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stowplan.core.errors import MissingDependency
from stowplan.core.hardware import PRESETS
from stowplan.offload.dry import cuda, cuda_device
from stowplan.offload.dry.cuda import CudaTarget, pretended_cuda, target_of
from stowplan.offload.dry.cuda_attention import Kernel, attention_kernel
from stowplan.offload.dry.cuda_costs import allocated_bytes, assumptions, library_bytes, workspace_bytes
from stowplan.offload.dry.known import Known
from stowplan.offload.dry.mode import DryMode
from stowplan.offload.dry.patches import uninitialised, unnoticed
from tests.models import gpt2, llama, train

aten = torch.ops.aten

A100 = CudaTarget(capability=(8, 0))
H100 = CudaTarget()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing to pretend: there is a GPU")


@pytest.fixture(autouse=True)
def _no_wish_about_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)


class Ops(TorchDispatchMode):
    """Names of the ops that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def having(self, *parts: str) -> set[str]:
        return {name for name in self.names if any(part in name for part in parts)}


@dataclass
class Step:
    """A fake training step: its ops, what autograd saved, live bytes."""

    ops: set[str] = field(default_factory=set)
    saved: list[tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=list)
    live_before: int = 0
    live_after_forward: int = 0
    live_after_step: int = 0
    peak: int = 0
    parameter_bytes: int = 0


@contextmanager
def faking(target: CudaTarget) -> Iterator[DryMode]:
    with ExitStack() as stack:
        for context in (pretended_cuda(target), unnoticed(), uninitialised(), FakeTensorMode()):
            stack.enter_context(context)
        mode = stack.enter_context(DryMode(known=Known()))
        stack.enter_context(torch.device("cuda"))
        yield mode


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return transformers.BertForMaskedLM(config).train()


def in_dtype(dtype: torch.dtype, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(usual)


def step(
    build: Callable[[], torch.nn.Module],
    target: CudaTarget = A100,
    amp: bool = True,
    dtype: torch.dtype = torch.float32,
    tokens: int = 24,
    padding: int = 0,
    **optimizer: bool,
) -> Step:
    """The second step of a small model, the first having made the optimizer's states."""
    seen = Step()
    with faking(target) as mode:
        model = in_dtype(dtype, build)
        ids = torch.zeros(2, tokens, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if padding:
            ones, zeros = torch.ones(2, tokens - padding), torch.zeros(2, padding)
            batch["attention_mask"] = torch.cat([ones, zeros], 1).long()
        else:
            batch["use_cache"] = False
        chosen = torch.optim.AdamW(model.parameters(), lr=1e-3, **optimizer)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            seen.saved.append((tensor.dtype, tuple(tensor.shape)))
            return tensor

        for _ in range(2):
            seen.saved.clear()
            seen.live_before = mode.peak_bytes = mode.live_bytes
            with Ops() as ops:
                with (
                    torch.autocast("cuda", torch.bfloat16, enabled=amp),
                    torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                ):
                    loss = model(**batch).loss
                seen.live_after_forward = mode.live_bytes
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                chosen.step()
            chosen.zero_grad()
            assert loss.device.type == "cuda"
            del loss
        seen.live_after_step = mode.live_bytes
        seen.peak = mode.peak_bytes
        seen.ops = ops.having("attention", "dropout", "foreach", "fused", "softmax", "layer_norm")
        seen.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return seen


def test_llama_under_autocast_takes_flash_attention_and_foreach_adamw() -> None:
    seen = step(llama)
    assert {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"} <= seen.ops
    assert {"_foreach_lerp_", "_foreach_addcdiv_", "_foreach_norm"} <= seen.ops
    assert not {name for name in seen.ops if "for_cpu" in name or "_safe_softmax" in name}


def test_an_h100_takes_cudnn_attention_and_fused_adamw() -> None:
    seen = step(llama, H100, fused=True)
    assert {"_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"} <= seen.ops
    assert "_fused_adamw_" in seen.ops


def test_gpt2_drops_as_cuda_does() -> None:
    seen = step(gpt2, foreach=False)
    assert {"native_dropout", "native_dropout_backward", "native_layer_norm"} <= seen.ops
    assert "_scaled_dot_product_flash_attention" in seen.ops
    assert not {name for name in seen.ops if name.startswith(("_foreach_lerp", "_fused"))}


@pytest.mark.parametrize("amp", [True, False])
def test_bert_with_padding_takes_efficient_attention(amp: bool) -> None:
    seen = step(bert, amp=amp, padding=4)
    efficient = "_scaled_dot_product_efficient_attention"
    assert {efficient, efficient + "_backward"} <= seen.ops
    assert not {name for name in seen.ops if "flash" in name or "_safe_softmax" in name}


def test_autocast_casts_as_on_cuda() -> None:
    """Attention saves q, k, v and its output in bf16, lse in float; the loss its probabilities in float."""
    seen = step(llama)
    heads = {(2, 4, 24, 8), (2, 2, 24, 8)}
    assert {dtype for dtype, shape in seen.saved if shape in heads} == {torch.bfloat16}
    assert {dtype for dtype, shape in seen.saved if shape == (2, 4, 24)} == {torch.float32}
    assert {dtype for dtype, shape in seen.saved if shape[-1:] == (64,) and len(shape) == 2} >= {torch.float32}
    with faking(A100), torch.autocast("cuda", torch.bfloat16):
        half = torch.empty(2, 2, dtype=torch.bfloat16)
        assert (half.pow(3).dtype, (half.float() @ half.float()).dtype) == (torch.float32, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
            assert torch.empty(2, 2, dtype=torch.bfloat16).pow(3).dtype is torch.bfloat16  # the CPU's rules are others


# ---- bytes ----------------------------------------------------------------------------------------------------------
def test_live_bytes_of_a_llama_layer_follow_the_formula() -> None:
    """Pure bf16, flash attention, T tokens of width h, k of them keys', i inner; lse in float for each query head.

    Norms save their input in float, its inverse deviation, and both products in bf16: 8Th + 4T, twice. Attention
    saves q, k, v, the output, lse, and 24 bytes to draw random numbers again. The MLP saves gate, its activation, up,
    and their product.
    """
    h, i, kv, heads, tokens = 32, 88, 16, 4, 2 * 24
    layer = (
        2 * (8 * tokens * h + 4 * tokens) + 4 * tokens * h + 4 * tokens * kv + 4 * tokens * heads + 24 + 8 * tokens * i
    )
    three = step(lambda: llama(3), amp=False, dtype=torch.bfloat16)
    four = step(lambda: llama(4), amp=False, dtype=torch.bfloat16)
    held = [seen.live_after_forward - seen.live_before for seen in (three, four)]
    assert held[1] - held[0] == layer


def test_states_and_peak_of_a_step() -> None:
    """After a step: weights and two moments. The peak: these, the gradients, and a copy or more by foreach."""
    seen = step(lambda: llama(3, hidden=64), tokens=4)
    small = 1 << 12  # steps, learning rates, caches of positions
    assert 0 <= seen.live_after_step - 3 * seen.parameter_bytes < small
    assert 0 <= seen.peak - 5 * seen.parameter_bytes < 2 * seen.parameter_bytes
    fused = step(lambda: llama(3, hidden=64), tokens=4, fused=True)
    assert fused.peak < seen.peak


# ---- which kernel ---------------------------------------------------------------------------------------------------
def kernel(
    target: CudaTarget, shape: tuple[int, ...] = (2, 4, 64, 64), kv_heads: int = 4, mask: bool = False, **changes: Any
) -> Kernel:
    given = {"dtype": torch.bfloat16, "dropout": 0.0, "is_causal": True, "grouped": False, "keys": shape[2]} | changes
    query = torch.empty(shape, dtype=given["dtype"], device="meta", requires_grad=True)
    key = torch.empty((shape[0], kv_heads, given["keys"], shape[3]), dtype=given["dtype"], device="meta")
    bias = torch.empty(shape[2], given["keys"], device="meta") if mask else None
    return attention_kernel(target, query, key, key, bias, given["dropout"], given["is_causal"], given["grouped"])


@pytest.mark.parametrize(
    ("target", "changes", "expected"),
    [
        (A100, {}, Kernel.FLASH),
        (H100, {}, Kernel.CUDNN),
        (H100, {"mask": True}, Kernel.CUDNN),
        (H100, {"shape": (2, 4, 64, 60)}, Kernel.FLASH),
        (CudaTarget(cudnn_attention=False), {}, Kernel.FLASH),
        (A100, {"mask": True}, Kernel.EFFICIENT),
        (A100, {"dtype": torch.float32}, Kernel.EFFICIENT),
        (A100, {"dtype": torch.float64}, Kernel.MATH),
        (A100, {"keys": 32}, Kernel.EFFICIENT),
        (A100, {"shape": (2, 4, 64, 512)}, Kernel.EFFICIENT),
        (A100, {"kv_heads": 2, "grouped": True}, Kernel.FLASH),
        (A100, {"kv_heads": 2, "grouped": True, "dtype": torch.float32}, Kernel.MATH),
        (A100, {"kv_heads": 2}, Kernel.MATH),
        (A100, {"mask": True, "shape": (2, 4, 64, 60)}, Kernel.MATH),
        (CudaTarget(capability=(8, 9)), {"shape": (2, 4, 64, 200)}, Kernel.EFFICIENT),
        (CudaTarget(capability=(7, 5)), {}, Kernel.MATH),
        (CudaTarget(capability=(7, 5)), {"dtype": torch.float16}, Kernel.EFFICIENT),
    ],
)
def test_choice_of_an_attention_kernel(target: CudaTarget, changes: dict[str, Any], expected: Kernel) -> None:
    assert kernel(target, **changes) is expected


def test_wishes_about_attention_kernels_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert kernel(H100) is Kernel.FLASH
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert kernel(H100) is Kernel.MATH


def test_a_head_that_flash_attention_must_pad() -> None:
    with faking(A100), Ops() as ops:
        query = torch.empty(2, 4, 16, 20, dtype=torch.bfloat16, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        out.sum().backward()
        assert out.shape == query.shape == query.grad.shape
    assert {"constant_pad_nd", "_scaled_dot_product_flash_attention_backward"} <= set(ops.names)


def test_a_machine_names_its_gpu() -> None:
    assert {name: target_of(name).capability for name in PRESETS} == {
        "h100-sxm": (9, 0),
        "h200-sxm": (9, 0),
        "a100-sxm": (8, 0),
    }
    assert target_of("my own machine") == CudaTarget()


# ---- costs ----------------------------------------------------------------------------------------------------------
def test_scratch_of_attention_backward() -> None:
    batch, heads, kv_heads, tokens, head_dim = 2, 8, 2, 200, 80
    query = torch.empty(batch, tokens, heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    key = torch.empty(batch, tokens, kv_heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    args = (query, query, key, key)
    accumulated = batch * heads * 256 * 4 * (96 + 1)  # 200 tokens to 256, 80 numbers to 96, and softmax_d
    expanded = 2 * batch * heads * tokens * head_dim * 2
    flash = aten._scaled_dot_product_flash_attention_backward.default
    assert workspace_bytes(flash, args, None) == accumulated + expanded
    same_heads = (query, query, query, query)
    assert workspace_bytes(flash, same_heads, None) == accumulated


def test_scratch_of_the_embedding_backward() -> None:
    backward = aten.embedding_dense_backward.default
    few, many = (torch.empty(n, dtype=torch.long, device="meta") for n in (3072, 4000))
    grads = [torch.empty(t.numel(), 16, dtype=torch.bfloat16, device="meta") for t in (few, many)]
    assert workspace_bytes(backward, (grads[0], few, 1000, -1, False), None) == 0
    sums = (400 + 1000) * 16 * 4
    assert workspace_bytes(backward, (grads[1], many, 1000, -1, False), None) == sums + 6 * 8 * 4000


def test_sizes_of_the_allocator_and_libraries() -> None:
    assert [allocated_bytes(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert library_bytes(H100) == 32 * 1024**2
    assert library_bytes(A100) == 8 * 1024**2 + 128 * 1024


def test_assumptions_are_sentences_about_the_target() -> None:
    assert "9.0: cuDNN, then flash" in assumptions(H100)[0]
    assert "8.0: flash" in assumptions(A100)[0]
    assert any("guess" in sentence for sentence in assumptions(H100))


# ---- what is left alone ---------------------------------------------------------------------------------------------
def test_real_training_is_bit_equal_before_inside_and_after() -> None:
    before = train(llama(2), num_steps=2)
    with pretended_cuda():
        inside = train(llama(2), num_steps=2)
    after = train(llama(2), num_steps=2)
    assert all(torch.equal(*pair) for pair in zip(before, inside, strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def answers() -> tuple[Any, ...]:
    return (
        torch.cuda.is_available(),
        torch._C._get_accelerator(),
        torch.cuda.amp.common.amp_definitely_not_available(),
        torch.autograd.is_multithreading_enabled(),
        FakeTensor in sys.modules["torch.optim.optimizer"]._foreach_supported_types,
        torch._C._dispatch_has_kernel_for_dispatch_key("aten::scaled_dot_product_attention", "AutogradCUDA"),
    )


def test_nothing_is_left_behind_even_by_an_error() -> None:
    before = answers()
    with pretended_cuda():
        inside = answers()
    assert answers() == before
    assert inside[:2] == (False, torch.device("cuda"))
    assert all(a != b for a, b in zip(before[1:], inside[1:], strict=True))
    with pytest.raises(ZeroDivisionError), pretended_cuda():
        raise ZeroDivisionError
    assert answers() == before


def test_a_fake_tensor_may_outlive_the_device() -> None:
    with pretended_cuda(), FakeTensorMode() as mode:
        weight = torch.empty(2, 2, device="cuda", requires_grad=True)
    with mode:
        loss = (weight @ weight).sum()
        with pytest.raises(RuntimeError, match=r"accelerator|hasPrimaryContext"):
            loss.backward()


def test_the_innermost_target_holds() -> None:
    with pretended_cuda(A100):
        with pretended_cuda(H100):
            assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_capability() == (8, 0)
        assert torch._C._get_accelerator().type == "cuda"
    assert torch._C._get_accelerator().type == "cpu"


def test_a_second_thread_waits() -> None:
    order: list[str] = []

    def enter() -> None:
        with pretended_cuda(H100), FakeTensorMode():
            order.append("second")
            weight = torch.empty(2, device="cuda", requires_grad=True)
            weight.sum().backward()
            order.append(str(weight.grad.device))

    with pretended_cuda(A100):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second", "cuda:0"]


def test_a_torch_that_lacks_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.library, "_scoped_library")
    with pytest.raises(MissingDependency, match="has no _scoped_library"), pretended_cuda():
        pass
    assert torch._C._get_accelerator().type == "cpu"


def test_a_torch_that_lacks_a_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "_GET_HOOKS", "no_such_symbol")
    with pytest.raises(MissingDependency, match="no no_such_symbol in libtorch_cpu"), pretended_cuda():
        pass


def test_no_gpu_is_pretended_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_guard", None)
    with pretended_cuda():
        assert torch._C._get_accelerator().type == "cpu"


FIRST_BACKWARD = """
import os, threading, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from stowplan.offload.dry.cuda import pretended_cuda

def fake_step():
    with pretended_cuda(), FakeTensorMode():
        weight = torch.empty(2, device="cuda", requires_grad=True)
        weight.sum().backward()
        assert weight.grad.device.type == "cuda"

first = threading.Thread(target=fake_step)
first.start()
first.join()
fake_step()  # the first thread has ended, and nothing with it
torch.ones(2, requires_grad=True).sum().backward()
print(len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1)
"""


def test_a_process_whose_first_backward_is_fake_gets_no_threads_for_devices() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FIRST_BACKWARD], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(ran.stdout) < 8  # torch counts eight devices in its fake guard

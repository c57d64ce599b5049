"""Step programs from a roofline: Llama-like models of any size and sequence, for tests and benchmarks without a GPU.

Times assume an H100-like device (60% of its dense bf16 peak in matrix products, 2.6 TB/s of memory traffic in the
rest). They are not measured: compare policies on them, promise nothing.
"""

from __future__ import annotations

from dataclasses import replace

from stowplan.core.program import Action, BlockProgram, Op, Phase, StepProgram, Value

__all__ = ["analytic_block", "analytic_llama", "with_rows"]

MATMUL_FLOPS_PER_SECOND = 0.6 * 989e12
MEMORY_BYTES_PER_SECOND = 2.6e12
BF16_BYTES, FP32_BYTES = 2, 4
HEAD_DIMENSION = 128
ALL = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)


def analytic_block(
    *, hidden: int, ffn_ratio: float, kv_ratio: float, sequence: int, num_devices: int, gradient_bytes: int = 0
) -> BlockProgram:
    """One Llama block: 16 saved values, grouped-query attention, gated MLP.

    ``sequence`` tokens are spread over ``num_devices`` (context parallel; attention sees them all); ``ffn_ratio`` and
    ``kv_ratio`` are widths over ``hidden``.
    """
    tokens = sequence // num_devices
    unit = tokens * hidden * BF16_BYTES
    names: list[str] = []
    values: list[Value] = []
    ops: list[Op] = []

    def value(name: str, widths: float, producer: int | None, num_bytes: int | None = None) -> int:
        size = int(widths * unit) if num_bytes is None else num_bytes
        values.append(
            Value(name=name, size_bytes=size, producer=producer, actions=ALL if producer is not None else ALL[:2])
        )
        names.append(name)
        return len(values) - 1

    def op(
        name: str, inputs: str, outputs: dict[str, float], *, weights: float = 0, traffic: float = 0, flops: int = 0
    ) -> None:
        flops += int(2 * tokens * hidden * hidden * weights)
        seconds = flops / MATMUL_FLOPS_PER_SECOND + traffic * unit / MEMORY_BYTES_PER_SECOND
        read = tuple(names.index(i) for i in inputs.split())
        made = tuple(
            value(o, w, len(ops), tokens * hidden // HEAD_DIMENSION * FP32_BYTES if o == "logsumexp" else None)
            for o, w in outputs.items()
        )
        ops.append(
            Op(name=name, inputs=read, outputs=made, seconds=seconds, flops=flops, causal_attention=name == "attention")
        )

    value("input", 1, None)
    op("norm_1", "input", {"normed_1": 1}, traffic=2)
    op("query_projection", "normed_1", {"query_raw": 1}, weights=1)
    op("key_projection", "normed_1", {"key_raw": kv_ratio}, weights=kv_ratio)
    op("value_projection", "normed_1", {"value": kv_ratio}, weights=kv_ratio)
    op("rotary_query", "query_raw", {"query": 1}, traffic=2)
    op("rotary_key", "key_raw", {"key": kv_ratio}, traffic=2 * kv_ratio)
    attention_flops = 4 * sequence * tokens * hidden // 2
    op("attention", "query key value", {"attention": 1, "logsumexp": 0}, flops=attention_flops)
    op("output_projection", "attention", {"projected": 1}, weights=1)
    op("residual_1", "input projected", {"residual": 1}, traffic=3)
    op("norm_2", "residual", {"normed_2": 1}, traffic=2)
    op("gate_projection", "normed_2", {"gate": ffn_ratio}, weights=ffn_ratio)
    op("up_projection", "normed_2", {"up": ffn_ratio}, weights=ffn_ratio)
    op("silu", "gate", {"activated": ffn_ratio}, traffic=2 * ffn_ratio)
    op("multiply", "activated up", {"product": ffn_ratio}, traffic=3 * ffn_ratio)
    saved = sum(v.size_bytes for v in values)
    down = 2 * tokens * hidden * hidden * ffn_ratio / MATMUL_FLOPS_PER_SECOND
    attention_seconds = attention_flops / MATMUL_FLOPS_PER_SECOND
    matmul_seconds = sum(o.flops for o in ops) / MATMUL_FLOPS_PER_SECOND - attention_seconds + down
    other_seconds = sum(o.seconds for o in ops) - sum(o.flops for o in ops) / MATMUL_FLOPS_PER_SECOND
    return BlockProgram(
        name="LlamaDecoderLayer",
        values=tuple(values),
        ops=tuple(ops),
        forward_seconds=matmul_seconds + attention_seconds + other_seconds,
        backward_seconds=2 * matmul_seconds + 2.5 * attention_seconds + 1.5 * other_seconds,  # flash backward: 2.5×
        forward_peak_bytes=saved + 2 * unit,
        backward_peak_bytes=saved + int((2 + 2 * ffn_ratio) * unit),
        output_gradient_bytes=unit,
        gradient_bytes=gradient_bytes,
    )


def analytic_llama(
    *,
    num_blocks: int = 32,
    hidden: int = 4096,
    ffn_ratio: float = 3.5,
    kv_ratio: float = 0.25,
    sequence: int = 131072,
    num_devices: int = 8,
    static_bytes: int = 16 * 10**9,
    vocabulary: int = 128256,
    head_chunk_tokens: int = 2048,
) -> StepProgram:
    """A whole step: equal blocks between an embedding and a loss computed in chunks of ``head_chunk_tokens``."""
    block = analytic_block(
        hidden=hidden, ffn_ratio=ffn_ratio, kv_ratio=kv_ratio, sequence=sequence, num_devices=num_devices
    )
    tokens = sequence // num_devices
    unit = tokens * hidden * BF16_BYTES
    logits = min(tokens, head_chunk_tokens) * vocabulary * FP32_BYTES
    head_seconds = 3 * 2 * tokens * hidden * vocabulary / MATMUL_FLOPS_PER_SECOND
    return StepProgram(
        programs=(block,),
        blocks=(0,) * num_blocks,
        block_names=tuple(f"model.layers.{i}" for i in range(num_blocks)),
        parameter_bytes=static_bytes,
        buffer_bytes=0,
        optimizer_bytes=0,
        batch_bytes=tokens * 8,
        held_gradient_bytes=0,
        embedding_forward=Phase(seconds=unit / MEMORY_BYTES_PER_SECOND, peak_bytes=unit, left_bytes=0),
        head=Phase(seconds=head_seconds, peak_bytes=3 * unit + 2 * logits, left_bytes=0),
        embedding_backward=Phase(seconds=unit / MEMORY_BYTES_PER_SECOND, peak_bytes=unit, left_bytes=0),
        optimizer_step=Phase(seconds=static_bytes / MEMORY_BYTES_PER_SECOND, peak_bytes=0, left_bytes=0),
    )


def with_rows(step: StepProgram, num_rows: int = 256, num_splits: int = 16) -> StepProgram:
    """``step`` with values of ``num_rows`` rows: all may be swapped by rows, and what is row-wise recomputed by rows.

    Attention's outputs are not row-wise; splits are the multiples of ``num_rows`` / ``num_splits``.
    """

    def divided(program: BlockProgram) -> BlockProgram:
        values = []
        for value in program.values:
            row_wise = value.producer is not None and not program.ops[value.producer].causal_attention
            splits = tuple(num_rows * part // num_splits for part in range(1, num_splits)) if row_wise else ()
            assert value.size_bytes % num_rows == 0
            values.append(replace(value, num_rows=num_rows, splits=splits))
        return replace(program, values=tuple(values))

    return replace(step, programs=tuple(map(divided, step.programs)))

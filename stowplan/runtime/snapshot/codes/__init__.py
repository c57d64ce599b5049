"""Erasure codes and checksums of snapshots: pure functions over buffers, for any network and any process."""

from stowplan.runtime.snapshot.codes.code import NAMES, Area, Chunk, Code, Name, Stripe, code_for
from stowplan.runtime.snapshot.codes.coding import accumulate, carry_out, decode, encode
from stowplan.runtime.snapshot.codes.kernels import Kernels, best_kernels, crc32c
from stowplan.runtime.snapshot.codes.layout import Layout, Plan, Span, Term
from stowplan.runtime.snapshot.codes.native import NativeKernels, prepare
from stowplan.runtime.snapshot.codes.portable import NumpyKernels

__all__ = [
    "NAMES",
    "Area",
    "Chunk",
    "Code",
    "Kernels",
    "Layout",
    "Name",
    "NativeKernels",
    "NumpyKernels",
    "Plan",
    "Span",
    "Stripe",
    "Term",
    "accumulate",
    "best_kernels",
    "carry_out",
    "code_for",
    "crc32c",
    "decode",
    "encode",
    "prepare",
]

"""Every kernel that this machine has."""

from __future__ import annotations

import shutil

import pytest

from stowplan.core.errors import CompilationFailed
from stowplan.runtime.snapshot.codes import NativeKernels, NumpyKernels
from stowplan.runtime.snapshot.codes.native import variants


def _native():
    try:
        return variants()
    except CompilationFailed:
        assert not any(map(shutil.which, ("c++", "g++", "clang++"))), "there is a compiler, so it has to compile"
        return ()


KERNELS = {"numpy": NumpyKernels} | {each.name.lower(): lambda each=each: NativeKernels(each) for each in _native()}


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]()

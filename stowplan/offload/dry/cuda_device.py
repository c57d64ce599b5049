"""What autograd's engine asks of a CUDA device, answered in a process that has none.

Nothing is compiled: torch brings all the parts, and ctypes puts them in place.

Note: a CUDA device for fake tensors
    A fake tensor may say that it is on cuda, but a build of torch without CUDA, or without a driver, stops at autograd:

    1. Its nodes ask for the *device guard* of cuda, and the process aborts if there is none. torch has one for
       this case (``FakeGuardImpl``), which ``ensureCUDADeviceGuardSet`` puts in the place of a guard that counts no
       device. So a guard that answers 0 to everything is registered and torch replaces it at once. The guard stays: it
       does nothing, and without it a fake tensor that outlives us would end the process.
    2. The engine asks which accelerator there is, through virtual functions of the *CUDA hooks*. While the device is
       pretended, the object's table of functions is a copy in which those that the engine asks answer yes. Which ones
       they are is found by watching what a backward pass of two fake numbers calls, not from a list of positions.
    3. It has *threads* for as many devices as there were at the first backward pass of the process. Without
       multithreading, which is a setting of each thread, backward runs in the thread that calls it.

    ``at::accelerator::getAccelerator``, ``Engine::ready_queue`` and ``GraphTask::stash_current_streams`` of torch 2.13
    are the sources. Real tensors on the CPU have no stream and no device thread: they are not concerned.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stowplan.core.errors import MissingDependency

__all__ = ["answering_hooks", "device_guard"]

_CUDA = 1  # c10::DeviceType::CUDA
_REGISTER_GUARD = "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_GET_HOOKS = "_ZN2at6detail12getCUDAHooksEv"

# Functions of a guard: about thirty. Functions of the hooks: about sixty; a table ends with a zero.
_MAX_FUNCTIONS = 128
_TABLE_HEADER = 2  # offset to top and type information come before the first function (Itanium C++ ABI)
_POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)
# isBuilt, isAvailable and hasPrimaryContext in torch 2.13. Many more would mean that something else was asked.
_MAX_ANSWERS = 6

_Answer = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_Table = ctypes.Array[ctypes.c_void_p]


@functools.cache
def device_guard() -> None:
    """Let torch put its fake guard in the place of cuda's; see the note above, 1."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        raise _missing("no torch._C._ensureCUDADeviceGuardSet")
    guards = _symbol("libc10", _GUARDS, ctypes.c_void_p * (_CUDA + 1))
    register = _function("libc10", _REGISTER_GUARD, None, ctypes.c_int8, ctypes.c_void_p)
    # The engine counts devices when it starts its threads, so let it start before there are any to be seen.
    with _plainly():
        torch.zeros(1, requires_grad=True).sum().backward()
    nothing = _Answer(lambda _: 0)
    functions = _table([_address(nothing)] * _MAX_FUNCTIONS)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(functions))
    own = guards[_CUDA]
    placed = threading.Event()

    def place() -> None:
        register(_CUDA, ctypes.addressof(guard))
        torch._C._ensureCUDADeviceGuardSet()
        placed.set()
        threading.Event().wait()  # torch 2.11 keeps its guard only as long as the thread that asked for it

    threading.Thread(target=place, daemon=True, name="stowplan-device-guard").start()
    placed.wait()
    if guards[_CUDA] == ctypes.addressof(guard):
        register(_CUDA, own)
        raise _missing("torch._C._ensureCUDADeviceGuardSet() does not bring a device guard")


@contextmanager
def answering_hooks() -> Iterator[None]:
    """Let the engine believe that there is a CUDA device; see the note above, 2 and 3. One thread at a time."""
    with _hooks_with(_answering_functions()), torch.autograd.set_multithreading_enabled(False):
        yield


@functools.cache
def _answering_functions() -> _Table:
    """The table of the CUDA hooks' functions in which those that the engine asks say yes."""
    own = _own_functions()
    yes = _address(ctypes.pythonapi.Py_IsInitialized)  # returns 1, whatever it is given, and needs no lock
    header, functions = own[:_TABLE_HEADER], own[_TABLE_HEADER:]
    asked: set[int] = set()
    answers = [_Answer(functools.partial(_note, asked, index)) for index in range(len(functions))]
    known: set[int] = set()
    while True:
        watched = [yes if i in known else _address(answer) for i, answer in enumerate(answers)]
        with _hooks_with(_table([*header, *watched])):
            works = _backward_works()
        if asked <= known:
            break
        known |= asked
        if len(known) > _MAX_ANSWERS:
            raise _missing(f"autograd asks {len(known)} functions of CUDAHooksInterface")
    if not works:
        raise _missing("autograd does not take the CUDA hooks' word for a device")
    return _table([*header, *(yes if i in known else function for i, function in enumerate(functions))])


def _note(asked: set[int], index: int, _: int | None) -> int:
    asked.add(index)
    return 0


def _backward_works() -> bool:
    """Run a backward pass of fake tensors on cuda, once the hooks say that this is the accelerator."""
    if torch._C._get_accelerator().type != "cuda":
        return False
    with _plainly(), torch.autograd.set_multithreading_enabled(False), FakeTensorMode():
        weight = torch.empty(2, device="cuda", requires_grad=True)
        weight.sum().backward()
    return weight.grad is not None


@contextmanager
def _plainly() -> Iterator[None]:
    """Without any mode that is on."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        yield


# ---- tables of functions --------------------------------------------------------------------------------------------
def _own_functions() -> list[int]:
    """The table of the hooks as they are, header and all."""
    start = (_hooks()[0] or 0) - _TABLE_HEADER * _POINTER_BYTES
    table = (ctypes.c_void_p * (_TABLE_HEADER + _MAX_FUNCTIONS)).from_address(start)
    size = next((i for i in range(_TABLE_HEADER, len(table)) if not table[i]), len(table))
    return [entry or 0 for entry in table[:size]]


@contextmanager
def _hooks_with(table: _Table) -> Iterator[None]:
    hooks = _hooks()
    own = hooks[0]
    hooks[0] = ctypes.addressof(table) + _TABLE_HEADER * _POINTER_BYTES
    try:
        yield
    finally:
        hooks[0] = own


def _hooks() -> ctypes.Array[ctypes.c_void_p]:
    """The one object of the process; its first word points at its functions."""
    get = _function("libtorch_cpu", _GET_HOOKS, ctypes.c_void_p)
    return (ctypes.c_void_p * 1).from_address(get())


def _table(entries: list[int]) -> _Table:
    return (ctypes.c_void_p * len(entries))(*entries)


def _address(function: Callable[..., object]) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


# ---- names of torch's libraries -------------------------------------------------------------------------------------
@functools.cache
def _library(name: str) -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    for suffix in (".so", ".dylib"):
        if (folder / (name + suffix)).exists():
            return ctypes.CDLL(str(folder / (name + suffix)))
    raise _missing(f"no {name} in {folder}")


def _symbol(library: str, name: str, kind: type[ctypes.Array[ctypes.c_void_p]]) -> ctypes.Array[ctypes.c_void_p]:
    try:
        return kind.in_dll(_library(library), name)
    except ValueError:
        raise _missing(f"no {name} in {library}") from None


def _function(library: str, name: str, returns: type | None, *arguments: type) -> Callable[..., int]:
    try:
        function = getattr(_library(library), name)
    except AttributeError:
        raise _missing(f"no {name} in {library}") from None
    function.restype, function.argtypes = returns, list(arguments)
    return function  # type: ignore[no-any-return]


def _missing(what: str) -> MissingDependency:
    return MissingDependency(
        f"fake tensors cannot be on cuda with this torch ({torch.__version__}): {what}. Plan on a machine with a GPU, "
        "or install a torch of a version that was tried (2.11 to 2.15), on Linux or macOS."
    )

"""A job to plan for, from the command line: a model, one batch, an optimizer.

The command line takes its choices from here, so torch is imported only where a job is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stowplan.core.errors import InvalidArgument, MissingDependency

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "OptimizerName", "Precision", "job_from_config", "job_from_function"]


class Precision(StrEnum):
    """In what numbers a model computes; ``bf16-autocast`` keeps its weights in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    BF16_AUTOCAST = "bf16-autocast"


class OptimizerName(StrEnum):
    """Optimizers that the command line can make."""

    ADAMW = "adamw"
    SGD = "sgd"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Job:
    """What ``stowplan.plan`` is called with, inside ``surroundings``. ``batch`` is what the model is called with."""

    model: torch.nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer | None = None
    precision: Precision = Precision.FLOAT32

    def surroundings(self) -> AbstractContextManager[object]:
        """What the forward pass runs under: autocast, or nothing."""
        import torch

        if self.precision is not Precision.BF16_AUTOCAST:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=torch.bfloat16)


# ---- from a function of the user's -----------------------------------------------------------------------------------


def job_from_function(reference: str) -> Job:
    """Call ``module:function`` or ``path/to/file.py:function`` without arguments and take what it returns as a job.

    It may return a mapping or an object with ``model``, ``batch`` and, if there is one, ``optimizer``, or a tuple
    (model, batch) or (model, batch, optimizer). Raises InvalidArgument if it cannot be found, fails, or returns
    anything else.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise InvalidArgument(
            f"--model {reference!r} is no function; allowed: module:function or path/to/file.py:function."
        )
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidArgument(f"--model {reference!r}: {place} has no function {name!r}.")
    return _job_from(_call(function, reference), reference)


def _module_by_name(name: str) -> ModuleType:
    # As `python -m` does, so that a module beside the user is found.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module: ModuleType = _call(lambda: importlib.import_module(name), name)
    return module


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidArgument(f"--model: there is no file {str(path)!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    # Classes look their module up here, and neighbours are imported from beside the file, as when it is run.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    loader = spec.loader
    _call(lambda: loader.exec_module(module), str(path))
    return module


def _call(function: Callable[[], Any], what: str) -> Any:
    """Run code of the user's; what it raises is told as a mistake in what was given, with its place."""
    try:
        return function()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InvalidArgument(
            f"--model: {what} raised {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})."
        ) from error


def _job_from(returned: object, reference: str) -> Job:
    import torch

    expected = "allowed: a dict or object with model, batch and optionally optimizer, or a tuple of them in that order"
    model, batch, optimizer = _parts(returned)
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgument(f"--model {reference!r} gave a {type(model).__name__} as model; {expected}.")
    if batch is None:
        raise InvalidArgument(f"--model {reference!r} gave no batch; {expected}.")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(f"--model {reference!r} gave a {type(optimizer).__name__} as optimizer; {expected}.")
    return Job(model, batch, optimizer)


def _parts(returned: object) -> tuple[object, object, object]:
    names = ("model", "batch", "optimizer")
    match returned:
        case (model, batch):
            return model, batch, None
        case (model, batch, optimizer):
            return model, batch, optimizer
        case Mapping():
            model, batch, optimizer = (returned.get(name) for name in names)
        case _:
            model, batch, optimizer = (getattr(returned, name, None) for name in names)
    return model, batch, optimizer


# ---- from a Hugging Face config --------------------------------------------------------------------------------------


def job_from_config(
    path: Path,
    *,
    seq_len: int,
    batch_size: int,
    precision: Precision = Precision.FLOAT32,
    optimizer: OptimizerName = OptimizerName.ADAMW,
) -> Job:
    """A causal language model with random weights, random tokens as inputs and labels, and an optimizer.

    ``path`` is a ``config.json`` or the directory of one; nothing is downloaded and no code beside it is run. Raises
    InvalidArgument for configs of no causal language model and sequences longer than the model's positions,
    MissingDependency without transformers.
    """
    import torch

    config = _read_config(path)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise InvalidArgument(f"--model-config: {str(path)!r} has no vocabulary: it is no causal language model.")
    positions = _num_positions(config)
    if positions is not None and seq_len > positions:
        raise InvalidArgument(
            f"--seq-len {seq_len} is more than the {positions} positions of {str(path)!r}; shorten it, or raise the "
            f"number of positions in a copy of the config."
        )
    config.use_cache = False  # a cache holds activations that training never reads
    model = _build(config, path, precision)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (batch_size, seq_len), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    return Job(model, batch, _optimizer(optimizer, model), precision)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingDependency('--model-config needs transformers: pip install "stowplan[hf]".') from None


def _read_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InvalidArgument(f"--model-config: there is no file {str(file)!r}; give a config.json or its directory.")
    try:
        return _transformers().AutoConfig.from_pretrained(str(file), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InvalidArgument(f"--model-config: {str(file)!r} is no config that transformers reads: {error}") from None


def _num_positions(config: Any) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _build(config: Any, path: Path, precision: Precision) -> torch.nn.Module:
    import torch

    dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
    try:
        model = _transformers().AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InvalidArgument(f"--model-config: {str(path)!r} makes no causal language model: {error}") from None
    assert isinstance(model, torch.nn.Module)
    return model.train()


def _optimizer(name: OptimizerName, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    import torch

    match name:
        case OptimizerName.ADAMW:
            return torch.optim.AdamW(model.parameters())
        case OptimizerName.SGD:
            return torch.optim.SGD(model.parameters())
        case OptimizerName.NONE:
            return None

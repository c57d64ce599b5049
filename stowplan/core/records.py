"""Frozen dataclasses to plain JSON values and back, strictly: every mistake is named by its path in the file."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from functools import cache
from typing import Any

__all__ = ["RecordError", "from_plain", "to_plain"]


class RecordError(Exception):
    """A plain value does not have the shape that its dataclass asks for; the message starts with the path."""


def to_plain(record: Any) -> Any:
    """Turn dataclasses, enums and tuples into dicts, strings and lists."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: to_plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, enum.Enum):
        return record.value
    if isinstance(record, tuple | list):
        return [to_plain(item) for item in record]
    if isinstance(record, dict):
        return {key: to_plain(item) for key, item in record.items()}
    return record


def from_plain(kind: Any, plain: Any, path: str = "$") -> Any:
    """Rebuild a value of type ``kind`` from plain JSON values. Raises RecordError naming the path of the mistake."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if plain is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) > 1:  # at most one of them is a dataclass, and only that is written as an object
            kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind) == isinstance(plain, dict)]
        (kind,) = kinds
        return from_plain(kind, plain, path)
    if origin is tuple:
        items = _expect(list, plain, path)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(from_plain(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(items))
        if len(items) != len(arguments):
            raise RecordError(f"{path}: {len(items)} items where {len(arguments)} are expected")
        return tuple(
            from_plain(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(arguments, items, strict=True))
        )
    if origin is dict:
        return {
            key: from_plain(arguments[1], item, f"{path}.{key}") for key, item in _expect(dict, plain, path).items()
        }
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_plain(kind, _expect(dict, plain, path), path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(plain)
        except ValueError:
            raise RecordError(f"{path}: {plain!r} is none of {', '.join(repr(m.value) for m in kind)}") from None
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        try:
            return float(plain)
        except OverflowError:
            raise RecordError(f"{path}: the number is too large") from None
    return _expect(kind, plain, path)


def _expect(kind: Any, plain: Any, path: str) -> Any:
    if kind is Any:
        return plain
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise RecordError(f"{path}: {type(plain).__name__} where {kind.__name__} is expected")
    return plain


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _dataclass_from_plain(kind: Any, plain: dict[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(plain) - set(fields))
    if unknown:
        raise RecordError(f"{path}: unknown key {unknown[0]!r}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in plain]
    if missing:
        raise RecordError(f"{path}: key {missing[0]!r} is missing")
    hints = _field_types(kind)
    return kind(**{name: from_plain(hints[name], item, f"{path}.{name}") for name, item in plain.items()})

"""Frames between nodes: a fixed prefix, a code that proves who sent it, a JSON header, and raw bytes. Never pickle.

    4s magic | u16 version | u16 zero | u32 header bytes | u32 payload bytes | u32 CRC-32C of the payload
    16s BLAKE2b of the number of the frame, the prefix and the header, with the connection's key
    header: JSON object | payload

Each direction counts its frames from 0 and has its own key, which is empty until both ends know who the other is.
Any frame that is not so ends its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import struct
from hashlib import blake2b
from typing import Any, TypeAlias

from stowplan.core.units import KIB, MIB
from stowplan.runtime.snapshot.codes import crc32c

__all__ = ["MOST_PAYLOAD_BYTES", "PROTOCOL_VERSION", "BrokenFrame", "Channel", "Header", "OtherVersion"]

Header: TypeAlias = dict[str, Any]
PROTOCOL_VERSION = 2
MOST_PAYLOAD_BYTES = 16 * MIB
_MOST_HEADER_BYTES = 1 * MIB
_MOST_STRANGERS_HEADER_BYTES = 4 * KIB
_MAGIC = b"STWX"
_PREFIX = struct.Struct("<4sHHIII")
_COUNT = struct.Struct("<Q")
_MAC_BYTES = 16


class BrokenFrame(ConnectionError):
    """What came is no frame of this connection; nothing of it counts."""


class OtherVersion(BrokenFrame):
    """The other end speaks another version of the protocol."""


class Channel:
    """A connection that frames go over; strangers' frames are short and have no payload until ``secure``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._keys = (b"", b"")
        self._counts = [0, 0]
        self._secure = False

    def secure(self, send_key: bytes, receive_key: bytes) -> None:
        """All frames from now on carry codes with these keys."""
        self._keys, self._counts, self._secure = (send_key, receive_key), [0, 0], True

    async def send(self, header: Header, payload: bytes | memoryview = b"") -> None:
        """Raises ConnectionError."""
        body = json.dumps(header, separators=(",", ":")).encode()
        prefix = _PREFIX.pack(_MAGIC, PROTOCOL_VERSION, 0, len(body), len(payload), crc32c(payload))
        self._writer.write(prefix + self._code(0, prefix, body) + body)
        if len(payload):
            self._writer.write(payload)
        await self._writer.drain()

    async def receive(self) -> tuple[Header, bytes]:
        """Header and payload. Raises BrokenFrame, and ConnectionError where the connection has ended."""
        try:
            prefix = await self._reader.readexactly(_PREFIX.size)
            magic, version, zero, header_bytes, payload_bytes, crc = _PREFIX.unpack(prefix)
            if magic != _MAGIC or zero:
                raise BrokenFrame("what came does not begin as a frame does")
            if version != PROTOCOL_VERSION:
                raise OtherVersion(
                    f"the other end speaks version {version} of the protocol, this one {PROTOCOL_VERSION}"
                )
            most = (_MOST_HEADER_BYTES, MOST_PAYLOAD_BYTES) if self._secure else (_MOST_STRANGERS_HEADER_BYTES, 0)
            if header_bytes > most[0] or payload_bytes > most[1]:
                raise BrokenFrame(f"a frame with {header_bytes} + {payload_bytes} bytes, {most[0]} + {most[1]} allowed")
            mac = await self._reader.readexactly(_MAC_BYTES)
            body = await self._reader.readexactly(header_bytes)
            if not hmac.compare_digest(mac, self._code(1, prefix, body)):
                raise BrokenFrame("a frame was changed on its way, or is not of this connection")
            payload = await self._reader.readexactly(payload_bytes)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the connection ended") from error
        if crc32c(payload) != crc:
            raise BrokenFrame("a payload was changed on its way: its CRC is wrong")
        try:
            header = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BrokenFrame("a header is no JSON") from error
        if not isinstance(header, dict):
            raise BrokenFrame("a header is no JSON object")
        return header, payload

    def _code(self, direction: int, prefix: bytes, body: bytes) -> bytes:
        count = _COUNT.pack(self._counts[direction])
        self._counts[direction] += 1
        return blake2b(count + prefix + body, key=self._keys[direction], digest_size=_MAC_BYTES).digest()

    def abort(self) -> None:
        """End the connection at once."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """End the connection after what was sent."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

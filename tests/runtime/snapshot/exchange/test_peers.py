"""Strangers, forgers and malformed frames: refused, at their own cost only; and who may have a token."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from stowplan import InvalidArgument, SnapshotPeerRefused
from stowplan.runtime.snapshot.codes import Area
from stowplan.runtime.snapshot.exchange.authentication import (
    TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    JobToken,
    Member,
    prove_to_server,
)
from stowplan.runtime.snapshot.exchange.exchange import Verdict
from stowplan.runtime.snapshot.exchange.peer_messages import Done, Read
from stowplan.runtime.snapshot.exchange.wire import PROTOCOL_VERSION, Channel
from tests.runtime.snapshot.nodes import TOKEN, Group, snapshot_id

FIRST = snapshot_id(1)
SECRET = b"a token of this job, not of others"


def frame(magic=b"STWX", version=PROTOCOL_VERSION, header=b"{}", header_bytes=None, payload_bytes=0):
    size = len(header) if header_bytes is None else header_bytes
    return struct.pack("<4sHHIII", magic, version, 0, size, payload_bytes, 0) + bytes(16) + header


FOREIGN = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a long header": frame(header_bytes=1 << 31),
    "a payload": frame(payload_bytes=1 << 20),
    "no code": frame(),
    "nothing": b"",
}


@pytest.mark.parametrize("sent", FOREIGN.values(), ids=FOREIGN)
def test_strangers_are_cut_off_and_the_exchange_goes_on(sent):
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            reader, writer = await asyncio.open_connection(*group.addresses[0])
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            assert sum(group.nodes[0].server.refusals.values()) == 1
            group.commit(FIRST)
            assert {each.verdict for each in (await group.code_all(FIRST)).values()} == {Verdict.GLOBAL}

    asyncio.run(body())


def test_strangers_that_say_nothing_hold_few_connections():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            strangers = [await asyncio.open_connection(*group.addresses[0]) for _ in range(40)]
            ended = [asyncio.ensure_future(reader.read()) for reader, _ in strangers]
            done, _ = await asyncio.wait(ended, timeout=0.3)
            assert len(done) == 8 == group.nodes[0].server.refusals["crowd"]
            for task in ended:
                task.cancel()
            for _, writer in strangers:
                writer.close()
            await asyncio.gather(*ended, return_exceptions=True)

    asyncio.run(body())


def test_another_version_is_named():
    async def body():
        async def answer(reader, writer):
            await reader.read(10)
            writer.write(frame(version=99))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, Group("raim5", [10_000] * 3) as group:
            group.addresses[1] = server.sockets[0].getsockname()
            await group.connect()
            group.commit(FIRST)
            outcome = (await group.code_all(FIRST, [0]))[0]
            assert outcome.verdict is Verdict.SKIPPED
            assert f"speaks version 99 of the protocol, this one {PROTOCOL_VERSION}" in outcome.reason

    asyncio.run(body())


def test_who_listens_without_the_token_is_no_peer_and_learns_no_token():
    heard = bytearray()

    async def body():
        ended = asyncio.Event()

        async def answer(reader, writer):
            channel = Channel(reader, writer)
            heard.extend(str(await channel.receive()).encode())
            await channel.send({"nonce": "00"})
            heard.extend(str(await channel.receive()).encode())
            await channel.send({"proof": "00"})
            await channel.close()
            ended.set()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            channel = Channel(*await asyncio.open_connection(*server.sockets[0].getsockname()))
            with pytest.raises(SnapshotPeerRefused, match="does not know the job's token") as caught:
                await prove_to_server(channel, TOKEN, Member("run", "group", 0, 3, "raim5 3 1", 4096))
            assert caught.value.reason == "server"
            channel.abort()
            await ended.wait()

    asyncio.run(body())
    assert b"proof" in heard
    assert SECRET not in heard
    assert SECRET.hex().encode() not in heard


def test_proofs_of_one_connection_are_none_for_another():
    """Who recorded a whole connection and sends it again is not believed."""
    said = []

    def record(begin, towards_server, chunk):
        if towards_server:
            said.append(chunk)
        return chunk

    async def body():
        async with Group("raim5", [10_000] * 3, harms={(0, 1): record}) as group:
            group.commit(FIRST)
            await group.code_all(FIRST)
            refused = group.nodes[1].server.refusals["malformed"]
            reader, writer = await asyncio.open_connection(*group.addresses[1])
            writer.write(b"".join(said[:2]))  # hello and proof
            assert b'"error":"token"' in await reader.read()
            assert group.nodes[1].server.refusals["malformed"] == refused + 1
            writer.close()

    asyncio.run(body())


def test_malformed_requests_of_members_end_their_connection():
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            for asked in (
                {"ask": "Everything", "generation": 1, "body": {}},
                {"ask": "Read", "generation": 1, "body": {"snapshot": 3}},
                {"ask": ["Read"], "generation": True},
            ):
                channel = Channel(*await asyncio.open_connection(*group.addresses[1]))
                await prove_to_server(channel, TOKEN, group.nodes[0].member)
                assert await channel.receive() == ({}, b"")
                await channel.send(asked)
                answer, _ = await channel.receive()
                assert answer["error"] == "malformed"
                with pytest.raises(ConnectionError):
                    await channel.receive()
                channel.abort()

    asyncio.run(body())


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, 10_001), (4095, 2), (9999, 2), (0, -5)])
def test_bytes_outside_a_block_are_not_read(offset, length):
    async def body():
        async with Group("raim5", [10_000] * 3) as group:
            group.commit(FIRST)
            with pytest.raises(SnapshotPeerRefused, match="not within one block") as caught:
                await group.nodes[0].ask(1, Read(FIRST, Area.DATA, offset, length), Done)
            assert caught.value.reason == "malformed"

    asyncio.run(body())


def test_tokens_come_from_files_that_nobody_else_may_read(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    assert JobToken.from_file(path).derived("a", b"b") == TOKEN.derived("a", b"b")
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(path))
    assert JobToken.from_environment().derived("a", b"b") == TOKEN.derived("a", b"b")
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(InvalidArgument, match=f"mode {mode:04o}"):
            JobToken.from_environment()
    with pytest.raises(InvalidArgument, match="cannot be read: No such file"):
        JobToken.from_file(Path(tmp_path / "none"))
    monkeypatch.delenv(TOKEN_FILE_VARIABLE)
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET.decode())
    assert JobToken.from_environment().derived("a", b"b") == TOKEN.derived("a", b"b")
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(InvalidArgument, match="no job token"):
        JobToken.from_environment()
    with pytest.raises(InvalidArgument, match="16 or more"):
        JobToken(b"short")
    assert "job" not in repr(TOKEN).replace("JobToken", "")

"""Connections between the nodes of a group: each serves all others, and asks each over one connection of its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any, TypeAlias

from stowplan.core.errors import SnapshotPeerRefused, SnapshotPeerUnavailable
from stowplan.core.records import RecordError, from_plain, to_plain
from stowplan.runtime.snapshot.exchange.authentication import JobToken, Member, prove_to_client, prove_to_server
from stowplan.runtime.snapshot.exchange.peer_messages import REQUESTS, Answer, Request
from stowplan.runtime.snapshot.exchange.wire import BrokenFrame, Channel, Header, OtherVersion
from stowplan.runtime.snapshot.fail_points import fail_at

__all__ = ["Address", "Link", "Serve", "Server"]

Address: TypeAlias = tuple[str, int]
Payload: TypeAlias = bytes | memoryview
Serve: TypeAlias = Callable[[int, int, Request, bytes], Awaitable[tuple[Answer, Payload]]]
_MOST_STRANGERS = 32  # connections at a time that have not proved themselves


class Server:
    """Accepts the members of the group, each at one connection, and answers with ``serve(node, generation, request)``.

    What anybody sends that is not right ends that connection and nothing else; ``refusals`` counts why.
    """

    def __init__(self, member: Member, token: JobToken, serve: Serve, handshake_seconds: float) -> None:
        self._member, self._token, self._serve, self._handshake_seconds = member, token, serve, handshake_seconds
        self._server: asyncio.Server | None = None
        self._strangers = 0
        self._channels: dict[int, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.refusals: Counter[str] = Counter()

    async def start(self, host: str, port: int) -> Address:
        """Listen; port 0 takes a free one. Gives the address."""
        self._server = await asyncio.start_server(self._connected, host, port)
        bound = self._server.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    async def close(self) -> None:
        """End all connections."""
        if self._server:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        if self._strangers >= _MOST_STRANGERS:
            self.refusals["crowd"] += 1
            channel.abort()
            return
        self._strangers += 1
        task = asyncio.get_running_loop().create_task(self._hold(channel))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:  # also of what was cancelled before it began
            self._tasks.discard(task)
            channel.abort()

        task.add_done_callback(ended)

    async def _hold(self, channel: Channel) -> None:
        try:
            node = await self._admit(channel)
            if node is None:
                return
            try:
                await self._converse(channel, node)
            finally:
                if self._channels.get(node) is channel:
                    del self._channels[node]
        except BrokenFrame as error:
            self.refusals["version" if isinstance(error, OtherVersion) else "malformed"] += 1
        except (ConnectionError, TimeoutError):
            self.refusals["cut"] += 1

    async def _admit(self, channel: Channel) -> int | None:
        try:
            async with asyncio.timeout(self._handshake_seconds):
                member = await prove_to_client(channel, self._token)
        except OtherVersion:
            await channel.send({"error": "version"})
            await channel.close()
            raise
        except BrokenFrame:
            await channel.close()
            raise
        finally:
            self._strangers -= 1
        reason, problem = _mismatch(self._member, member)
        if reason:
            self.refusals[reason] += 1
            await channel.send({"error": reason, "problem": problem})
            await channel.close()
            return None
        await channel.send({})
        if former := self._channels.get(member.node):
            former.abort()
        self._channels[member.node] = channel
        return member.node

    async def _converse(self, channel: Channel, node: int) -> None:
        while True:
            header, payload = await channel.receive()
            try:
                generation, request = _request(header)
                answer, content = await self._serve(node, generation, request, payload)
            except RecordError as error:
                await channel.send({"error": "malformed", "problem": f"node {node} asks for nothing known: {error}."})
                await channel.close()
                raise BrokenFrame(str(error)) from error
            except SnapshotPeerRefused as error:
                await channel.send({"error": error.reason, "problem": error.problem})
            else:
                await channel.send({"body": to_plain(answer)}, content)


class Link:
    """Asks one node; connects when it has to. One request is under way at a time."""

    def __init__(self, member: Member, token: JobToken, node: int, address: Address, handshake_seconds: float) -> None:
        self._member, self._token, self.node, self._address = member, token, node, address
        self._handshake_seconds = handshake_seconds
        self._channel: Channel | None = None
        self._turn = asyncio.Lock()

    async def ask(
        self, request: Request, kind: type[Any], generation: int, payload: Payload, timeout_seconds: float
    ) -> tuple[Any, bytes]:
        """The answer, of type ``kind``, and its payload.

        Raises SnapshotPeerUnavailable, after which the next request connects anew, and SnapshotPeerRefused.
        """
        async with self._turn:
            whole = False
            try:
                fail_at("exchange")
                async with asyncio.timeout(timeout_seconds):
                    if self._channel is None:
                        self._channel = await self._connected()
                    header: Header = {
                        "ask": type(request).__name__, "generation": generation, "body": to_plain(request)
                    }  # fmt: skip
                    await self._channel.send(header, payload)
                    answer, content = await self._channel.receive()
                whole = True
            except (OSError, TimeoutError) as error:
                what = "does not answer in time" if isinstance(error, TimeoutError) else str(error) or repr(error)
                raise SnapshotPeerUnavailable(f"node {self.node} at {self._where}: {what}.") from error
            finally:
                if not whole:
                    self.abort()
        if "error" in answer:
            raise SnapshotPeerRefused(str(answer["error"]), str(answer.get("problem")))
        try:
            return from_plain(kind, answer.get("body"), "answer"), content
        except RecordError as error:
            raise SnapshotPeerRefused("malformed", f"node {self.node} answers what was not asked: {error}.") from error

    async def _connected(self) -> Channel:
        channel = None
        try:
            async with asyncio.timeout(self._handshake_seconds):
                channel = Channel(*await asyncio.open_connection(*self._address))
                await prove_to_server(channel, self._token, self._member)
                welcome, _ = await channel.receive()
            if "error" in welcome:
                raise SnapshotPeerRefused(str(welcome["error"]), str(welcome.get("problem")))
        except OtherVersion as error:
            if channel:
                channel.abort()
            raise SnapshotPeerRefused("version", f"node {self.node} at {self._where}: {error}.") from error
        except BaseException:
            if channel:
                channel.abort()
            raise
        return channel

    @property
    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def abort(self) -> None:
        """End the connection, if there is one."""
        if self._channel:
            self._channel.abort()
            self._channel = None


def _request(header: Header) -> tuple[int, Request]:
    name, generation = header.get("ask"), header.get("generation")
    if not isinstance(name, str) or name not in REQUESTS or type(generation) is not int:
        raise RecordError(f"$: ask={name!r}, generation={generation!r}")
    return generation, from_plain(REQUESTS[name], header.get("body"), "$.body")


def _mismatch(own: Member, other: Member) -> tuple[str, str]:
    """Why ``other`` is no member of this one's group: a word and a sentence; empty where it is one."""
    for field in fields(Member):
        ours, theirs = getattr(own, field.name), getattr(other, field.name)
        if field.name != "node" and ours != theirs:
            reason = field.name if field.name in ("run", "group") else "code"
            return reason, (
                f"node {other.node} has {field.name}={theirs!r}, and node {own.node} that it asks has {ours!r}: all "
                f"nodes of a group are started with the same."
            )
    if not 0 <= other.node < own.num_nodes or other.node == own.node:
        return "node", f"node {other.node} cannot ask node {own.node} of {own.num_nodes}: each node has its own number."
    return "", ""

"""Who may speak to whom: nodes prove to each other that they know the job's token, which is never sent.

    client → server   hello: run, group, node, nonce …
    server → client   nonce
    client → server   HMAC-SHA256(token, "client" + both)
    server → client   HMAC-SHA256(token, "server" + both)

The server proves itself last, so strangers learn nothing from it. Nonces are new for each connection, and so are the
keys of its frames, which are made from the token and both messages: proofs passed on by a third party do not let it
send frames of its own. Payloads are not encrypted.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from stowplan.core.errors import InvalidArgument, SnapshotPeerRefused
from stowplan.core.records import RecordError, from_plain, to_plain
from stowplan.runtime.snapshot.exchange.wire import BrokenFrame, Channel, Header

__all__ = ["TOKEN_FILE_VARIABLE", "TOKEN_VARIABLE", "JobToken", "Member", "prove_to_client", "prove_to_server"]

TOKEN_VARIABLE = "STOWPLAN_JOB_TOKEN"
TOKEN_FILE_VARIABLE = "STOWPLAN_JOB_TOKEN_FILE"
_LEAST_TOKEN_BYTES = 16
_NONCE_BYTES = 32


class JobToken:
    """A secret that all nodes of a job have, and nobody else. It shows nowhere."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < _LEAST_TOKEN_BYTES:
            raise InvalidArgument(
                f"a job token of {len(secret)} bytes: {_LEAST_TOKEN_BYTES} or more are needed. Make one for each job, "
                f"such as by `openssl rand -hex 32`, and give it to all its nodes."
            )
        self._secret = secret

    @classmethod
    def from_file(cls, path: Path) -> JobToken:
        """The file's content without blanks around it. Raises InvalidArgument: not there, or others may read it."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                content = file.read().strip()
        except OSError as error:
            raise InvalidArgument(f"the job token in {path} cannot be read: {error.strerror}.") from error
        mode, owner, user = stat.S_IMODE(status.st_mode), status.st_uid, os.geteuid()
        if not stat.S_ISREG(status.st_mode) or mode & 0o077 or owner != user:
            raise InvalidArgument(
                f"the job token in {path} has mode {mode:04o} and owner {owner}: it has to be a file of this user "
                f"({user}) with mode 0600. Use `chmod 600`, and make a new token if others may have seen it."
            )
        return cls(content)

    @classmethod
    def from_environment(cls) -> JobToken:
        """That of STOWPLAN_JOB_TOKEN_FILE, a path, or of STOWPLAN_JOB_TOKEN. Raises InvalidArgument: neither is set."""
        if path := os.environ.get(TOKEN_FILE_VARIABLE):
            return cls.from_file(Path(path))
        if secret := os.environ.get(TOKEN_VARIABLE):
            return cls(secret.encode())
        raise InvalidArgument(
            f"no job token: set {TOKEN_FILE_VARIABLE} to a file of mode 0600 with one, or {TOKEN_VARIABLE}."
        )

    def __repr__(self) -> str:
        return "JobToken(…)"

    def derived(self, purpose: str, message: bytes) -> bytes:
        """32 bytes that only who knows the token can compute."""
        return hmac.digest(self._secret, purpose.encode() + b"\0" + message, "sha256")


@dataclass(frozen=True, slots=True)
class Member:
    """Which node of which group of which run; ``code`` and ``block_bytes`` are those that all members have to have."""

    run: str
    group: str
    node: int
    num_nodes: int
    code: str
    block_bytes: int


async def prove_to_server(channel: Channel, token: JobToken, member: Member) -> None:
    """The client's part; the channel is secure when it returns.

    Raises SnapshotPeerRefused ("token", "server"), ConnectionError.
    """
    hello: Header = {"member": to_plain(member), "nonce": secrets.token_hex(_NONCE_BYTES)}
    await channel.send(hello)
    challenge, _ = await channel.receive()
    message = _message(hello, challenge)
    await channel.send({"proof": token.derived("client", message).hex()})
    answer, _ = await channel.receive()
    if answer.get("error") == "token":
        raise SnapshotPeerRefused("token", "the peer does not take this job's token: give all nodes of a job the same.")
    if not _same(answer.get("proof"), token.derived("server", message)):
        raise SnapshotPeerRefused("server", "what listens at a peer's address does not know the job's token.")
    channel.secure(token.derived("to server", message), token.derived("to client", message))


async def prove_to_client(channel: Channel, token: JobToken) -> Member:
    """The server's part; gives whom the client is proved to be. Raises BrokenFrame for who does not know the token."""
    hello, _ = await channel.receive()
    challenge: Header = {"nonce": secrets.token_hex(_NONCE_BYTES)}
    await channel.send(challenge)
    message = _message(hello, challenge)
    answer, _ = await channel.receive()
    if not _same(answer.get("proof"), token.derived("client", message)):
        await channel.send({"error": "token"})
        raise BrokenFrame("the client does not know the job's token")
    await channel.send({"proof": token.derived("server", message).hex()})
    channel.secure(token.derived("to client", message), token.derived("to server", message))
    try:
        return from_plain(Member, hello.get("member"), "member")  # type: ignore[no-any-return]
    except RecordError as error:
        raise BrokenFrame(f"a client does not say who it is: {error}") from error


def _message(hello: Header, challenge: Header) -> bytes:
    return json.dumps([hello, challenge], sort_keys=True, separators=(",", ":")).encode()


def _same(given: object, expected: bytes) -> bool:
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, expected.hex())

"""The memory process: outlives trainers and whoever started it, and ends when it is told to, or after a time alone.

    python -m stowplan.runtime.snapshot.memory.process --run RUN --node NODE --num-ranks N --directory D
        [--generation G] [--idle-seconds S] [--listen ADDRESS]

returns when the process serves, with 0, or says on stderr why there is none. The process is forked twice and has a
session of its own: it is in no process group that a launcher kills, and nobody's child. Its log is beside its socket; a
process that was told to end by ``End`` removes it, unless there is more in it than plain information.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import logging.handlers
import os
import re
import resource
import signal
import sys
from pathlib import Path

from stowplan.core.errors import StowplanError
from stowplan.core.units import MIB
from stowplan.runtime.snapshot.exchange.group_coder import GroupCoder
from stowplan.runtime.snapshot.fail_points import arm
from stowplan.runtime.snapshot.layouts import node_of
from stowplan.runtime.snapshot.memory import protocol
from stowplan.runtime.snapshot.memory.locks import FileLock
from stowplan.runtime.snapshot.memory.protocol import IDLE_SECONDS, LOOPBACK
from stowplan.runtime.snapshot.memory.server import Server
from stowplan.runtime.snapshot.memory.store import Store

__all__ = ["main"]

_LOG = logging.getLogger("stowplan.runtime.snapshot")
_INFORMATION = re.compile(r"\S+ \S+ \d+ \S+ INFO .*")  # a line of the log


def main(arguments: list[str] | None = None) -> int:
    """The command above; also 0 where a process serves this run and node already."""
    options = _parsed(arguments)
    files = protocol.files_of(options.run, options.node, options.directory)
    protocol.check_directory(options.directory)
    told, tell = os.pipe()
    first = os.fork()
    if first:
        os.close(tell)
        os.waitpid(first, 0)
        with os.fdopen(told, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        if said != "ready":
            sys.stderr.write(said or "the memory process ended before it could serve\n")
            return 1
        return 0
    os.close(told)
    os.setsid()
    if os.fork():
        os._exit(0)
    os._exit(_serve(options, files, tell))


def _serve(options: argparse.Namespace, files: protocol.Files, tell: int) -> int:
    os.chdir("/")
    os.umask(0o077)
    with contextlib.suppress(OSError):  # where this is allowed trainers are taken first when memory runs out
        Path("/proc/self/oom_score_adj").write_text("-500")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        lock = FileLock(files.lock)
        if not lock.acquire(blocking=False):
            _tell(tell, "ready")  # another one serves
            return 0
        _log_to(files.log)
        arm(node_of(options.node))
        coder = GroupCoder(options.run, options.listen)
        store = Store(options.run, options.generation, options.num_ranks, coder)
        server = Server(store, options.node, files.socket, options.idle_seconds, coder)
    except (OSError, StowplanError) as error:
        _LOG.exception("no memory process")
        _tell(tell, f"{error}\n")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    _LOG.info("serves run %s on node %s: %d ranks", options.run, options.node, options.num_ranks)
    _tell(tell, "ready")
    _LOG.info("ends: %s", server.serve())
    if server.asked_to_end:
        _tidy(files)
    lock.release()
    return 0


def _tidy(files: protocol.Files) -> None:
    """Remove what nobody will read: logs without warnings, and what a killed starter left."""
    logs = [path for path in (files.log, files.log.with_name(f"{files.log.name}.1")) if path.exists()]
    if all(_INFORMATION.fullmatch(line) for path in logs for line in path.read_text(errors="replace").splitlines()):
        for path in logs:
            path.unlink()
    starter = FileLock(files.start)
    if starter.acquire(blocking=False):
        starter.release()


def _tell(pipe: int, message: str) -> None:
    os.write(pipe, message.encode())
    os.close(pipe)


def _log_to(path: Path) -> None:
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=MIB, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(threadName)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stowplan.runtime.snapshot.memory.process", description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--num-ranks", type=int, required=True)
    parser.add_argument("--generation", type=int, default=0)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--listen", default=LOOPBACK)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

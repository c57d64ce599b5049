"""A limit on bytes per second, so that coding leaves the network to training."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from stowplan.core.errors import InvalidArgument

__all__ = ["TokenBucket"]


class TokenBucket:
    """Over any time t at most ``burst_bytes`` + t · ``bytes_per_second`` pass, but for what a last caller overdraws.

    A call may be for more than the burst: it goes into debt, and waits until that is paid before it returns. Calls are
    served in order. ``clock`` and ``sleep`` are for tests.
    """

    def __init__(
        self,
        bytes_per_second: float,
        burst_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not bytes_per_second > 0 or burst_bytes < 0:
            raise InvalidArgument(
                f"bytes_per_second={bytes_per_second}, burst_bytes={burst_bytes}: give a rate above 0 and a burst of 0 "
                f"or more, or no rate for no limit."
            )
        self._rate, self._burst = bytes_per_second, burst_bytes
        self._clock, self._sleep = clock, sleep
        self._level, self._at = float(burst_bytes), clock()
        self._turn = asyncio.Lock()

    async def take(self, num_bytes: int) -> None:
        """Return when so many bytes may pass."""
        async with self._turn:
            now = self._clock()
            self._level = min(self._burst, self._level + (now - self._at) * self._rate) - num_bytes
            self._at = now
            if self._level < 0:
                await self._sleep(-self._level / self._rate)

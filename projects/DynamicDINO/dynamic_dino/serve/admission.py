"""Who is let in: a bound on requests, and a bound on the memory of their decoded images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Full(Exception):
    """As many requests as may be are already inside."""


class Closed(Exception):
    """The server is about to stop."""


class Gate:
    """Counts the requests that are accepted and not yet answered: those whose body is read, those
    that wait, and those that the detector is working on.

    Args:
        limit: how many they may be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = self.accepted = 0
        self.closed = False

    def close(self) -> None:
        """Lets nobody in from now on."""
        self.closed = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Raises `Closed` or `Full` where a request can't be accepted."""
        if self.closed:
            raise Closed
        if self.inside >= self.limit:
            raise Full
        self.inside += 1
        self.accepted += 1
        try:
            yield
        finally:
            self.inside -= 1


class PixelBudget:
    """Decoded images hold at most so many pixels, all together: who finds too few free waits, in
    the order of coming. An image in a file is a hundred times smaller, so files may wait instead.

    Args:
        pixels: how many; no single image may have more.
    """

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def holding(self, pixels: int) -> AsyncIterator[None]:
        async with self._turn:
            while self._free < pixels:
                self._given_back.clear()
                await self._given_back.wait()
            self._free -= pixels
        try:
            yield
        finally:
            self._free += pixels
            self._given_back.set()

"""uvicorn, told when to stop."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

CLOSING_SECONDS = 30  # for clients that don't take their answers
# Clients and proxies keep a connection that nobody uses for 60 s at most (httpx 5, nginx 60). The
# client must close it first: what it sends while the server closes is lost.
IDLE_SECONDS = 75


class Server(uvicorn.Server):
    """Told to stop (SIGTERM, SIGINT), it goes on listening, refuses what comes with 503, and ends
    once every request that was accepted before is answered. SIGINT meanwhile ends it at once."""

    def __init__(self, app: FastAPI, url: str) -> None:
        # The process decides about logging: uvicorn's own set-up would close everybody's handlers.
        super().__init__(
            uvicorn.Config(
                app,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
                log_config=None,
            )
        )
        self.gate, self.url = app.state.gate, url
        self._unsaid: int | None = None  # requests that were inside when it was told to stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"listening on {self.url}, described at {self.url}/docs", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.gate.closed and sig == signal.SIGINT:  # supervisors may send SIGTERM twice
            # Not by print: the signal may have interrupted somebody who prints.
            os.write(2, b"error: ended at once, before every request was answered\n")
            os._exit(2)
        if not self.gate.closed:
            self._unsaid = self.gate.inside
        self.gate.close()

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        if self._unsaid is not None:
            print(f"told to stop: answering {self._unsaid} requests first", flush=True)
            self._unsaid = None
        return ends or (self.gate.closed and not self.gate.inside)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that holds the address, and doesn't listen yet: the model is loaded first.

    Raises OSError where there is no such address, or somebody has it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(False)
    return bound


def address_of(bound: Sequence) -> str:
    """(host, port, ...) as a URL has it."""
    host, port = bound[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

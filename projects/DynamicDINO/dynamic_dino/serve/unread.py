"""Bodies that nobody read: an answer before the end of its request must reach the client too."""

from __future__ import annotations

from typing import Any

import anyio

from . import bodies


class Unread:
    """ASGI middleware: the answer goes out at once, and ends when its request has come as a whole.

    uvicorn closes a connection that isn't kept (HTTP/1.0, ``Connection: close``, as many proxies
    ask) where the answer ends. With bytes of a refused body still unread, the kernel then resets
    it, and the client, which is still sending, loses the answer.

    Args:
        most: bytes of a body that are read and thrown away; nor is one waited for longer than
            `bodies.BODY_SECONDS`.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        more = True
        # A client that waits for "100 Continue" sends nothing until somebody asks for the body.
        comes = not any(name == b"expect" for name, _ in scope["headers"])

        async def received() -> dict:
            nonlocal more, comes
            comes = True
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def sent(message: dict) -> None:
            ends = message["type"] == "http.response.body" and not message.get("more_body", False)
            if ends and more and comes:
                await send(message | {"more_body": True})
                left = self.most
                with anyio.move_on_after(bodies.BODY_SECONDS):
                    while more and left > 0:
                        left -= len((await received()).get("body", b""))
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, received, sent)

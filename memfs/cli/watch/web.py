"""`memfs web`: a page in a browser of this machine, which shows guest memory and what happens to it live.

Whoever can reach the port is not yet whoever may look: any user of the machine can, and any page in any browser can try
to. So each run draws a token by lot, which is part of each path; the name that a browser believes it speaks to must be
that of this machine (or a page of somebody else's could reach us by a name of its own, DNS rebinding); and the page may
load nothing, nor be shown within another. It listens on addresses of this machine only.

The server is hypercorn (the extra `[web]`), the page is three files without a build step, and what changes is sent as
server-sent events. An ASGI application of a few paths needs no framework.
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import closing
from functools import partial
from importlib.resources import files
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs

import trio

from memfs.cli.arguments import address, listening_at
from memfs.cli.command import CommandError, Commands
from memfs.cli.watch.live import Live, MemoryMap, window_of
from memfs.cli.watch.sample import Watcher

Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]

_MOST_VIEWERS: Final = 16
_INTERVAL: Final = 0.5  # seconds
_FILES: Final = {
    "": ("index.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",  # there is the token in it
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser("web", help="show guest memory in a browser", description=_run.__doc__)
    parser.add_argument("path", metavar="PATH", nargs="*", help="mountpoints (default: all memfs's that are mounted)")
    parser.add_argument(
        "--listen",
        metavar="ADDRESS:PORT",
        type=_own_address,
        default=("127.0.0.1", 0),
        help="an address of this machine only (default 127.0.0.1, any free port)",
    )
    parser.set_defaults(run=_run)


def _own_address(text: str) -> tuple[str, int]:
    host, port = address(text)
    try:
        ours = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: not an address, such as 127.0.0.1") from None
    if not ours.is_loopback:
        raise argparse.ArgumentTypeError(
            f"{text}: not an address of this machine only (127.0.0.1, ::1); from elsewhere, forward a port with ssh -L"
        )
    return str(ours), port


def _run(arguments: argparse.Namespace) -> None:
    """Serve a page that shows mounts, guest memory, conversions and latencies live, until a signal; print its address.

    Who has the address sees what the user that runs this may see. It is served on this machine only.
    """
    try:
        from hypercorn.config import Config
        from hypercorn.trio import serve
    except ImportError as error:
        raise CommandError(
            "the page is served by hypercorn, which is not installed "
            "(pip install 'memfs-kvmsim[web]'; Debian: python3-hypercorn)"
        ) from error
    host, wanted = arguments.listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as listener:  # until hypercorn has it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, wanted))
        except OSError as error:
            raise OSError(error.errno, error.strerror, listening_at(host, wanted)) from error
        listener.listen()
        config = Config()
        config.loglevel = "CRITICAL"
        config.include_server_header = False
        port = listener.getsockname()[1]
        config.bind = [f"fd://{listener.detach()}"]
        live = Live(Watcher(arguments.path), _INTERVAL)
        site = Site(live, port)
        print(f"memfs: http://{listening_at(host, site.port)}/{site.token}/", flush=True)
        trio.run(_serve, live, partial(serve, site, config))
        raise KeyboardInterrupt  # nothing else ends it without an error, and hypercorn has caught that


async def _serve(live: Live, serve: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.run)
        await serve()
        nursery.cancel_scope.cancel()


class Refused(Exception):
    """A request that is not answered: the status, and a sentence."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status: Final = status


class Site:
    """The ASGI application."""

    def __init__(self, live: Live, port: int) -> None:
        self._live: Final = live
        self.port: Final = port
        self.token: Final = secrets.token_urlsafe(24)
        self._hosts: Final = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        page = files("memfs.cli.watch") / "page"
        self._files: Final = {path: (kind, (page / name).read_bytes()) for path, (name, kind) in _FILES.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":  # hypercorn goes on without the events of its life; and there are no web sockets
            raise NotImplementedError(scope["type"])
        try:
            name = self._checked(scope)
            if name == "events":
                await self._stream(parse_qs(scope["query_string"].decode("ascii", "replace")), receive, send)
            else:
                kind, content = self._files[name]
                await _answer(send, 200, f"{kind}; charset=utf-8", content)
        except Refused as error:
            await _answer(send, error.status, "text/plain; charset=utf-8", f"{error}\n".encode())

    def _checked(self, scope: Scope) -> str:
        """Return which file a request is for. Raises Refused."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b":authority")]
        if not hosts or not set(hosts) <= self._hosts:
            raise Refused(421, "This is not the machine that you mean.")
        token, slash, name = str(scope["path"]).removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise Refused(404, "There is nothing here without the token that memfs web has printed.")
        if scope["method"] not in ("GET", "HEAD"):
            raise Refused(405, "There is nothing to be changed here.")
        if not slash or name not in (*self._files, "events"):
            raise Refused(404, "There is no such page.")
        return name

    async def _stream(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        """Send what is the latest, again and again, until the browser leaves."""
        if self._live.viewers >= _MOST_VIEWERS:
            raise Refused(503, f"{_MOST_VIEWERS} pages are open; close some.")
        drawn = _map_of(self._live, query)
        with self._live.viewed():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_events, drawn, send)
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

    async def _send_events(self, drawn: MemoryMap | None, send: Send) -> None:
        await _begin(send, 200, "text/event-stream; charset=utf-8", [])
        number, history = 0, True
        while True:
            number = await self._live.later_than(number)
            event = self._live.latest
            if history:
                event["history"], history = self._live.history, False
            if drawn is not None:
                event["map"] = await drawn.draw()
            await send({"type": "http.response.body", "body": _event(event), "more_body": True})


def _map_of(live: Live, query: dict[str, list[str]]) -> MemoryMap | None:
    """Return the map that a query asks for, if it asks for one. Raises Refused."""
    if "mount" not in query:
        return None
    try:
        owner, ino, start, end = (int(query.get(name, ["0"])[0]) for name in ("owner", "ino", "start", "end"))
    except ValueError:
        raise Refused(400, "owner, ino, start and end are numbers.") from None
    return MemoryMap(live, query["mount"][0], owner, ino, window_of(start, end))


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


async def _begin(send: Send, status: int, kind: str, more: Iterable[tuple[bytes, bytes]]) -> None:
    headers = [(name.encode(), value.encode()) for name, value in {"content-type": kind, **_HEADERS}.items()]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *more]})


async def _answer(send: Send, status: int, kind: str, content: bytes) -> None:
    await _begin(send, status, kind, [(b"content-length", str(len(content)).encode())])
    await send({"type": "http.response.body", "body": content})

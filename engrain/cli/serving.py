"""Serving pages of a store on this machine: the address with its token, and Ctrl-C ends it."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import closing, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from agent.errors import MissingPackageError
from envs.errors import UsageError
from memory.store import Store

if TYPE_CHECKING:  # it is there with the extra only
    from engrain.ui.games import Games

LOOPBACK = "127.0.0.1"
PORT = 8765

HostOption = Annotated[
    str | None,
    typer.Option(
        "--host", help=f"Address or name under which people open it. Default: {LOOPBACK}, which keeps others out."
    ),
]
PortOption = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, help=f"Port; 0 takes a free one. Default: {PORT}.")
]


def check_extra() -> None:
    """Refuse before anything is loaded.

    Raises:
        MissingPackageError: what the pages need is not installed.
    """
    try:
        import uvicorn  # noqa: F401

        import engrain.ui.app  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"the pages need {error.name or error}, which is not installed; pip install 'engrain[ui]'"
        ) from None


def serve(
    store: Store, host: str | None, port: int | None, what: str, path: str = "/", games: Games | None = None
) -> None:
    """Serve the pages until Ctrl-C or SIGTERM; `what` is said to be at the address of `path`.

    Raises:
        UsageError: nobody can listen there.
    """
    import uvicorn

    from engrain.settings import Settings
    from engrain.ui.access import Access
    from engrain.ui.app import make_app

    host, port = host or LOOPBACK, PORT if port is None else port
    kept = Settings().ui_token.get_secret_value()
    with closing(_listen(host, port)) as listening:
        access = Access(kept or None)
        app = make_app(store, access, hosts=[host], games=games)
        where = f"[{host}]" if ":" in host else host
        token = "$ENGRAIN_UI_TOKEN" if kept else access.token
        address = f"http://{where}:{listening.getsockname()[1]}{path}?token={token}"
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"{what} at", markup=False)
        console.print(address, markup=False)
        if not _is_loopback(host):
            console.print("not encrypted: whoever listens on the way reads the token and the pages", markup=False)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if games is not None:
                    games.ending.set()  # pages that wait for a game answer at once
                super().handle_exit(sig, frame)

        with suppress(KeyboardInterrupt):  # how it is meant to end
            Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        UsageError: it is no address of this machine, all of them at once, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_unspecified:
            raise UsageError(f"--host {host} is no address that people open; name the one that they will use")
        # With its protocol named, or answers wait 40 ms for each other (Nagle): asyncio turns that off only then.
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address of this machine: {error}; leave it out for loopback") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(f"cannot listen at {host}:{port}: {error}; choose another --port or --host") from error
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

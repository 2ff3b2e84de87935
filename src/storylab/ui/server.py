"""Serve the page on this machine."""

from __future__ import annotations

import socket
from pathlib import Path

import uvicorn

from storylab.errors import UserError
from storylab.ui.app import create_app

ADDRESS = "127.0.0.1"


def open_port(port: int) -> socket.socket:
    """A socket on ``port`` of this machine alone, or on any free port for 0.

    Raises:
        UserError: another program uses the port.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen()  # a browser that comes before the first answer is ready waits
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"cannot use port {port} ({error}): give another --port") from error
    return listener


def serve(runs: Path, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(create_app(runs), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])

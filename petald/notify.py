"""Telling the service manager how the daemon is: systemd's sd_notify.

Source: sd_notify(3). Without ``$NOTIFY_SOCKET``, nothing happens; a service manager that does not
listen is no reason to fail.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify_ready() -> None:
    """The daemon serves."""
    _send("READY=1")


def notify_status(text: str) -> None:
    """One line on what the daemon does, for ``systemctl status``."""
    _send(f"STATUS={text.splitlines()[0] if text else ''}")


def notify_stopping() -> None:
    """The daemon goes down, on purpose."""
    _send("STOPPING=1")


def _send(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError, ValueError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
    ):
        sender.setblocking(False)
        sender.sendto(state.encode(), address)

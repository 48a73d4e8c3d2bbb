"""The command line and the thin client of petald.

`Client`, `AsyncClient` and their errors are loaded when they are first asked for, so that importing
one part never imports the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petalctl.async_client import AsyncClient as AsyncClient
    from petalctl.client import Client as Client
    from petalctl.errors import DaemonUnreachable as DaemonUnreachable
    from petalctl.errors import JobError as JobError

_HOMES = {
    "AsyncClient": "petalctl.async_client",
    "Client": "petalctl.client",
    "DaemonUnreachable": "petalctl.errors",
    "JobError": "petalctl.errors",
}

__all__ = ["AsyncClient", "Client", "DaemonUnreachable", "JobError"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)

"""Where the Unix socket between the daemon and the apps of its machine lies.

The one place that says so, for both sides. Standard library only; it looks at files, makes none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from p2p.errors import P2PError

SOCKET_VARIABLE = "PETALD_SOCKET"
SYSTEM_SOCKET = Path("/run/petald/petald.sock")
"""Where the daemon of the machine listens, as against the daemon of one user."""

MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` has 108 bytes on Linux, the ending zero included: unix(7)."""

_NAME = "petald.sock"


class SocketPathTooLong(P2PError):
    """The operating system takes no socket path of this length: choose a shorter one."""

    code = "socket_path_too_long"


def default_socket_path(environ: Mapping[str, str]) -> Path:
    """Where an app finds the daemon, unless its user says otherwise.

    The first of `candidate_socket_paths` that exists; the first of all where none does.
    """
    candidates = candidate_socket_paths(environ)
    return next((path for path in candidates if _may_exist(path)), candidates[0])


def candidate_socket_paths(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where an app looks for the daemon, in this order."""
    if chosen := environ.get(SOCKET_VARIABLE):
        return (_absolute(chosen),)
    of_user = _data_folder(environ) / _NAME
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return (Path(runtime) / "petald" / _NAME, SYSTEM_SOCKET, of_user)
    return (SYSTEM_SOCKET, of_user) if _may_exist(SYSTEM_SOCKET) else (of_user, SYSTEM_SOCKET)


def listen_socket_path(environ: Mapping[str, str]) -> Path:
    """Where the daemon listens, unless its configuration says otherwise.

    A system service has ``$RUNTIME_DIRECTORY`` from systemd; it is what `SYSTEM_SOCKET` names.
    """
    if chosen := environ.get(SOCKET_VARIABLE):
        return _absolute(chosen)
    if given := environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0]) / _NAME
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "petald" / _NAME
    return _data_folder(environ) / _NAME


def check_socket_path(path: Path) -> Path:
    """The path itself, if a Unix socket can lie there.

    Raises:
        SocketPathTooLong: the operating system takes no path of this length.
    """
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise SocketPathTooLong(
            f"the socket path {path} has {length} bytes, and the operating system takes at most "
            f"{MAX_SOCKET_PATH_BYTES}; choose a shorter one"
        )
    return path


def _data_folder(environ: Mapping[str, str]) -> Path:
    if home := environ.get("PETALD_HOME"):
        return _absolute(home)
    data_home = environ.get("XDG_DATA_HOME")
    if data_home and Path(data_home).is_absolute():
        return Path(data_home) / "petald"
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".local" / "share" / "petald"


def _absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _may_exist(path: Path) -> bool:
    """Whether something is there, or whether one may not look: then connecting says so best."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True

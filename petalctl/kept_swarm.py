"""A private swarm that was left running: who belongs to it, and its end at the user's word.

A file in the swarm's folder names the processes and when each began; a number alone may belong to
another process by now. Only what both fit is sent a signal, and only in the user's own folders.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from petalctl.errors import CommandError

STATE_NAME = "swarm.json"
FOLDER_PREFIX = "petald-swarm-"
_START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted from after the program's name: proc_pid_stat(5), field 22."""


@dataclass(frozen=True, slots=True)
class KeptDaemon:
    """One process of a kept swarm.

    Attributes:
        start_ticks: when it began, in clock ticks since the machine did.
    """

    name: str
    pid: int
    start_ticks: int


def save_kept(folder: Path, daemons: Iterable[tuple[str, int]]) -> None:
    """Writes down which processes (name, pid) belong to the swarm in the folder."""
    kept = [
        {"name": name, "pid": pid, "start_ticks": ticks}
        for name, pid in daemons
        if (ticks := _start_ticks(pid)) is not None
    ]
    unfinished = folder / f"{STATE_NAME}.new"
    unfinished.write_text(json.dumps({"daemons": kept}, indent=2), "utf-8")
    unfinished.replace(folder / STATE_NAME)


def load_kept(folder: Path) -> list[KeptDaemon]:
    """Which processes belong to the swarm in the folder.

    Raises:
        CommandError: the folder is not one of this user's kept swarms.
    """
    try:
        if folder.stat().st_uid != os.getuid():
            raise ValueError("another user's folder")
        state = json.loads((folder / STATE_NAME).read_text("utf-8"))
        return [
            KeptDaemon(str(each["name"]), int(each["pid"]), int(each["start_ticks"]))
            for each in state["daemons"]
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"{folder} is not the folder of a swarm that you left running", code="no_such_swarm"
        ) from error


def find_kept() -> list[Path]:
    """The folders of this user's kept swarms, where `tempfile` puts them."""
    found = []
    for place in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for folder in place.glob(f"{FOLDER_PREFIX}*"):
            with contextlib.suppress(CommandError):
                load_kept(folder)
                found.append(folder)
    return sorted(found)


def stop_kept(folder: Path, timeout_s: float) -> int:
    """Ends the swarm in the folder and removes the folder; gives how many processes still ran.

    Raises:
        CommandError: the folder is not one of this user's kept swarms.
    """
    handles = []
    try:
        for daemon in load_kept(folder):
            if (handle := _open_process(daemon)) is not None:
                handles.append(handle)
        _end_processes(handles, timeout_s)
    finally:
        for handle in handles:
            os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)
    return len(handles)


def _open_process(daemon: KeptDaemon) -> int | None:
    """A handle that stands for this very process; none where it has gone."""
    try:
        handle = os.pidfd_open(daemon.pid)
    except OSError:
        return None
    if _start_ticks(daemon.pid) == daemon.start_ticks:
        return handle
    os.close(handle)
    return None


def _end_processes(handles: list[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = handles
    for number in (signal.SIGTERM, signal.SIGKILL):
        for handle in waiting:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
        while waiting and time.monotonic() < deadline:
            ended, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
            waiting = [handle for handle in waiting if handle not in ended]
        deadline = time.monotonic() + timeout_s


def _start_ticks(pid: int) -> int | None:
    """When the process began; none where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
        return int(status.rpartition(")")[2].split()[_START_TIME_FIELD])
    except (OSError, ValueError, IndexError):
        return None

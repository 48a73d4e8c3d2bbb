"""One real ``petald`` as a child process: its configuration, its start, its readiness, its end.

A child runs in a session of its own, so that Ctrl-C at the terminal reaches it through its parent
only, and in its order. Unless it is to be kept, the kernel ends it with the *thread* that started
it: start it on the main thread, or on one that lives as long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from p2p.wire.socket_path import SOCKET_VARIABLE, check_socket_path
from petalctl.errors import CommandError
from petalctl.terminal import neutralise
from petalctl.toml_text import Value, format_toml

PETALD_COMMAND = (sys.executable, "-m", "petald")
POLL_S = 0.02
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 16384
KILL_WAIT_S = 10.0
_SYSTEMD_VARIABLES = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "WATCHDOG_PID")


class DaemonProcess:
    """A ``petald`` that was started.

    Attributes:
        name: for people: ``anchor``, ``server 1``, ``router``.
        span: the blocks that it hosts, as it was told; none where it hosts none.
        socket: the path of its control socket.
        log_path: of what it printed.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: Mapping[str, Mapping[str, Value]],
        *,
        span: tuple[int, int] | None = None,
        is_kept: bool = False,
    ) -> None:
        self.name = name
        self.span = span
        self.socket = check_socket_path(folder / "petald.sock")
        self.log_path = folder / "petald.log"
        folder.mkdir(mode=0o700)
        config_path = folder / "petald.toml"
        own = {"socket": str(self.socket), "state_dir": str(folder / "state")}
        config_path.write_text(
            format_toml({**config, "daemon": {**config.get("daemon", {}), **own}}), "utf-8"
        )
        self._notifications = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        notify_path = check_socket_path(folder / "notify.sock")
        self._notifications.bind(str(notify_path))
        self._is_ready = False
        command = [*PETALD_COMMAND, "--config", str(config_path)]
        if not is_kept:
            launcher = str(Path(__file__).with_name("child_launcher.py"))
            command = [sys.executable, "-I", "-S", launcher, str(os.getpid()), *command]
        with self.log_path.open("wb") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_child_environment(notify_path),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process; it stays its own until it has been waited for."""
        return self._child.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it serves.

        Raises:
            CommandError: it ended before; the text has the end of its log.
        """
        has_ended = not self.is_running
        while not self._is_ready:
            try:
                told = self._notifications.recv(4096)
            except BlockingIOError:
                break
            self._is_ready = b"READY=1" in told.split(b"\n")
        if not self._is_ready and has_ended:
            raise CommandError(
                f"the {self.name} ended with status {self._child.returncode} before it was ready."
                f"{self.quote_log()}",
                code="daemon_failed",
            )
        return self._is_ready

    def quote_log(self) -> str:
        """The last lines of its log, to stand at the end of a sentence."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f" Its log cannot be read: {error}"
        if not lines:
            return " It printed nothing."
        tail = "\n".join(f"    {neutralise(line)}" for line in lines[-LOG_TAIL_LINES:])
        return f" The end of its log:\n{tail}"

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal, if it still runs."""
        self._child.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end; tells whether it came in time."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends it: asks first, and after the time makes an end."""
        stop_all([self], timeout_s)

    def close(self) -> None:
        """Gives back what the parent holds of it, once it has ended."""
        self._notifications.close()

    def let_go(self) -> None:
        """Leaves it running for good, without this object."""
        self.close()
        self._child.returncode = 0  # or else `subprocess` warns of a child that nobody waits for


def wait_ready(
    daemons: Sequence[DaemonProcess],
    timeout_s: float,
    on_ready: Callable[[DaemonProcess], None] = lambda daemon: None,
) -> None:
    """Waits until all of them serve; tells of each as it begins to.

    Raises:
        CommandError: one ended, or was not ready in time; the text has the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(daemons)
    while waiting:
        for daemon in list(waiting):
            if daemon.is_ready:
                waiting.remove(daemon)
                on_ready(daemon)
        if waiting and time.monotonic() > deadline:
            raise CommandError(
                f"the {waiting[0].name} was not ready within {timeout_s:g} s."
                f"{waiting[0].quote_log()}",
                code="daemon_failed",
            )
        if waiting:
            time.sleep(POLL_S)


def stop_all(daemons: Iterable[DaemonProcess], timeout_s: float) -> None:
    """Ends them all at once: asks first, and after the time, or at Ctrl-C, makes an end."""
    running = [daemon for daemon in daemons if daemon.is_running]
    try:
        for daemon in running:
            daemon.kill(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for daemon in running:
            daemon.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for daemon in running:
            with contextlib.suppress(ProcessLookupError):
                daemon.kill(signal.SIGKILL)
        for daemon in running:
            daemon.wait(KILL_WAIT_S)


def _child_environment(notify_path: Path) -> dict[str, str]:
    """Of the parent, without what is meant for the parent alone."""
    environ = dict(os.environ)
    for name in (*_SYSTEMD_VARIABLES, SOCKET_VARIABLE):
        environ.pop(name, None)
    environ["NOTIFY_SOCKET"] = str(notify_path)
    root = str(Path(__file__).resolve().parent.parent)
    if root not in {*site.getsitepackages(), site.getusersitepackages()}:
        # Run from a source tree: the child stands in another folder, and must find it too.
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH", "")]))
    return environ

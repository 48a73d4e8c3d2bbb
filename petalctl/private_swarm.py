"""A swarm of real daemons on this machine's loopback, that ends with the block that made it.

One anchor, which the others know; a server for each span; and one daemon that only routes, which
apps talk to. Everything lies in one folder. For the demonstration, for tests and for benchmarks.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

from kernels.errors import KernelError
from kernels.model_store import find_model, fingerprint, store_root
from p2p.wire.socket_path import MAX_SOCKET_PATH_BYTES
from petalctl.client import Client
from petalctl.coverage import uncovered_ranges
from petalctl.daemon_process import DaemonProcess, stop_all, wait_ready
from petalctl.errors import CommandError
from petalctl.kept_swarm import FOLDER_PREFIX, save_kept
from petalctl.names import join_ranges
from petalctl.toml_text import Value

START_TIMEOUT_S = 180.0
DAEMON_STOP_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 8.0
"""More than a daemon takes to stop in its own time."""

COVERED_POLL_S = 0.1
_LISTEN: list[str] = ["/ip4/127.0.0.1/tcp/0"]
_LONGEST_SOCKET_NAME = "/server-999/petald.sock"

OnReady = Callable[[DaemonProcess], None]


class Links(Protocol):
    """What carries the connections between the daemons, where they do not dial each other."""

    def place(self, name: str) -> tuple[str, str]:
        """The address that a daemon is to listen on, and the one that it is to announce."""

    def started(self, name: str, pid: int) -> None:
        """The daemon runs as this process."""


class PrivateSwarm:
    """The swarm; use as a context manager.

    Args:
        model: a name in the store, or a folder's path.
        spans: for each server the blocks that it hosts.
        dtype: of the weights and of the computation.
        threads: of each daemon that computes; none leaves it to the daemon.
        serve: more settings for each server's ``[serve]`` section.
        lend: settings for each server's ``[lend]`` section, instead of making way for nobody: the
            daemons of a private swarm, and what uses it, share one machine.
        route: more settings for the router's ``[route]`` section.
        links: carries the daemons' connections, to make them slow or break them.
        folder: where everything lies; a temporary one, removed at the end, if not given.
        is_kept: the daemons outlive this process, and `__exit__` leaves them running, unless it is
            left by an exception.
        on_ready: told of each daemon as it begins to serve.

    Attributes:
        servers: in the order of the spans; `add_server` appends.
        anchor, router: the other daemons.
    """

    anchor: DaemonProcess
    router: DaemonProcess

    def __init__(
        self,
        model: str,
        spans: Sequence[tuple[int, int]],
        *,
        dtype: str = "float32",
        threads: int | None = None,
        serve: Mapping[str, Value] | None = None,
        lend: Mapping[str, Value] | None = None,
        route: Mapping[str, Value] | None = None,
        links: Links | None = None,
        folder: Path | None = None,
        is_kept: bool = False,
        on_ready: OnReady = lambda daemon: None,
    ) -> None:
        self.model = resolve_model(model)
        self.servers: list[DaemonProcess] = []
        self._spans = list(spans)
        self._serve: dict[str, Value] = {"model": self.model, "dtype": dtype, **(serve or {})}
        self._lend: dict[str, Value] = {"max_load": 1.0, **(lend or {})}
        # On one machine there is nothing to gain from codecs.
        self._route: dict[str, Value] = {
            "models": [self.model],
            "codec": "raw",
            "gradient_codec": "raw",
            **(route or {}),
        }
        if threads is not None:
            self._serve["threads"] = self._route["threads"] = threads
        self._links = links
        self._given_folder = folder
        self._is_kept = is_kept
        self._on_ready = on_ready
        self._started: list[DaemonProcess] = []
        self._bootstrap: list[str] = []
        self._guards = ExitStack()

    def __enter__(self) -> Self:
        """Starts all daemons, the servers at the same time.

        Raises:
            CommandError: one did not start; nothing of the swarm is left.
        """
        self._guards.enter_context(_signals_as_exceptions())
        try:
            self.folder = self._given_folder or _make_folder()
            self.anchor = self._start("anchor", {})
            wait_ready([self.anchor], START_TIMEOUT_S, self._on_ready)
            self._bootstrap = [_loopback_address(self.anchor)]
            for span in self._spans:
                self._start_server(span, {}, {})
            self.router = self._start("router", {"route": self._route})
            wait_ready([*self.servers, self.router], START_TIMEOUT_S, self._on_ready)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_kept and error is None:
            for daemon in self._started:
                daemon.let_go()
            self._guards.close()
        else:
            self.stop()

    @property
    def daemons(self) -> tuple[DaemonProcess, ...]:
        """All that were started, in this order."""
        return tuple(self._started)

    def client(self) -> Client:
        """A connection to the routing daemon.

        Raises:
            DaemonUnreachable: it does not answer.
        """
        return Client(self.router.socket)

    def add_server(
        self,
        span: tuple[int, int],
        *,
        lend: Mapping[str, Value] | None = None,
        **serve: Value,
    ) -> DaemonProcess:
        """Starts one more server, and waits until it serves.

        Args:
            span: the blocks that it hosts.
            lend: more settings for its ``[lend]`` section.
            serve: more settings for its ``[serve]`` section.

        Raises:
            CommandError: it did not start.
        """
        server = self._start_server(span, serve, lend or {})
        wait_ready([server], START_TIMEOUT_S, self._on_ready)
        return server

    def add_free_servers(self, count: int, **serve: Value) -> list[DaemonProcess]:
        """Starts servers that choose their blocks themselves, all at once; waits until they serve.

        Args:
            count: how many.
            serve: more settings for their ``[serve]`` sections.

        Raises:
            CommandError: one did not start.
        """
        servers = [self._start_server(None, serve, {}) for _ in range(count)]
        wait_ready(servers, START_TIMEOUT_S, self._on_ready)
        return servers

    def wait_covered(self, model: str = "", timeout_s: float = 60.0) -> None:
        """Waits until the routing daemon knows a server for every block.

        Raises:
            CommandError: it did not in time; the text names the blocks.
        """
        deadline = time.monotonic() + timeout_s
        with self.client() as client:
            while True:
                swarms = client.swarm(model or self.model).models
                gaps = uncovered_ranges(swarms[0].coverage) if swarms else [(0, 0)]
                if not gaps:
                    return
                self._check_running()
                if time.monotonic() > deadline:
                    raise CommandError(
                        f"after {timeout_s:g} s nobody is known to hold the blocks "
                        f"{join_ranges(gaps)}.{self.router.quote_log()}",
                        code="missing_blocks",
                    )
                time.sleep(COVERED_POLL_S)

    def stop(self) -> None:
        """Ends every daemon, and removes the folder if it was a temporary one."""
        try:
            started, self._started = self._started, []
            anchors = [daemon for daemon in started if daemon.name == "anchor"]
            try:
                stop_all([daemon for daemon in started if daemon not in anchors], STOP_TIMEOUT_S)
            finally:
                stop_all(anchors, STOP_TIMEOUT_S)
            for daemon in started:
                daemon.close()
        finally:
            if self._given_folder is None and hasattr(self, "folder"):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._guards.close()

    def _start_server(
        self,
        span: tuple[int, int] | None,
        serve: Mapping[str, Value],
        lend: Mapping[str, Value],
    ) -> DaemonProcess:
        blocks = "auto" if span is None else f"{span[0]}:{span[1]}"
        server = self._start(
            f"server {len(self.servers) + 1}",
            {
                "serve": {**self._serve, "blocks": blocks, **serve},
                "lend": {**self._lend, **lend},
            },
            span=span,
        )
        self.servers.append(server)
        return server

    def _start(
        self,
        name: str,
        sections: Mapping[str, Mapping[str, Value]],
        span: tuple[int, int] | None = None,
    ) -> DaemonProcess:
        network: dict[str, Value] = {"listen": _LISTEN, "bootstrap": self._bootstrap}
        if self._links is not None:
            listen, announce = self._links.place(name)
            network |= {"listen": [listen], "announce": [announce]}
        config: dict[str, Mapping[str, Value]] = {
            "daemon": {"stop_timeout_s": DAEMON_STOP_TIMEOUT_S},
            "network": network,
            **sections,
        }
        folder = self.folder / name.replace(" ", "-")
        daemon = DaemonProcess(name, folder, config, span=span, is_kept=self._is_kept)
        self._started.append(daemon)
        if self._links is not None:
            self._links.started(name, daemon.pid)
        if self._is_kept:
            save_kept(self.folder, [(each.name, each.pid) for each in self._started])
        return daemon

    def _check_running(self) -> None:
        for daemon in self._started:
            if not daemon.is_running:
                raise CommandError(
                    f"the {daemon.name} ended.{daemon.quote_log()}", code="daemon_failed"
                )


def split_blocks(blocks: int, servers: int) -> list[tuple[int, int]]:
    """Shares blocks among servers as evenly as can be.

    Raises:
        CommandError: there are more servers than blocks.
    """
    if servers > blocks:
        raise CommandError(
            f"{servers} servers cannot share {blocks} blocks; at least one block each is needed",
            code="usage",
            exit_status=2,
        )
    edges = [server * blocks // servers for server in range(servers + 1)]
    return list(pairwise(edges))


def resolve_model(model: str) -> str:
    """The model as any process finds it: its name in the store, or else its whole path.

    Its fingerprint is worked out here, once, rather than by every daemon at the same time.

    Raises:
        CommandError: there is none, or its files are damaged.
    """
    try:
        found = find_model(model)
        fingerprint(found)
    except KernelError as error:
        raise CommandError(str(error), code=error.code) from error
    return found.name if found.path.parent == store_root() else str(found.path)


def _loopback_address(daemon: DaemonProcess) -> str:
    with Client(daemon.socket) as client:
        report = client.status()
    for address in report.addresses:
        if address.startswith("/ip4/127.0.0.1/"):
            return address if "/p2p/" in address else f"{address}/p2p/{report.peer}"
    raise CommandError(
        f"the {daemon.name} listens on no loopback address, but on: "
        f"{', '.join(report.addresses) or 'none'}",
        code="daemon_failed",
    )


def _make_folder() -> Path:
    """A temporary folder whose path is short enough for the sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    if len(str(folder)) + len(_LONGEST_SOCKET_NAME) <= MAX_SOCKET_PATH_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Makes signals that would end the process at once unwind it instead, on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    changed = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in changed:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)

"""A daemon's training jobs on a real Unix socket, with servers in memory, in its own thread."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from kernels.checkpoint import Checkpoint
from petald.config import DaemonConfig
from petald.control import Jobs, open_control_socket, serve_control
from petald.local_model import ModelIdentity
from petald.message_codecs import MessageCodecs
from petald.training_jobs import TrainingJobs
from tests.helpers.pass_world import MODEL, PassWorld, open_pass_world


class TrainingDaemon:
    """What a test may look at.

    Attributes:
        socket: for the client.
        world: its servers; to be touched by `run` alone.
    """

    socket: Path
    world: PassWorld

    def __init__(self) -> None:
        self._is_ready = threading.Event()
        self._error: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()

    def run(self, function: Any, *args: Any) -> Any:
        """Calls a function in the daemon's loop."""
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def serve(self, checkpoint: Checkpoint, folder: Path, spans: Any, dtype: torch.dtype) -> None:
        try:
            trio.run(self._live, checkpoint, folder, spans, dtype)
        except BaseException as error:
            self._error = error
        finally:
            self._is_ready.set()

    def wait_ready(self) -> None:
        self._is_ready.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        if self._error is None:
            self.run(self._scope.cancel)

    async def _live(
        self, checkpoint: Checkpoint, folder: Path, spans: Any, dtype: torch.dtype
    ) -> None:
        config = DaemonConfig(socket=folder / "socket", state_dir=folder)
        with self._scope:
            async with (
                open_pass_world(checkpoint, *spans, dtype=dtype) as world,
                open_control_socket(config) as listener,
            ):
                identity = ModelIdentity(
                    name="tiny",
                    folder=checkpoint.folder,
                    fingerprint=MODEL,
                    config=checkpoint.config,
                )

                async def identify(_: str) -> ModelIdentity:
                    await trio.lowlevel.checkpoint()
                    return identity

                models: Any = SimpleNamespace(identify=identify)
                router: Any = SimpleNamespace(
                    histories=world.histories,
                    codecs=MessageCodecs(world.client),
                    codec="raw",
                    gradient_codec="raw",
                )
                parts: Any = dict.fromkeys(
                    (
                        "report_status",
                        "report_swarm",
                        "make_generation",
                        "pause_or_resume",
                        "hidden",
                    )
                )
                jobs = Jobs(
                    training=TrainingJobs(models, router, world.links, max_wait_s=1.0), **parts
                )
                self.socket = config.socket
                self.world = world
                self._token = trio.lowlevel.current_trio_token()
                self._is_ready.set()
                await serve_control(listener, jobs)


@contextmanager
def run_training_daemon(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    *spans: tuple[int, int],
    dtype: torch.dtype = torch.float64,
) -> Iterator[TrainingDaemon]:
    daemon = TrainingDaemon()
    monkeypatch.setattr(
        "petald.training_jobs.ModelPassChooser", lambda *_, **__: daemon.world, raising=True
    )
    with tempfile.TemporaryDirectory(prefix="petald-test-") as folder:
        thread = threading.Thread(
            target=daemon.serve, args=(checkpoint, Path(folder), spans, dtype)
        )
        thread.start()
        try:
            daemon.wait_ready()
            yield daemon
        finally:
            daemon.stop()
            thread.join()

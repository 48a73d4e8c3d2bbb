"""A daemon's start and end, and what keeps it from starting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm
from tests.helpers.tiny_models import make_model, save_model
from tests.swarm.conftest import PROMPTS, even_spans

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads at once; it has no tokenizer, and is only served."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_model(make_model("llama"), folder, max_shard_size="40KB")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A command line for a daemon that shares nothing with others."""
    return [
        *(sys.executable, "-m", "petald"),
        *("--daemon-socket", str(tmp_path / "petald.sock")),
        *("--daemon-state-dir", str(tmp_path / "state")),
        *("--network-listen", "/ip4/127.0.0.1/tcp/0"),
    ]


class Started:
    """A daemon that said that it is ready."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.socket = folder / "petald.sock"
        notify_path = folder / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(notify_path))
            listener.settimeout(60)
            environ = {**os.environ, "NOTIFY_SOCKET": str(notify_path)}
            self.process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
            while b"READY=1" not in listener.recv(4096):
                pass

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal; gives exit status and log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log


@pytest.fixture
def no_leftovers() -> Iterator[list[Started]]:
    started: list[Started] = []
    yield started
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def run_to_failure(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_sigterm_ends_a_server_with_status_0(
    flags: list[str], tiny_folder: Path, tmp_path: Path, no_leftovers: list[Started]
) -> None:
    daemon = Started([*flags, "--serve-model", str(tiny_folder), "--serve-blocks", "1:3"], tmp_path)
    no_leftovers.append(daemon)
    with Client(daemon.socket) as client:
        status = client.status()
        # It routes for nobody, and knows whom it serves; the store of whoever tests may have more.
        swarms = {model.model: model for model in client.swarm().models}
    assert status.span is not None
    assert (status.span.start, status.span.end) == (1, 3)
    assert swarms[str(tiny_folder)].coverage == (0, 1, 1, 0)
    assert daemon.socket.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state" / "identity.key").stat().st_mode & 0o777 == 0o600
    code, log = daemon.end(signal.SIGTERM)
    assert code == 0
    events = [line.split("  ")[-1] for line in log.splitlines()]
    assert len(events) <= 6, log  # quiet: one line for each thing an operator cares about
    assert "stopped" in events[-1]
    assert not daemon.socket.exists()


def test_auto_takes_every_block_that_fits(
    flags: list[str], tiny_folder: Path, tmp_path: Path, no_leftovers: list[Started]
) -> None:
    daemon = Started([*flags, "--serve-model", str(tiny_folder)], tmp_path)
    no_leftovers.append(daemon)
    with Client(daemon.socket) as client:
        span = client.status().span
    assert span is not None
    assert (span.start, span.end) == (0, 4)


def test_a_peer_keeps_its_identity(
    flags: list[str], tmp_path: Path, no_leftovers: list[Started]
) -> None:
    peers = []
    for _ in range(2):
        daemon = Started(flags, tmp_path)
        no_leftovers.append(daemon)
        with Client(daemon.socket) as client:
            status = client.status()
        assert status.roles == ("anchor",)
        peers.append(status.peer)
        assert daemon.end(signal.SIGINT)[0] == 0
        (tmp_path / "notify").unlink()
    assert peers[0] == peers[1]


def test_a_port_in_use_is_said(flags: list[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        flags[flags.index("--network-listen") + 1] = address
        said = run_to_failure(flags)
    assert "address_in_use" in said
    assert address in said


def test_a_socket_path_in_use_is_said(
    flags: list[str], tmp_path: Path, no_leftovers: list[Started]
) -> None:
    no_leftovers.append(Started(flags, tmp_path))
    flags[flags.index("--daemon-state-dir") + 1] = str(tmp_path / "other")
    assert "socket_in_use" in run_to_failure(flags)
    with Client(tmp_path / "petald.sock") as client:  # the first one is not harmed
        assert client.status().peer


def test_a_socket_that_a_dead_daemon_left_is_taken_over(
    flags: list[str], tmp_path: Path, no_leftovers: list[Started]
) -> None:
    daemon = Started(flags, tmp_path)
    no_leftovers.append(daemon)
    daemon.end(signal.SIGKILL)
    assert daemon.socket.exists()
    (tmp_path / "notify").unlink()
    no_leftovers.append(Started(flags, tmp_path))


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_a_corrupt_checkpoint_is_said(
    flags: list[str], tiny_folder: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("*.safetensors"):
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-50])
        elif damage == "missing":
            file.unlink()
        else:
            file.write_bytes(b"\xff" * 4096)
    said = run_to_failure([*flags, "--serve-model", str(folder), "--serve-blocks", "0:4"])
    assert "corrupt_checkpoint" in said
    assert "safetensors" in said


def test_an_unsupported_family_is_said(flags: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    said = run_to_failure([*flags, "--serve-model", str(folder), "--serve-blocks", "0:4"])
    assert "unsupported_model" in said
    assert "gpt_neox" in said
    assert "llama" in said


def test_blocks_beyond_the_model_are_said(flags: list[str], tiny_folder: Path) -> None:
    said = run_to_failure([*flags, "--serve-model", str(tiny_folder), "--serve-blocks", "2:9"])
    assert "config_error" in said
    assert "0:4" in said


def test_an_unknown_key_is_said(flags: list[str], tmp_path: Path) -> None:
    file = tmp_path / "petald.toml"
    file.write_text("[serve]\nblock = '0:4'\n")
    assert '"blocks"' in run_to_failure([*flags, "--config", str(file)])


@pytest.mark.model
def test_a_stopped_server_that_nobody_replaces_finishes_its_session(model_folder: Path) -> None:
    with (
        PrivateSwarm(str(model_folder), spans=even_spans(2), threads=1) as swarm,
        swarm.client() as client,
    ):
        generation = client.generate(prompt=PROMPTS[2], max_new_tokens=20)
        pieces = iter(generation)
        next(pieces)
        leaver = swarm.servers[0]
        os.kill(leaver.pid, signal.SIGTERM)
        time.sleep(0.3)
        (model,) = client.swarm().models
        assert {server.state for server in model.servers} == {"leaving", "serving"}
        assert model.coverage == (0,) * 15 + (1,) * 15
        assert len(generation.result().tokens) == 20
        assert leaver.wait(10)


@pytest.mark.model
def test_a_server_ends_though_an_idle_session_stays(model_folder: Path) -> None:
    with (
        PrivateSwarm(str(model_folder), spans=even_spans(2), threads=1) as swarm,
        swarm.client() as client,
    ):
        client.generate(prompt=PROMPTS[2], max_new_tokens=4, session="kept").result()
        leaver = swarm.servers[0]
        with Client(leaver.socket) as own:
            span = own.status().span
        assert span is not None
        assert span.sessions == 1
        os.kill(leaver.pid, signal.SIGTERM)
        assert leaver.wait(10)

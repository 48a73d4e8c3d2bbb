"""What starts daemons and ends them, with a stand-in for ``petald``: no torch, no libp2p."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from petalctl import daemon_process, kept_swarm, private_swarm
from petalctl.cli import main
from petalctl.daemon_process import DaemonProcess, wait_ready
from petalctl.errors import CommandError
from petalctl.kept_swarm import load_kept, save_kept, stop_kept
from petalctl.private_swarm import PrivateSwarm, split_blocks
from petalctl.toml_text import format_toml

ROOT = Path(__file__).parents[2]
STAND_IN = (sys.executable, "-m", "tests.helpers.petald_stand_in")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of four blocks, as far as can be seen without reading its weights."""
    monkeypatch.setenv("PETALD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(daemon_process, "PETALD_COMMAND", STAND_IN)
    monkeypatch.setattr(private_swarm, "fingerprint", lambda folder: "ab" * 32)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    return str(folder)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_gone(pids: list[int], wait_s: float = 20.0) -> None:
    end = time.monotonic() + wait_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.02)


def test_swarm_starts_and_leaves_nothing(model: str) -> None:
    told = []
    with PrivateSwarm(
        model, [(0, 2), (2, 4)], threads=1, dtype="bfloat16", on_ready=told.append
    ) as swarm:
        assert [daemon.name for daemon in swarm.daemons] == [
            "anchor",
            "server 1",
            "server 2",
            "router",
        ]
        assert told[0] is swarm.anchor
        assert set(told) == set(swarm.daemons)
        pids = [daemon.pid for daemon in swarm.daemons]
        assert all(map(is_alive, pids))
        swarm.wait_covered()
        with swarm.client() as client:
            assert client.generate("hi").result().text == "It speaks"
        extra = swarm.add_server((1, 3), cache_tokens=64)
        assert (extra.name, extra.span, swarm.servers[-1]) == ("server 3", (1, 3), extra)
        config = tomllib.loads((swarm.folder / "server-3" / "petald.toml").read_text())
        assert config["serve"] == {
            "model": model,
            "dtype": "bfloat16",
            "threads": 1,
            "blocks": "1:3",
            "cache_tokens": 64,
        }
        assert config["network"] == {
            "listen": ["/ip4/127.0.0.1/tcp/0"],
            "bootstrap": ["/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWanchor"],
        }
        folder = swarm.folder
    wait_gone([*pids, extra.pid])
    assert not folder.exists()


def test_server_can_be_killed_and_stopped(model: str) -> None:
    with PrivateSwarm(model, [(0, 2), (2, 4)]) as swarm:
        first, second = swarm.servers
        first.kill(signal.SIGKILL)
        assert first.wait(10)
        assert not first.is_running
        second.stop()
        assert not second.is_running
        first.stop()


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        ("dies", r"the server 1 ended with status 1 before it was ready(?s:.*)the model is broken"),
        ("never ready", r"the server 1 was not ready within 1 s(?s:.*)petald stands in"),
    ],
)
def test_daemon_that_does_not_start_is_explained_by_its_log(
    model: str, monkeypatch: pytest.MonkeyPatch, trouble: str, complaint: str
) -> None:
    monkeypatch.setattr(private_swarm, "START_TIMEOUT_S", 1.0)
    swarm = PrivateSwarm(model, [(0, 4)], serve={"device": trouble})
    with pytest.raises(CommandError, match=complaint), swarm:
        pass
    assert swarm.daemons == ()
    assert not swarm.folder.exists()
    wait_gone([server.pid for server in swarm.servers])


def test_daemon_that_does_not_stop_is_killed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_swarm, "STOP_TIMEOUT_S", 0.2)
    with PrivateSwarm(model, [(0, 4)], serve={"device": "ignores SIGTERM"}) as swarm:
        pids = [daemon.pid for daemon in swarm.daemons]
    wait_gone(pids)


def test_exception_in_the_block_ends_the_swarm(model: str) -> None:
    pids = []
    with pytest.raises(ZeroDivisionError), PrivateSwarm(model, [(0, 4)]) as swarm:  # noqa: PT012
        pids += [daemon.pid for daemon in swarm.daemons]
        raise ZeroDivisionError
    wait_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signal_to_the_parent_ends_the_swarm(model: str, number: signal.Signals) -> None:
    code = (
        "import sys, time\n"
        "from petalctl import daemon_process, private_swarm\n"
        f"daemon_process.PETALD_COMMAND = {STAND_IN!r}\n"
        "private_swarm.fingerprint = lambda folder: 'ab' * 32\n"
        f"with private_swarm.PrivateSwarm({model!r}, [(0, 4)]) as swarm:\n"
        "    print(swarm.folder, *[d.pid for d in swarm.daemons], flush=True)\n"
        "    time.sleep(60)\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    folder, *pids = parent.stdout.readline().split()
    assert len(pids) == 3
    parent.send_signal(number)
    parent.wait(20)
    parent.stdout.close()
    wait_gone(list(map(int, pids)))
    if number == signal.SIGKILL:
        import shutil

        shutil.rmtree(folder)
    assert not Path(folder).exists()
    if number == signal.SIGTERM:
        assert parent.returncode == 143


def test_child_whose_parent_is_gone_does_not_begin(tmp_path: Path) -> None:
    launcher = ROOT / "petalctl" / "child_launcher.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(launcher), "1", "/bin/echo", "begun"],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout == b""


def test_demo_tells_answers_and_cleans_up(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", model, "--servers", "2", "--prompt", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "It speaks\n"
    assert "tiny, 4 blocks" in err
    assert "blocks 0:2" in err
    assert "2 tokens, the first after" in err
    assert "nothing of it is left" in err


def test_kept_demo_is_used_and_stopped(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", model, "--servers", "1", "--keep"]) == 0
    _, err = capsys.readouterr()
    folder = Path(err.rpartition("petalctl demo --stop ")[2].strip())
    router_socket = err.rpartition("export PETALD_SOCKET=")[2].split()[0]
    try:
        pids = [daemon.pid for daemon in load_kept(folder)]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
        assert main(["--socket", router_socket, "generate", "hi"]) == 0
        assert folder in kept_swarm.find_kept()
    finally:
        assert main(["demo", "--stop", str(folder)]) == 0
    assert "ended 3 processes" in capsys.readouterr().err
    assert not any(map(is_alive, pids))
    assert not folder.exists()
    assert main(["demo", "--stop", str(folder)]) == 1
    assert "not the folder of a swarm" in capsys.readouterr().err


def test_more_servers_than_blocks_is_refused(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", model, "--servers", "5"]) == 2
    assert "5 servers cannot share 4 blocks" in capsys.readouterr().err


def test_process_that_took_over_a_number_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        try:
            save_kept(tmp_path, [("server 1", other.pid)])
            state = json.loads((tmp_path / "swarm.json").read_text())
            state["daemons"][0]["start_ticks"] -= 1
            (tmp_path / "swarm.json").write_text(json.dumps(state))
            assert stop_kept(tmp_path, 1.0) == 0
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.parametrize("content", ["", "[]", '{"daemons": [{"name": "x"}]}', '{"daemons": 3}'])
def test_folder_that_is_no_kept_swarm_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "swarm.json").write_text(content)
    with pytest.raises(CommandError, match="not the folder of a swarm"):
        stop_kept(tmp_path, 1.0)
    assert (tmp_path / "swarm.json").exists()


def test_blocks_are_shared_evenly() -> None:
    assert split_blocks(30, 3) == [(0, 10), (10, 20), (20, 30)]
    assert split_blocks(30, 4) == [(0, 7), (7, 15), (15, 22), (22, 30)]
    assert split_blocks(2, 2) == [(0, 1), (1, 2)]


def test_configuration_survives_the_way_through_toml() -> None:
    sections = {
        "daemon": {"socket": 'a "quoted" \\ path\x7f\n☃', "stop_timeout_s": 1.5, "on": True},
        "network": {"listen": ["/a", "b"], "bootstrap": [], "count": 3},
    }
    assert tomllib.loads(format_toml(sections)) == sections


def test_waiting_tells_of_each_daemon_once(model: str, tmp_path: Path) -> None:
    short = Path("/tmp") / f"petald-test-{os.getpid()}"
    short.mkdir()
    daemon = DaemonProcess("anchor", short / "a", {"network": {"bootstrap": []}})
    try:
        told = []
        wait_ready([daemon], 20, told.append)
        wait_ready([daemon], 20, told.append)
        assert told == [daemon, daemon]
        assert "petald stands in" in daemon.quote_log()
    finally:
        daemon.stop()
        daemon.close()
        import shutil

        shutil.rmtree(short)

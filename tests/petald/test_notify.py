import os
import socket
import sys

import pytest

from petald.notify import notify_ready, notify_status, notify_stopping


def listen(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(5)
    return sock


def test_service_manager_hears_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listen(str(tmp_path / "notify")) as manager:
        notify_status("loading blocks 0:10\nREADY=1")
        notify_ready()
        notify_stopping()
        heard = [manager.recv(4096) for _ in range(3)]
    assert heard == [b"STATUS=loading blocks 0:10", b"READY=1", b"STOPPING=1"]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_abstract_socket(monkeypatch):
    name = f"petald-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with listen(f"\0{name}") as manager:
        notify_ready()
        assert manager.recv(4096) == b"READY=1"


@pytest.mark.parametrize("address", [None, "", "/nowhere/notify", "/" + "x" * 200, "@" + "x" * 200])
def test_nobody_listens_and_nothing_happens(monkeypatch, address):
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify_status("")
    notify_status("\ud800")
    notify_ready()
    notify_stopping()


def test_manager_that_does_not_read_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listen(str(tmp_path / "notify")):
        for _ in range(2000):
            notify_status("x" * 1000)

from __future__ import annotations

from pathlib import Path

import pytest

from p2p.wire import socket_path
from p2p.wire.socket_path import (
    SocketPathTooLong,
    candidate_socket_paths,
    check_socket_path,
    default_socket_path,
    listen_socket_path,
)


@pytest.fixture(autouse=True)
def _no_system_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_path, "SYSTEM_SOCKET", tmp_path / "run" / "petald.sock")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PETALD_SOCKET": "/a/b", "XDG_RUNTIME_DIR": "/run/user/7"}, "/a/b"),
        ({"RUNTIME_DIRECTORY": "/run/petald:/run/other"}, "/run/petald/petald.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/h"}, "/run/user/7/petald/petald.sock"),
        ({"HOME": "/h"}, "/h/.local/share/petald/petald.sock"),
        ({"HOME": "/h", "XDG_DATA_HOME": "/d"}, "/d/petald/petald.sock"),
        ({"HOME": "/h", "XDG_DATA_HOME": "not/absolute"}, "/h/.local/share/petald/petald.sock"),
        ({"HOME": "/h", "PETALD_HOME": "/p"}, "/p/petald.sock"),
    ],
)
def test_listen_path_follows_the_environment(environ: dict[str, str], expected: str) -> None:
    assert listen_socket_path(environ) == Path(expected)


def test_client_finds_where_the_daemon_of_the_same_user_listens(tmp_path: Path) -> None:
    for environ in (
        {"HOME": str(tmp_path)},
        {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run-user")},
        {"HOME": str(tmp_path), "PETALD_SOCKET": str(tmp_path / "x")},
    ):
        assert default_socket_path(environ) == listen_socket_path(environ)


def test_client_takes_the_first_that_exists(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run-user")}
    candidates = candidate_socket_paths(environ)
    assert len(candidates) == 3
    for path in reversed(candidates):
        path.parent.mkdir(parents=True)
        path.touch()
        assert default_socket_path(environ) == path


def test_chosen_socket_is_the_only_candidate(tmp_path: Path) -> None:
    environ = {"PETALD_SOCKET": str(tmp_path / "mine"), "XDG_RUNTIME_DIR": "/run/user/7"}
    assert candidate_socket_paths(environ) == (tmp_path / "mine",)


def test_too_long_path_is_refused_with_its_length() -> None:
    longest = Path("/" + "x" * 106)
    assert check_socket_path(longest) == longest
    with pytest.raises(SocketPathTooLong, match=r"has 108 bytes.*at most 107"):
        check_socket_path(Path("/" + "x" * 107))
    with pytest.raises(SocketPathTooLong):
        check_socket_path(Path("/" + "é" * 54))

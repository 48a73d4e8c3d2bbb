"""The systemd unit: what it runs, where it goes, and what is said when it cannot."""

from __future__ import annotations

import configparser
import shlex
import stat
import sys
from pathlib import Path

import pytest

from petalctl.cli import main
from petalctl.service import UNIT_NAME, format_unit, quote_argument, unit_folder


def read_unit(text: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize("is_system", [True, False])
def test_the_unit_is_whole(is_system: bool) -> None:
    text = format_unit(is_system=is_system, command="/x/petald --config /y")
    assert "${" not in text
    unit = read_unit(text)
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["ExecStart"] == "/x/petald --config /y"
    assert unit["Install"]["WantedBy"] == ("multi-user.target" if is_system else "default.target")
    assert ("DynamicUser" in unit["Service"]) == is_system


def test_install_writes_a_unit_that_runs_this_environments_petald(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = tmp_path / "my petald.toml"
    config.write_text("")
    assert main(["service", "install", "--user", "--config", str(config)]) == 0
    path = tmp_path / "systemd" / "user" / UNIT_NAME
    words = shlex.split(read_unit(path.read_text())["Service"]["ExecStart"])
    assert Path(words[0]).parent == Path(sys.executable).parent
    assert words[-2:] == ["--config", str(config)]
    assert "systemctl --user" in capsys.readouterr().out
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0


def test_print_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["service", "install", "--user", "--print"]) == 0
    assert "ExecStart=" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_missing_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.toml"
    assert main(["service", "install", "--user", "--config", str(missing)]) == 1
    assert str(missing) in capsys.readouterr().err


def test_uninstalling_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["service", "uninstall", "--user"]) == 1
    assert "not there" in capsys.readouterr().err


def test_units_of_the_machine_and_of_a_user_have_their_own_folders() -> None:
    assert unit_folder(is_system=True, environ={}) == Path("/etc/systemd/system")
    user = unit_folder(is_system=False, environ={"XDG_CONFIG_HOME": "/c"})
    assert user == Path("/c/systemd/user")


@pytest.mark.parametrize(
    ("word", "quoted"),
    [("/plain", "/plain"), ("/a b", '"/a b"'), ("/50%", '"/50%%"'), ('/q"', '"/q\\""')],
)
def test_words_are_quoted_as_systemd_reads_them(word: str, quoted: str) -> None:
    assert quote_argument(word) == quoted

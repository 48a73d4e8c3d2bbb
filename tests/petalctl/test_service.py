import argparse
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from petalctl import service
from petalctl.errors import CommandError

FAKE_SYSTEMCTL = """#!/bin/sh
echo "$@" >> "{calls}"
case "$*" in
    *status*) echo "petald.service - loaded"; exit ${{STATUS_EXIT:-0}};;
    *{failing}*) echo "the manager is away" >&2; exit 1;;
esac
"""


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    service.add_service_parser(parser.add_subparsers())
    args = parser.parse_args(["service", *words])
    return args.run(args)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with systemd, whose systemctl writes down what it is asked."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(service, "SYSTEMD_RUNS", tmp_path / "run")
    monkeypatch.setattr(service, "SYSTEM_UNIT_FOLDER", tmp_path / "etc")
    monkeypatch.setattr(service, "SYSTEM_CONFIG", tmp_path / "etc" / "petald.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    write_systemctl(tmp_path)
    executable = tmp_path / "bin" / "petald"
    root = Path(service.__file__).parent.parent
    executable.write_text(
        f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" -m petald "$@"\n'
    )
    executable.chmod(0o755)
    monkeypatch.setattr(service.sysconfig, "get_path", lambda name: str(tmp_path / "bin"))
    return tmp_path


def write_systemctl(tmp_path: Path, failing: str = "nothing") -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.write_text(FAKE_SYSTEMCTL.format(calls=tmp_path / "calls", failing=failing))
    systemctl.chmod(0o755)


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_install_for_the_user_writes_and_says_what_is_next(machine, capsys):
    assert run("install", "--user") == 0
    unit = machine / "config" / "systemd" / "user" / "petald.service"
    text = unit.read_text()
    assert f"ExecStart={machine}/bin/petald\n" in text
    assert "WantedBy=default.target" in text
    assert "DynamicUser" not in text
    assert stat.S_IMODE(unit.stat().st_mode) == 0o644
    assert os.listdir(unit.parent) == ["petald.service"]
    assert calls(machine) == ["--user daemon-reload"]
    said = capsys.readouterr().out
    assert "systemctl --user enable --now petald" in said
    assert "petald --print-config" in said


def test_install_for_the_machine_starts_when_asked(machine, capsys):
    config = machine / "my config%.toml"
    config.write_text("[serve]\nthreads = 1\n")
    assert run("install", "--system", "--now", "--config", str(config)) == 0
    text = (machine / "etc" / "petald.service").read_text()
    assert f'--config "{machine}/my config%%.toml"\n' in text
    assert "DynamicUser=yes" in text
    assert "WantedBy=multi-user.target" in text
    assert calls(machine) == ["daemon-reload", "enable petald.service", "restart petald.service"]
    assert "petalctl service status --system" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["--user", "--system"])
def test_print_changes_nothing_and_needs_no_systemd(machine, monkeypatch, capsys, kind):
    monkeypatch.setattr(service, "SYSTEMD_RUNS", machine / "absent")
    assert run("install", kind, "--print") == 0
    text = capsys.readouterr().out
    assert text.startswith(service.FIRST_LINE)
    assert "Type=notify" in text
    left = [line for line in text.splitlines() if "@" in line]
    assert left == ["SystemCallFilter=@system-service"]
    assert not (machine / "config").exists()
    assert calls(machine) == []


def test_install_takes_the_usual_configuration(machine, capsys):
    config = machine / "config" / "petald" / "petald.toml"
    config.parent.mkdir(parents=True)
    config.write_text("")
    run("install", "--user", "--print")
    assert f"--config {config}\n" in capsys.readouterr().out


def test_bad_configuration_is_refused_with_the_daemons_words(machine):
    config = machine / "petald.toml"
    config.write_text("[serve]\nmodle = 1\n")
    with pytest.raises(CommandError, match='nearest is "model"') as caught:
        run("install", "--user", "--config", str(config))
    assert caught.value.code == "config_error"
    with pytest.raises(CommandError, match="cannot read"):
        run("install", "--user", "--config", "/nowhere.toml")
    assert not (machine / "config").exists()


def test_without_systemd_nothing_is_written(machine, monkeypatch):
    monkeypatch.setattr(service, "SYSTEMD_RUNS", machine / "absent")
    with pytest.raises(CommandError, match="systemd does not run") as caught:
        run("install", "--user")
    assert caught.value.code == "no_systemd"
    assert not (machine / "config").exists()


def test_anothers_unit_is_left_alone(machine):
    unit = machine / "etc" / "petald.service"
    unit.parent.mkdir()
    unit.write_text("[Service]\n")
    for command in ("install", "uninstall"):
        with pytest.raises(CommandError, match="not written by petalctl"):
            run(command, "--system")
    assert unit.read_text() == "[Service]\n"


def test_systemctls_words_are_passed_on(machine):
    write_systemctl(machine, failing="daemon-reload")
    with pytest.raises(CommandError, match="the manager is away") as caught:
        run("install", "--user")
    assert caught.value.code == "systemctl_failed"


def test_uninstall_stops_and_removes_what_is_there(machine, capsys):
    run("install", "--user")
    assert run("uninstall") == 0
    assert not (machine / "config" / "systemd" / "user" / "petald.service").exists()
    assert calls(machine)[1:] == [
        "--user disable --now petald.service",
        "--user daemon-reload",
    ]
    with pytest.raises(CommandError, match="no service is installed"):
        run("uninstall")


@pytest.mark.parametrize(("systemctl_exit", "exit_status"), [("0", 0), ("3", 3)])
def test_status_tells_whether_it_runs(machine, monkeypatch, capsys, systemctl_exit, exit_status):
    monkeypatch.setenv("STATUS_EXIT", systemctl_exit)
    run("install", "--user")
    assert run("status") == exit_status
    assert "petald.service - loaded" in capsys.readouterr().out


def test_status_without_a_service():
    with pytest.raises(CommandError) as caught:
        run("status", "--system")
    assert caught.value.code == "no_service"


def test_missing_executable_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(service.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(service.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(CommandError, match="not installed"):
        run("install", "--print")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_access_says_what_to_do(machine):
    (machine / "etc").mkdir(mode=0o500)
    with pytest.raises(CommandError, match="as root, or with --user"):
        run("install", "--system")


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("/usr/bin/petald", "/usr/bin/petald"),
        ("/a b", '"/a b"'),
        ('/a"\\$b', '"/a\\"\\\\$$b"'),
        ("/50%", "/50%%"),
    ],
)
def test_words_are_quoted_as_systemd_reads_them(word, quoted):
    assert service.quote_word(word) == quoted


def test_word_with_a_newline_is_refused():
    with pytest.raises(CommandError):
        service.quote_word("/a\nExecStartPre=/bin/evil")


@pytest.mark.parametrize("is_system", [True, False])
def test_systemd_itself_finds_no_fault(tmp_path, is_system):
    unit = tmp_path / "petald.service"
    unit.write_text(service.format_unit(Path("/bin/true"), None, is_system=is_system))
    manager = "--system" if is_system else "--user"
    try:
        ended = subprocess.run(
            ["systemd-analyze", manager, "--man=no", "verify", str(unit)],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no systemd-analyze here")
    if "Failed to initialize manager" in ended.stderr:
        pytest.skip("systemd cannot be asked here")
    assert "petald.service:" not in ended.stderr

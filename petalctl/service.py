"""``petalctl service``: petald as a service of systemd, of the machine or of one user.

Writes one unit file and asks systemctl for the rest. Nothing here imports the daemon.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from petalctl.errors import CommandError
from petalctl.terminal import neutralise

UNIT_NAME = "petald.service"
SYSTEM_UNIT_FOLDER = Path("/etc/systemd/system")
SYSTEM_CONFIG = Path("/etc/petald/petald.toml")
SYSTEMD_RUNS = Path("/run/systemd/system")
"""There while systemd is what the machine was started with: sd_booted(3)."""

FIRST_LINE = "# petald as a service of systemd"
EXIT_NOT_RUNNING = 3

_OF_SYSTEM = """\

DynamicUser=yes
Environment=PETALD_HOME=%S/petald
ProtectHome=read-only
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
CapabilityBoundingSet=
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manager:
    """One of the two service managers: the machine's, or the user's.

    Attributes:
        default_config: taken, where it exists, when no other configuration is named.
    """

    is_system: bool
    unit: Path
    default_config: Path

    @property
    def command(self) -> tuple[str, ...]:
        """How to talk to it."""
        return ("systemctl",) if self.is_system else ("systemctl", "--user")

    @property
    def flag(self) -> str:
        """How the user of ``petalctl service`` names it."""
        return "--system" if self.is_system else "--user"


def add_service_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``service`` and its subcommands; each sets ``run``, from args to status."""
    service = subparsers.add_parser(
        "service", help="have systemd keep the daemon running", allow_abbrev=False
    )
    commands = service.add_subparsers(dest="service_command", required=True, metavar="COMMAND")
    install = commands.add_parser(
        "install",
        help="make the daemon a service",
        description="Write the service's unit file, for the machine where root asks, and else for "
        "the user.",
        allow_abbrev=False,
    )
    _add_manager(install, run_install)
    install.add_argument("--config", metavar="FILE", help="the daemon's configuration")
    install.add_argument("--now", action="store_true", help="start it, now and at every boot")
    install.add_argument(
        "--print",
        dest="only_print",
        action="store_true",
        help="print the unit file, change nothing",
    )
    uninstall = commands.add_parser(
        "uninstall", help="stop the service, and remove it", allow_abbrev=False
    )
    _add_manager(uninstall, run_uninstall)
    status = commands.add_parser("status", help="what systemd says of it", allow_abbrev=False)
    _add_manager(status, run_status)


def run_install(args: argparse.Namespace) -> int:
    """Writes the unit file, and starts the service where that was asked for."""
    manager = _choose_manager(args.is_system)
    executable = find_executable()
    config = _choose_config(args.config, manager, executable)
    unit = format_unit(executable, config, is_system=manager.is_system)
    if args.only_print:
        print(unit, end="")
        return 0
    _require_systemd()
    if manager.unit.exists() and not _is_own(manager.unit):
        raise CommandError(
            f"{manager.unit} was not written by petalctl; remove it yourself if you want another",
            code="service_exists",
        )
    _write(manager.unit, unit)
    _call(manager, "daemon-reload")
    print(f"wrote {manager.unit}")
    if config is None:
        print(f"no configuration yet; make one: petald --print-config > {manager.default_config}")
    if args.now:
        _call(manager, "enable", UNIT_NAME)
        _call(manager, "restart", UNIT_NAME)
        print(f"petald runs; look at it with: petalctl service status {manager.flag}")
    else:
        print(f"start it, now and at every boot: {' '.join(manager.command)} enable --now petald")
    if manager.is_system:
        print('only root may use its socket, unless [daemon] socket_mode says "0666", say')
    else:
        print("to keep it running while you are logged out: loginctl enable-linger")
    return 0


def run_uninstall(args: argparse.Namespace) -> int:
    """Stops the service and removes its unit file; leaves models and keys alone."""
    manager = _find_installed(args.is_system)
    _require_systemd()
    if not _is_own(manager.unit):
        raise CommandError(
            f"{manager.unit} was not written by petalctl; remove it yourself", code="service_exists"
        )
    _call(manager, "disable", "--now", UNIT_NAME)
    try:
        manager.unit.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(manager.unit, error) from error
    _call(manager, "daemon-reload")
    print(f"removed {manager.unit}; models, keys and configuration are left")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Shows what systemd says; 0 while the service runs, 3 while it does not."""
    manager = _find_installed(args.is_system)
    _require_systemd()
    ended = subprocess.run(
        [*manager.command, "status", "--no-pager", UNIT_NAME],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if not ended.stdout:
        raise _systemctl_failed(manager, "status", ended.stderr)
    print(neutralise(ended.stdout), end="")
    return 0 if ended.returncode == 0 else EXIT_NOT_RUNNING


def find_executable() -> Path:
    """The ``petald`` of the environment that this program runs in.

    Raises:
        CommandError: it is not installed there.
    """
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        executable = Path(folder).absolute() / "petald"
        if os.access(executable, os.X_OK):
            return executable
    raise CommandError(
        f"petald is not installed for {sys.executable}; install the package there",
        code="not_installed",
    )


def format_unit(executable: Path, config: Path | None, *, is_system: bool) -> str:
    """The unit file."""
    spec = importlib.util.find_spec("petald")
    if spec is None or spec.origin is None:
        raise CommandError("the package petald is not installed", code="not_installed")
    template = Path(spec.origin).with_name(UNIT_NAME).read_text("utf-8")
    words = [str(executable)] if config is None else [str(executable), "--config", str(config)]
    return (
        template.replace("@COMMAND@", " ".join(map(quote_word, words)))
        .replace("@OF_MANAGER@\n", _OF_SYSTEM + "\n" if is_system else "\n")
        .replace("@TARGET@", "multi-user.target" if is_system else "default.target")
    )


def quote_word(text: str) -> str:
    """A word of a command line in a unit file: systemd.service(5), "Command lines".

    Raises:
        CommandError: it cannot stand there.
    """
    if not text.isprintable():
        raise CommandError(f"a unit file cannot name {text!r}", code="bad_path")
    text = text.replace("%", "%%")
    if all(each.isalnum() or each in "/._-+:,=@%~" for each in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"'


def _add_manager(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--user", dest="is_system", action="store_false", default=None, help="of this user"
    )
    choice.add_argument(
        "--system", dest="is_system", action="store_true", default=None, help="of the machine"
    )
    parser.set_defaults(run=run)


def _choose_manager(is_system: bool | None) -> Manager:
    if is_system is None:
        is_system = os.geteuid() == 0
    if is_system:
        return Manager(
            is_system=True, unit=SYSTEM_UNIT_FOLDER / UNIT_NAME, default_config=SYSTEM_CONFIG
        )
    chosen = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    folder = chosen if chosen.is_absolute() else Path.home() / ".config"
    return Manager(
        is_system=False,
        unit=folder / "systemd" / "user" / UNIT_NAME,
        default_config=folder / "petald" / "petald.toml",
    )


def _find_installed(is_system: bool | None) -> Manager:
    choices = (False, True) if is_system is None else (is_system,)
    managers = [_choose_manager(choice) for choice in choices]
    for manager in managers:
        if manager.unit.exists():
            return manager
    places = " or ".join(str(manager.unit) for manager in managers)
    raise CommandError(
        f"no service is installed: there is no {places}; `petalctl service install` makes one",
        code="no_service",
    )


def _choose_config(given: str | None, manager: Manager, executable: Path) -> Path | None:
    """The configuration's path, or none; what the daemon would refuse is refused here."""
    path = manager.default_config if given is None else Path(given).expanduser().absolute()
    if given is None and not path.exists():
        return None
    ended = subprocess.run(
        [str(executable), "--config", str(path), "--print-config"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode:
        text = neutralise(ended.stderr).strip().removeprefix("petald: ")
        raise CommandError(text or f"petald does not take {path}", code="config_error")
    return path


def _require_systemd() -> None:
    if not SYSTEMD_RUNS.is_dir() or shutil.which("systemctl") is None:
        raise CommandError(
            "systemd does not run on this machine; start `petald --config FILE` by what does, "
            "or see the unit file with `petalctl service install --print`",
            code="no_systemd",
        )


def _is_own(unit: Path) -> bool:
    try:
        return unit.read_text("utf-8", errors="replace").startswith(FIRST_LINE)
    except OSError as error:
        raise CommandError(f"cannot read {unit}: {error.strerror}", code="no_access") from error


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(unfinished, 0o644)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> CommandError:
    advice = "; run this as root, or with --user" if isinstance(error, PermissionError) else ""
    return CommandError(f"cannot write {path}: {error.strerror or error}{advice}", code="no_access")


def _call(manager: Manager, *words: str) -> None:
    ended = subprocess.run(
        [*manager.command, *words], capture_output=True, text=True, errors="replace", check=False
    )
    if ended.returncode:
        raise _systemctl_failed(manager, " ".join(words), ended.stderr)


def _systemctl_failed(manager: Manager, words: str, said: str) -> CommandError:
    reason = neutralise(said).strip() or "it does not say why"
    return CommandError(
        f"`{' '.join(manager.command)} {words}` failed: {reason}", code="systemctl_failed"
    )

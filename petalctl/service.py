"""``petalctl service``: petald under systemd, for one user or for the machine.

The unit comes from the template that ships with petald; what is filled in is where this
environment's ``petald`` is, and where the configuration. Nothing is started unless asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from petalctl.errors import CommandError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

UNIT_NAME = "petald.service"
SYSTEM_UNITS = Path("/etc/systemd/system")

_SYSTEM_IDENTITY = """\
DynamicUser=yes
SupplementaryGroups=video render
ProtectHome=read-only
Environment=PETALD_HOME=/var/lib/petald"""


def add_service_parser(subparsers: Subparsers) -> None:
    """Adds ``petalctl service ...``."""
    parser = subparsers.add_parser("service", help="run petald as a systemd service")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    install = actions.add_parser("install", help="write the systemd unit")
    install.add_argument("--config", type=Path, metavar="FILE", help="petald's configuration")
    install.add_argument("--now", action="store_true", help="enable and start it, too")
    install.add_argument(
        "--print", action="store_true", dest="is_dry", help="print the unit, write nothing"
    )
    install.set_defaults(run=run_install)
    uninstall = actions.add_parser("uninstall", help="stop petald and remove the unit")
    uninstall.set_defaults(run=run_uninstall)
    status = actions.add_parser("status", help="what systemd says of it")
    status.set_defaults(run=run_status)
    for action in (install, uninstall, status):
        scope = action.add_mutually_exclusive_group()
        scope.add_argument(
            "--user", action="store_true", help="for this user (the default, except for root)"
        )
        scope.add_argument("--system", action="store_true", help="for the machine; needs root")


def run_install(args: argparse.Namespace) -> int:
    """Writes the unit; with ``--now``, starts it."""
    is_system = _is_system(args)
    unit = format_unit(is_system=is_system, command=_find_command(args.config))
    if args.is_dry:
        print(unit, end="")
        return 0
    path = unit_folder(is_system=is_system, environ=os.environ) / UNIT_NAME
    _write(path, unit)
    print(f"{path} is written.")
    if args.now:
        _systemctl(is_system, "daemon-reload")
        _systemctl(is_system, "enable", "--now", UNIT_NAME)
        print("petald runs, and will with every start.")
        return 0
    scope = "" if is_system else "--user "
    print(
        f"Start it now and with every {'boot' if is_system else 'login'}:\n"
        f"  systemctl {scope}daemon-reload && systemctl {scope}enable --now petald"
    )
    if not is_system:
        print("Keep it running when you are logged out:\n  loginctl enable-linger")
    return 0


def run_uninstall(args: argparse.Namespace) -> int:
    """Stops petald and removes the unit."""
    is_system = _is_system(args)
    path = unit_folder(is_system=is_system, environ=os.environ) / UNIT_NAME
    if not path.exists():
        raise CommandError(f"{path} is not there; nothing to remove", code="not_installed")
    if shutil.which("systemctl"):
        _systemctl(is_system, "disable", "--now", UNIT_NAME)
    _unlink(path)
    if shutil.which("systemctl"):
        _systemctl(is_system, "daemon-reload")
    print(f"{path} is removed.")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Shows what systemd says."""
    _need_systemctl()
    scope = [] if _is_system(args) else ["--user"]
    command = ["systemctl", *scope, "--no-pager", "status", UNIT_NAME]
    return subprocess.run(command, check=False).returncode


def format_unit(*, is_system: bool, command: str) -> str:
    """The unit's text.

    Args:
        is_system: for the machine, not for one user.
        command: for ``ExecStart=``, quoted as systemd wants it.
    """
    template = string.Template(_template_path().read_text(encoding="utf-8"))
    return template.substitute(
        command=command,
        scope="" if is_system else "--user ",
        identity=_SYSTEM_IDENTITY if is_system else "",
        target="multi-user.target" if is_system else "default.target",
    )


def unit_folder(*, is_system: bool, environ: Mapping[str, str]) -> Path:
    """Where systemd looks for units of an administrator, or of a user."""
    if is_system:
        return SYSTEM_UNITS
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "systemd" / "user"


def quote_argument(text: str) -> str:
    """A word of a command line as systemd reads it: systemd.service(5), COMMAND LINES."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != text or any(c in text for c in " \t'") else text


def _is_system(args: argparse.Namespace) -> bool:
    return bool(args.system) or (os.geteuid() == 0 and not args.user)


def _template_path() -> Path:
    # Looked up, not imported: petalctl knows petald's files, not its code.
    spec = importlib.util.find_spec("petald")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError("petald is not installed in this environment", code="no_petald")
    return Path(spec.submodule_search_locations[0]) / UNIT_NAME


def _find_command(config: Path | None) -> str:
    beside = Path(sys.executable).with_name("petald")
    words = [str(beside)] if beside.exists() else [sys.executable, "-m", "petald"]
    if config is not None:
        if not config.is_file():
            raise CommandError(
                f"{config} is not there; `petald --print-config > {config}` writes one to begin "
                "with",
                code="no_config",
            )
        words += ["--config", str(config.resolve())]
    return " ".join(quote_argument(word) for word in words)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CommandError(
            f"{path} cannot be written ({error.strerror}); run this as root, or with --user",
            code="not_writable",
        ) from error


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise CommandError(
            f"{path} cannot be removed ({error.strerror}); run this as root, or with --user",
            code="not_writable",
        ) from error


def _need_systemctl() -> None:
    if not shutil.which("systemctl"):
        raise CommandError(
            "systemctl is not on this machine; start petald by hand: petald --config FILE",
            code="no_systemd",
        )


def _systemctl(is_system: bool, *words: str) -> None:
    _need_systemctl()
    command = ["systemctl", *([] if is_system else ["--user"]), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()[:500]}", code="systemctl_failed"
        )

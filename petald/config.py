"""The configuration: defaults, then a TOML file, then flags.

A setting is a field of one of the section classes, with its help text; the file's keys, the flags
and the commented default file all follow from the fields. Each part of the daemon takes its own
section. Nothing heavy is imported here, so that ``petald --help`` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import os
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from p2p.wire.socket_path import listen_socket_path
from petald.errors import ConfigError
from petald.placement import parse_blocks

T = TypeVar("T")

_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/\d{1,5}(/p2p/[A-Za-z0-9]+)?")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def setting(default: Any, text: str, check: Callable[[Any], str | None] | None = None) -> Any:
    """A field with its help text, and what may be wrong with a value."""
    metadata = {"help": text, "check": check}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _one_of(*names: str) -> Callable[[Any], str | None]:
    return lambda value: None if value in names else f"must be one of {', '.join(names)}"


def _between(least: float, most: float) -> Callable[[Any], str | None]:
    return lambda value: None if least <= value <= most else f"must be from {least:,g} to {most:,g}"


def _each_multiaddr(needs_peer: bool) -> Callable[[Any], str | None]:
    form = "/ip4/HOST/tcp/PORT" + ("/p2p/PEER" if needs_peer else "")

    def check(values: tuple[str, ...]) -> str | None:
        for value in values:
            found = _MULTIADDR.fullmatch(value)
            if found is None or bool(found[2]) != needs_peer:
                return f"has {value!r}, which is not of the form {form}"
        return None

    return check


def _check_blocks(value: str) -> str | None:
    if value == "auto":
        return None
    try:
        parse_blocks(value)
    except ConfigError as error:
        return f"is wrong: {error}"
    return None


def _check_mode(value: str) -> str | None:
    is_mode = re.fullmatch(r"0?[0-7]{3}", value) is not None
    return None if is_mode else "must be an octal file mode, say 0600"


def _check_device(value: str) -> str | None:
    return None if _DEVICE.fullmatch(value) else "must be auto, cpu, cuda, or cuda:NUMBER"


def _default_state_dir() -> Path:
    environ = os.environ
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    base = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "petald"


def _default_socket() -> Path:
    return listen_socket_path(os.environ)


@dataclass(frozen=True, kw_only=True)
class DaemonConfig:
    """The daemon itself."""

    socket: Path = setting(_default_socket, "Path of the Unix socket for this machine's apps.")
    socket_mode: str = setting(
        "0600", "File mode of the socket: who may use the daemon.", _check_mode
    )
    state_dir: Path = setting(_default_state_dir, "Folder for the identity's private key.")
    log_level: str = setting(
        "info", "debug, info, warning or error.", _one_of("debug", "info", "warning", "error")
    )
    log_format: str = setting("text", "text or json.", _one_of("text", "json"))
    stop_timeout_s: float = setting(
        10.0, "Seconds that sessions get to finish when the daemon is stopped.", _between(0, 3600)
    )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The peer-to-peer network."""

    listen: tuple[str, ...] = setting(
        ("/ip4/0.0.0.0/tcp/7735",), "Multiaddrs to listen on.", _each_multiaddr(False)
    )
    bootstrap: tuple[str, ...] = setting(
        (),
        "Full multiaddrs of peers to join by: /ip4/HOST/tcp/PORT/p2p/PEER.",
        _each_multiaddr(True),
    )
    announce: tuple[str, ...] = setting(
        (),
        "Multiaddrs to tell others, instead of those listened on (a forwarded port, say).",
        _each_multiaddr(False),
    )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serving a span of a model to others."""

    model: str = setting(
        "", "Model to serve: a name from `petalctl model list`, or a folder. Empty: serve nothing."
    )
    blocks: str = setting(
        "auto", 'Blocks to serve, as "START:END"; "auto" takes as many as fit.', _check_blocks
    )
    dtype: str = setting(
        "auto",
        "float32, bfloat16, float16; auto is bfloat16 on a GPU and float32 on a CPU.",
        _one_of("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "auto, cpu, cuda, or cuda:NUMBER.", _check_device)
    threads: int = setting(0, "CPU threads for kernels; 0 lets PyTorch choose.", _between(0, 1024))
    cache_tokens: int = setting(
        16384, "Size of the KV cache, in tokens of all sessions together.", _between(64, 2**31)
    )
    max_sessions: int = setting(64, "Sessions that may be open at once.", _between(1, 65536))
    max_step_tokens: int = setting(
        512, "Longest piece of a prefill, in tokens.", _between(1, 65536)
    )
    memory_bytes: int = setting(
        0, 'Memory that blocks = "auto" may take; 0: half of what is free.', _between(0, 2**53)
    )


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """Using models through the swarm, for this machine's apps."""

    models: tuple[str, ...] = setting(
        (), "Models to load at the start; the first is the default. Others load when first used."
    )
    dtype: str = setting(
        "float32",
        "Of the embedding and the head, which are held here.",
        _one_of("float32", "bfloat16", "float16"),
    )
    threads: int = setting(
        0, "CPU threads, where the daemon serves nothing; 0 lets PyTorch choose.", _between(0, 1024)
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything, by section."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    route: RouteConfig = field(default_factory=RouteConfig)


SECTIONS: dict[str, type[Any]] = {
    "daemon": DaemonConfig,
    "network": NetworkConfig,
    "serve": ServeConfig,
    "route": RouteConfig,
}


def parse_arguments(argv: Sequence[str]) -> Config:
    """The configuration of a command line, file included; exits for ``--help`` and the like.

    Raises:
        ConfigError: names the place, what was expected, and the nearest known key.
    """
    arguments = vars(_make_parser().parse_args(argv))
    if arguments.pop("print_config"):
        sys.stdout.write(format_default_config())
        raise SystemExit(0)
    file: Path | None = arguments.pop("config")
    raw = _read_file(file) if file is not None else {}
    for name, value in arguments.items():
        if value is not None:
            section, _, key = name.partition("__")
            raw.setdefault(section, {})[key] = value
    return make_config(raw, origin=str(file) if file is not None else "the command line")


def make_config(raw: Mapping[str, Any], *, origin: str) -> Config:
    """The configuration of nested maps, as TOML gives them.

    Raises:
        ConfigError: as `parse_arguments`.
    """
    _check_known(raw, SECTIONS, f"{origin}: section")
    sections = {}
    for name, cls in SECTIONS.items():
        values = raw.get(name, {})
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: [{name}] is no section")
        sections[name] = _make_section(cls, values, f"{origin}: [{name}]")
    return Config(**sections)


def format_default_config() -> str:
    """The defaults as a TOML file with comments; it reads back as the defaults."""
    lines = ["# Configuration of petald. Each setting is also a flag: [serve] blocks is", ""]
    lines[0] += " --serve-blocks."
    for name, cls in SECTIONS.items():
        defaults = cls()
        lines += [f"# {(cls.__doc__ or '').strip()}", f"[{name}]"]
        for one in dataclasses.fields(cls):
            value = getattr(defaults, one.name)
            lines += [f"# {one.metadata['help']}", f"{one.name} = {_format_toml(value)}"]
        lines.append("")
    return "\n".join(lines)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="petald",
        description="Lends this machine's idle compute to a swarm that runs large language models.",
    )
    version = importlib.metadata.version("petald")
    parser.add_argument("--version", action="version", version=f"petald {version}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the settings")
    parser.add_argument(
        "--print-config", action="store_true", help="print a commented default file, and exit"
    )
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]", cls.__doc__)
        hints = typing.get_type_hints(cls)
        for one in dataclasses.fields(cls):
            flag = f"--{section}-{one.name}".replace("_", "-")
            kind = hints[one.name]
            is_list = typing.get_origin(kind) is tuple
            group.add_argument(
                flag,
                dest=f"{section}__{one.name}",
                type=str if is_list or kind is Path else kind,
                action="append" if is_list else "store",
                metavar=one.name.rpartition("_")[2].upper(),
                help=one.metadata["help"].replace("%", "%%")
                + (" May be repeated." if is_list else ""),
            )
    return parser


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no TOML: {error}") from error


def _make_section(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    _check_known(raw, hints, f"{where}: key")
    values = {}
    for one in dataclasses.fields(cls):  # type: ignore[arg-type]  # SECTIONS holds dataclasses
        if one.name in raw:
            value = _convert(raw[one.name], hints[one.name], f"{where} {one.name}")
            check = one.metadata["check"]
            problem = check(value) if check else None
            if problem:
                raise ConfigError(f"{where} {one.name} {problem}; {raw[one.name]!r} came")
            values[one.name] = value
    return cls(**values)


def _convert(raw: Any, kind: Any, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        if isinstance(raw, list) and all(isinstance(item, str) for item in raw):
            return tuple(raw)
        raise ConfigError(f"{where} must be a list of texts; {raw!r} came")
    if kind is Path and isinstance(raw, str) and raw:
        return Path(raw).expanduser()
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        wanted = {str: "a text", int: "a whole number", float: "a number", Path: "a path"}[kind]
        raise ConfigError(f"{where} must be {wanted}; {raw!r} came")
    return raw


def _check_known(raw: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{what} {name!r} is not known; {hint}")


def _format_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_format_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'

"""The configuration: defaults, then a TOML file, then flags.

The dataclasses below are the only list of settings: reading, checking, the flags, and the text of
``--print-config`` come from their fields. Invariant: a `Config` that `parse_arguments` gives holds
values of the right type and range. Imports neither torch nor libp2p.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import json
import math
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from kernels.codecs.names import CODECS
from kernels.weight_formats import WEIGHT_FORMATS
from p2p.addresses import BadAddress, parse_address
from p2p.wire.socket_path import SocketPathTooLong, check_socket_path, listen_socket_path
from petald.codec_choice import AUTO, UNASKED_CODECS
from petald.errors import ConfigError
from petald.lending_hours import parse_hours
from petald.placement import parse_blocks

Check = Callable[[Any], None]
"""Raises `ValueError`, or `ConfigError`, with a text that says what was expected."""

ANY_BLOCKS = "auto"
MAX_THREADS = 1024
MAX_WAIT_S = 86400
MAX_STOP_TIMEOUT_S = 3600.0
MAX_HOSTED_ADAPTERS = 8
"""What an announcement has room for (`petald.swarm.MAX_ADAPTERS`)."""

_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MODE = re.compile(r"0?[0-7]{3}")
_TEXT_WIDTH = 98


def _setting(text: str, *, default: Any = MISSING, check: Check, metavar: str) -> Any:
    metadata = {"help": text, "check": check, "metavar": metavar}
    return field(default=default, metadata=metadata)


def _one_of(*choices: str) -> Check:
    def check(value: str) -> None:
        if value not in choices:
            names = ", ".join(f'"{choice}"' for choice in choices)
            raise ValueError(f"expected one of {names}")

    return check


def _between(least: float, most: float) -> Check:
    def check(value: float) -> None:
        if not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"expected a number from {least:g} to {most:g}")

    return check


def _at_least(least: int) -> Check:
    def check(value: int) -> None:
        if value < least:
            raise ValueError(f"expected a whole number of at least {least}")

    return check


def _check_socket(path: Path) -> None:
    try:
        check_socket_path(path)
    except SocketPathTooLong as error:
        raise ValueError(str(error)) from error


def _check_mode(text: str) -> None:
    if not _MODE.fullmatch(text):
        raise ValueError('expected a file mode in octal digits, say "0600" or "0660"')


def _check_device(text: str) -> None:
    if not _DEVICE.fullmatch(text):
        raise ValueError('expected "auto", "cpu", "cuda", or one device, say "cuda:1"')


def _check_blocks(text: str) -> None:
    if text != ANY_BLOCKS:
        parse_blocks(text)


def _check_hours(texts: Sequence[str]) -> None:
    parse_hours(texts)


def _check_listen(addresses: Sequence[str]) -> None:
    for text in addresses:
        address = _parse_address(text)
        if address.peer is not None or address.kind not in ("ip4", "ip6"):
            raise ValueError(
                f"{text!r} is no address to listen on; expected something like "
                "/ip4/0.0.0.0/tcp/7735"
            )


def _check_bootstrap(addresses: Sequence[str]) -> None:
    for text in addresses:
        address = _parse_address(text)
        if address.peer is None or not address.port:
            raise ValueError(
                f"{text!r} does not say which peer; expected something like "
                "/ip4/192.0.2.7/tcp/7735/p2p/12D3KooW..."
            )


def _check_announce(addresses: Sequence[str]) -> None:
    for text in addresses:
        address = _parse_address(text)
        if address.peer is not None or not address.port:
            raise ValueError(
                f"{text!r} is no address to announce; expected something like "
                "/dns/petals.example.org/tcp/7735"
            )


def _parse_address(text: str) -> Any:
    try:
        return parse_address(text)
    except BadAddress as error:
        raise ValueError(str(error)) from error


def _check_names(names: Sequence[str]) -> None:
    if not all(names):
        raise ValueError("expected names; an empty one came")


def _check_adapters(texts: Sequence[str]) -> None:
    for text in texts:
        name, equals, folder = text.partition("=")
        if not _ADAPTER_NAME.fullmatch(name) or not equals or not folder:
            raise ValueError(
                f"{text!r} is no adapter; expected NAME=FOLDER, the name of up to 64 letters, "
                "digits, dots, dashes and underscores"
            )
    names = [text.partition("=")[0] for text in texts]
    if len(set(names)) != len(names) or len(names) > MAX_HOSTED_ADAPTERS:
        raise ValueError(f"expected at most {MAX_HOSTED_ADAPTERS} adapters of different names")


def _check_nothing(_: object) -> None:
    pass


_DTYPES = _one_of("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonConfig:
    """The process itself."""

    socket: Path = _setting(  # noqa: RUF009
        "Unix socket for the apps of this machine. Where systemd or the login session gives a "
        "folder for such things, it lies there; else under ~/.local/share/petald.",
        check=_check_socket,
        metavar="PATH",
    )
    socket_mode: str = _setting(
        "Who may use the socket, as a file mode in octal digits.",
        default="0600",
        check=_check_mode,
        metavar="MODE",
    )
    state_dir: Path = _setting(  # noqa: RUF009
        "Where the daemon keeps its private key. $STATE_DIRECTORY, or petald in $XDG_STATE_HOME, "
        "or ~/.local/state/petald.",
        check=_check_nothing,
        metavar="PATH",
    )
    log_level: str = _setting(
        "debug, info, warning or error.",
        default="info",
        check=_one_of("debug", "info", "warning", "error"),
        metavar="LEVEL",
    )
    log_format: str = _setting(
        "text or json.", default="text", check=_one_of("text", "json"), metavar="FORMAT"
    )
    stop_timeout_s: float = _setting(
        "How long, in seconds, the daemon lets sessions end when it is told to stop.",
        default=10.0,
        check=_between(0, MAX_STOP_TIMEOUT_S),
        metavar="SECONDS",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The network of peers."""

    listen: tuple[str, ...] = _setting(
        "Addresses to listen on. Port 0 lets the system choose one.",
        default=("/ip4/0.0.0.0/tcp/7735",),
        check=_check_listen,
        metavar="ADDRESS",
    )
    bootstrap: tuple[str, ...] = _setting(
        "Peers to begin with, each as /ip4/ADDRESS/tcp/PORT/p2p/PEER. Without any, this daemon is "
        "the first of a new swarm.",
        default=(),
        check=_check_bootstrap,
        metavar="ADDRESS",
    )
    announce: tuple[str, ...] = _setting(
        "Addresses to tell others, where they differ from those listened on: behind a router that "
        "forwards a port, say.",
        default=(),
        check=_check_announce,
        metavar="ADDRESS",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Hosting blocks of a model for others."""

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be served."""
        return bool(self.model or self.models)

    model: str = _setting(
        "The model to serve: a name in the store, or a folder. Empty: serve nothing.",
        default="",
        check=_check_nothing,
        metavar="NAME",
    )
    models: tuple[str, ...] = _setting(
        "Models to choose from, in place of one model: the server takes the one that most needs "
        "it, and changes when another one does.",
        default=(),
        check=_check_names,
        metavar="NAME",
    )
    blocks: str = _setting(
        'The blocks to host, say 0:10 for the first ten; "auto" takes as many as fit, where the '
        "swarm needs them most.",
        default=ANY_BLOCKS,
        check=_check_blocks,
        metavar="START:END",
    )
    dtype: str = _setting(
        "auto, float32, bfloat16 or float16. auto: float32 on a CPU, unless weights are quantised; "
        "bfloat16 otherwise.",
        default="auto",
        check=_DTYPES,
        metavar="DTYPE",
    )
    codec: str = _setting(
        "How outputs are written where the job leaves it to this server: auto, what is quickest "
        "over the link, or always the same.",
        default=AUTO,
        check=_one_of(AUTO, *UNASKED_CODECS),
        metavar="CODEC",
    )
    quant: str = _setting(
        "How weights are kept: "
        + "; ".join(f"{name}, {text}" for name, text in WEIGHT_FORMATS.items())
        + ".",
        default="none",
        check=_one_of(*WEIGHT_FORMATS),
        metavar="FORMAT",
    )
    device: str = _setting(
        "auto, cpu, cuda, or one device, say cuda:1.",
        default="auto",
        check=_check_device,
        metavar="DEVICE",
    )
    threads: int = _setting(
        "Processor threads for the computation. 0 leaves it to PyTorch.",
        default=0,
        check=_between(0, MAX_THREADS),
        metavar="N",
    )
    cache_tokens: int = _setting(
        "Room of the KV cache, in tokens of all sessions together.",
        default=16384,
        check=_at_least(1),
        metavar="N",
    )
    max_sessions: int = _setting(
        "The most sessions at one time.", default=64, check=_at_least(1), metavar="N"
    )
    max_step_tokens: int = _setting(
        "The most tokens that a session may send in one step.",
        default=512,
        check=_between(1, 65536),
        metavar="N",
    )
    max_pass_tokens: int = _setting(
        "The most tokens of one piece of a batch that comes for a forward or backward pass; a "
        "longer sequence cannot be trained on here.",
        default=4096,
        check=_between(1, 1 << 20),
        metavar="N",
    )
    pass_bytes: int = _setting(
        "Memory for what one backward pass needs of the forward. Larger pieces of a batch are cut "
        "up, and blocks computed twice, to stay within it.",
        default=1024 * 1024 * 1024,
        check=_at_least(1),
        metavar="BYTES",
    )
    max_passes: int = _setting(
        "The most streams of forward and backward passes at one time.",
        default=16,
        check=_at_least(0),
        metavar="N",
    )
    adapters: tuple[str, ...] = _setting(
        "Adapters to host, each as NAME=FOLDER, in PEFT's format. Jobs choose one by its name.",
        default=(),
        check=_check_adapters,
        metavar="NAME=FOLDER",
    )
    adapter_bytes: int = _setting(
        "Memory for the adapters that clients lend; those that were not used for longest give way.",
        default=256 * 1024 * 1024,
        check=_at_least(0),
        metavar="BYTES",
    )
    max_adapter_bytes: int = _setting(
        "The largest adapter to take from a client, counting its part for the blocks here.",
        default=32 * 1024 * 1024,
        check=_between(0, 60 * 1024 * 1024),
        metavar="BYTES",
    )
    memory_bytes: int = _setting(
        'Memory for weights and cache when blocks = "auto". 0: half of what is free.',
        default=0,
        check=_at_least(0),
        metavar="BYTES",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LendConfig:
    """When to serve, and how much of the device: only what its owner leaves idle.

    How much memory is lent, [serve] says: its blocks or memory_bytes, cache_tokens, pass_bytes.
    """

    hours: tuple[str, ...] = _setting(
        'Hours of the day in which to serve, in local time, each like "22:00-08:00", which goes '
        "over midnight. Empty: always.",
        default=(),
        check=_check_hours,
        metavar="FROM-TO",
    )
    max_load: float = _setting(
        "What share of the device others may use, or want where nothing is idle, before this "
        "server makes way: of all processors together, or of the GPU's time. Processes of lowered "
        "priority (nice) do not count on a processor. 1: never make way.",
        default=0.5,
        check=_between(0, 1),
        metavar="SHARE",
    )
    busy_s: float = _setting(
        "Over how many seconds others must use more than that, on average.",
        default=10.0,
        check=_between(1, 3600),
        metavar="SECONDS",
    )
    idle_s: float = _setting(
        "Over how many seconds they must use no more than that, on average, before this server "
        "comes back.",
        default=60.0,
        check=_between(1, 86400),
        metavar="SECONDS",
    )
    yield_within_s: float = _setting(
        "How long, in seconds, sessions have to move when this server makes way. Then those that "
        "are left are ended; their clients rebuild them as soon as somebody can run them.",
        default=60.0,
        check=_between(0, MAX_WAIT_S),
        metavar="SECONDS",
    )
    free_after_s: float = _setting(
        "How long, in seconds, its blocks stay in memory when this server made way for a load, "
        "which comes and goes. Then they are freed, as they are at once for your pause and outside "
        "of the hours, and loaded again when it comes back.",
        default=300.0,
        check=_between(0, MAX_WAIT_S),
        metavar="SECONDS",
    )
    device_share: float = _setting(
        "The most of the device's time that is spent for others: after each batch it rests in "
        "proportion. 1: all of it.",
        default=1.0,
        check=_between(0.01, 1),
        metavar="SHARE",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteConfig:
    """Running models through the swarm, for the apps of this machine."""

    models: tuple[str, ...] = _setting(
        "Models to make ready at the start. Others of the store are loaded when first used.",
        default=(),
        check=_check_names,
        metavar="NAME",
    )
    dtype: str = _setting(
        "Of embedding and head, and so of the hidden states that are sent: as for [serve].",
        default="float32",
        check=_DTYPES,
        metavar="DTYPE",
    )
    codec: str = _setting(
        "How hidden states are written on the wire: auto, or one codec for all of them. auto: each "
        "peer that sends some chooses raw or int8, by what its link carries. The codecs: "
        + "; ".join(f"{name}, {text}" for name, text in CODECS.items())
        + ".",
        default=AUTO,
        check=_one_of(AUTO, *CODECS),
        metavar="CODEC",
    )
    gradient_codec: str = _setting(
        "The same for gradients of hidden states, in training. bfloat16 halves them and errs by a "
        "fifth of a percent; int8, by less than one.",
        default="bfloat16",
        check=_one_of(AUTO, *CODECS),
        metavar="CODEC",
    )
    replay: str = _setting(
        "How a server that fails is replaced: fast, in long pieces, which differ in the last bits "
        "from what was lost; exact, step by step as it was computed first, to the same bits on a "
        "like machine, which takes several times as long; or auto: exact where a codec loses "
        "precision, since that makes a whole step of a last bit.",
        default="auto",
        check=_one_of("auto", "exact", "fast"),
        metavar="KIND",
    )
    max_wait_s: float = _setting(
        "How long, in seconds, a job waits where no server can run some blocks, unless it says "
        "itself.",
        default=60.0,
        check=_between(0, MAX_WAIT_S),
        metavar="SECONDS",
    )
    history_bytes: int = _setting(
        "Memory for what sessions sent, from which a server that fails is replaced. What goes "
        "beyond it lies in temporary files.",
        default=256 * 1024 * 1024,
        check=_at_least(0),
        metavar="BYTES",
    )
    threads: int = _setting(
        "Processor threads, where [serve] threads is 0. 0 leaves it to PyTorch.",
        default=0,
        check=_between(0, MAX_THREADS),
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All of it, one section for each concern."""

    daemon: DaemonConfig
    network: NetworkConfig
    serve: ServeConfig
    lend: LendConfig
    route: RouteConfig


_SECTIONS: dict[str, type[Any]] = get_type_hints(Config)
_HINTS: dict[str, dict[str, Any]] = {
    name: get_type_hints(section) for name, section in _SECTIONS.items()
}
_KINDS = {
    str: "a string",
    Path: "a path as a string",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a list of strings",
}


def parse_arguments(arguments: Sequence[str]) -> Config:
    """Reads the command line, and the file that it names.

    Exits by itself where only ``--help``, ``--version`` or ``--print-config`` was asked for.

    Raises:
        ConfigError: the text names the file or flag, the key, and what was expected.
    """
    args = _parse_flags(arguments)
    values = _default_values(os.environ)
    if args.config is not None:
        for section, settings in load_settings(Path(args.config)).items():
            values[section].update(settings)
    for section, setting in _all_settings():
        given = getattr(args, _destination(section, setting))
        if given is not None:
            flag = _flag(section, setting)
            value = _convert_flag(given, _HINTS[section][setting.name], flag)
            _check(setting, value, flag)
            values[section][setting.name] = value
    config = Config(**{name: cls(**values[name]) for name, cls in _SECTIONS.items()})
    _check_together(config.serve)
    if args.print_config:
        sys.stdout.write(format_config(config))
        sys.exit(0)
    return config


def _check_together(serve: ServeConfig) -> None:
    """Refuses settings that exclude each other."""
    if serve.model and serve.models:
        raise ConfigError(
            "[serve] model and models are both set; name the one model to serve, or those to "
            "choose from"
        )
    if serve.models and serve.blocks != ANY_BLOCKS:
        raise ConfigError(
            '[serve] models are chosen from with blocks = "auto"; set model where blocks are given'
        )
    if not serve.is_wanted and serve.blocks != ANY_BLOCKS:
        raise ConfigError(
            f"[serve] blocks is {serve.blocks}, but no model is given; set [serve] model too"
        )


def load_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a file; gives what it sets, of the right types and ranges.

    Raises:
        ConfigError: the file cannot be read, or says what it should not.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    settings: dict[str, dict[str, Any]] = {}
    for section, table in document.items():
        if section not in _SECTIONS:
            raise ConfigError(f"{path}: unknown section [{section}]; {_suggest_section(section)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} should be a section, written [{section}]")
        known = {setting.name: setting for setting in fields(_SECTIONS[section])}
        settings[section] = {}
        for key, raw in table.items():
            if key not in known:
                raise ConfigError(
                    f'{path}: [{section}] has no key "{key}"; {_suggest_key(section, key)}'
                )
            place = f"{path}: [{section}] {key}"
            value = _convert_toml(raw, _HINTS[section][key], place)
            _check(known[key], value, place)
            settings[section][key] = value
    return settings


def format_config(config: Config) -> str:
    """The configuration as a file with explanations, which reads back as the same.

    What depends on the machine stands there as a comment, where it is the default.
    """
    defaults = _default_values(os.environ)
    parts = ["# The configuration of petald. Start it with: petald --config FILE\n"]
    for section, cls in _SECTIONS.items():
        lines = [*_comment(cls.__doc__), f"[{section}]"]
        for setting in fields(cls):
            value = getattr(getattr(config, section), setting.name)
            is_of_machine = setting.default is MISSING and value == defaults[section][setting.name]
            lines.append("")
            lines += _comment(setting.metadata["help"])
            mark = "# " if is_of_machine else ""
            lines.append(f"{mark}{setting.name} = {_format_toml(value)}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _comment(text: str | None) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text or "", _TEXT_WIDTH)]


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where the daemon keeps what must last: as systemd says, or as XDG does."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    state_home = environ.get("XDG_STATE_HOME")
    if state_home and Path(state_home).is_absolute():
        return Path(state_home) / "petald"
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".local" / "state" / "petald"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see petald --help)")


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="petald",
        description="The daemon with which people together run language models too large for any "
        "one of them. Settings come from the defaults, then the file, then the flags.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("petald")
    parser.add_argument("--version", action="version", version=f"petald {version}")
    parser.add_argument("--config", metavar="FILE", help="a TOML file with settings")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings as a TOML file with explanations, and exit",
    )
    defaults = _default_values(os.environ)
    for section, cls in _SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]", cls.__doc__)
        for setting in fields(cls):
            is_list = _HINTS[section][setting.name] == tuple[str, ...]
            default = defaults[section][setting.name]
            shown = " ".join(default) if is_list else str(default)
            text = setting.metadata["help"] + (" May be repeated." if is_list else "")
            group.add_argument(
                _flag(section, setting),
                dest=_destination(section, setting),
                action="append" if is_list else "store",
                metavar=setting.metadata["metavar"],
                help=f"{text} Default: {shown or 'none'}".replace("%", "%%"),
            )
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        advice = f"; the nearest is {near[0]}" if near else ""
        raise ConfigError(f"unknown argument {unknown[0]!r}{advice} (see petald --help)")
    return args


def _default_values(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {
        name: {each.name: each.default for each in fields(cls) if each.default is not MISSING}
        for name, cls in _SECTIONS.items()
    }
    values["daemon"]["socket"] = listen_socket_path(environ)
    values["daemon"]["state_dir"] = default_state_dir(environ)
    return values


def _all_settings() -> Iterator[tuple[str, Field[Any]]]:
    for section, cls in _SECTIONS.items():
        for setting in fields(cls):
            yield section, setting


def _flag(section: str, setting: Field[Any]) -> str:
    return f"--{section}-{setting.name.replace('_', '-')}"


def _destination(section: str, setting: Field[Any]) -> str:
    return f"{section}.{setting.name}"


def _convert_toml(raw: object, kind: Any, place: str) -> Any:
    if kind is str and isinstance(raw, str):
        return raw
    if kind is Path and isinstance(raw, str) and raw:
        return Path(raw).expanduser().absolute()
    if kind is int and type(raw) is int:
        return raw
    if kind is float and type(raw) in (int, float):
        return float(str(raw))
    if isinstance(raw, list) and kind == tuple[str, ...] and all(type(x) is str for x in raw):
        return tuple(raw)
    raise ConfigError(f"{place}: expected {_KINDS[kind]}, not {raw!r}")


def _convert_flag(given: str | list[str], kind: Any, flag: str) -> Any:
    if isinstance(given, list) or kind is str:
        return tuple(given) if isinstance(given, list) else given
    try:
        number = {int: int, float: float}.get(kind, str)(given)
    except ValueError:
        raise ConfigError(f"{flag}: expected {_KINDS[kind]}, not {given!r}") from None
    return _convert_toml(number, kind, flag)


def _check(setting: Field[Any], value: Any, place: str) -> None:
    check: Check = setting.metadata["check"]
    try:
        check(value)
    except (ValueError, ConfigError) as error:
        shown = str(value) if isinstance(value, Path) else value
        is_quoted = isinstance(value, tuple) or repr(shown) in str(error)
        came = "" if is_quoted else f", not {shown!r}"
        raise ConfigError(f"{place}: {error}{came}") from error


def _suggest_section(section: str) -> str:
    near = difflib.get_close_matches(section, _SECTIONS, n=1)
    known = ", ".join(f"[{name}]" for name in _SECTIONS)
    return f"the nearest is [{near[0]}]" if near else f"there are {known}"


def _suggest_key(section: str, key: str) -> str:
    own = [setting.name for setting in fields(_SECTIONS[section])]
    if near := difflib.get_close_matches(key, own, n=1):
        return f'the nearest is "{near[0]}"'
    elsewhere = [name for name, setting in _all_settings() if setting.name == key]
    if elsewhere:
        return f"[{elsewhere[0]}] has it"
    return f"it has {', '.join(own)}"


def _format_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_format_toml(each) for each in value)}]"
    if isinstance(value, str | Path):
        # A basic string of TOML escapes as JSON does, but for DEL.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
    return repr(value)

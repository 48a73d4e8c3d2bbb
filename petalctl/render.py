"""Reports for people, as rich renders them. Whatever a peer said is text, never markup."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from p2p.wire.control_messages import (
    CodecCount,
    ModelSwarm,
    PauseStatus,
    PeerStatus,
    ServerStatus,
    StatusReport,
    SwarmReport,
)
from petalctl.coverage import (
    block_steps,
    count_coverage,
    coverage_cells,
    describe_coverage,
    uncovered_ranges,
    weakest_ranges,
)
from petalctl.names import join_ranges, shorten_peers
from petalctl.terminal import neutralise_line

PIPE_WIDTH = 500
"""Columns where no terminal sets them: nothing is cut or wrapped for whoever reads the lines."""

_BAR_STYLES = ("red", "yellow", "green")


def print_rich(content: RenderableType, stream: TextIO) -> None:
    """Writes what rich made; as plain lines without padding where that is no terminal."""
    if stream.isatty():
        Console(file=stream, highlight=False).print(content)
        return
    page = io.StringIO()
    Console(file=page, width=PIPE_WIDTH, color_system=None, highlight=False).print(content)
    stream.write("".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines()))


def render_status(report: StatusReport) -> RenderableType:
    """A daemon, its span, its peers."""
    facts = [
        ("daemon", f"petald {report.version}, pid {report.pid}, up {format_age(report.uptime_s)}"),
        ("peer", report.peer),
        *_labelled("address", report.addresses),
        ("roles", ", ".join(report.roles)),
        *_labelled("routes for", report.models or ("no model",)),
        *_serving_facts(report),
        ("jobs", str(report.jobs)),
        *([("sent", _sent(report.sent))] if report.sent else ()),
        ("peers", str(len(report.peers))),
    ]
    parts: list[RenderableType] = [_facts_table(facts)]
    if report.peers:
        parts += ["", _peers_table(report.peers)]
    return Group(*parts)


def _serving_facts(report: StatusReport) -> list[tuple[str, str]]:
    span, pause = report.span, report.pause
    if span is None and "serve" not in report.roles:
        return []
    reason = [("", _pause(pause))] if pause else []
    if span is None:
        why = (
            "paused, no blocks in memory"
            if pause
            else "nothing now; it loads its blocks, or will try to again"
        )
        return [("serves", why), *reason]
    return [
        ("serves", f"{span.model}, blocks {span.start}:{span.end}, {span.state}"),
        *reason,
        (
            "",
            f"{_weights(span.dtype, span.quant)} on {span.device}, "
            f"{format_bytes(span.weight_bytes)} of weights",
        ),
        ("cache", f"{span.free_cache_tokens} of {span.cache_tokens} tokens free"),
        ("sessions", f"{span.sessions} open"),
        ("steps", f"{span.decode_steps} decode, {span.prefill_steps} prefill"),
    ]


def _pause(pause: PauseStatus) -> str:
    """Why a server is paused, and when it comes back by itself."""
    if pause.ends_in_s is None:
        return pause.why
    return f"{pause.why}; for {format_age(pause.ends_in_s)} more"


def _sent(counts: Sequence[CodecCount]) -> str:
    """How many messages went in which codec."""
    return ", ".join(f"{count.messages} as {count.codec}" for count in counts)


def _peers_table(peers: Sequence[PeerStatus]) -> Table:
    table = _table()
    table.add_column("peer", no_wrap=True)
    table.add_column("round trip", justify="right", no_wrap=True)
    table.add_column("upload", justify="right", no_wrap=True)
    table.add_column("address", overflow="fold")
    names = shorten_peers(peer.peer for peer in peers)
    for peer in peers:
        address = peer.addresses[0] if peer.addresses else "-"
        table.add_row(
            _cell(names[peer.peer]),
            format_ms(peer.round_trip_s),
            "-" if peer.bytes_per_s is None else f"{format_bytes(peer.bytes_per_s)}/s",
            _cell(_without_peer(address)),
        )
    return table


def render_swarm(report: SwarmReport) -> RenderableType:
    """Each model, its coverage, its servers."""
    if not report.models:
        return Text("this daemon knows no model; name one under [serve] or [route] in its config")
    parts: list[RenderableType] = []
    for swarm in report.models:
        parts += ["", *_render_model(swarm)] if parts else _render_model(swarm)
    return Group(*parts)


def _render_model(swarm: ModelSwarm) -> list[RenderableType]:
    count = len(swarm.servers)
    title = Text()
    title.append(neutralise_line(swarm.model), style="bold")
    title.append(
        f"  {swarm.blocks} blocks, {count or 'no'} server{'s' if count != 1 else ''}"
        f"  {neutralise_line(swarm.fingerprint)[:12]}"
    )
    parts: list[RenderableType] = [title, Padding(_coverage_bar(swarm.coverage), (0, 0, 0, 2))]
    if covered := describe_coverage(swarm.coverage):
        parts.append(Padding(Text(f"covered:   {covered}"), (0, 0, 0, 2)))
    if gaps := uncovered_ranges(swarm.coverage):
        text = Text(f"UNCOVERED: {join_ranges(gaps)}, so no job can cross this model", style="red")
        parts.append(Padding(text, (0, 0, 0, 2)))
    elif weak := weakest_ranges(steps := block_steps(swarm.servers, swarm.blocks)):
        text = Text(
            f"needs help: {join_ranges(weak)}, {min(steps):.1f} steps/s, "
            f"where blocks have {sum(steps) / len(steps):.1f} on average"
        )
        parts.append(Padding(text, (0, 0, 0, 2)))
    if swarm.share < 1:
        parts.append(Padding(Text(_sample(swarm)), (0, 0, 0, 2)))
    if swarm.servers:
        parts.append(Padding(_servers_table(swarm.servers), (0, 0, 0, 2)))
    parts += [Padding(line, (0, 0, 0, 2)) for line in _adapter_lines(swarm)]
    return parts


def _sample(swarm: ModelSwarm) -> str:
    """How much of a large swarm the daemon itself goes by."""
    seen = round(swarm.share * len(swarm.servers))
    return f"sampled:   this daemon chooses from about {seen} of the {len(swarm.servers)} servers"


def _adapter_lines(swarm: ModelSwarm) -> list[Text]:
    """Which adapters servers host, and for which blocks."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for server in swarm.servers:
        for name in server.adapters:
            spans.setdefault(name, []).append((server.start, server.end))
    return [
        _cell(f"adapter:   {name}, {describe_coverage(count_coverage(spans[name], swarm.blocks))}")
        for name in sorted(spans)
    ]


def _coverage_bar(coverage: Sequence[int]) -> Text:
    """One sign for each block (or few): how many servers hold it, a dot for none."""
    bar = Text("[")
    for servers in coverage_cells(coverage):
        sign = "." if servers == 0 else str(servers) if servers < 10 else "+"
        bar.append(sign, style=_BAR_STYLES[min(servers, 2)])
    bar.append("]")
    return bar


def _servers_table(servers: Sequence[ServerStatus]) -> Table:
    table = _table()
    table.add_column("server", no_wrap=True)
    table.add_column("blocks", no_wrap=True)
    table.add_column("state")
    table.add_column("weights")
    shows_codecs = any(server.codec != "auto" for server in servers)
    if shows_codecs:
        table.add_column("sends")
    table.add_column("steps/s", justify="right")
    table.add_column("free cache", justify="right")
    table.add_column("round trip", justify="right")
    names = shorten_peers(server.peer for server in servers)
    for server in servers:
        table.add_row(
            _cell(names[server.peer]),
            f"{server.start}:{server.end}",
            _cell(server.state),
            _cell(_weights(server.dtype, server.quant)),
            *([_cell(server.codec)] if shows_codecs else []),
            f"{server.steps_per_s:.1f}" if server.steps_per_s else "-",
            f"{server.free_cache_tokens}/{server.cache_tokens}",
            format_ms(server.round_trip_s),
        )
    return table


def _weights(dtype: str, quant: str) -> str:
    return dtype if quant in ("", "none") else f"{dtype} {quant}"


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)


def _facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts:
        table.add_row(label, _cell(value))
    return table


def _labelled(label: str, values: Sequence[str]) -> list[tuple[str, str]]:
    """The label stands beside the first of the values only."""
    return [(label if index == 0 else "", value) for index, value in enumerate(values)]


def _cell(text: str) -> Text:
    return Text(neutralise_line(text))


def _without_peer(address: str) -> str:
    return address.split("/p2p/")[0] or address


def format_ms(seconds: float | None) -> str:
    """A round trip in milliseconds."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def format_age(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_bytes(count: int) -> str:
    """A size in its largest unit."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"

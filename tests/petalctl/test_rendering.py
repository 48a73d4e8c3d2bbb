from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalctl.coverage import (
    block_steps,
    count_coverage,
    coverage_cells,
    covered_ranges,
    describe_coverage,
    uncovered_ranges,
    weakest_ranges,
)
from petalctl.names import shorten_peers
from petalctl.render import format_age, format_bytes, print_rich, render_status, render_swarm
from petalctl.terminal import AnswerWriter, neutralise, neutralise_line
from tests.helpers.control_stand_in import status_report, swarm_report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_sample_is_called_one() -> None:
    report = swarm_report(1)
    swarm = report.models[0]
    servers = swarm.servers * 40
    page = io.StringIO()
    print_rich(render_swarm(report), page)
    assert "sampled:" not in page.getvalue()
    part = replace(swarm, servers=servers, share=0.25)
    print_rich(render_swarm(replace(report, models=(part,))), page)
    seen = len(servers) // 4
    assert f"this daemon chooses from about {seen} of the {len(servers)} servers" in page.getvalue()


def test_answer_on_a_terminal_cannot_steer_it() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    hostile = "a\x1b]0;title\x07\r\x9b31m\x7f\tb\nc"
    for stream in (terminal, pipe):
        writer = AnswerWriter(stream)
        writer.write(hostile)
        writer.end_line()
        writer.end_line()
    assert terminal.getvalue() == "a␛]0;title␇␍\ufffd31m␡\tb\nc\n"
    assert pipe.getvalue() == hostile + "\n"


def test_a_message_in_the_midst_of_an_answer_gets_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        writer = AnswerWriter(stream)
        writer.make_way()
        writer.write("a b")
        writer.make_way()
        writer.write(" c")
    assert terminal.getvalue() == "a b\n c"
    assert pipe.getvalue() == "a b c"


@given(st.text())
def test_neutral_text_has_no_controls_and_the_same_length(text: str) -> None:
    shown = neutralise(text)
    assert len(shown) == len(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert "\n" not in neutralise_line(text)


@given(st.lists(st.integers(0, 3), max_size=200))
def test_coverage_is_told_without_loss(coverage: list[int]) -> None:
    ranges = covered_ranges(coverage)
    assert [servers for start, end, servers in ranges for _ in range(start, end)] == coverage
    gaps = {block for start, end in uncovered_ranges(coverage) for block in range(start, end)}
    assert gaps == {block for block, servers in enumerate(coverage) if servers == 0}
    cells = coverage_cells(coverage, most=60)
    assert len(cells) == min(60, len(coverage))
    assert min(cells, default=0) == min(coverage, default=0)


def test_coverage_in_words() -> None:
    assert describe_coverage([2, 2, 0, 1]) == "0:2 ×2, 3:4 ×1"  # noqa: RUF001
    assert describe_coverage([]) == ""


@given(st.sets(st.text("abc", min_size=1, max_size=12), max_size=20))
def test_short_names_stay_different(peers: set[str]) -> None:
    names = shorten_peers(peers)
    assert set(names) == peers
    assert len(set(names.values())) == len(peers)


def test_ids_of_one_kind_are_told_apart_by_their_ends() -> None:
    one, two = "12D3KooWaaaaaaaaaaX123456", "12D3KooWaaaaaaaaaaY123456"
    assert shorten_peers([one, two, one]) == {one: "…X123456", two: "…Y123456"}
    assert shorten_peers([one]) == {one: "…123456"}


def test_words_of_peers_are_text_and_not_markup() -> None:
    report = swarm_report(1)
    swarm = report.models[0]
    hostile = replace(
        swarm,
        model="[red]\x1b[31m",
        servers=(replace(swarm.servers[0], state="[bold]x[/bold]", dtype="a\nb"),),
    )
    page = io.StringIO()
    print_rich(render_swarm(replace(report, models=(hostile,))), page)
    assert "[red]␛[31m" in page.getvalue()
    assert "[bold]x[/bold]" in page.getvalue()
    assert "a b" in page.getvalue()


def test_hosted_adapters_are_told_with_their_blocks() -> None:
    report = swarm_report(1)
    swarm = report.models[0]
    name = "poet@0123456789abcdef"
    servers = tuple(replace(server, adapters=(name, "\x1b[31m@0")) for server in swarm.servers)
    page = io.StringIO()
    print_rich(render_swarm(replace(report, models=(replace(swarm, servers=servers),))), page)
    assert f"  adapter:   {name}, 0:2 ×2, 2:3 ×1\n" in page.getvalue()  # noqa: RUF001
    assert "\x1b" not in page.getvalue()


def test_the_blocks_that_need_help_most_are_told() -> None:
    swarm = swarm_report(1).models[0]

    def shown(*servers: tuple[int, int, float]) -> str:
        told = tuple(
            replace(swarm.servers[0], start=start, end=end, steps_per_s=steps)
            for start, end, steps in servers
        )
        coverage = tuple(count_coverage([one[:2] for one in servers], swarm.blocks))
        page = io.StringIO()
        report = replace(swarm, servers=told, coverage=coverage)
        print_rich(render_swarm(replace(swarm_report(1), models=(report,))), page)
        return page.getvalue()

    weak = shown((0, 2, 40.0), (2, 4, 10.0))
    assert "  needs help: 2:4, 10.0 steps/s, where blocks have 25.0 on average\n" in weak
    assert "needs help" not in shown((0, 2, 40.0), (2, 4, 36.0))
    gap = shown((0, 2, 40.0), (3, 4, 10.0))
    assert "UNCOVERED: 2:3" in gap
    assert "needs help" not in gap
    assert weakest_ranges([]) == []


def test_a_server_that_takes_no_sessions_does_not_count() -> None:
    server = swarm_report(1).models[0].servers[0]
    leaving = replace(server, start=0, end=4, state="leaving")
    serving = replace(server, start=1, end=9, state="serving", steps_per_s=7.0)
    assert block_steps([leaving, serving], 4) == [0.0, 7.0, 7.0, 7.0]


def test_pages_fit_a_terminal_of_80_columns() -> None:
    for content in (render_status(status_report(1)), render_swarm(swarm_report(1))):
        page = io.StringIO()
        print_rich(content, page)
        assert max(map(len, page.getvalue().splitlines())) <= 80


def test_daemon_without_models_or_span() -> None:
    page = io.StringIO()
    print_rich(render_swarm(replace(swarm_report(1), models=())), page)
    assert "knows no model" in page.getvalue()
    page = io.StringIO()
    print_rich(render_status(replace(status_report(1), span=None, peers=(), models=())), page)
    assert "routes for  no model" in page.getvalue()


def test_quantities() -> None:
    assert [format_age(s) for s in (5.9, 65, 3700, 90000)] == [
        "5 s",
        "1 min 5 s",
        "1 h 1 min",
        "1 d 1 h",
    ]
    assert [format_bytes(n) for n in (7, 7000, 7_100_000, 4_900_000_000)] == [
        "7 B",
        "7 kB",
        "7 MB",
        "4.9 GB",
    ]

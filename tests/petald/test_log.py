import json
import logging
import os
import sys
import warnings
from types import SimpleNamespace

import pytest
import trio

from petald.log import configure_logging, format_value, get_logger, log_context

log = get_logger("petald.test_log")


@pytest.fixture(autouse=True)
def untouched_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def start(log_format: str = "text", log_level: str = "info") -> None:
    configure_logging(SimpleNamespace(log_format=log_format, log_level=log_level))


def test_text_has_time_level_event_and_fields(capsys):
    start()
    log.info("span loaded", model="tiny", blocks="0:10", name="a b", empty="")
    line = capsys.readouterr().err
    head, _, rest = line.partition(" info ")
    assert len(head) == len("2026-01-01 00:00:00.000")
    assert rest.strip() == 'span loaded model=tiny blocks=0:10 name="a b" empty=""'


def test_json_is_one_object_a_line(capsys):
    start("json")
    log.warning("peer\nlost", peer="12D", count=3, seconds=0.5, text="a\x1b[2Jb" + "y" * 1000)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "\x1b" not in line
    entry = json.loads(line)
    assert entry["event"] == "peer\nlost"
    assert (entry["level"], entry["peer"], entry["count"]) == ("warning", "12D", 3)
    assert entry["logger"] == "petald.test_log"
    assert "1006 characters" in entry["text"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_values_from_peers_cannot_forge_a_line(capsys, log_format):
    start(log_format)
    log.info("refused", text='x\n2026-01-01 error owned "\x1b[31m\u202e')
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.isascii()


def test_long_values_are_cut():
    assert len(format_value("x" * 10_000)) < 400
    assert format_value("grün und blau") == '"grün und blau"'


def test_level_is_kept(capsys):
    start(log_level="warning")
    log.info("quiet")
    log.error("loud")
    assert "quiet" not in (text := capsys.readouterr().err)
    assert "loud" in text


def test_libraries_and_warnings_are_tamed(capsys):
    start(log_level="debug")
    logging.getLogger("libp2p.host").info("chatter")
    logging.getLogger("urllib3.connectionpool").warning("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("chatter", stacklevel=1)
    assert capsys.readouterr().err == ""


def test_traceback_stays_on_the_line(capsys):
    start()
    try:
        raise ValueError("no\nvalue")
    except ValueError:
        log.exception("job failed", job=1)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "job failed job=1 traceback=" in line


def test_journal_gets_a_priority_and_no_time(tmp_path, monkeypatch):
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        start()
        log.warning("peer lost")
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        start()
        log.warning("peer lost again")
    first, second = (tmp_path / "journal").read_text().splitlines()
    assert first == "<4>peer lost"
    assert second.endswith("warning peer lost again")


async def test_context_is_of_the_task_and_those_it_starts(capsys):
    start()

    async def work(number: int) -> None:
        with log_context(session=number):
            await trio.lowlevel.checkpoint()
            log.info("step", session_too="no")

    with log_context(peer="A"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, 1)
            nursery.start_soon(work, 2)
    log.info("outside")
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.partition("step ")[2] for line in lines[:2]) == [
        "peer=A session=1 session_too=no",
        "peer=A session=2 session_too=no",
    ]
    assert lines[2].endswith("outside")

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from p2p.wire.control_messages import (
    Cancel,
    CloseSession,
    Generate,
    Generated,
    JobFailed,
    Sampling,
    StatusRequest,
    Turn,
)
from p2p.wire.message import encode_message
from petalctl import Client, DaemonUnreachable, JobError
from petalctl.errors import ConnectionLost
from tests.helpers.control_stand_in import (
    CHAIN,
    Conversation,
    answer_everything,
    chain_progress,
    done,
    pieces,
    refuse_everything,
    run_stand_in,
    speak_until_cancelled,
    status_report,
    swarm_report,
)


def test_reports_come_back_whole() -> None:
    with run_stand_in(answer_everything) as daemon, Client(daemon.path) as client:
        assert client.status() == status_report(1)
        assert client.swarm() == swarm_report(2)


def test_text_streams_piece_by_piece() -> None:
    with run_stand_in(answer_everything) as daemon, Client(daemon.path) as client:
        told = []
        generation = client.generate("hi", on_progress=told.append)
        assert list(generation) == ["Hello", ", ", "world"]
        assert generation.result() == done(1, ["Hello", ", ", "world"])
        assert generation.tokens == (1, 2, 3)
        assert generation.chain == CHAIN
        assert [progress.event for progress in told] == ["chain"]


def test_pieces_arrive_before_the_answer_is_whole() -> None:
    """The stand-in makes the second piece only after the first was read."""

    def script(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, Generate)
        conversation.send(*pieces(request.job, ["first"]))
        asked = conversation.receive()
        assert isinstance(asked, StatusRequest)
        conversation.send(status_report(asked.job), done(request.job, ["first"]))
        conversation.receive()

    with run_stand_in(script) as daemon, Client(daemon.path) as client:
        generation = client.generate("hi")
        stream = iter(generation)
        assert next(stream) == "first"
        assert client.status().pid == 4242
        assert list(stream) == []
        assert generation.result().text == "first"


def test_options_reach_the_daemon() -> None:
    with run_stand_in(answer_everything) as daemon, Client(daemon.path) as client:
        client.generate(
            turns=[{"role": "user", "content": "hi"}, Turn(role="assistant", content="ho")],
            model="m",
            max_new_tokens=5,
            temperature=1,
            top_k=2,
            top_p=0.5,
            min_p=0.25,
            repetition_penalty=1.5,
            seed=7,
            stop="\n",
            session="s",
        ).result()
        assert daemon.received == [
            Generate(
                job=1,
                model="m",
                turns=(Turn(role="user", content="hi"), Turn(role="assistant", content="ho")),
                max_new_tokens=5,
                sampling=Sampling(
                    temperature=1.0,
                    top_k=2,
                    top_p=0.5,
                    min_p=0.25,
                    repetition_penalty=1.5,
                    seed=7,
                ),
                stop=("\n",),
                session="s",
            )
        ]


def test_there_is_exactly_one_kind_of_prompt() -> None:
    with run_stand_in(answer_everything) as daemon, Client(daemon.path) as client:
        for options in ({}, {"prompt_tokens": [1], "turns": [Turn(role="user", content="x")]}):
            with pytest.raises(JobError, match="exactly one"):
                client.generate(**options)
        with pytest.raises(JobError, match="exactly one"):
            client.generate("x", prompt_tokens=[1])
        assert client.generate(prompt_tokens=[1]).result().text == "Hello, world"


def test_error_has_the_daemons_code() -> None:
    with run_stand_in(refuse_everything) as daemon, Client(daemon.path) as client:
        generation = client.generate("hi")
        for _ in range(2):
            with pytest.raises(JobError, match="held by nobody") as caught:
                generation.result()
            assert caught.value.code == "missing_blocks"


def test_closing_a_generation_cancels_it_and_the_connection_goes_on() -> None:
    def script(conversation: Conversation) -> None:
        speak_until_cancelled(conversation)

    with run_stand_in(script) as daemon, Client(daemon.path) as client:
        for session in ("", "kept", "kept"):
            with client.generate("hi", session=session) as generation:
                next(iter(generation))
            with pytest.raises(JobError, match="was closed"):
                generation.result()
        assert daemon.wait_received(Cancel) == Cancel(job=1)


def test_stopped_generation_ends_with_cancelled() -> None:
    with run_stand_in(speak_until_cancelled) as daemon, Client(daemon.path) as client:
        generation = client.generate("hi")
        seen = []
        with pytest.raises(JobError) as caught:  # noqa: PT012
            for piece in generation:
                seen.append(piece)
                if len(seen) == 3:
                    generation.stop()
        assert caught.value.code == "cancelled"
        assert generation.text.startswith("w1 w2 w3 ")


def test_next_job_of_a_session_waits_for_the_abandoned_one() -> None:
    """A daemon refuses a session that another job holds: the client waits for that one's end."""
    running: set[str] = set()

    def script(conversation: Conversation) -> None:
        first = conversation.receive()
        assert isinstance(first, Generate)
        running.add(first.session)
        conversation.send(*pieces(first.job, ["a"]))
        assert conversation.receive() == Cancel(job=first.job)
        assert conversation.poll(0.05) is None
        running.clear()
        conversation.send(JobFailed(job=first.job, code="cancelled"))
        second = conversation.receive()
        assert isinstance(second, Generate)
        assert not running
        conversation.send(done(second.job, ["b"]))
        conversation.receive()

    with run_stand_in(script) as daemon, Client(daemon.path) as client:
        with client.generate("hi", session="s") as generation:
            next(iter(generation))
        assert client.generate("hi", session="s").result().text == "b"


def test_closing_a_session_is_answered() -> None:
    with run_stand_in(answer_everything) as daemon, Client(daemon.path) as client:
        client.close_session("s")
        assert daemon.received == [CloseSession(job=1, session="s")]


@pytest.mark.parametrize("part", [0, 1, 4, 20])
def test_daemon_that_goes_away_midway_is_told_clearly(part: int) -> None:
    def script(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, Generate)
        conversation.send(*pieces(request.job, ["half an "]))
        conversation.send_bytes(encode_message(pieces(request.job, ["answer" * 9])[0])[:part])

    with run_stand_in(script) as daemon, Client(daemon.path) as client:
        generation = client.generate("hi")
        with pytest.raises(ConnectionLost, match="closed the connection"):
            list(generation)
        assert generation.text == "half an "
        with pytest.raises(ConnectionLost):
            client.status()


def test_reason_for_a_closed_connection_is_heard_when_sending_fails() -> None:
    def script(conversation: Conversation) -> None:
        conversation.send(JobFailed(job=0, code="overloaded", text="too many connections"))

    with run_stand_in(script) as daemon, Client(daemon.path) as client:
        with pytest.raises((JobError, ConnectionLost)) as caught:  # noqa: PT012
            for _ in range(100):
                client.generate("x" * 100_000).result()
        assert caught.value.code == "overloaded"


def test_report_that_does_not_come_is_an_error() -> None:
    def script(conversation: Conversation) -> None:
        while conversation.receive() is not None:
            pass

    with run_stand_in(script) as daemon, Client(daemon.path, answer_timeout_s=0.05) as client:
        with pytest.raises(JobError, match="did not answer in time") as caught:
            client.status()
        assert caught.value.code == "deadline_exceeded"
        assert daemon.wait_received(Cancel) == Cancel(job=1)


def test_missing_socket_says_where_was_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DaemonUnreachable, match=r"no petald socket at .*nowhere.*Start a daemon"):
        Client(tmp_path / "nowhere")
    monkeypatch.delenv("PETALD_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(DaemonUnreachable, match=r"at .*/petald/petald.sock \(nor at .* or "):
        Client()
    monkeypatch.setenv("PETALD_SOCKET", str(tmp_path / "mine"))
    with pytest.raises(DaemonUnreachable, match=r"mine\. Start"):
        Client()


def test_left_over_socket_and_plain_file_are_told_apart(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(DaemonUnreachable, match="left over"):
        Client(tmp_path / "dead")
    (tmp_path / "file").touch()
    with pytest.raises(DaemonUnreachable, match="is not a socket"):
        Client(tmp_path / "file")
    with pytest.raises(DaemonUnreachable, match="at most 107"):
        Client(tmp_path / ("x" * 120))


@pytest.mark.skipif(os.getuid() == 0, reason="root may do everything")
def test_forbidden_socket_names_the_remedy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as forbidden:
        forbidden.bind(str(tmp_path / "s"))
        forbidden.listen()
        (tmp_path / "s").chmod(stat.S_IRUSR)
        with pytest.raises(DaemonUnreachable, match=r"no permission.*daemon's user"):
            Client(tmp_path / "s")


def test_events_are_typed_and_in_order() -> None:
    with run_stand_in(answer_everything) as daemon, Client(daemon.path) as client:
        events = list(client.generate("hi").events())
        assert events[0] == chain_progress(1)
        assert all(isinstance(event, Generated) for event in events[1:-1])
        assert events[-1] == done(1, ["Hello", ", ", "world"])

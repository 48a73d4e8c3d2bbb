from __future__ import annotations

from collections.abc import Iterable

import pytest

from p2p.wire.control_messages import (
    Cancel,
    Generate,
    Generated,
    GenerateDone,
    JobFailed,
    Sampling,
    StatusReport,
    StatusRequest,
    SwarmRequest,
)
from p2p.wire.frame import HEADER_BYTES
from p2p.wire.message import Message, decode_message, encode_message
from petalctl.connection import ControlConnection
from petalctl.errors import CommandError, ConnectionLost, DaemonUnreachable, JobError
from tests.helpers.control_stand_in import (
    chain_progress,
    done,
    pieces,
    status_report,
    swarm_report,
)


def frames(messages: Iterable[Message]) -> bytes:
    return b"".join(map(encode_message, messages))


def read_answers(connection: ControlConnection, job: int) -> list[Message]:
    answers = []
    while (answer := connection.next_answer(job)) is not None:
        answers.append(answer)
        if isinstance(answer, GenerateDone | StatusReport):
            break
    return answers


def test_each_job_gets_its_own_answers_in_order() -> None:
    connection = ControlConnection()
    one, frame = connection.begin(Generate(job=0, prompt="a"))
    two, _ = connection.begin(Generate(job=0, prompt="b"))
    asked, _ = connection.begin(StatusRequest(job=0))
    assert decode_message(frame[HEADER_BYTES:]) == Generate(job=one, prompt="a")
    assert len({one, two, asked, 0}) == 4
    stream = [
        chain_progress(two),
        *pieces(one, ["x"]),
        status_report(asked),
        *pieces(two, ["y"]),
        done(one, ["x"]),
        done(two, ["y"]),
    ]
    connection.receive_data(frames(stream))
    assert read_answers(connection, one) == [*pieces(one, ["x"]), done(one, ["x"])]
    assert read_answers(connection, asked) == [status_report(asked)]
    expected = [chain_progress(two), *pieces(two, ["y"]), done(two, ["y"])]
    assert read_answers(connection, two) == expected


def test_answers_are_the_same_wherever_the_bytes_are_split() -> None:
    reference = [chain_progress(1), *pieces(1, ["a", "b"]), done(1, ["a", "b"])]
    data = frames(reference)
    for place in range(len(data) + 1):
        connection = ControlConnection()
        connection.begin(Generate(job=0, prompt="p"))
        for part in (data[:place], data[place:]):
            if part:
                connection.receive_data(part)
        assert read_answers(connection, 1) == reference


def test_failed_job_raises_its_code_and_text() -> None:
    connection = ControlConnection()
    job, _ = connection.begin(SwarmRequest(job=0, model="m"))
    connection.receive_data(frames([JobFailed(job=job, code="unknown_model", text="no m here")]))
    with pytest.raises(JobError, match="no m here") as caught:
        connection.next_answer(job)
    assert (caught.value.code, caught.value.exit_status) == ("unknown_model", 1)


def test_abandoned_jobs_answers_are_dropped_until_its_end() -> None:
    connection = ControlConnection()
    job, _ = connection.begin(Generate(job=0, prompt="p", session="s"))
    connection.receive_data(frames(pieces(job, ["a"])))
    data = connection.abandon(job)
    assert decode_message(data[HEADER_BYTES:]) == Cancel(job=job)
    assert connection.is_winding_up("s")
    assert not connection.is_winding_up("")
    connection.receive_data(frames(pieces(job, ["b"])))
    assert connection.is_winding_up("s")
    connection.receive_data(frames([JobFailed(job=job, code="cancelled")]))
    assert not connection.is_winding_up("s")
    assert connection.cancel(job) == b""
    other, _ = connection.begin(StatusRequest(job=0))
    connection.receive_data(frames([status_report(other)]))
    assert connection.next_answer(other) == status_report(other)


def test_abandoning_an_ended_job_sends_nothing() -> None:
    connection = ControlConnection()
    job, _ = connection.begin(Generate(job=0, prompt="p"))
    connection.receive_data(frames([done(job, ["a"])]))
    assert connection.abandon(job) == b""
    assert connection.abandon(job) == b""


def test_end_of_connection_comes_after_what_was_received() -> None:
    connection = ControlConnection()
    job, _ = connection.begin(Generate(job=0, prompt="p"))
    whole = frames(pieces(job, ["a", "b"]))
    connection.receive_data(whole[:-3])
    connection.receive_data(b"")
    assert connection.next_answer(job) == pieces(job, ["a"])[0]
    with pytest.raises(ConnectionLost, match="closed the connection before the job ended"):
        connection.next_answer(job)
    with pytest.raises(ConnectionLost):
        connection.begin(StatusRequest(job=0))


def test_complaint_about_the_connection_reaches_every_job() -> None:
    connection = ControlConnection()
    jobs = [connection.begin(StatusRequest(job=0))[0] for _ in range(2)]
    connection.receive_data(frames([JobFailed(job=0, code="message_too_large", text="too large")]))
    for job in jobs:
        with pytest.raises(JobError, match="too large"):
            connection.next_answer(job)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x03abc",
        frames([status_report(1)]),
        frames([swarm_report(99)]),
        frames([StatusRequest(job=1)]),
        frames([Cancel(job=1)]),
        frames([done(1, ["a"]), *pieces(1, ["b"])]),
    ],
)
def test_answer_that_makes_no_sense_ends_the_connection(answer: bytes) -> None:
    connection = ControlConnection()
    job, _ = connection.begin(Generate(job=0, prompt="p"))
    connection.receive_data(answer)
    with pytest.raises(DaemonUnreachable, match="cannot be read"):  # noqa: PT012
        for _ in range(3):
            connection.next_answer(job)
            connection.begin(StatusRequest(job=0))


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Generate(job=0, prompt="p", sampling=Sampling(temperature=float("nan"))), "temperature"),
        (Generate(job=0, prompt="p", max_new_tokens=-1), "max_new_tokens"),
        (Generate(job=0, prompt="p", stop=("",)), "stop"),
        (Generate(job=0, prompt="p", sampling=Sampling(top_k=0.5)), "top_k"),  # type: ignore[arg-type]
        (Generate(job=0, prompt="p\ud800"), "UTF-8"),
        (Generate(job=0, prompt="x" * (8 * 1024 * 1024 + 1)), "prompt"),
        (Generate(job=0, prompt="\N{SNOWMAN}" * (6 * 1024 * 1024)), "limit"),
        (Generate(job=0, prompt_tokens=(1 << 40,)), "prompt_tokens"),
        (Generate(job=0, prompt_tokens=(1 << 70,)), "sent"),
    ],
)
def test_request_that_cannot_be_sent_harms_no_other(request_: Generate, complaint: str) -> None:
    connection = ControlConnection()
    with pytest.raises(CommandError, match=complaint) as caught:
        connection.begin(request_)
    assert caught.value.code in ("bad_request", "message_too_large")
    job, _ = connection.begin(StatusRequest(job=0))
    connection.receive_data(frames([status_report(job)]))
    assert connection.next_answer(job) == status_report(job)


def test_pieces_without_text_are_answers_too() -> None:
    connection = ControlConnection()
    job, _ = connection.begin(Generate(job=0, prompt="p"))
    piece = Generated(job=job, tokens=(5,))
    connection.receive_data(frames([piece]))
    assert connection.next_answer(job) == piece
    assert connection.next_answer(job) is None

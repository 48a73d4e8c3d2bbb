from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from p2p.wire.control_messages import (
    Generate,
    JobFailed,
    Pause,
    PauseStatus,
    Resume,
    Resumed,
    StatusRequest,
    Turn,
)
from petalctl.cli import main
from tests.helpers.control_stand_in import (
    CHAIN,
    Conversation,
    answer_everything,
    chain_progress,
    pieces,
    refuse_everything,
    run_stand_in,
    status_report,
)

Run = Callable[..., tuple[int, str, str]]

OWNERS = PauseStatus(why="its owner paused it", ends_in_s=7200.0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs petalctl here; gives its exit status and what it printed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_generate_prints_the_text_and_nothing_else(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        assert run("--socket", daemon.path, "generate", "hi") == (0, "Hello, world\n", "")
        assert daemon.received == [Generate(job=1, turns=(Turn(role="user", content="hi"),))]


def test_socket_may_be_named_after_the_command_or_in_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_stand_in(answer_everything) as daemon:
        assert run("generate", "hi", "--socket", daemon.path)[0] == 0
        monkeypatch.setenv("PETALD_SOCKET", str(daemon.path))
        assert run("generate", "hi")[0] == 0


def test_options_reach_the_daemon(run: Run) -> None:
    options = (
        "--model m --max-new-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.2 --seed 9 --stop END --stop \\n --raw"
    )
    with run_stand_in(answer_everything) as daemon:
        assert run("--socket", daemon.path, "generate", "hi", *options.split(" "))[0] == 0
        (request,) = daemon.received
    assert isinstance(request, Generate)
    assert (request.prompt, request.turns, request.model) == ("hi", (), "m")
    assert (request.max_new_tokens, request.stop) == (5, ("END", "\n"))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.2, 9)


def test_system_text_is_a_turn_of_its_own(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        run("--socket", daemon.path, "generate", "hi", "--chat", "--system", "Be brief.")
        (request,) = daemon.received
    assert isinstance(request, Generate)
    assert [(turn.role, turn.content) for turn in request.turns] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]


def test_prompt_comes_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    with run_stand_in(answer_everything) as daemon:
        assert run("--socket", daemon.path, "generate", "--raw", "-")[0] == 0
        (request,) = daemon.received
    assert isinstance(request, Generate)
    assert request.prompt == "two\nlines\n"


def test_show_chain_tells_on_standard_error(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "generate", "hi", "--show-chain")
    assert (status, out) == (0, "Hello, world\n")
    assert err.splitlines()[0] == "chain: …AAAAAA [0:2] → …BBBBBB [2:4]"
    assert "3 tokens, the first after 0.25 s, then 12.5 tokens/s" in err


def test_json_is_one_object_with_everything(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "generate", "hi", "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == {
        "text": "Hello, world",
        "tokens": [1, 2, 3],
        "prompt_tokens": 7,
        "finish_reason": "stop",
        "model": "tiny",
        "chain": [
            {"peer": CHAIN[0].peer, "blocks": [0, 2]},
            {"peer": CHAIN[1].peer, "blocks": [2, 4]},
        ],
        "timings": {
            "time_to_first_token_s": 0.25,
            "steps_per_s": 12.5,
            "total_s": 1.5,
            "prefilled_tokens": 7,
            "hop_compute_s": [0.5, 0.25],
            "hop_queue_s": [0.0, 0.125],
        },
        "moves": [],
    }


def test_failed_job_is_told_and_its_text_cannot_steer_the_terminal(run: Run) -> None:
    with run_stand_in(refuse_everything) as daemon:
        for command in (["generate", "hi"], ["status"], ["swarm"]):
            status, out, err = run("--socket", daemon.path, *command)
            assert (status, out) == (1, "")
            assert err == "petalctl: blocks 2:4 are held by nobody ␛[31mred [missing_blocks]\n"
            status, out, err = run("--socket", daemon.path, *command, "--json")
            assert (status, err) == (1, "")
            error = json.loads(out)["error"]
            assert error["code"] == "missing_blocks"
            assert error["text"].startswith("blocks 2:4")


def test_text_before_a_failure_is_not_lost(run: Run) -> None:
    def script(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, Generate)
        conversation.send(chain_progress(request.job), *pieces(request.job, ["half an answer"]))

    with run_stand_in(script) as daemon:
        status, out, err = run("--socket", daemon.path, "generate", "hi")
        assert (status, out) == (3, "half an answer\n")
        assert "closed the connection" in err
    with run_stand_in(script) as daemon:
        status, out, err = run("--socket", daemon.path, "generate", "hi", "--json")
        assert (status, err) == (3, "")
        assert json.loads(out)["error"]["code"] == "connection_lost"


@pytest.mark.parametrize("command", ["generate hi", "chat", "status", "swarm"])
def test_no_daemon_is_exit_status_3(run: Run, tmp_path: Path, command: str) -> None:
    status, out, err = run("--socket", tmp_path / "none", *command.split())
    assert (status, out) == (3, "")
    assert "Start a daemon with" in err
    if command != "chat":
        status, out, err = run("--socket", tmp_path / "none", *command.split(), "--json")
        assert (status, err) == (3, "")
        assert json.loads(out)["error"]["code"] == "daemon_unreachable"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--temperature -1", "--temperature: '-1' is not a number of at least 0"),
        ("--temperature nan", "'nan' is not a number of at least 0"),
        ("--temperature inf", "'inf' is not a number"),
        ("--temperature hot", "'hot' is not a number"),
        ("--top-p 0", "'0' is not a number of more than 0 and at most 1"),
        ("--top-p 1.1", "'1.1' is not a number"),
        ("--min-p 2", "'2' is not a number of at least 0 and at most 1"),
        ("--top-k -3", "'-3' is not a whole number of at least 0"),
        ("--top-k 1.5", "'1.5' is not a whole number"),
        ("--max-new-tokens 0", "'0' is not a whole number of at least 1"),
        ("--repetition-penalty 0", "'0' is not a number of more than 0"),
        ("--seed x", "'x' is not a whole number"),
        ("--stop ", "a stop text has 1 to 256 characters, not 0"),
        ("--chat --raw", "not allowed with"),
        ("--raw --system x", "--system needs --chat"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--stop x " * 17, "at most 16 are taken"),
    ],
)
def test_wrong_option_is_exit_status_2_and_one_sentence(
    run: Run, tmp_path: Path, arguments: str, complaint: str
) -> None:
    words = arguments.strip(" ").split(" ") + ([""] if arguments == "--stop " else [])
    status, out, err = run("--socket", tmp_path / "none", "generate", "hi", *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert complaint in err
    status, out, err = run("--socket", tmp_path / "none", "generate", "hi", *words, "--json")
    assert (status, err) == (2, "")
    assert complaint in json.loads(out)["error"]["text"]


def test_empty_prompt_is_a_mistake_of_the_call(run: Run, tmp_path: Path) -> None:
    for prompt in ("", "  \n", "-"):
        status, _, err = run("--socket", tmp_path / "none", "generate", prompt)
        assert status == 2
        assert "the prompt is empty" in err


def test_prompt_that_is_no_text_is_a_mistake_of_the_call(run: Run, tmp_path: Path) -> None:
    status, _, err = run("--socket", tmp_path / "none", "generate", "a\udcff")
    assert status == 2
    assert "not valid UTF-8" in err


def test_status_is_a_page_without_colours_or_padding(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "status")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert not re.search(r" $", out, re.MULTILINE)
    lines = out.splitlines()
    assert lines[0] == "daemon      petald 0.1.0, pid 4242, up 1 h 2 min"
    assert "serves      tiny, blocks 0:2, serving" in lines
    assert "cache       8000 of 8192 tokens free" in lines
    assert "            bfloat16 nf4 on cpu, 123 MB of weights" in lines
    assert "sent        812 as int8, 40 as raw" in lines
    assert re.search(r"…AAAAAA +12\.3 ms +2 MB/s +/ip4/10\.0\.0\.7/tcp/4001$", out, re.MULTILINE)


def test_swarm_names_what_is_uncovered(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "swarm")
        assert (status, err) == (0, "")
        assert "[221.]" in out
        assert "0:2 ×2, 2:3 ×1" in out  # noqa: RUF001
        assert "UNCOVERED: 3:4" in out
        assert re.search(r"…AAAAAA +0:2 +serving +float32 +31\.2 +8000/8192 +0\.7 ms", out)
        status, out, _ = run("--socket", daemon.path, "swarm", "--model", "tiny", "--json")
        model = json.loads(out)["models"][0]
        assert (model["coverage"], model["uncovered"]) == ([2, 2, 1, 0], [[3, 4]])
        assert model["weakest"] == [[3, 4]]
        assert model["steps_per_s"][3] == 0.0
        assert model["servers"][0]["peer"] == CHAIN[0].peer
        status, _, err = run("--socket", daemon.path, "swarm", "--model", "other")
        assert status == 1
        assert "[unknown_model]" in err


def test_status_as_json_is_the_whole_report(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, _ = run("--socket", daemon.path, "status", "--json")
    report = json.loads(out)
    assert (status, report["pid"], report["span"]["weight_bytes"]) == (0, 4242, 123_000_000)
    assert report["peers"][0]["round_trip_s"] == 0.0123


def test_chat_keeps_the_session_and_the_turns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "hello\n\n/system Be brief.\nagain\n/nonsense\nmore\n/reset\nfresh\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with run_stand_in(answer_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "chat", "--temperature", "0")
        requests = [message for message in daemon.received if isinstance(message, Generate)]
    assert (status, out) == (0, "Hello, world\n" * 4)
    assert "/nonsense is no command" in err
    assert {request.session for request in requests} == {"chat"}
    said = [[turn.content for turn in request.turns] for request in requests]
    assert said == [
        ["hello"],
        ["Be brief.", "again"],
        ["Be brief.", "again", "Hello, world", "more"],
        ["Be brief.", "fresh"],
    ]


def test_chat_goes_on_after_a_failed_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    with run_stand_in(refuse_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "chat")
        requests = [message for message in daemon.received if isinstance(message, Generate)]
    assert (status, out) == (1, "")
    assert err.count("[missing_blocks]") == 2
    assert [len(request.turns) for request in requests] == [1, 1]


def test_version_and_missing_command(run: Run) -> None:
    status, _, err = run()
    assert (status, err.count("\n")) == (2, 1)


def test_an_adapter_is_a_folder_or_a_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "poet").mkdir()
    with run_stand_in(answer_everything) as daemon:

        def told(adapter: str) -> str:
            assert run("--socket", daemon.path, "generate", "hi", "--adapter", adapter)[0] == 0
            request = daemon.received[-1]
            assert isinstance(request, Generate)
            return request.adapter

        folder = str(tmp_path / "poet")
        assert told("poet") == "poet"  # no folder of this name is here
        assert told("poet@0123456789abcdef") == "poet@0123456789abcdef"
        assert told(folder) == folder
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert [told(text) for text in ("poet", "./poet/", "poet/../poet", "~/poet")] == [
            folder
        ] * 4
        for missing in ("./painter", "poet/x", str(tmp_path / "x")):
            status, _, err = run("--socket", daemon.path, "generate", "hi", "--adapter", missing)
            assert status == 1
            assert "there is no folder" in err
        for asked in daemon.received:
            assert isinstance(asked, Generate)


def test_a_chat_keeps_its_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nagain\n"))
    with run_stand_in(answer_everything) as daemon:
        assert run("--socket", daemon.path, "chat", "--adapter", "poet")[0] == 0
        asked = [each for each in daemon.received if isinstance(each, Generate)]
        assert [each.adapter for each in asked] == ["poet", "poet"]


@pytest.mark.parametrize(
    ("words", "for_s", "within_s"),
    [
        ("", None, None),
        ("for 2h", 7200, None),
        ("for 1h30m", 5400, None),
        ("for 1h 30min --within 5", 5400, 5),
        ("for 90s", 90, None),
        ("for 1.5d", 129600, None),
    ],
)
def test_pause_says_how_long_and_what_next(
    run: Run, words: str, for_s: float | None, within_s: float | None
) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, err = run("--socket", daemon.path, "pause", *words.split())
        assert (status, err) == (0, "")
        assert daemon.received == [Pause(job=1, for_s=for_s, within_s=within_s)]
        assert "petalctl resume" in out
        assert ("until" in out.splitlines()[0]) is (for_s is not None)
        assert "2 of 3 sessions moved" in out
        assert "1 did not" in out
        status, out, _ = run("--socket", daemon.path, "pause", *words.split(), "--json")
        assert json.loads(out) == {"sessions": 3, "left": 1, "for_s": for_s}


def test_pause_until_a_time_of_the_day(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        status, out, _ = run("--socket", daemon.path, "pause", "until", "08:00")
        (request,) = daemon.received
    assert status == 0
    assert isinstance(request, Pause)
    assert request.for_s is not None
    assert 0 < request.for_s <= 25 * 3600  # a night may have an hour more
    assert "paused until 08:00;" in out


@pytest.mark.parametrize(
    "words",
    [
        *("2h", "for", "for ever", "for 2", "for 0s", "for 400d", "for 1h2x", "for 2h until 08:00"),
        *("until", "until 24:00", "until 8", "until 08:60", "till 08:00"),
    ],
)
def test_a_pause_that_does_not_say_how_long_is_refused(
    run: Run, tmp_path: Path, words: str
) -> None:
    status, out, err = run("--socket", tmp_path / "none", "pause", *words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "for 2h" in err
    status, out, err = run("--socket", tmp_path / "none", "pause", *words.split(), "--json")
    assert (status, err, json.loads(out)["error"]["code"]) == (2, "", "usage")


def test_resume_says_whether_the_server_is_back(run: Run) -> None:
    with run_stand_in(answer_everything) as daemon:
        assert run("--socket", daemon.path, "resume") == (
            0,
            "this server takes sessions again\n",
            "",
        )
        status, out, _ = run("--socket", daemon.path, "resume", "--json")
        assert (status, json.loads(out)) == (
            0,
            {"lends": True, "paused_why": "", "is_loading": False},
        )

    def load(conversation: Conversation) -> None:
        while (request := conversation.receive()) is not None:
            assert isinstance(request, Resume)
            conversation.send(Resumed(job=request.job, is_loading=True))

    with run_stand_in(load) as daemon:
        status, out, _ = run("--socket", daemon.path, "resume")
        assert (status, out.startswith("this server loads its blocks again")) == (0, True)

    def stay_away(conversation: Conversation) -> None:
        while (request := conversation.receive()) is not None:
            assert isinstance(request, Resume)
            conversation.send(Resumed(job=request.job, paused_why="others are \x1b[31m busy"))

    with run_stand_in(stay_away) as daemon:
        status, out, err = run("--socket", daemon.path, "resume")
        assert (status, out) == (1, "")
        assert "others are ␛[31m busy" in err
        assert "max_load" in err
        assert run("--socket", daemon.path, "resume", "--json")[0] == 1


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_a_daemon_that_does_not_serve_says_so(run: Run, command: str) -> None:
    def refuse(conversation: Conversation) -> None:
        while (request := conversation.receive()) is not None:
            text = "this daemon serves no blocks; there is nothing to pause"
            conversation.send(JobFailed(job=request.job, code="bad_request", text=text))  # type: ignore[attr-defined]

    with run_stand_in(refuse) as daemon:
        status, out, err = run("--socket", daemon.path, command)
    assert (status, out) == (1, "")
    assert "serves no blocks" in err


@pytest.mark.parametrize(
    ("has_blocks", "pause", "expected"),
    [
        (True, OWNERS, "tiny, blocks 0:2, paused\n"),
        (False, OWNERS, "paused, no blocks in memory\n"),
        (False, None, "nothing now; it loads its blocks, or will try to again\n"),
    ],
)
def test_status_says_why_a_server_serves_nobody(
    run: Run, has_blocks: bool, pause: PauseStatus | None, expected: str
) -> None:
    def answer(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, StatusRequest)
        report = status_report(request.job)
        assert report.span is not None
        span = replace(report.span, state="paused") if has_blocks else None
        conversation.send(replace(report, roles=("serve",), span=span, pause=pause))
        conversation.receive()

    with run_stand_in(answer) as daemon:
        _, out, _ = run("--socket", daemon.path, "status")
    assert f"serves      {expected}" in out
    assert ("its owner paused it; for 2 h" in out) is (pause is not None)

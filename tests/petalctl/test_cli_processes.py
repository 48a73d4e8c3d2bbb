"""``petalctl`` as a process of its own: what it imports, and how it ends when it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2p.wire.control_messages import Cancel, Generate, StatusRequest
from tests.helpers.control_stand_in import (
    Conversation,
    answer_everything,
    run_stand_in,
    speak_until_cancelled,
    status_report,
)

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "libp2p", "petald", "transformers", "numpy", "safetensors", "huggingface_hub")
LATE = (*HEAVY, "trio", "rich", "msgpack", "asyncio")


def environ() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def start(*arguments: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "petalctl", *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(),
    )


def loaded_modules(*arguments: object) -> set[str]:
    """Runs petalctl; gives the top-level modules that it had loaded at its end."""
    code = (
        "import sys, json\n"
        "from petalctl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environ(),
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "generate --help",
        "demo --help",
        "model --help",
        "service --help",
        "train --help",
        "--nonsense",
    ],
)
def test_help_loads_nothing_that_takes_time(arguments: str) -> None:
    assert not loaded_modules(*arguments.split()) & set(LATE)


@pytest.mark.parametrize("arguments", ["generate hi", "generate hi --json", "status", "swarm"])
def test_daemons_jobs_need_nothing_heavy(arguments: str) -> None:
    with run_stand_in(answer_everything) as daemon:
        loaded = loaded_modules("--socket", daemon.path, *arguments.split())
    assert "msgpack" in loaded
    assert not loaded & {*HEAVY, "trio"}


def test_importing_the_client_loads_nothing_else() -> None:
    code = "import sys; from petalctl import Client; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ(), check=True
    )
    assert not set(done.stdout.split()) & {*HEAVY, "trio", "rich", "argparse"}


def test_interrupt_keeps_the_text_and_cancels_the_job() -> None:
    with run_stand_in(speak_until_cancelled) as daemon:
        process = start("--socket", daemon.path, "generate", "hi")
        assert process.stdout is not None
        begun = process.stdout.read(6)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert (begun + out).startswith("w1 w2 ")
        assert (begun + out).endswith(" \n")
        assert err == ""
        assert daemon.wait_received(Cancel) == Cancel(job=1)


def test_interrupt_with_json_prints_one_object_with_what_came() -> None:
    with run_stand_in(speak_until_cancelled) as daemon:
        process = start("--socket", daemon.path, "generate", "hi", "--json", "--show-chain")
        assert process.stderr is not None
        assert process.stderr.readline().startswith("chain:")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    said = json.loads(out)
    assert said["error"]["code"] == "interrupted"
    assert len(said["tokens"]) == len(said["text"].split())


def test_second_interrupt_does_not_wait_for_the_daemon() -> None:
    def hang(conversation: Conversation) -> None:
        while conversation.receive() is not None:
            pass

    with run_stand_in(hang) as daemon:
        process = start("--socket", daemon.path, "generate", "hi")
        daemon.wait_received(Generate)
        process.send_signal(signal.SIGINT)
        daemon.wait_received(Cancel)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (130, "", "")


def test_broken_pipe_ends_quietly_and_cancels_the_job() -> None:
    with run_stand_in(speak_until_cancelled) as daemon:
        process = start("--socket", daemon.path, "generate", "hi")
        assert process.stdout is not None
        process.stdout.read(3)
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (141, "")
        assert daemon.wait_received(Cancel) == Cancel(job=1)


class Terminal:
    """petalctl in a terminal: what is typed, and what is seen."""

    def __init__(self, *arguments: object) -> None:
        self._master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "petalctl", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environ(), "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_seen(self, text: str, wait_s: float = 20.0) -> None:
        """Waits until the text is seen; looks on after it the next time."""
        end = time.monotonic() + wait_s
        while text not in self.seen:
            if not select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} was not seen, but {self.seen!r}")
            try:
                self.seen += os.read(self._master, 4096).decode()
            except OSError as error:
                raise AssertionError(f"it ended; {text!r} not in {self.seen!r}") from error
        self.seen = self.seen.partition(text)[2]

    def interrupt_until_seen(self, text: str) -> None:
        """Presses Ctrl-C, and again where one fell between a prompt and the reading after it.

        Python looks at a signal before it reads from the terminal, and then not until a line came.
        """
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.wait_seen(text, 2.0)
        raise AssertionError(f"{text!r} was never seen, but {self.seen!r}")

    def wait(self) -> int:
        status = self.process.wait(20)
        os.close(self._master)
        return status


def test_chat_in_a_terminal_survives_an_interrupted_answer() -> None:
    def script(conversation: Conversation) -> None:
        asked = conversation.receive()
        assert isinstance(asked, StatusRequest)
        conversation.send(status_report(asked.job))
        speak_until_cancelled(conversation)

    with run_stand_in(script) as daemon:
        terminal = Terminal("--socket", daemon.path, "chat")
        terminal.wait_seen("Ctrl-D leaves")
        terminal.wait_seen("> ")
        for _ in range(2):
            terminal.type("hello\n")
            terminal.wait_seen("w3 ")
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_seen("(stopped)")
            terminal.wait_seen("> ")
        terminal.interrupt_until_seen("/quit leaves")
        terminal.wait_seen("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0

"""Real daemons that are killed, stopped and cut off: the tokens are those of the undisturbed run.

One swarm serves all tests of a codec: three servers for each third of the model. What a test
killed, it starts anew.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2p.wire.control_messages import ChainHop, ChainMove, GenerateDone, Progress
from petalctl.client import Client, Generation
from petalctl.daemon_process import DaemonProcess
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import even_spans, wait_until_free

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]

PROMPT = "Once upon a time, in a small village by the sea,"
LONG_PROMPT = " ".join(f"Item {number} costs {number * 7} coins." for number in range(80))
NEW_TOKENS = 256

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 11}


class Trial:
    """A swarm, and which of its processes are at which hop."""

    def __init__(self, swarm: PrivateSwarm) -> None:
        self.swarm = swarm
        self.peers: dict[str, DaemonProcess] = {}
        self.undisturbed: dict[str, tuple[int, ...]] = {}
        self.struck: list[ChainHop] = []
        for server in swarm.servers:
            self.learn(server)

    def learn(self, server: DaemonProcess) -> None:
        with Client(server.socket) as own:
            self.peers[own.status().peer] = server

    def expected(self, client: Client, **options: Any) -> tuple[int, ...]:
        """The tokens of the same job where nothing happens."""
        key = repr(sorted(options.items()))
        if key not in self.undisturbed:
            result = client.generate(**options).result()
            assert not failures(result.moves)
            self.undisturbed[key] = result.tokens
        return self.undisturbed[key]

    def part(self, generation: Generation, third: int) -> ChainHop:
        """The hop that runs the middle of a third of the model; a chain may have more than 3."""
        block = sum(even_spans(3)[third]) // 2
        return next(hop for hop in generation.chain if hop.start <= block < hop.end)

    def hop(self, generation: Generation, third: int) -> DaemonProcess:
        return self.peers[self.part(generation, third).peer]

    def restore(self) -> None:
        """Starts anew what was killed, and lets go on what was stopped."""
        for peer, server in list(self.peers.items()):
            if server.is_running:
                os.kill(server.pid, signal.SIGCONT)
                continue
            del self.peers[peer]
            assert server.span is not None
            self.learn(self.swarm.add_server(server.span))

    def sessions(self, server: DaemonProcess) -> int:
        with Client(server.socket) as own:
            span = own.status().span
        assert span is not None
        return span.sessions


@pytest.fixture(scope="module")
def trial(model_folder: Path) -> Iterator[Trial]:
    with PrivateSwarm(str(model_folder), spans=even_spans(3) * 3, threads=1) as swarm:
        yield Trial(swarm)


def failures(moves: Iterable[ChainMove]) -> list[ChainMove]:
    """What was moved because it failed, and not because a better chain was found."""
    return [move for move in moves if move.reason != "better"]


@pytest.fixture
def client(trial: Trial) -> Iterator[Client]:
    with trial.swarm.client() as client:
        yield client
    trial.restore()
    wait_until_free(trial.swarm)


def disturb(
    trial: Trial,
    client: Client,
    after: int,
    act: Callable[[Generation], None],
    **options: Any,
) -> tuple[GenerateDone, tuple[int, ...], list[Progress]]:
    """Runs a job, does something to it after so many tokens; gives result and expected tokens."""
    settings = {"prompt": PROMPT, "max_new_tokens": NEW_TOKENS, **options}
    expected = trial.expected(client, **settings)
    news: list[Progress] = []
    generation = client.generate(**settings, on_progress=news.append)
    for event in generation.events():
        if len(generation.tokens) >= after:
            break
        del event
    act(generation)
    return generation.result(), expected, news


def stop(*thirds: int, by: signal.Signals, trial: Trial) -> Callable[[Generation], None]:
    def act(generation: Generation) -> None:
        trial.struck = [trial.part(generation, third) for third in thirds]
        for third in thirds:
            os.kill(trial.hop(generation, third).pid, by)

    return act


def moves_of(part: ChainHop, result: GenerateDone) -> list[ChainMove]:
    """The failures by which a hop's blocks came to others."""
    found = [m for m in failures(result.moves) if m.start <= part.start and part.end <= m.end]
    assert found, f"{part} did not move: {result.moves}"
    return found


@pytest.mark.parametrize(
    ("hops", "after"),
    [((0,), 3), ((1,), 90), ((2,), 200), ((0, 1), 60), ((0, 2), 120), ((0, 1, 2), 30)],
    ids=str,
)
def test_killed_hops_are_replaced(
    trial: Trial, client: Client, hops: tuple[int, ...], after: int
) -> None:
    act = stop(*hops, by=signal.SIGKILL, trial=trial)
    result, expected, news = disturb(trial, client, after, act)
    assert result.tokens == expected
    for part in trial.struck:
        moves_of(part, result)
    assert all(move.replayed_tokens >= after for move in failures(result.moves))
    (told, *_) = [event for event in news if event.event == "moved"]
    assert told.move is not None
    assert set(told.move.new) <= {hop.peer for hop in told.chain}


@pytest.mark.parametrize(("hop", "after"), [(0, 50), (1, 150), (2, 20)])
def test_a_stopped_hop_is_replaced(trial: Trial, client: Client, hop: int, after: int) -> None:
    act = stop(hop, by=signal.SIGSTOP, trial=trial)
    result, expected, _ = disturb(trial, client, after, act)
    assert result.tokens == expected
    (part,) = trial.struck
    move = moves_of(part, result)[0]
    assert move.reason == "no_answer"
    assert 0 < move.silent_s < 5


def test_a_stopped_hop_in_a_prefill_is_replaced(trial: Trial, client: Client) -> None:
    settings = {"prompt": LONG_PROMPT, "max_new_tokens": 8}
    expected = trial.expected(client, **settings)
    generation = client.generate(**settings)
    for event in generation.events():
        if isinstance(event, Progress) and event.event == "prefill":
            os.kill(trial.hop(generation, 1).pid, signal.SIGSTOP)
            break
    result = generation.result()
    assert result.tokens == expected
    assert 10 in [move.start for move in failures(result.moves)]


def test_a_replacement_that_dies_in_its_rebuild_is_replaced(trial: Trial, client: Client) -> None:
    killed: list[DaemonProcess] = []

    def act(generation: Generation) -> None:
        first = trial.hop(generation, 1)
        spares = [s for s in trial.peers.values() if s.span == first.span and s is not first]
        os.kill(first.pid, signal.SIGKILL)
        killed.append(first)
        ends_at = time.monotonic() + 20
        while len(killed) < 2:
            assert time.monotonic() < ends_at, "no spare was asked"
            for spare in spares:
                if trial.sessions(spare):
                    os.kill(spare.pid, signal.SIGKILL)
                    killed.append(spare)
                    break

    result, expected, _ = disturb(trial, client, 10, act, prompt=LONG_PROMPT, max_new_tokens=40)
    assert result.tokens == expected
    dead = {peer for peer, server in trial.peers.items() if server in killed}
    assert not dead & {hop.peer for hop in result.chain}


def test_a_sampled_answer_is_the_same(trial: Trial, client: Client) -> None:
    act = stop(1, by=signal.SIGKILL, trial=trial)
    result, expected, _ = disturb(trial, client, 40, act, **SAMPLING)
    assert result.tokens == expected
    assert failures(result.moves)


def test_a_leaving_hop_hands_over_before_it_goes(trial: Trial, client: Client) -> None:
    leavers: list[DaemonProcess] = []

    def act(generation: Generation) -> None:
        leavers.append(trial.hop(generation, 1))
        os.kill(leavers[-1].pid, signal.SIGTERM)

    for _ in range(3):  # a busy machine may hold two of its own processes to be far apart
        result, expected, _ = disturb(trial, client, 100, act)
        assert result.tokens == expected
        assert leavers[-1].wait(10)
        move = next(move for move in result.moves if move.reason == "leaving")
        if move.handed_over_tokens >= 100:  # the cache came; it was not computed again
            return
        trial.restore()
    raise AssertionError("no cache was handed over")


def test_a_job_waits_for_blocks_that_nobody_has(trial: Trial, client: Client) -> None:
    spare: list[DaemonProcess] = []
    span = even_spans(3)[2]

    def act(generation: Generation) -> None:
        for server in trial.peers.values():
            if server.span == span:
                os.kill(server.pid, signal.SIGKILL)
                spare.append(server)
        time.sleep(1)
        trial.learn(trial.swarm.add_server(span))

    result, expected, news = disturb(trial, client, 30, act, max_new_tokens=60)
    assert len(spare) == 3
    assert result.tokens == expected
    waiting = [event.text for event in news if event.event == "waiting"]
    assert any("20:30" in text for text in waiting)


def test_a_lossy_codec_is_replayed_to_the_same_tokens(model_folder: Path) -> None:
    strikes = [(40, 0, signal.SIGKILL), (110, 1, signal.SIGSTOP), (180, 2, signal.SIGKILL)]
    with (
        PrivateSwarm(
            str(model_folder), spans=even_spans(3) * 2, threads=1, route={"codec": "int8"}
        ) as swarm,
        swarm.client() as client,
    ):
        trial = Trial(swarm)
        settings = {"prompt": PROMPT, "max_new_tokens": NEW_TOKENS}
        expected = trial.expected(client, **settings)
        generation = client.generate(**settings)
        left = list(strikes)
        for _ in generation.events():
            if left and len(generation.tokens) >= left[0][0]:
                _, hop, by = left.pop(0)
                os.kill(trial.hop(generation, hop).pid, by)
        result = generation.result()
        assert not left
        assert result.tokens == expected
        assert len(failures(result.moves)) >= len(strikes)

"""A session that a test leads by the hand: it says what happens, and looks at what comes of it."""

from __future__ import annotations

from typing import TypeVar

from petald import session_actions as do
from petald.routing import Hop
from petald.session import Session
from petald.session_settings import SessionSettings
from tests.helpers.session_rows import ListHistory, SimRows

STEP_TOKENS = 128

Kind = TypeVar("Kind")


def hop_at(peer: str, start: int, end: int) -> Hop:
    return Hop(peer=peer, addresses=(), start=start, end=end)


class SessionByHand:
    """A session of 8 blocks, and the time.

    Attributes:
        last: the actions that the newest event gave, and those that came of them.
        all: the actions so far.
    """

    def __init__(self, *, max_wait_s: float = 60.0, prefers_hand_over: bool = False) -> None:
        self.now = 100.0
        self.last: list[do.Action] = []
        self.all: list[do.Action] = []
        self.session = Session(
            SessionSettings(
                num_blocks=8,
                max_tokens=10_000,
                make_history=ListHistory,  # type: ignore[arg-type]
                max_wait_s=max_wait_s,
                prefers_hand_over=lambda old, new, tokens: prefers_hand_over,
            )
        )

    def feed(self, event: str, *arguments: object) -> list[do.Action]:
        """Lets something happen."""
        self.last = getattr(self.session, event)(*arguments, now=self.now)
        self.all += self.last
        return self.last

    def found(self, kind: type[Kind]) -> list[Kind]:
        """The actions of one kind among the last."""
        return [action for action in self.last if isinstance(action, kind)]

    def submit(self, position: int, tokens: int, wanted: str = "last") -> int:
        rows = SimRows(tuple(range(position, position + tokens)))
        ticket, self.last = self.session.submit(position, rows, wanted, self.now)
        self.all += self.last
        return ticket

    def choose(self, *chain: Hop, opens: bool = True) -> list[int]:
        """Answers the question that was asked last, and lets all hops open and link."""
        question = [each for each in self.all if isinstance(each, do.NeedChain)][-1]
        self.feed("on_chain", question.question, chain)
        return self.open_all() if opens else self.asked()

    def asked(self) -> list[int]:
        return [action.hop for action in self.found(do.OpenHop)]

    def open_all(self) -> list[int]:
        """Lets the hops that were just asked for open, and all link."""
        hops = self.asked()
        made: list[do.Action] = []
        for hop in hops:
            made += self.link_all(self.feed("on_opened", hop, STEP_TOKENS))
        self.last = made
        return hops

    def link_all(self, actions: list[do.Action]) -> list[do.Action]:
        """Answers all requests for links, until there are no more."""
        made, queue = [], list(actions)
        while queue:
            action = queue.pop(0)
            made.append(action)
            if isinstance(action, do.SendLinkNext | do.SendLinkPrevious):
                queue += self.feed("on_link_done", action.hop, action.request)
        self.last = made
        return made

    def open(self, *chain: Hop) -> list[int]:
        """Opens the session."""
        self.feed("start")
        hops = self.choose(*chain)
        assert self.session.is_running
        return hops

    def answer(self, hops: list[int], step: do.SendStep) -> list[do.Action]:
        """Lets all hops of a route do a step."""
        tokens = step.hidden.shape[0]
        made: list[do.Action] = []
        for hop in hops[:-1]:
            made += self.feed("on_output", hop, step.number, SimRows((1,) * tokens))
        rows = {"none": None, "last": SimRows((5,))}.get(step.wanted, SimRows((5,) * tokens))
        made += self.feed("on_result", hops[-1], step.number, rows, ())
        self.last = made
        return made

    def fill(self, hops: list[int], tokens: int, start: int = 0) -> None:
        """Has so many tokens done, and nothing under way."""
        for position in range(start, tokens, STEP_TOKENS):
            self.submit(position, min(STEP_TOKENS, tokens - position), "none")
            self.answer(hops, self.found(do.SendStep)[0])

    def pass_time(self, seconds: float, *, answering: bool = True) -> list[do.Action]:
        """Lets time pass, with all timers on time; probes are answered, if they are to be."""
        until = self.now + seconds
        made: list[do.Action] = []
        while (due := self.session.next_deadline()) <= until:
            self.now = max(self.now, due)
            made += self.feed("on_timer")
            for probe in self.found(do.SendProbe):
                if answering:
                    made += self.feed("on_probe_reply", probe.hop, probe.request, 10**6)
        self.now = until
        self.last = made
        return made

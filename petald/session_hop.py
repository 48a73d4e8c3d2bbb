"""What a session knows of one of its hops: how it is linked, and how long it may be silent.

Pure: times are arguments. The time from a step's arrival at a hop (as the copy of the output before
it shows) to its own output is a *lap*. Laps are averaged as TCP averages round trips (RFC 6298:
mean and mean deviation). What is made of a hop that is silent for several laps is told in
`petald.session_watch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from petald.routing import Hop

DECODE_TOKENS = 4
"""Steps of so few tokens take as long as one of one; longer ones are counted by the token."""

FIRST_ALLOWANCE_S = 2.0
FIRST_ALLOWANCE_PER_TOKEN_S = 0.05
"""Before anything was measured: a slow machine, and 16 KB for each token at 320 KB/s."""

LEAST_ALLOWANCE_S = 0.15
"""Below this, the pauses of a busy operating system would be taken for silence."""


class HopState(Enum):
    """How far the session at a hop has come."""

    OPENING = "opening"
    OPEN = "open"
    GONE = "gone"


class Laps:
    """How long one hop takes for a step, learnt from those that it did."""

    def __init__(self) -> None:
        self._decode: tuple[float, float] | None = None
        self._per_token: tuple[float, float] | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """Takes a measurement."""
        if tokens <= DECODE_TOKENS:
            self._decode = _average(self._decode, seconds)
        else:
            self._per_token = _average(self._per_token, seconds / tokens)

    def allowance_s(self, tokens: int) -> float:
        """How long the hop may take for a step before it is asked whether it lives."""
        is_decode = tokens <= DECODE_TOKENS
        learnt = self._decode if is_decode else self._per_token
        if learnt is None:
            return FIRST_ALLOWANCE_S + FIRST_ALLOWANCE_PER_TOKEN_S * tokens
        mean_s, deviation_s = learnt
        seconds = (2 * mean_s + 4 * deviation_s) * (1 if is_decode else tokens)
        return max(LEAST_ALLOWANCE_S, seconds)


def _average(before: tuple[float, float] | None, value: float) -> tuple[float, float]:
    if before is None:
        return value, value / 2
    mean, deviation = before
    return 0.875 * mean + 0.125 * value, 0.75 * deviation + 0.25 * abs(value - mean)


class RequestKind(Enum):
    """What a hop was asked for."""

    LINK_NEXT = "link_next"
    LINK_PREVIOUS = "link_previous"
    HAND_OVER = "hand_over"


@dataclass(slots=True)
class Request:
    """Something that a hop was asked for and has not answered.

    Attributes:
        kind: of it.
        target: the other hop's number; for a previous link that of the hop before.
        asked_at: when.
    """

    kind: RequestKind
    target: int
    asked_at: float


@dataclass(slots=True)
class ProbeState:
    """A hop that was asked whether it lives.

    Attributes:
        request: the probe that is not answered; none where the last one was.
        due_at: when the answer is overdue, or when the hop is to be asked again.
        since: when the silence began.
        allowance_s: between two probes.
        number: of the step that it is silent about; 0 where it is none.
        misses: answers that said that the step had not arrived.
    """

    request: int | None
    due_at: float
    since: float
    allowance_s: float
    number: int
    misses: int = 0


@dataclass(eq=False, slots=True)
class HopRecord:
    """One hop, from being asked until it is given up.

    Attributes:
        id: its number in the session.
        at: the server and its blocks.
        due_at: when it must have opened.
        previous: the peer whose pushes it takes, as far as it confirmed.
        next: the hop that it pushes to, likewise.
        max_step_tokens: the longest step that it takes.
        last_output_at: when its last output came.
        owed: outputs that are still to come of steps that nobody waits for any more.
        link_failures: for each next hop, how often the link to it failed, since one last worked;
            one peer's hops share it.
        blames: how often it held the hop before to be the cause of a failure.
    """

    id: int
    at: Hop
    due_at: float
    previous: str | None
    state: HopState = HopState.OPENING
    next: int | None = None
    max_step_tokens: int = 0
    last_output_at: float = 0.0
    owed: int = 0
    is_leaving: bool = False
    laps: Laps = field(default_factory=Laps)
    requests: dict[int, Request] = field(default_factory=dict)
    probe: ProbeState | None = None
    link_failures: dict[int, int] = field(default_factory=dict)
    blames: int = 0

    @property
    def peer(self) -> str:
        """Its peer id."""
        return self.at.peer

    def has_asked(self, kind: RequestKind, target: int) -> bool:
        """Whether such a request is open."""
        return any(
            request.kind is kind and request.target == target for request in self.requests.values()
        )

"""Servers on their way into a chain: the making of new hops for some blocks of a session.

Pure records; `petald.session` drives them. An *urgent* build closes a gap: the session stands still
until it is done. Another is made beside the hops that still run these blocks, and takes over once
it has caught up with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from petald.session_actions import History
from petald.session_hop import HopRecord, HopState


class Stage(Enum):
    """How far a build has come."""

    CHOOSING = "choosing"
    WAITING = "waiting"
    RESTING = "resting"
    BUILDING = "building"


@dataclass(eq=False, slots=True)
class Build:
    """New hops for the blocks ``[start, end)``.

    Attributes:
        code: why they are needed.
        old_peers: who ran the blocks before.
        noticed_at: when the need arose.
        silent_s: how long a hop that was given up for its silence had been silent.
        stage: `Stage.RESTING` until a step is submitted, where the blocks were lost in idleness.
        question: the one that is open, while `stage` is `Stage.CHOOSING`; 0 until it is asked.
        retry_at: when to choose again, while it is `Stage.WAITING`.
        attempts: choices that came to nothing.
        histories: of the borders within, by block.
        sent: tokens sent to be replayed, or handed over.
        done: tokens that the new hops have cached.
        in_flight: replayed steps that are not done.
        source: the number of the hop that may hand its cache over.
        may_hand_over: no hand-over for this build has failed yet.
        hand_over: the request for it, while it is open.
        retired: hops that are closed when this build takes their place.
    """

    start: int
    end: int
    code: str
    old_peers: tuple[str, ...]
    noticed_at: float
    is_urgent: bool
    silent_s: float = 0.0
    stage: Stage = Stage.CHOOSING
    question: int = 0
    retry_at: float = 0.0
    waiting_since: float | None = None
    attempts: int = 0
    hops: list[HopRecord] = field(default_factory=list)
    histories: dict[int, History] = field(default_factory=dict)
    sent: int = 0
    done: int = 0
    in_flight: int = 0
    source: int | None = None
    may_hand_over: bool = True
    hand_over: int | None = None
    replayed_tokens: int = 0
    handed_over_tokens: int = 0
    retired: list[HopRecord] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether all its hops have opened."""
        return self.stage is Stage.BUILDING and all(hop.state is HopState.OPEN for hop in self.hops)

    def has_cached(self, tokens: int) -> bool:
        """Whether its hops are open and hold so many tokens."""
        return (
            self.is_open
            and not self.in_flight
            and self.hand_over is None
            and self.done >= tokens
            and all(history.rows >= tokens for history in self.histories.values())
        )

    def rewind(self, tokens: int) -> None:
        """Tokens from a position on do not count any more."""
        self.sent = min(self.sent, tokens)
        self.done = min(self.done, tokens)
        for history in self.histories.values():
            history.truncate(min(history.rows, tokens))

    def reset(self) -> None:
        """Gives up the hops; the blocks remain to be done."""
        for history in self.histories.values():
            history.close()
        self.hops, self.histories = [], {}
        self.sent = self.done = self.in_flight = 0
        self.hand_over = self.source = None

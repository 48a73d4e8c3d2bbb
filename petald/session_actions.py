"""What a session's state machine wants done, and what it tells. Plain values, without behaviour.

A hop is named by a number of the session's own, new for each time that a server is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from p2p.wire.session_messages import HopTime
from p2p.wire.tensor import WireTensor
from petald.errors import PetaldError
from petald.routing import Hop


class History(Protocol):
    """The rows that crossed one border between blocks, in order, exactly as they were decoded."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def append(self, hidden: WireTensor) -> None:
        """Adds rows at the end."""

    def truncate(self, rows: int) -> None:
        """Forgets all rows from a position on."""

    def read(self, start: int, end: int) -> WireTensor:
        """WireTensor from ``start`` on: at least one, and none from ``end`` on."""

    def close(self) -> None:
        """Gives back what it holds."""


@dataclass(frozen=True, slots=True)
class OpenHop:
    """Ask a server to be a hop; answered with `Session.on_opened` or `Session.on_hop_failed`.

    Attributes:
        hop: its number from now on.
        at: the server, and the blocks to run there.
        previous: the peer whose pushes it is to take.
        cache_from: the peer that may hand its cache over.
    """

    hop: int
    at: Hop
    previous: str | None
    cache_from: str | None = None


@dataclass(frozen=True, slots=True)
class CloseHop:
    """End the session at a hop; nothing that comes from it matters any more."""

    hop: int


@dataclass(frozen=True, slots=True)
class SendStep:
    """Send rows to a hop."""

    hop: int
    number: int
    position: int
    hidden: WireTensor
    wanted: str
    until: int | None = None


@dataclass(frozen=True, slots=True)
class SendLinkNext:
    """Tell a hop where its output goes."""

    hop: int
    request: int
    target: int


@dataclass(frozen=True, slots=True)
class SendLinkPrevious:
    """Tell a hop whose pushes to take."""

    hop: int
    request: int
    peer: str | None


@dataclass(frozen=True, slots=True)
class SendHandOver:
    """Tell a hop to copy its cache to another."""

    hop: int
    request: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class SendProbe:
    """Ask a hop whether it lives, and how far it got."""

    hop: int
    request: int


@dataclass(frozen=True, slots=True)
class NeedChain:
    """Choose servers for blocks; answered with `Session.on_chain` or `Session.on_no_chain`.

    Attributes:
        question: its number; an answer to an older one is passed over.
        start: first block.
        end: the block after the last one.
        before: the peer whose output goes there; none where it is the client.
        after: the peer that the output goes to; likewise.
        excluded: peers that are not to be chosen.
        tokens: room that each must have.
        is_retry: the view that there is was of no use.
    """

    question: int
    start: int
    end: int
    before: str | None
    after: str | None
    excluded: frozenset[str]
    tokens: int
    is_retry: bool


@dataclass(frozen=True, slots=True)
class Penalise:
    """A peer did not do its part."""

    peer: str
    code: str


@dataclass(frozen=True, slots=True)
class StepResultRows:
    """What a step gave.

    Attributes:
        hidden: the wanted rows; none where none were wanted.
        times: of the hops, in order.
    """

    hidden: WireTensor | None
    times: tuple[HopTime, ...]


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step that was submitted has been done."""

    ticket: int
    result: StepResultRows


@dataclass(frozen=True, slots=True)
class StepLost:
    """A step will not be done: one before it was cancelled, or the session has ended."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is lost; nothing follows but `CloseHop` and `StepLost`."""

    error: PetaldError


@dataclass(frozen=True, slots=True)
class Moved:
    """Blocks are run elsewhere now, and steps flow again.

    Attributes:
        start: first block.
        end: the block after the last one.
        old: peers that ran them; empty where a session begins.
        new: peers that run them now.
        code: why: a failure's code, or ``leaving`` or ``better``.
        silent_s: how long the hop had been silent when it was given up; 0 where that was told.
        pause_s: from then on until steps flowed again.
        replayed_tokens: that were replayed; those handed over are not among them.
        handed_over_tokens: that came from the old hop's cache.
    """

    start: int
    end: int
    old: tuple[str, ...]
    new: tuple[str, ...]
    code: str
    silent_s: float
    pause_s: float
    replayed_tokens: int
    handed_over_tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nobody can run these blocks now.

    Attributes:
        text: says so.
        waited_s: for how long it has been so.
        limit_s: after which the session is given up.
    """

    text: str
    waited_s: float
    limit_s: float


Action = (
    OpenHop
    | CloseHop
    | SendStep
    | SendLinkNext
    | SendLinkPrevious
    | SendHandOver
    | SendProbe
    | NeedChain
    | Penalise
    | StepDone
    | StepLost
    | Ended
    | Moved
    | Waiting
)

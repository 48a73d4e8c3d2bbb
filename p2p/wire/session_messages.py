"""The conversation of a session: ``/petald/session/1`` and ``/petald/push/1``.

A client opens a session stream to every hop and sends `OpenSession`; the hop answers
`SessionOpened` or a `Refusal`. `LinkNext` then tells each hop but the last where its output goes.
A `Step` enters at the first hop, on the session stream, and is pushed from server to server, over
one push stream for each session and link that begins with `AttachPush`. The last hop answers the
client with a `StepResult` on its own session stream. A hop that cannot do a step says so to the
client, with a `StepFailed`, and to nobody else.

Every stream of a session is ordered, and so are the steps on it. A step carries the absolute
position of its first token: less than what the hop has cached means that the cache is cut back to
that position first, which is how a client takes tokens back or repeats a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from p2p.wire.message import (
    Addresses,
    BlockNumber,
    Bound,
    Count,
    Digest,
    Message,
    Name,
    PeerName,
    Text,
    Tokens,
    message,
)
from p2p.wire.tensor import WireTensor

SESSION_PROTOCOL = "/petald/session/1"
PUSH_PROTOCOL = "/petald/push/1"

SessionId = Annotated[bytes, Bound(16, 16)]
"""Chosen by the client at random, another for each hop. Who knows a hop's, and is its announced
previous hop, may push to it."""

Microseconds = Annotated[int, Bound(0, 2**40)]
MAX_HOPS = 128


class Wanted(StrEnum):
    """Which rows of the last hop's output the client wants back."""

    ALL = "all"
    LAST = "last"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class HopTime:
    """What one hop spent on one step.

    Attributes:
        queue_us: from the step's arrival to the start of its kernels.
        compute_us: in the kernels.
    """

    queue_us: Microseconds
    compute_us: Microseconds


@message("open_session")
@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSession(Message):
    """Asks a server to be one hop of a session.

    Attributes:
        session: the id of the session at this hop.
        model: the fingerprint; a server of other weights refuses.
        start: first block to run, absolute.
        end: the block after the last one.
        max_tokens: the most tokens that this session will ever have cached.
        previous: the peer whose pushes are to be taken; none for the first hop.
    """

    session: SessionId
    model: Digest
    start: BlockNumber
    end: BlockNumber
    max_tokens: Tokens
    previous: PeerName | None = None


@message("session_opened")
@dataclass(frozen=True, kw_only=True, slots=True)
class SessionOpened(Message):
    """The hop has room, and keeps it until the session's stream ends.

    Attributes:
        max_step_tokens: the longest step that it takes; longer prefills come in pieces.
    """

    max_step_tokens: Tokens


@message("link_next")
@dataclass(frozen=True, kw_only=True, slots=True)
class LinkNext(Message):
    """Tells a hop where its output goes; answered with ``ok`` or a `Refusal`.

    Attributes:
        peer: the next hop.
        session: the id under which the next hop knows this session.
        addresses: where the next hop was last known to listen.
    """

    peer: PeerName
    session: SessionId
    addresses: Addresses = ()


@message("attach_push")
@dataclass(frozen=True, kw_only=True, slots=True)
class AttachPush(Message):
    """Opens a push stream: the steps that follow belong to this session."""

    session: SessionId


@message("step")
@dataclass(frozen=True, kw_only=True, slots=True)
class Step(Message):
    """Some consecutive tokens on their way through the chain.

    Attributes:
        number: counts the session's steps from 1; a repeated step has its first number.
        position: of the first token, absolute in the session.
        wanted: a `Wanted`.
        times: of the hops already passed, in order.
        hidden: hidden states ``[tokens, hidden]``.
    """

    number: Count
    position: Tokens
    hidden: WireTensor
    wanted: Annotated[str, Bound(1, 8)] = Wanted.LAST
    times: Annotated[tuple[HopTime, ...], Bound(0, MAX_HOPS)] = ()


@message("step_result")
@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult(Message):
    """What came out of the last hop.

    Attributes:
        number: the step's.
        hidden: the wanted rows, ``[rows, hidden]``; none where none were wanted.
        times: of all hops, in order.
    """

    number: Count
    hidden: WireTensor | None = None
    times: Annotated[tuple[HopTime, ...], Bound(0, MAX_HOPS)] = ()


@message("step_failed")
@dataclass(frozen=True, kw_only=True, slots=True)
class StepFailed(Message):
    """A hop could not do a step; the session at this hop stays as it was before it.

    Attributes:
        number: the step's; 0 where it is not about one step.
        code: what went wrong.
        text: a sentence, for a person.
        culprit: the peer that the hop holds to be the cause; none where it is itself.
    """

    number: Count
    code: Name
    text: Text = ""
    culprit: PeerName | None = None

"""The conversation of a session: ``/petald/session/1`` and ``/petald/push/1``.

A client opens a session stream to every hop and sends `OpenSession`; the hop answers
`SessionOpened` or a `Refusal`. `LinkNext` then tells each hop but the last where its output goes,
and `LinkPrevious` whose output it may take, at any time again: so a hop is replaced between its
neighbours. A `Step` enters at some hop (the first, mostly), on the session stream, and is pushed
from server to server, over one push stream for each session and link that begins with `AttachPush`,
until the hop where it ends. That one answers the client with a `StepResult` on its own session
stream; all hops before it send the client a copy of what they push, `StepOutput`, which is what the
next one can be rebuilt from. A hop that cannot do a step says so to the client, with a
`StepFailed`, and to nobody else.

Every stream of a session is ordered, and so are the steps on it. A step carries the absolute
position of its first token: less than what the hop has cached means that the cache is cut back to
that position first, which is how a client takes tokens back or repeats a step.

A hop that wants to leave says `Leaving`. If its replacement holds the same blocks, the client may
tell it to hand its cache over: `HandOver`, which opens a push stream that begins with
`AttachCache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from p2p.wire.frame import MAX_FRAME_BYTES
from p2p.wire.message import (
    Addresses,
    BlockNumber,
    Bound,
    Count,
    Digest,
    Message,
    Name,
    PeerName,
    Seconds,
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

SLACK_BYTES = 64 * 1024
"""For all of a message but its tensors: the times of `MAX_HOPS` hops, addresses, a sentence."""

MAX_CACHE_ROWS_BYTES = 2 * (1 << 20) + SLACK_BYTES
"""The largest `CacheRows`: keys and values of at most 1 MiB each."""


def max_step_bytes(max_step_tokens: int, hidden_size: int) -> int:
    """The largest message of a session's client, or of the hop before: float32 is the most."""
    return min(max_step_tokens * 4 * hidden_size + SLACK_BYTES, MAX_FRAME_BYTES)


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
        codec: in which the hop is to write its outputs; ``auto``: it chooses for each, by what the
            links carry. It reads any that it knows.
        cache_from: the peer that may hand its cache over to this hop.
        adapter: the digest of an adapter's part for these blocks, which was lent to the server
            (`p2p.wire.pass_messages.LendAdapter`); a server that does not have it any more refuses
            with ``unknown_adapter``.
        hosted: the name of an adapter that the server hosts itself.
    """

    session: SessionId
    model: Digest
    start: BlockNumber
    end: BlockNumber
    max_tokens: Tokens
    previous: PeerName | None = None
    codec: Name = "raw"
    cache_from: PeerName | None = None
    adapter: Digest | None = None
    hosted: Name | None = None


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
    """Tells a hop where its output goes; answered with `LinkDone` or `LinkFailed`.

    A push that hangs on the link before is given up at once.

    Attributes:
        request: chosen by the client; the answer has it.
        peer: the next hop.
        session: the id under which the next hop knows this session.
        addresses: where the next hop was last known to listen.
    """

    request: Count
    peer: PeerName
    session: SessionId
    addresses: Addresses = ()


@message("link_previous")
@dataclass(frozen=True, kw_only=True, slots=True)
class LinkPrevious(Message):
    """Tells a hop whose pushes to take from now on; answered with `LinkDone`.

    Attributes:
        request: chosen by the client; the answer has it.
        peer: the hop before; none where there is none any more.
    """

    request: Count
    peer: PeerName | None = None


@message("hand_over")
@dataclass(frozen=True, kw_only=True, slots=True)
class HandOver(Message):
    """Tells a hop to copy what it has cached to its replacement; answered as a link is.

    Attributes:
        request: chosen by the client; the answer has it.
        peer: the replacement, which has opened the session for the same blocks.
        session: the id under which the replacement knows this session.
        tokens: how many to hand over, from the first on; the hop has cached at least as many.
        addresses: where the replacement was last known to listen.
    """

    request: Count
    peer: PeerName
    session: SessionId
    tokens: Tokens
    addresses: Addresses = ()


@message("link_done")
@dataclass(frozen=True, kw_only=True, slots=True)
class LinkDone(Message):
    """A link was made, or a cache was handed over."""

    request: Count


@message("link_failed")
@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFailed(Message):
    """A link could not be made, or a cache not be handed over.

    Attributes:
        request: which.
        code: what went wrong.
        text: a sentence, for a person.
    """

    request: Count
    code: Name
    text: Text = ""


@message("probe")
@dataclass(frozen=True, kw_only=True, slots=True)
class Probe(Message):
    """Is this hop alive, and did the step reach it? Answered at once, whatever it computes."""

    request: Count


@message("probe_reply")
@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReply(Message):
    """The hop is alive.

    Attributes:
        request: which probe is answered.
        received: the number of the newest step that reached this hop; 0 where none did.
    """

    request: Count
    received: Count


@message("leaving")
@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving(Message):
    """The hop is going to leave: the client had better move what it runs here.

    Attributes:
        within_s: how long it will wait.
    """

    within_s: Seconds


@message("attach_push")
@dataclass(frozen=True, kw_only=True, slots=True)
class AttachPush(Message):
    """Opens a push stream: the steps that follow belong to this session."""

    session: SessionId


@message("attach_cache")
@dataclass(frozen=True, kw_only=True, slots=True)
class AttachCache(Message):
    """Opens a push stream on which a cache is handed over: `CacheRows` follow.

    It is answered with ``ok`` or a `Refusal`, and so is the end of the rows.

    Attributes:
        session: the receiving hop's id.
        tokens: how many will come.
    """

    session: SessionId
    tokens: Tokens


@message("cache_rows")
@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRows(Message):
    """Keys and values of consecutive tokens in one block.

    Attributes:
        block: absolute.
        position: of the first token.
        keys: ``[kv_heads, tokens, head_size]``, uncompressed.
        values: likewise.
    """

    block: BlockNumber
    position: Tokens
    keys: WireTensor
    values: WireTensor


@message("step")
@dataclass(frozen=True, kw_only=True, slots=True)
class Step(Message):
    """Some consecutive tokens on their way through the chain.

    Attributes:
        number: counts the session's steps from 1; a repeated step has its first number.
        position: of the first token, absolute in the session.
        wanted: a `Wanted`.
        until: the step ends at the hop whose last block comes before this one; none: at the last.
        times: of the hops already passed, in order.
        hidden: hidden states ``[tokens, hidden]``.
    """

    number: Count
    position: Tokens
    hidden: WireTensor
    wanted: Annotated[str, Bound(1, 8)] = Wanted.LAST
    until: BlockNumber | None = None
    times: Annotated[tuple[HopTime, ...], Bound(0, MAX_HOPS)] = ()


@message("step_output")
@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput(Message):
    """A copy of what a hop pushed to the next one: the next one's input, exactly as it is decoded.

    Attributes:
        number: the step's.
        hidden: ``[tokens, hidden]``.
    """

    number: Count
    hidden: WireTensor


@message("step_result")
@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult(Message):
    """What came out of the hop where a step ends.

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

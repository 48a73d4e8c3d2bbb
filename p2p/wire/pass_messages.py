"""The conversation of forward and backward passes: ``/petald/pass/1``.

A client opens one stream to a server, with `OpenPass`; the server answers `PassOpened` or a
`Refusal`. Then requests come, each with a number of its own: `LendAdapter`, `RunForward`,
`RunBackward`. They are done, and answered, in order, with a result or `PassFailed`; the client may
send some ahead. A pass is one piece of a batch: whole sequences, each from its first token on, with
no cache. A server keeps nothing of it: backward brings the input again. What was lent is kept for
a while, for whoever names it by its digest, on any stream and in sessions too.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.frame import MAX_FRAME_BYTES
from p2p.wire.message import (
    BlockNumber,
    Count,
    Digest,
    Message,
    Name,
    Text,
    Tokens,
    message,
)
from p2p.wire.session_messages import SLACK_BYTES, HopTime
from p2p.wire.tensor import WireTensor

PASS_PROTOCOL = "/petald/pass/1"

CODE_UNKNOWN_ADAPTER = "unknown_adapter"
"""The server does not have the adapter (any more): lend it."""

CODE_MISSING_ADAPTER = "missing_adapter"
"""The server does not host an adapter of that name."""

CODE_NOT_FINITE = "not_finite"
"""What was computed is not all finite numbers; another server may do better."""

CODE_SEQUENCE_TOO_LONG = "sequence_too_long"
"""One sequence is more than the server can take."""


def max_pass_message_bytes(max_tokens: int, hidden_size: int, max_adapter_bytes: int) -> int:
    """The largest request: hidden states and their gradient, or an adapter."""
    batch = max_tokens * (2 * 8 * hidden_size + 1)
    return min(max(batch, max_adapter_bytes) + SLACK_BYTES, MAX_FRAME_BYTES)


def max_pass_tokens(hidden_size: int) -> int:
    """The most tokens of float64 hidden states, and their gradient, that one frame can hold."""
    return (MAX_FRAME_BYTES - SLACK_BYTES) // (2 * 8 * hidden_size + 1)


@message("open_pass")
@dataclass(frozen=True, kw_only=True, slots=True)
class OpenPass(Message):
    """Asks a server to run passes through some of its blocks.

    Attributes:
        model: the fingerprint; a server of other weights refuses.
        start: first block, absolute.
        end: the block after the last one.
        codec: in which forward's outputs are to be written; ``auto``: the sender chooses.
        gradient_codec: in which backward's gradients of hidden states are, likewise; those of an
            adapter's numbers are never compressed.
        hosted: the name of an adapter of the server's own that is part of the blocks.
    """

    model: Digest
    start: BlockNumber
    end: BlockNumber
    codec: Name = "raw"
    gradient_codec: Name = "raw"
    hosted: Name | None = None


@message("pass_opened")
@dataclass(frozen=True, kw_only=True, slots=True)
class PassOpened(Message):
    """The server takes passes until the stream ends.

    Attributes:
        max_tokens: the most tokens of one pass, padding included.
        max_adapter_bytes: the largest adapter's part that it takes.
    """

    max_tokens: Tokens
    max_adapter_bytes: Count


@message("lend_adapter")
@dataclass(frozen=True, kw_only=True, slots=True)
class LendAdapter(Message):
    """Gives an adapter's part for the stream's blocks; answered with `AdapterLent`.

    Attributes:
        number: of the request.
        adapter: its digest (`kernels.adapter_form.adapter_digest`); the server checks it.
        form: what it consists of.
        values: ``[blocks, numbers of a block]``, uncompressed.
    """

    number: Count
    adapter: Digest
    form: AdapterShape
    values: WireTensor


@message("adapter_lent")
@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLent(Message):
    """The server has the adapter now."""

    number: Count


@message("run_forward")
@dataclass(frozen=True, kw_only=True, slots=True)
class RunForward(Message):
    """One piece of a batch to be run through the blocks; answered with `ForwardResult`.

    Attributes:
        number: of the request.
        sequences: how many.
        tokens: of each, padding included.
        hidden: ``[sequences * tokens, hidden]``, one sequence after the other.
        mask: uint8 ``[sequences, tokens]``, 1 for real tokens, 0 for padding; none: all are real.
        adapter: the digest of a lent adapter.
    """

    number: Count
    sequences: Tokens
    tokens: Tokens
    hidden: WireTensor
    mask: WireTensor | None = None
    adapter: Digest | None = None


@message("forward_result")
@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardResult(Message):
    """What came out of the blocks.

    Attributes:
        number: the request's.
        hidden: ``[sequences * tokens, hidden]``.
        time: what it took.
    """

    number: Count
    hidden: WireTensor
    time: HopTime


@message("run_backward")
@dataclass(frozen=True, kw_only=True, slots=True)
class RunBackward(Message):
    """A gradient to be taken back through the blocks; answered with `BackwardResult`.

    Attributes:
        number: of the request.
        sequences: how many.
        tokens: of each, padding included.
        hidden: the input as it went forward, ``[sequences * tokens, hidden]``.
        gradient: of the output, of the same shape.
        mask: as in `RunForward`.
        adapter: the digest of a lent adapter, whose gradient is wanted as well.
    """

    number: Count
    sequences: Tokens
    tokens: Tokens
    hidden: WireTensor
    gradient: WireTensor
    mask: WireTensor | None = None
    adapter: Digest | None = None


@message("backward_result")
@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardResult(Message):
    """The gradients.

    Attributes:
        number: the request's.
        gradient: of the input, ``[sequences * tokens, hidden]``.
        adapter_gradient: of the lent adapter's numbers, ``[blocks, numbers of a block]``.
        time: what it took.
    """

    number: Count
    gradient: WireTensor
    time: HopTime
    adapter_gradient: WireTensor | None = None


@message("pass_failed")
@dataclass(frozen=True, kw_only=True, slots=True)
class PassFailed(Message):
    """A request that the server did not do; those after it go on.

    Attributes:
        number: the request's.
        code: what went wrong.
        text: a sentence, for a person.
    """

    number: Count
    code: Name
    text: Text = ""

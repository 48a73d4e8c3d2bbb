"""Lending an adapter's part to a server that is to run a session with it.

The client's side of ``/petald/pass/1``, for this one request.
"""

from __future__ import annotations

from p2p.errors import RemoteProtocolError
from p2p.network import Network
from p2p.rpc import MessageStream
from p2p.wire.message import expect
from p2p.wire.pass_messages import (
    PASS_PROTOCOL,
    AdapterLent,
    LendAdapter,
    OpenPass,
    PassFailed,
    PassOpened,
)
from p2p.wire.replies import Refusal
from petald.lent_adapter import AdapterPart
from petald.routing import Hop

LEAST_RATE_BYTES_PER_S = 160_000
"""Half of what a session's steps are allowed: an adapter goes up beside them."""


def lending_allowance_s(part: AdapterPart) -> float:
    """How long it may take to send a part."""
    return len(part.values.data) / LEAST_RATE_BYTES_PER_S


async def lend_adapter(
    network: Network, hop: Hop, *, model: bytes, part: AdapterPart
) -> Refusal | None:
    """Lends a part for a hop's blocks to its server; gives why it was not taken, or none.

    Args:
        network: the way to the server.
        hop: the server, and the blocks that the part is for.
        model: the fingerprint.
        part: of the adapter.

    Raises:
        PeerUnreachable, StreamBroken: it did not get through.
        RemoteProtocolError: an answer is none that was asked for.
    """
    stream = await network.open_stream(hop.peer, PASS_PROTOCOL, hints=hop.addresses)
    async with MessageStream(stream) as messages:
        await messages.send(OpenPass(model=model, start=hop.start, end=hop.end))
        reply = await messages.receive()
        if isinstance(reply, Refusal):
            return reply
        if reply is None:
            raise RemoteProtocolError("the stream ended before the answer")
        opened = expect(reply, PassOpened)
        size = len(part.values.data)
        if size > opened.max_adapter_bytes:
            return Refusal(
                code="adapter_too_large",
                text=f"the adapter's part for blocks {hop.start}:{hop.end} has {size} bytes; the "
                f"server takes {opened.max_adapter_bytes}",
            )
        await messages.send(
            LendAdapter(number=1, adapter=part.digest, form=part.form, values=part.values)
        )
        reply = await messages.receive()
    if isinstance(reply, PassFailed):
        return Refusal(code=reply.code, text=reply.text)
    if reply is None:
        raise RemoteProtocolError("the stream ended before the answer")
    expect(reply, AdapterLent)
    return None

"""A session's cache on its way from the hop that leaves to the one that takes its place.

Keys and values travel uncompressed, block by block, in pieces. Invariant: the receiving cache holds
either all the tokens that were announced, or none.

Shapes: K key and value heads, T tokens, H head size.
"""

from __future__ import annotations

import torch
import trio

from p2p.errors import DeadlineExceeded, Refused, RemoteProtocolError
from p2p.network import Network
from p2p.rpc import MessageStream
from p2p.wire.message import expect
from p2p.wire.replies import Ok, Refusal
from p2p.wire.session_messages import PUSH_PROTOCOL, AttachCache, CacheRows, HandOver
from p2p.wire.tensor import RAW, WireTensor
from petald.errors import BadRequest
from petald.hosted_cache import HostedCache
from petald.hosted_span import HostedSpan
from petald.tensors import WIRE_DTYPES

PIECE_BYTES = 1 << 20
"""Of keys or values in one message: a few of them fill a home link for a while."""

TRANSFER_DEADLINE_S = 60.0


async def send_cache(
    item: HandOver,
    cache: HostedCache,
    *,
    network: Network,
    hosted: HostedSpan,
    blocks: tuple[int, int],
) -> None:
    """Copies the first tokens of a cache to another hop, which confirmed it when this returns.

    Raises:
        BadRequest: there are not so many tokens.
        Refused, TransportError: the other hop did not take them.
    """
    if cache.length < item.tokens:
        raise BadRequest(f"{item.tokens} tokens were to be handed over; {cache.length} are cached")
    with trio.move_on_after(TRANSFER_DEADLINE_S):
        stream = await network.open_stream(item.peer, PUSH_PROTOCOL, hints=item.addresses)
        async with MessageStream(stream) as messages:
            await messages.send(AttachCache(session=item.session, tokens=item.tokens))
            await _expect_ok(messages)
            piece = max(1, PIECE_BYTES // cache.row_bytes)
            for block in range(*blocks):
                for position in range(0, item.tokens, piece):
                    count = min(piece, item.tokens - position)
                    keys_KTH, values_KTH = await hosted.read_cache(cache, block, position, count)
                    rows = CacheRows(
                        block=block,
                        position=position,
                        keys=_to_wire(keys_KTH),
                        values=_to_wire(values_KTH),
                    )
                    await messages.send(rows)
            await _expect_ok(messages)
        return
    raise DeadlineExceeded(f"{item.peer} did not take a cache within {TRANSFER_DEADLINE_S:g} s")


async def receive_cache(
    attach: AttachCache,
    messages: MessageStream,
    cache: HostedCache,
    *,
    hosted: HostedSpan,
    blocks: tuple[int, int],
) -> None:
    """Takes the tokens that another hop hands over.

    The caller counts and confirms them. Cancelled, or after an error, the cache is empty.

    Raises:
        RemoteProtocolError: something else came.
        CacheFull: more than was promised.
    """
    await hosted.extend_cache(cache, attach.tokens)
    is_whole = False
    try:
        await messages.send(Ok())
        for block in range(*blocks):
            await _receive_block(block, attach.tokens, messages, cache, hosted)
        is_whole = True
    finally:
        if not is_whole:
            await hosted.truncate_cache(cache, 0)


async def _receive_block(
    block: int, tokens: int, messages: MessageStream, cache: HostedCache, hosted: HostedSpan
) -> None:
    position = 0
    while position < tokens:
        received = await messages.receive()
        if received is None:
            raise RemoteProtocolError("the stream ended before the whole cache had come")
        rows = expect(received, CacheRows)
        if (rows.block, rows.position) != (block, position):
            raise RemoteProtocolError("a piece of a cache came out of order")
        keys_KTH, values_KTH = (
            _from_wire(tensor, cache, tokens - position) for tensor in (rows.keys, rows.values)
        )
        if keys_KTH.shape != values_KTH.shape:
            raise RemoteProtocolError("keys and values of different lengths came")
        await hosted.write_cache(cache, block, position, keys_KTH, values_KTH)
        position += keys_KTH.shape[1]


async def _expect_ok(messages: MessageStream) -> None:
    reply = await messages.receive()
    if reply is None:
        raise RemoteProtocolError("the stream ended before the answer")
    if isinstance(reply, Refusal):
        raise Refused(messages.remote_peer, reply.code, reply.text)
    expect(reply, Ok)


def _to_wire(cache_KTH: torch.Tensor) -> WireTensor:
    dtype = str(cache_KTH.dtype).removeprefix("torch.")
    data = cache_KTH.view(torch.uint8).numpy().data.cast("B")
    return WireTensor(dtype, tuple(cache_KTH.shape), data)


def _from_wire(tensor: WireTensor, cache: HostedCache, most_tokens: int) -> torch.Tensor:
    dtype = WIRE_DTYPES.get(tensor.dtype)
    heads, head_size = cache.shape
    shape = tensor.shape
    if dtype is not cache.dtype or tensor.codec != RAW:
        raise RemoteProtocolError(f"a cache of {tensor.dtype} came; {cache.dtype} was expected")
    if len(shape) != 3 or (shape[0], shape[2]) != (heads, head_size):
        raise RemoteProtocolError(f"a cache of the shape {list(shape)} came")
    if not 1 <= shape[1] <= most_tokens:
        raise RemoteProtocolError(f"{shape[1]} tokens of a cache came; {most_tokens} are missing")
    rows_KTH = torch.frombuffer(bytearray(tensor.data), dtype=dtype).view(shape)
    if not torch.isfinite(rows_KTH).all():
        raise RemoteProtocolError("a cache came with numbers that are not finite")
    return rows_KTH

"""The adapters at this server: those that clients lent, and those that it hosts by name.

A lent one is known by its digest, whoever lent it and whoever uses it: nobody can put something
else in its place. When there is no more room, those that were not used for longest go; whoever
still computes with one holds it. Invariant: what the store holds of lent adapters is never more
than its limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, adapter_digest, row_elements
from kernels.errors import BadAdapter
from kernels.span import Span
from p2p.errors import RemoteProtocolError
from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.tensor import RAW, WireTensor
from petald.tensors import all_finite, plain_tensor


class AdapterStore:
    """Adapters for one span.

    Args:
        span: whose blocks they are for.
        hosted: the server's own, by name.
        limit_bytes: for all lent adapters together.
        max_adapter_bytes: for each.
    """

    def __init__(
        self,
        span: Span,
        *,
        hosted: Mapping[str, SpanAdapter] | None = None,
        limit_bytes: int,
        max_adapter_bytes: int,
    ) -> None:
        self._span = span
        self._limit_bytes = limit_bytes
        self._lent: OrderedDict[bytes, SpanAdapter] = OrderedDict()
        self.hosted: Mapping[str, SpanAdapter] = hosted or {}
        self.max_adapter_bytes = min(max_adapter_bytes, limit_bytes)
        self.lent_bytes = 0
        self.lent_adapters = 0

    def clear(self) -> None:
        """Gives up all adapters; whoever computes with one still holds it."""
        self._lent.clear()
        self.hosted, self.lent_bytes, self.lent_adapters = {}, 0, 0

    def find_lent(self, digest: bytes, start: int, end: int) -> SpanAdapter | None:
        """A lent adapter for the blocks ``[start, end)``; none where it is not here any more."""
        adapter = self._lent.get(digest)
        if adapter is None or (adapter.start, adapter.end) != (start, end):
            return None
        self._lent.move_to_end(digest)
        return adapter

    async def take(
        self, digest: bytes, shape: AdapterShape, values: WireTensor, start: int, end: int
    ) -> None:
        """Takes an adapter that a client lends for the blocks ``[start, end)``.

        Raises:
            BadAdapter: it is too large, or does not fit the model.
            RemoteProtocolError: it is not what its digest says, or not finite.

        Cancellation: the store is as it was.
        """
        adapter = await trio.to_thread.run_sync(self._read, digest, shape, values, start, end)
        self._keep(digest, adapter)

    def _read(
        self, digest: bytes, shape: AdapterShape, values: WireTensor, start: int, end: int
    ) -> SpanAdapter:
        if len(values.data) > self.max_adapter_bytes:
            raise BadAdapter(
                f"the adapter's part for blocks {start}:{end} has {len(values.data)} bytes; this "
                f"server takes {self.max_adapter_bytes}. Use a lower rank or fewer target modules"
            )
        form = read_shape(shape)
        expected = (end - start, row_elements(self._span.config, form))
        if values.shape != expected or values.codec != RAW:
            raise BadAdapter(
                f"the adapter's numbers have the shape {list(values.shape)}; "
                f"{list(expected)} was expected"
            )
        data, dtype = values.data, values.dtype
        if adapter_digest(form, start=start, end=end, dtype=dtype, data=data) != digest:
            raise RemoteProtocolError("an adapter came that is not what its digest says")
        values_LE = plain_tensor(values)
        if not all_finite(values_LE):
            raise RemoteProtocolError("an adapter came with numbers that are not finite")
        # Always a copy: the message's memory is not kept.
        values_LE = values_LE.to(self._span.device, self._span.dtype, copy=True)
        return SpanAdapter(self._span.config, form, start, values_LE)

    def _keep(self, digest: bytes, adapter: SpanAdapter) -> None:
        size = adapter.values_LE.nbytes
        if size > self._limit_bytes:  # larger here than as it came
            raise BadAdapter(f"an adapter takes {size} bytes; {self._limit_bytes} are for all")
        old = self._lent.pop(digest, None)
        if old is not None:
            self.lent_bytes -= old.values_LE.nbytes
        while self._lent and self.lent_bytes + size > self._limit_bytes:
            _, dropped = self._lent.popitem(last=False)
            self.lent_bytes -= dropped.values_LE.nbytes
        self._lent[digest] = adapter
        self.lent_bytes += size
        self.lent_adapters += 1


def read_shape(shape: AdapterShape) -> AdapterForm:
    """The form that came on the wire."""
    return AdapterForm(
        targets=shape.targets,
        rank=shape.rank,
        scaling=shape.scaling,
        prefix_tokens=shape.prefix_tokens,
    )


def write_shape(form: AdapterForm) -> AdapterShape:
    """A form for the wire."""
    return AdapterShape(
        targets=form.targets,
        rank=form.rank,
        scaling=form.scaling,
        prefix_tokens=form.prefix_tokens,
    )


def adapter_rows(values_LE: torch.Tensor) -> WireTensor:
    """An adapter's numbers, or their gradient, for the wire."""
    dtype = str(values_LE.dtype).removeprefix("torch.")
    data = values_LE.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
    return WireTensor(dtype, tuple(values_LE.shape), data)

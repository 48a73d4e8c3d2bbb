"""Hidden states on their way out: each message in the codec that was asked for, or that is best.

Large messages are encoded in a thread, so that the event loop never waits for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from kernels.codecs.names import CODECS
from kernels.codecs.registry import find_codec
from p2p.network import Network
from p2p.wire.tensor import WireTensor
from petald.codec_choice import (
    AUTO,
    AUTO_CODECS,
    TYPICAL_COSTS,
    UNASKED_CODECS,
    Candidate,
    CodecCost,
    choose_codec,
)
from petald.tensors import off_loop, to_wire

KNOWN_CODECS = (AUTO, *CODECS)
"""What a session or a pass may ask for."""


def may_come_as(codec: str, asked: str) -> bool:
    """Whether a message in some codec is what was asked for."""
    return codec in UNASKED_CODECS if asked == AUTO else codec == asked


class MessageCodecs:
    """Encodes what goes to other peers.

    Args:
        network: tells how fast bytes reach them.
        costs: of each codec, by the kind of device on which the states are.
        preferred: the codec to take where the choice is left to the sender; `AUTO`: the best.

    Attributes:
        sent: how many messages were given each codec.
    """

    def __init__(
        self,
        network: Network,
        costs: Mapping[str, Mapping[str, CodecCost]] | None = None,
        *,
        preferred: str = AUTO,
    ) -> None:
        self._network = network
        self._costs = costs or {}
        self._preferred = preferred
        self.sent: Counter[str] = Counter()

    def choose(
        self, rows_SD: torch.Tensor, asked: str, *, to: Sequence[str], is_gradient: bool = False
    ) -> str:
        """The codec for a message.

        Args:
            rows_SD: what it holds.
            asked: a codec, or `AUTO`.
            to: the peers to which it is sent; the slowest link counts.
            is_gradient: they are no hidden states, and what is preferred for those says nothing.
        """
        preferred = AUTO if is_gradient else self._preferred
        codec = preferred if asked == AUTO else asked
        if codec == AUTO:
            codec = self._choose_best(rows_SD, to)
        self.sent[codec] += 1
        return codec

    async def encode(self, rows_SD: torch.Tensor, asked: str, *, to: Sequence[str]) -> WireTensor:
        """A message's hidden states; see `choose` for the arguments.

        Raises:
            KernelError: they hold numbers that the codec cannot write.

        Cancellation: waits for the thread's end, where there is one.
        """
        codec = self.choose(rows_SD, asked, to=to)
        return await off_loop(to_wire, rows_SD, codec, size_bytes=rows_SD.nbytes)

    def _choose_best(self, rows_SD: torch.Tensor, to: Sequence[str]) -> str:
        costs = self._costs.get(rows_SD.device.type, TYPICAL_COSTS)
        rows, width = rows_SD.shape
        candidates = [
            Candidate(
                name,
                rows * find_codec(name).row_bytes(width, rows_SD.dtype),
                costs[name].seconds(rows_SD.numel()),
            )
            for name in AUTO_CODECS
        ]
        rates = [self._network.bytes_per_s(peer) for peer in to]
        return choose_codec(candidates, min((r for r in rates if r is not None), default=None))

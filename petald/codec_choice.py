"""Which codec a message goes in, where it may be any that loses next to nothing. Pure.

A codec pays where the time that it saves on the way is more than what encoding and decoding take:
for a long message on a home connection always, for one row on a loopback never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2p.wire.tensor import RAW

AUTO = "auto"
"""The sender of each message chooses among `AUTO_CODECS`."""

AUTO_CODECS = (RAW, "int8")
"""What may be chosen without being asked for by name: ``benchmarks/codecs.py`` shows that int8
leaves a model's perplexity as it is to 0.1 %."""

UNASKED_CODECS = (RAW, "bfloat16", "int8", "dynamic8")
"""What may come where the choice was left to the sender: `AUTO_CODECS`, and those that a server's
configuration may prefer, which lose no more. Not float16, which cannot write what is over 65504."""

UNKNOWN_BYTES_PER_S = 12.5e6
"""Before anything was measured: 100 Mbit/s, which few homes send faster than."""

LEAST_GAIN = 0.1
LEAST_GAIN_S = 50e-6
"""What a codec must save of a message's time, as a share and in all, to be taken instead of raw: an
estimate is no better."""


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What encoding a message and decoding it take together, on one device.

    Attributes:
        fixed_s: whatever its size.
        value_s: for each value.
    """

    fixed_s: float
    value_s: float

    def seconds(self, values: int) -> float:
        """For a message of so many values."""
        return self.fixed_s + values * self.value_s


TYPICAL_COSTS: Mapping[str, CodecCost] = {
    RAW: CodecCost(5e-6, 0.0),
    "int8": CodecCost(100e-6, 1.5e-9),
}
"""On two cores of a server's processor; `petald.throughput.measure_codecs` measures them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A codec for a certain message.

    Attributes:
        name: of the codec.
        size_bytes: of the message, encoded.
        cost_s: of encoding and decoding it.
    """

    name: str
    size_bytes: int
    cost_s: float


def choose_codec(candidates: Sequence[Candidate], bytes_per_s: float | None) -> str:
    """The codec in which a message is there soonest.

    Args:
        candidates: the first is taken where none is clearly better.
        bytes_per_s: what the slowest link that the message takes carries; none where unknown.
    """
    rate = UNKNOWN_BYTES_PER_S if bytes_per_s is None else max(bytes_per_s, 1.0)
    times_s = [each.size_bytes / rate + each.cost_s for each in candidates]
    best = min(range(len(candidates)), key=times_s.__getitem__)
    gain_s = times_s[0] - times_s[best]
    if gain_s < max(LEAST_GAIN * times_s[0], LEAST_GAIN_S):
        best = 0
    return candidates[best].name

"""How long a device rests so that peers get no more than a share of its time.

Pure. Each second of computing owes ``1 / share - 1`` seconds of rest, and the time in which nothing
is computed pays it, whether it was asked to rest or had nothing to do. So a lone session, whose
steps wait for the other hops in between, is hardly slowed down. A decode step may begin while some
rest is owed still, so that it does not wait out a prefill's; other work waits until all is paid.

Invariant: over any stretch of time, peers compute no longer than the share of it, and the share of
`DECODE_DEBT_S`, and one piece of work more.
"""

from __future__ import annotations

DECODE_DEBT_S = 1.0
"""The rest that may be owed when a decode step begins: about that of a prefill piece of 512 tokens
at half the device, which takes some ten times a decode step of tens of milliseconds
(``benchmarks/decode.py``), with the steps of a few sessions."""

LONGEST_STRETCH_S = 0.25
"""After so long a pass makes way for a rest: what it owes then, at a share down to a fifth, keeps
no decode step waiting."""


class DutyCycle:
    """Keeps account of the rest that is owed.

    Args:
        share: of the device's time that may be used, more than 0.
    """

    def __init__(self, share: float) -> None:
        self._rest_per_s = 1.0 / share - 1.0
        self._free_at = 0.0

    def on_computed(self, began_at: float, ended_at: float) -> None:
        """A piece of work was computed."""
        # What was owed when it began was not paid meanwhile.
        owed_s = max(0.0, self._free_at - began_at)
        self._free_at = ended_at + owed_s + (ended_at - began_at) * self._rest_per_s

    def rest_s(self, now: float, *, is_decode: bool) -> float:
        """How long to wait before the next piece of work begins; 0: not at all.

        Args:
            now: the time.
            is_decode: whether a decode step waits.
        """
        return max(0.0, self._free_at - now - (DECODE_DEBT_S if is_decode else 0.0))

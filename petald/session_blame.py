"""What a session holds against peers: whom it does not ask for a while, and whom it reports.

Pure: a part of `petald.session`. A failure costs a peer its place in this session at once, and some
time in which it is not chosen again; it is reported, to be held against the peer elsewhere too,
only where it is a fault. Invariant: nothing here grows with the session's length.
"""

from __future__ import annotations

from petald.errors import BadRequest
from petald.session_hop import HopRecord

AVOID_S = 0.5
LONGEST_AVOID_S = 30.0
"""How long a peer that failed this session is out of question; doubled each time."""

MAX_AVOIDED = 1024

MAX_MISBEHAVED = 5
"""Peers in turn that do not take, or do not give, what they must, without a step done in between:
then the fault is in what is sent, or in the model, and no other server will mend it. Two that lie,
and of whom each has another blamed first, are fewer."""

CODE_NO_ANSWER = "no_answer"
CODE_NEXT_HOP_LOST = "next_hop_lost"
CODE_MISBEHAVED = "remote_protocol_error"
CODE_BAD_REQUEST = BadRequest.code
CODE_REFUSED = "step_refused"
CODE_MISLED = "misled"
CODE_SESSION_IDLE = "session_idle"

FAULTS = frozenset(
    {
        CODE_NO_ANSWER,
        CODE_NEXT_HOP_LOST,
        CODE_MISBEHAVED,
        "message_too_large",
        "stream_broken",
        "peer_unreachable",
    }
)
"""Failures that are held against a peer. A refusal is not, nor is our error that it found."""


class Blame:
    """One session's.

    Args:
        patience_s: after so long, a few peers that misbehave again and again count as many.
    """

    def __init__(self, *, patience_s: float) -> None:
        self._patience_s = patience_s
        self._avoided: dict[str, tuple[float, int]] = {}
        self._misbehaved: dict[str, int] = {}
        self._misbehaved_since = 0.0
        self._strays: set[int] = set()

    def avoided(self, now: float) -> frozenset[str]:
        """The peers that are out of question now."""
        return frozenset(peer for peer, (until, _) in self._avoided.items() if until > now)

    def on_leaving(self, peer: str, now: float) -> None:
        """A peer said that it leaves."""
        self._avoid(peer, now + LONGEST_AVOID_S, 0)

    def on_failure(self, hop: HopRecord, code: str, now: float, *, retry_after_s: float) -> bool:
        """A hop was given up; says whether its peer is to be reported for it."""
        _, times = self._avoided.get(hop.peer, (0.0, 0))
        if hop.last_output_at:  # it was of use: it may be again
            times = 0
        avoid_s = max(retry_after_s, min(AVOID_S * 2**times, LONGEST_AVOID_S))
        self._avoid(hop.peer, now + avoid_s, min(times + 1, 8))
        if code in (CODE_MISBEHAVED, CODE_REFUSED):
            if not self._misbehaved:
                self._misbehaved_since = now
            self._misbehaved[hop.peer] = self._misbehaved.get(hop.peer, 0) + 1
        return code in FAULTS and not hop.is_leaving

    def on_step_done(self) -> None:
        """Steps can be done, so what misbehaved before was at fault itself."""
        self._misbehaved.clear()

    def is_hopeless(self, now: float) -> bool:
        """Whether so many misbehaved that no other will do better.

        A few that come again and again show it only to a user who does not want to wait for others.
        """
        if len(self._misbehaved) >= MAX_MISBEHAVED:
            return True
        is_late = now >= self._misbehaved_since + self._patience_s
        return is_late and sum(self._misbehaved.values()) >= MAX_MISBEHAVED

    def is_new_stray(self, number: int) -> bool:
        """Whether nothing was heard yet of a step of this number, which was never sent."""
        is_new = number not in self._strays
        if len(self._strays) >= MAX_AVOIDED:
            self._strays.clear()
        self._strays.add(number)
        return is_new

    def _avoid(self, peer: str, until: float, times: int) -> None:
        if len(self._avoided) >= MAX_AVOIDED:
            self._avoided.clear()
        before, _ = self._avoided.get(peer, (0.0, 0))
        self._avoided[peer] = max(before, until), times

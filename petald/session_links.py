"""The links from hop to hop: what is missing, what was asked for, and what to do when one is lost.

Pure: a part of `petald.session`. First the later hop is told whose pushes to take, then the earlier
one where to push: so no push comes before it is expected. Invariant: a hop has at most one open
request of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from petald.session_actions import Action, SendLinkNext, SendLinkPrevious
from petald.session_hop import HopRecord, HopState, Request, RequestKind
from petald.session_watch import STUCK_S

HAND_OVER_S = 60.0
"""For a cache on its way from hop to hop; meanwhile the old one serves."""


class Links:
    """One session's.

    Args:
        new_id: makes the requests' numbers.
    """

    def __init__(self, new_id: Callable[[], int]) -> None:
        self._new_id = new_id
        self._failures: dict[str, dict[int, int]] = {}

    def watch(self, hop: HopRecord) -> None:
        """A hop is new; the failures of its peer's links before count on."""
        hop.link_failures = self._failures.setdefault(hop.peer, hop.link_failures)

    def are_whole(self, hops: Sequence[HopRecord]) -> bool:
        """Whether each hop follows the one before, and is linked with it."""
        return all(_are_linked(*pair) for pair in pairwise(hops))

    def ask(self, hops: Sequence[HopRecord], now: float) -> list[Action]:
        """Asks for the links that are missing, where both ends are open."""
        actions: list[Action] = []
        for hop, target in pairwise(hops):
            are_open = hop.state is HopState.OPEN and target.state is HopState.OPEN
            if hop.at.end != target.at.start or not are_open:
                continue
            if target.previous != hop.peer:
                if not target.has_asked(RequestKind.LINK_PREVIOUS, hop.id):
                    request = self._ask(target, RequestKind.LINK_PREVIOUS, hop.id, now)
                    actions.append(SendLinkPrevious(target.id, request, hop.peer))
            elif hop.next != target.id and not hop.has_asked(RequestKind.LINK_NEXT, target.id):
                request = self._ask(hop, RequestKind.LINK_NEXT, target.id, now)
                actions.append(SendLinkNext(hop.id, request, target.id))
        return actions

    def on_lost(self, hop: HopRecord, target: HopRecord) -> tuple[HopRecord, bool]:
        """A link is gone; gives which end to suspect, and whether it was lost before."""
        hop.next = None
        target.probe = None
        failures = hop.link_failures.get(target.id, 0) + 1
        hop.link_failures[target.id] = failures
        culprit = hop if len(hop.link_failures) > 1 else target
        return culprit, failures > 1

    def _ask(self, hop: HopRecord, kind: RequestKind, target: int, now: float) -> int:
        """Opens a request; it replaces one of its kind, whose answer does not matter any more."""
        for number in [n for n, request in hop.requests.items() if request.kind is kind]:
            del hop.requests[number]
        request = self._new_id()
        hop.requests[request] = Request(kind, target, now)
        return request


def overdue_at(hop: HopRecord, request: Request) -> float:
    """When a request's answer is too late; a hop may have steps to do before it."""
    if request.kind is RequestKind.HAND_OVER:
        return request.asked_at + HAND_OVER_S
    return max(request.asked_at, hop.last_output_at) + STUCK_S


def _are_linked(hop: HopRecord, target: HopRecord) -> bool:
    are_open = hop.state is HopState.OPEN and target.state is HopState.OPEN
    is_joined = hop.at.end == target.at.start and are_open
    return is_joined and target.previous == hop.peer and hop.next == target.id

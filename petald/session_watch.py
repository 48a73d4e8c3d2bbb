"""Which of a session's hops is silent for too long: when to ask it, and when to give it up.

Pure: a part of `petald.session`, which carries out what is found. How long a hop may be silent is
learnt from its own steps (`petald.session_hop.Laps`). Then it is asked, on the session's own
stream, which it answers whatever it computes; only if that is not answered is it given up. So a
slow hop is waited for, and a hung one is noticed soon.

A hop is *awaited* when a step is with it, or when it, or a hop that it is to be linked with, was
asked for that link. The hops after the one that a step is with are asked too: where one of them
hangs, the push to it does not return, and the hop before it seems to be the silent one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from petald.session_actions import Action, SendProbe
from petald.session_flow import Flow
from petald.session_hop import HopRecord, HopState, ProbeState, RequestKind

PROBE_S = 0.5
"""For a probe's answer: a far round trip, and the pause of a busy event loop."""

LONGEST_ALLOWANCE_S = 10.0
STUCK_S = 60.0
"""A hop that lives but has not finished a step for so long is of no use to a session."""

LINK_ALLOWANCE_S = 1.0
"""For one hop's dial to the next, two handshakes over a common link, before anybody is asked."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A hop that is to be given up.

    Attributes:
        text: says why.
        silent_s: for how long nothing has come from it.
    """

    hop: HopRecord
    text: str
    silent_s: float


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Something that a hop owes.

    Attributes:
        since: when it was last heard of.
        allowance_s: how long that is nothing unusual.
        number: of the step that it owes; 0 where it owes none.
        is_witness: it owes nothing itself, but the hop before may wait for it.
    """

    hop: HopRecord
    since: float
    allowance_s: float
    number: int = 0
    is_witness: bool = False

    @property
    def probe(self) -> ProbeState | None:
        """The hop's probe, unless it was answered and was about something else."""
        probe = self.hop.probe
        if probe is None or probe.request is not None or self.number in (0, probe.number):
            return probe
        return None


class Watch:
    """Watches over the hops of one session.

    Args:
        flow: the steps under way.
        records: the hops that were not given up, by their numbers; shared with the session.
        new_id: makes the probes' numbers.
    """

    def __init__(
        self, flow: Flow, records: Mapping[int, HopRecord], new_id: Callable[[], int]
    ) -> None:
        self._flow = flow
        self._records = records
        self._new_id = new_id
        self.probes = 0

    def next_deadline(self) -> float:
        """When `on_timer` is wanted."""
        due = [
            one.since + one.allowance_s if one.probe is None else one.probe.due_at
            for one in self._awaited().values()
        ]
        return min(due, default=float("inf"))

    def on_timer(self, now: float) -> tuple[list[Action], list[Silence]]:
        """The probes to be sent, and the hops that did not answer theirs."""
        awaited = self._awaited()
        for hop in self._records.values():
            if hop.id not in awaited:
                hop.probe = None
        actions: list[Action] = []
        silences: list[Silence] = []
        for one in awaited.values():
            hop = one.hop
            probe = one.probe
            if probe is None and now >= one.since + one.allowance_s:
                probe = ProbeState(None, now, one.since, one.allowance_s, one.number)
                hop.probe = probe
            if probe is None or now < probe.due_at:
                continue
            silent_s = now - probe.since
            if probe.request is not None or (silent_s > STUCK_S and not one.is_witness):
                silences.append(Silence(hop, f"was silent for {silent_s:.1f} s", silent_s))
                continue
            probe.request = self._new_id()
            # A probe waits behind the step that is being sent, which may be a long one.
            probe.due_at = now + max(PROBE_S, probe.allowance_s / 2)
            self.probes += 1
            actions.append(SendProbe(hop.id, probe.request))
        return actions, silences

    def on_reply(self, hop: HopRecord, request: int, received: int, now: float) -> bool:
        """A hop lives. Says whether a step that it owes did not even arrive there."""
        probe = hop.probe
        if probe is None or probe.request != request:
            return False
        probe.request = None
        probe.allowance_s = min(2 * probe.allowance_s, LONGEST_ALLOWANCE_S)
        probe.due_at = now + probe.allowance_s
        if not probe.number:
            probe.since = now
        if received >= probe.number:
            return False
        probe.misses += 1
        return probe.misses > 1

    def _awaited(self) -> dict[int, _Awaited]:
        found: dict[int, _Awaited] = {}
        for hop in self._records.values():
            for request in hop.requests.values():
                if request.kind is not RequestKind.HAND_OVER:
                    since = max(request.asked_at, hop.last_output_at)
                    found[hop.id] = _Awaited(hop, since, LINK_ALLOWANCE_S)
                    target = self._records.get(request.target)
                    if target is not None and target.state is HopState.OPEN:
                        witness = _Awaited(target, since, LINK_ALLOWANCE_S, is_witness=True)
                        found.setdefault(target.id, witness)
        for hop, sent, since in self._flow.suspects():
            allowance_s = hop.laps.allowance_s(sent.tokens)
            found[hop.id] = _Awaited(hop, since, allowance_s, sent.number)
            for later in sent.route[sent.route.index(hop) + 1 :]:
                if later.state is HopState.OPEN:
                    witness = _Awaited(later, since, allowance_s, is_witness=True)
                    found.setdefault(later.id, witness)
        return found

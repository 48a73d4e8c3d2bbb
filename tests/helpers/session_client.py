"""A session in the world of `tests.helpers.session_world`, and the app that generates through it.

It carries out what the real `Session` wants done, as `petald.chain_client` does. Invariant, which
it asserts all the time: each hop has cached just what the histories say, up to the committed rows.
"""

from __future__ import annotations

from collections.abc import Callable

from p2p.wire.session_messages import Wanted
from petald import session_actions as do
from petald.errors import MissingBlocks, PetaldError
from petald.routing import Hop, choose_chain
from petald.session import Session
from petald.session_settings import Replay, SessionSettings
from tests.helpers.session_faults import twist
from tests.helpers.session_rows import PREFILL_TOKENS, ListHistory, SimRows
from tests.helpers.session_world import SimHop, World, run_step

PENALTY_S = 10.0


class SimClient:
    """A session, and its app.

    Attributes:
        penalised: all that was held against peers: when, whom, what for, and whether it was at
            fault as far as the world knows.
    """

    def __init__(
        self, world: World, prompt: tuple[int, ...], count: int, *, max_wait_s: float = 300.0
    ) -> None:
        self.world = world
        self.name = f"client {len(world.clients)}"
        self.number = len(world.clients)
        world.clients.append(self)
        self.prompt, self.count = prompt, count
        self.tokens: list[int] = []
        self.error: PetaldError | None = None
        self.is_done = False
        self.moves: list[do.Moved] = []
        self.penalties: dict[str, float] = {}
        self.penalised: list[tuple[float, str, str, bool]] = []
        self.session = Session(
            SessionSettings(
                num_blocks=world.num_blocks,
                max_tokens=len(prompt) + count,
                make_history=ListHistory,  # type: ignore[arg-type]
                max_wait_s=max_wait_s,
                replay=Replay.EXACT if world.is_replay_exact else Replay.FAST,
                prefers_hand_over=self._prefers_hand_over,
            )
        )
        self._submitted: list[int] = []
        self._tickets: dict[int, int] = {}
        self._peer_of: dict[int, str] = {}
        self._round = 0
        self._timer_at = float("inf")

    def _prefers_hand_over(self, old: Hop, new: Hop, tokens: int) -> bool:
        return self.world.hand_overs >= 1 or self.world.rng.random() < self.world.hand_overs

    # The app.

    def start(self) -> None:
        self.carry_out(self.session.start(self.world.now))
        self._prefill(0)

    def _prefill(self, start: int) -> None:
        """In pieces, all at once; the last one gives the first token."""
        while start < len(self.prompt):
            piece = self.prompt[start : start + PREFILL_TOKENS]
            is_last = start + len(piece) == len(self.prompt)
            self._submit(start, piece, Wanted.LAST if is_last else Wanted.NONE)
            start += len(piece)

    def _submit(self, position: int, values: tuple[int, ...], wanted: str) -> None:
        ticket, actions = self.session.submit(position, SimRows(values), wanted, self.world.now)
        del self._submitted[position:]
        self._submitted += values
        self._tickets[ticket] = position + len(values)
        self.carry_out(actions)

    def cancel_all(self) -> None:
        """An app takes its job back, and begins the generation anew in the same session."""
        if not self.is_done:
            self._cancel_tickets()
            self._begin_again(0)

    def rewind(self, share: float, *, cancels: bool) -> None:
        """An app goes back into the midst of what it submitted, and begins again there.

        Args:
            share: of the rows, which it keeps.
            cancels: takes back first what is not done.
        """
        if self.is_done:
            return
        if cancels:
            self._cancel_tickets()
        rows = self.session.submitted_rows
        position = max(0, min(int(share * rows), rows - 1))
        if self.world.is_replay_exact:  # the rest of a step has other bits than the whole
            position -= position % PREFILL_TOKENS if position < len(self.prompt) else 0
        builds = self.session._builds
        self.world.count("rewound while moving" if builds else "rewound")
        if any(build.hand_over is not None for build in builds):
            self.world.count("rewound during a hand-over")
        if any(build.in_flight for build in builds):
            self.world.count("rewound during a replay")
        self._begin_again(position)

    def _cancel_tickets(self) -> None:
        for ticket in list(self._tickets):
            self.carry_out(self.session.cancel(ticket, self.world.now))
        self._tickets.clear()

    def _begin_again(self, position: int) -> None:
        self._round += 1
        kept = position - len(self.prompt) + 1
        if kept > 0:
            del self.tokens[kept:]
            self._submit(position, (self.tokens[-1],), Wanted.LAST)
        else:
            self.tokens.clear()
            self._prefill(position)

    def repeat_last(self) -> None:
        """The network delivers steps twice, as no stream does, but a confused client might.

        What comes out of order then, behind another hop's word that it counts anew, cuts a cache
        below what is committed; that is found out by the next step, and mended.
        """
        for hop in self.hops():
            if hop.last is not None:
                hop.is_confused = True
                run_step(self.world, hop, hop.last[0])

    # The driver.

    def hops(self) -> list[SimHop]:
        """All that serve this session."""
        servers = self.world.servers.values()
        return [hop for each in servers for hop in each.hops.values() if hop.client is self]

    def peer_of(self, hop: int) -> str:
        return self._peer_of[hop]

    def on_broken(self, hop: int) -> Callable[[], None]:
        return lambda: self.feed("on_hop_failed", hop, "stream_broken", "it is gone")

    def answer(self, hop: SimHop, event: str, *arguments: object) -> None:
        """Sends what a hop has to say; a liar says something else."""
        for said, of in twist(self.world, hop, event, arguments):
            self.world.send(
                hop.server.peer,
                self.name,
                (self.number, hop.id),
                lambda said=said, of=of: self.feed(said, hop.id, *of),  # type: ignore[misc]
            )

    def feed(self, event: str, *arguments: object) -> None:
        if not self.is_done:
            self.carry_out(getattr(self.session, event)(*arguments, now=self.world.now))

    def carry_out(self, actions: list[do.Action]) -> None:
        for action in actions:
            getattr(self, f"_do_{type(action).__name__}")(action)
            if isinstance(action, do.Moved | do.StepDone):
                self.check_caches()
        self._set_timer()

    def check_caches(self) -> None:
        """Asserts that the hops have cached what the histories say."""
        session = self.session
        if not session.is_running or session.has_ended:
            return
        histories = session._flow.histories
        assert histories[0].values == self._submitted[: session.submitted_rows]  # type: ignore[attr-defined]
        committed = session._committed()
        for record in session._chain:
            hop = self.world.find_hop(record.peer, (self.number, record.id))
            if hop is not None and not hop.is_confused:
                history = histories[record.at.start]
                self.world.count("caches compared")
                assert hop.blocks.inputs[:committed] == history.values[:committed]  # type: ignore[attr-defined]
                assert len(hop.blocks.inputs) >= committed

    def _set_timer(self) -> None:
        due = self.session.next_deadline()
        if not self.session.has_ended and due < self._timer_at:
            self._timer_at = due
            self.world.at(due, self._on_timer)

    def _on_timer(self) -> None:
        if self.world.now < self._timer_at:
            return
        if self.name in self.world.hung:  # this process stands still
            self.world.hung[self.name].append(self._on_timer)
            return
        if self.world.now > self._timer_at + 1.0:
            self.world.count("late timer")
        self._timer_at = float("inf")
        if not self.session.has_ended:
            self.carry_out(self.session.on_timer(self.world.now))

    # Actions.

    def _to(self, hop: int, act: Callable[[SimHop], object]) -> None:
        peer = self._peer_of[hop]

        def arrive() -> None:
            found = self.world.find_hop(peer, (self.number, hop))
            if found is not None:
                act(found)

        self.world.send(self.name, peer, (self.number, hop), arrive)

    def _ask(self, hop: int, request: int, act: Callable[[SimHop], object]) -> None:
        """Sends a request, which a hop may refuse."""

        def take(found: SimHop) -> None:
            if found.server.refusals:
                found.server.refusals -= 1
                self.world.count("request refused")
                self.answer(found, "on_link_failed", request, "next_hop_lost", "no")
            else:
                act(found)

        self._to(hop, take)

    def _do_OpenHop(self, action: do.OpenHop) -> None:  # noqa: N802
        world = self.world
        self._peer_of[action.hop] = action.at.peer

        def arrive() -> None:
            server = world.servers.get(action.at.peer)
            if server is None or not server.is_alive:
                self.feed("on_hop_failed", action.hop, "peer_unreachable", "nobody answers")
            elif len(server.hops) >= server.capacity:
                self.feed("on_hop_failed", action.hop, "overloaded", "full")
            else:
                hop = world.open_hop(self, server, action)
                self.answer(hop, "on_opened", server.max_step_tokens)

        world.send(self.name, action.at.peer, (self.number, action.hop), arrive)

    def _do_CloseHop(self, action: do.CloseHop) -> None:  # noqa: N802
        self._to(action.hop, lambda hop: hop.server.hops.pop(hop.key))

    def _do_SendStep(self, action: do.SendStep) -> None:  # noqa: N802
        if action.hidden.shape[0] > PREFILL_TOKENS and action.position:
            self.world.count("replayed in several pieces")
        self._to(action.hop, lambda hop: run_step(self.world, hop, action))

    def _do_SendLinkNext(self, action: do.SendLinkNext) -> None:  # noqa: N802
        target = self._peer_of[action.target]
        self._ask(
            action.hop,
            action.request,
            lambda hop: self.world.link_next(hop, action.request, target, action.target),
        )

    def _do_SendLinkPrevious(self, action: do.SendLinkPrevious) -> None:  # noqa: N802
        def link(hop: SimHop) -> None:
            hop.expect_pushes_of(action.peer)
            self.answer(hop, "on_link_done", action.request)

        self._ask(action.hop, action.request, link)

    def _do_SendHandOver(self, action: do.SendHandOver) -> None:  # noqa: N802
        target = self._peer_of[action.target]
        self.world.count("hand-over begun")
        self._ask(
            action.hop,
            action.request,
            lambda hop: self.world.hand_over(hop, action, target),
        )

    def _do_SendProbe(self, action: do.SendProbe) -> None:  # noqa: N802
        self._to(
            action.hop,
            lambda hop: self.answer(hop, "on_probe_reply", action.request, hop.received),
        )

    def _do_NeedChain(self, action: do.NeedChain) -> None:  # noqa: N802
        world = self.world

        def choose() -> None:
            if self.session._find_question(action.question) is None:
                world.count("void question answered")
            penalties = {p: until - world.now for p, until in self.penalties.items()}
            try:
                chain = choose_chain(
                    world.view(),
                    needed_tokens=1,
                    start=action.start,
                    end=action.end,
                    before=action.before,
                    after=action.after,
                    penalties_s={p: s for p, s in penalties.items() if s > 0},
                    excluded=action.excluded,
                )
            except MissingBlocks as error:
                self.feed("on_no_chain", action.question, error)
            else:
                self.feed("on_chain", action.question, chain)

        delay_s = world.rng.choice(world.chain_delays_s)
        world.at(world.now + delay_s, choose)
        if world.rng.random() < 0.2:  # once more, when the question is void
            world.at(world.now + delay_s + world.rng.uniform(0.0, 2.0), choose)

    def _do_Penalise(self, action: do.Penalise) -> None:  # noqa: N802
        now = self.world.now
        self.penalties[action.peer] = now + PENALTY_S
        server = self.world.servers.get(action.peer)
        is_faulty = server is None or server.faulty_until > now
        self.penalised.append((now, action.peer, action.code, is_faulty))

    def _do_StepDone(self, action: do.StepDone) -> None:  # noqa: N802
        position = self._tickets.pop(action.ticket)
        if action.result.hidden is None:
            return
        self.tokens.append(action.result.hidden.values[-1] % 1009)  # type: ignore[attr-defined]
        assert position == len(self.prompt) + len(self.tokens) - 1
        if len(self.tokens) >= self.count:
            self.is_done = True
            self.carry_out(self.session.close())
            return
        round_ = self._round
        self.world.at(self.world.now, lambda: self._decode(position, round_))

    def _decode(self, position: int, round_: int) -> None:
        if not self.is_done and round_ == self._round:
            self._submit(position, (self.tokens[-1],), Wanted.LAST)

    def _do_StepLost(self, action: do.StepLost) -> None:  # noqa: N802
        self._tickets.pop(action.ticket, None)

    def _do_Ended(self, action: do.Ended) -> None:  # noqa: N802
        self.error = action.error
        self.is_done = True

    def _do_Moved(self, action: do.Moved) -> None:  # noqa: N802
        self.moves.append(action)

    def _do_Waiting(self, action: do.Waiting) -> None:  # noqa: N802
        pass

"""A world of servers and sessions on an event heap: the pure deciders, without network or torch.

`Session` at the clients, `HopSession` at the servers and `choose_chain` between them are the real
ones. What a model computes is replaced by arithmetic that any lost, doubled or misplaced row
changes for good: a block keeps a running digest of its inputs, as attention sees all tokens before,
and its output depends on that digest and the block's number. Everything is repeatable by the seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2p.wire.session_messages import Wanted
from petald import session_actions as do
from petald.errors import BadRequest, MissingBlocks, PetaldError
from petald.hop_session import HopSession, PassOver, RepeatOutput
from petald.routing import choose_chain
from petald.session import Session, SessionSettings
from petald.swarm import Announcement, Server, ServerState, SwarmView, make_view

MODEL = bytes(32)
MASK = (1 << 61) - 1
PREFILL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SimRows:
    """Rows of one number each."""

    values: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values), 1)


class ListHistory:
    """A `History` in a list."""

    open_histories = 0

    def __init__(self) -> None:
        self.values: list[int] = []
        ListHistory.open_histories += 1

    @property
    def rows(self) -> int:
        return len(self.values)

    def append(self, hidden: SimRows) -> None:
        self.values += hidden.values

    def truncate(self, rows: int) -> None:
        del self.values[rows:]

    def read(self, start: int, end: int) -> SimRows:
        assert start < end
        return SimRows(tuple(self.values[start:end]))

    def close(self) -> None:
        ListHistory.open_histories -= 1


def mix(one: int, other: int) -> int:
    return ((one * 6364136223846793005 + other * 1442695040888963407 + 1) ^ (one >> 29)) & MASK


class SimBlocks:
    """Some consecutive blocks, with their cache."""

    def __init__(self, start: int, end: int, *, tells_steps_apart: bool = False) -> None:
        self.start, self.end = start, end
        self.tells_steps_apart = tells_steps_apart
        self.digests: list[list[int]] = [[] for _ in range(start, end)]

    def run(self, position: int, values: Sequence[int]) -> tuple[int, ...]:
        """The outputs of one step; with `tells_steps_apart` they show how long it was."""
        outputs = []
        for digests in self.digests:
            del digests[position:]
        for value in values:
            for block, digests in enumerate(self.digests, self.start):
                if self.tells_steps_apart:
                    value = mix(value, len(values))
                digest = mix(digests[-1] if digests else 7, value)
                digests.append(digest)
                value = mix(digest, block)
            outputs.append(value)
        return tuple(outputs)


def expected_tokens(
    num_blocks: int, prompt: tuple[int, ...], count: int, *, tells_steps_apart: bool = False
) -> list[int]:
    """What an undisturbed chain makes of a prompt."""
    model = SimBlocks(0, num_blocks, tells_steps_apart=tells_steps_apart)
    last = 0
    for start in range(0, len(prompt), PREFILL_TOKENS):
        last = model.run(start, prompt[start : start + PREFILL_TOKENS])[-1]
    made = []
    for position in range(len(prompt), len(prompt) + count):
        made.append(last % 1009)
        if len(made) < count:
            last = model.run(position, (made[-1],))[-1]
    return made


@dataclass(eq=False)
class SimHop:
    """One session at one server."""

    client: SimClient
    id: int
    server: SimServer
    state: HopSession
    blocks: SimBlocks
    previous: str | None
    next: tuple[str, int] | None = None
    last: tuple[do.SendStep, SimRows] | None = None
    received: int = 0


@dataclass(eq=False)
class SimServer:
    """A server: its span, its speed, and whether it lives."""

    peer: str
    start: int
    end: int
    block_s: float
    capacity: int = 64
    hops: dict[tuple[int, int], SimHop] = field(default_factory=dict)
    is_alive: bool = True
    busy_until: float = 0.0
    most_queued_s: float = 0.0


class World:
    """Everything that happens, in order of time.

    Args:
        num_blocks: of the model.
        seed: of all chance.
        latency_s: of one way, on average.
        is_replay_exact: sessions replay so, and the blocks tell if a step was not as it was first.
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        *,
        latency_s: float = 0.02,
        is_replay_exact: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.is_replay_exact = is_replay_exact
        self.rng = random.Random(seed)
        self.latency_s = latency_s
        self.now = 0.0
        self.servers: dict[str, SimServer] = {}
        self.hung: dict[str, list[Callable[[], None]]] = {}
        self.cut: dict[frozenset[str], list[Callable[[], None]]] = {}
        self.clients: list[SimClient] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._streams: dict[tuple[str, str, object], deque[tuple[float, Callable[[], None]]]] = {}
        self._names = itertools.count()
        self._view: SwarmView | None = None
        self._view_until = 0.0

    # Time and links.

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), act))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = max(self.now, until)

    def send(self, source: str, target: str, stream: object, act: Callable[[], None]) -> None:
        """Carries something, in the order of its stream, when both ends and the way allow it."""
        key = (source, target, stream)
        queue = self._streams.setdefault(key, deque())
        last = queue[-1][0] if queue else 0.0
        when = max(last, self.now + self.latency_s * self.rng.uniform(0.5, 1.5))
        queue.append((when, act))
        self.at(when, lambda: self._deliver(key))

    def _deliver(self, key: tuple[str, str, object]) -> None:
        source, target, _ = key
        queue = self._streams.get(key)
        while queue and queue[0][0] <= self.now:
            for waiting in (
                self.hung.get(source),
                self.hung.get(target),
                self.cut.get(frozenset((source, target))),
            ):
                if waiting is not None:
                    waiting.append(lambda: self._deliver(key))
                    return
            queue.popleft()[1]()
        if not queue:
            self._streams.pop(key, None)

    # Faults.

    def add_server(self, start: int, end: int, *, block_s: float = 0.001) -> SimServer:
        server = SimServer(f"server {next(self._names):05}", start, end, block_s)
        self.servers[server.peer] = server
        return server

    def kill(self, server: SimServer) -> None:
        """Its streams break; a dead server stays in the view for a while, as in the directory."""
        if not server.is_alive:
            return
        server.is_alive = False
        hops = list(server.hops.values())
        server.hops.clear()
        for hop in hops:
            self.send(server.peer, hop.client.name, "break", hop.client.on_broken(hop.id))
        self.at(self.now + 20.0, lambda: self.servers.pop(server.peer, None))  # type: ignore[arg-type,return-value]

    def hang(self, server: SimServer, seconds: float) -> None:
        if server.peer not in self.hung:
            self.hung[server.peer] = []
            self.at(self.now + seconds, lambda: self._release(self.hung.pop(server.peer)))

    def partition(self, one: str, other: str, seconds: float) -> None:
        pair = frozenset((one, other))
        if pair not in self.cut:
            self.cut[pair] = []
            self.at(self.now + seconds, lambda: self._release(self.cut.pop(pair)))

    def _release(self, waiting: list[Callable[[], None]]) -> None:
        for act in waiting:
            self.at(self.now, act)

    # The view.

    def view(self, max_age_s: float = 2.0) -> SwarmView:
        if self._view is None or self.now > self._view_until:
            self._view_until = self.now + max_age_s
            servers = [self._describe(server) for server in self.servers.values()]
            self._view = make_view(MODEL, self.num_blocks, servers)
        return self._view

    def _describe(self, server: SimServer) -> Server:
        return Server(
            peer=server.peer,
            announcement=Announcement(
                model=MODEL,
                start=server.start,
                end=server.end,
                state=ServerState.SERVING,
                step_ms=server.block_s * (server.end - server.start) * 1e3,
                cache_tokens=server.capacity * 1000,
                free_cache_tokens=max(0, server.capacity - len(server.hops)) * 1000,
                dtype="float32",
            ),
            round_trip_s=2 * self.latency_s,
        )

    def open_hops(self) -> int:
        return sum(len(server.hops) for server in self.servers.values())


class SimClient:
    """A session, and the app that generates through it."""

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
        self.session = Session(
            SessionSettings(
                num_blocks=world.num_blocks,
                max_tokens=len(prompt) + count,
                make_history=ListHistory,  # type: ignore[arg-type]
                max_wait_s=max_wait_s,
                is_replay_exact=world.is_replay_exact,
                prefers_hand_over=lambda old, new, tokens: True,
            )
        )
        self.cached = 0
        self._tickets: dict[int, int] = {}
        self._timer_at = float("inf")

    def start(self) -> None:
        self.carry_out(self.session.start(self.world.now))
        self._prefill()

    def _prefill(self) -> None:
        """In pieces, all at once; the last one gives the first token."""
        for start in range(0, len(self.prompt), PREFILL_TOKENS):
            piece = self.prompt[start : start + PREFILL_TOKENS]
            is_last = start + PREFILL_TOKENS >= len(self.prompt)
            self._submit(start, piece, Wanted.LAST if is_last else Wanted.NONE)

    def _submit(self, position: int, values: tuple[int, ...], wanted: str) -> None:
        ticket, actions = self.session.submit(position, SimRows(values), wanted, self.world.now)
        self._tickets[ticket] = position + len(values)
        self.carry_out(actions)

    def cancel_all(self) -> None:
        """An app takes its job back, and begins the generation anew in the same session."""
        if self.is_done:
            return
        for ticket in list(self._tickets):
            self.carry_out(self.session.cancel(ticket, self.world.now))
        self._tickets.clear()
        self.tokens.clear()
        self._prefill()

    def repeat_last(self) -> None:
        """The network delivers steps twice, as no stream does, but a confused client might."""
        for server in self.world.servers.values():
            for (number, _), hop in list(server.hops.items()):
                if number == self.number and hop.last is not None:
                    run_step(self.world, hop, hop.last[0])

    def on_broken(self, hop: int) -> Callable[[], None]:
        return lambda: self.feed("on_hop_failed", hop, "stream_broken", "it is gone")

    def feed(self, event: str, *arguments: object) -> None:
        if not self.is_done:
            self.carry_out(getattr(self.session, event)(*arguments, now=self.world.now))

    def carry_out(self, actions: list[do.Action]) -> None:
        for action in actions:
            getattr(self, f"_do_{type(action).__name__}")(action)
        self._set_timer()

    def _set_timer(self) -> None:
        due = self.session.next_deadline()
        if not self.session.has_ended and due < self._timer_at:
            self._timer_at = due
            self.world.at(due, self._on_timer)

    def _on_timer(self) -> None:
        if self.world.now >= self._timer_at:
            self._timer_at = float("inf")
            if not self.session.has_ended:
                self.carry_out(self.session.on_timer(self.world.now))

    # Actions.

    def _to(self, hop: int, act: Callable[[SimServer, SimHop], None]) -> None:
        peer = self._peers.get(hop)
        if peer is None:
            return

        def arrive() -> None:
            server = self.world.servers.get(peer)
            found = None if server is None else server.hops.get((self.number, hop))
            if server is not None and found is not None:
                act(server, found)

        self.world.send(self.name, peer, (self.number, hop), arrive)

    @property
    def _peers(self) -> dict[int, str]:
        if not hasattr(self, "_peer_of"):
            self._peer_of: dict[int, str] = {}
        return self._peer_of

    def answer(self, hop: SimHop, event: str, *arguments: object) -> None:
        self.world.send(
            hop.server.peer,
            self.name,
            (self.number, hop.id),
            lambda: self.feed(event, hop.id, *arguments),
        )

    def _do_OpenHop(self, action: do.OpenHop) -> None:  # noqa: N802
        world = self.world
        self._peers[action.hop] = action.at.peer

        def arrive() -> None:
            server = world.servers.get(action.at.peer)
            if server is None or not server.is_alive:
                self.feed("on_hop_failed", action.hop, "peer_unreachable", "nobody answers")
                return
            if len(server.hops) >= server.capacity:
                self.feed("on_hop_failed", action.hop, "overloaded", "full")
                return
            hop = SimHop(
                self,
                action.hop,
                server,
                HopSession(max_tokens=10**6, max_step_tokens=128),
                SimBlocks(action.at.start, action.at.end, tells_steps_apart=world.is_replay_exact),
                action.previous,
            )
            server.hops[self.number, action.hop] = hop
            self.answer(hop, "on_opened", 128)

        world.send(self.name, action.at.peer, (self.number, action.hop), arrive)

    def _do_CloseHop(self, action: do.CloseHop) -> None:  # noqa: N802
        self._to(
            action.hop, lambda server, hop: server.hops.pop((self.number, hop.id), None) and None
        )

    def _do_SendStep(self, action: do.SendStep) -> None:  # noqa: N802
        self._to(action.hop, lambda server, hop: run_step(self.world, hop, action))

    def _do_SendLinkNext(self, action: do.SendLinkNext) -> None:  # noqa: N802
        target_peer = self._peers[action.target]

        def link(server: SimServer, hop: SimHop) -> None:
            def attach() -> None:
                target = self.world.servers.get(target_peer)
                far = None if target is None else target.hops.get((self.number, action.target))
                if far is None or far.previous != server.peer:
                    self.answer(hop, "on_link_failed", action.request, "next_hop_lost", "no")
                else:
                    hop.next = (target_peer, action.target)
                    self.answer(hop, "on_link_done", action.request)

            # In the order of the steps that came before, as the real server does.
            self.world.at(
                server.busy_until,
                lambda: self.world.send(server.peer, target_peer, (self.number, hop.id), attach),
            )

        self._to(action.hop, link)

    def _do_SendLinkPrevious(self, action: do.SendLinkPrevious) -> None:  # noqa: N802
        def link(server: SimServer, hop: SimHop) -> None:
            hop.previous = action.peer
            self.answer(hop, "on_link_done", action.request)

        self._to(action.hop, link)

    def _do_SendHandOver(self, action: do.SendHandOver) -> None:  # noqa: N802
        def hand_over(server: SimServer, hop: SimHop) -> None:
            target_peer = self._peers[action.target]

            def arrive() -> None:
                target = self.world.servers.get(target_peer)
                far = None if target is None else target.hops.get((self.number, action.target))
                if far is None or hop.state.length < action.tokens:
                    self.answer(hop, "on_link_failed", action.request, "hand_over_failed", "no")
                    return
                far.blocks.digests = [list(d[: action.tokens]) for d in snapshot]
                far.state.on_handed_over(action.tokens)
                self.answer(hop, "on_link_done", action.request)

            snapshot = [list(digests) for digests in hop.blocks.digests]
            self.world.send(server.peer, target_peer, (self.number, hop.id), arrive)

        self._to(action.hop, hand_over)

    def _do_SendProbe(self, action: do.SendProbe) -> None:  # noqa: N802
        self._to(
            action.hop,
            lambda server, hop: self.answer(hop, "on_probe_reply", action.request, hop.received),
        )

    def _do_NeedChain(self, action: do.NeedChain) -> None:  # noqa: N802
        def choose() -> None:
            penalties = {p: until - self.world.now for p, until in self.penalties.items()}
            try:
                chain = choose_chain(
                    self.world.view(),
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

        self.world.at(self.world.now + 0.001, choose)

    def _do_Penalise(self, action: do.Penalise) -> None:  # noqa: N802
        self.penalties[action.peer] = self.world.now + 10.0

    def _do_StepDone(self, action: do.StepDone) -> None:  # noqa: N802
        position = self._tickets.pop(action.ticket)
        if action.result.hidden is None:
            return
        self.tokens.append(action.result.hidden.values[-1] % 1009)  # type: ignore[attr-defined]
        if len(self.tokens) >= self.count:
            self.is_done = True
            self.carry_out(self.session.close())
            return
        token = self.tokens[-1]
        self.world.at(self.world.now, lambda: self._decode(position, token))

    def _decode(self, position: int, token: int) -> None:
        is_next = position == len(self.prompt) + len(self.tokens) - 1
        if not self.is_done and is_next and self.tokens and self.tokens[-1] == token:
            self._submit(position, (token,), Wanted.LAST)

    def _do_StepLost(self, action: do.StepLost) -> None:  # noqa: N802
        self._tickets.pop(action.ticket, None)

    def _do_Ended(self, action: do.Ended) -> None:  # noqa: N802
        self.error = action.error
        self.is_done = True

    def _do_Moved(self, action: do.Moved) -> None:  # noqa: N802
        self.moves.append(action)

    def _do_Waiting(self, action: do.Waiting) -> None:  # noqa: N802
        pass


def run_step(world: World, hop: SimHop, step: do.SendStep) -> None:
    """What a server does with a step that arrived."""
    server, client = hop.server, hop.client
    hop.received = max(hop.received, step.number)
    values: tuple[int, ...] = step.hidden.values  # type: ignore[attr-defined]
    began_at = max(world.now, server.busy_until)
    server.busy_until = began_at + server.block_s * len(hop.blocks.digests) * (1 + len(values) / 32)
    server.most_queued_s = max(server.most_queued_s, server.busy_until - world.now)

    def done() -> None:
        if server.hops.get((client.number, hop.id)) is not hop:
            return
        if server.peer in world.hung:
            world.hung[server.peer].append(done)
            return
        try:
            decision = hop.state.on_step(
                number=step.number, position=step.position, tokens=len(values)
            )
        except BadRequest as error:
            client.answer(hop, "on_step_failed", step.number, error.code, str(error), None)
            return
        if isinstance(decision, PassOver):
            return
        if isinstance(decision, RepeatOutput):
            assert hop.last is not None
            pass_on(world, hop, *hop.last)
            return
        output = SimRows(hop.blocks.run(step.position, values))
        hop.state.on_done(number=step.number, position=step.position, tokens=len(values))
        hop.last = (step, output)
        pass_on(world, hop, step, output)

    world.at(server.busy_until, done)


def pass_on(world: World, hop: SimHop, step: do.SendStep, output: SimRows) -> None:
    client = hop.client
    if hop.next is None or step.until == hop.blocks.end:
        rows = {Wanted.NONE: None, Wanted.LAST: SimRows(output.values[-1:])}.get(
            Wanted(step.wanted), output
        )
        client.answer(hop, "on_result", step.number, rows, ())
        return
    peer, number = hop.next
    pushed = do.SendStep(number, step.number, step.position, output, step.wanted, step.until)

    def arrive() -> None:
        server = world.servers.get(peer)
        far = None if server is None else server.hops.get((client.number, number))
        if far is not None:
            if far.previous == hop.server.peer:
                run_step(world, far, pushed)
        else:
            client.answer(
                hop, "on_step_failed", step.number, "next_hop_lost", "the next hop is gone", peer
            )

    world.send(hop.server.peer, peer, (client.number, hop.id), arrive)
    client.answer(hop, "on_output", step.number, output)

"""A world of servers and sessions on an event heap: the pure deciders, without network or torch.

`Session` at the clients (`tests.helpers.session_client`), `HopSession` at the servers and
`choose_chain` between them are the real ones; what a model computes is replaced by arithmetic
(`tests.helpers.session_rows`). A server does with a message what `petald.served_session` does.
Everything is repeatable by the seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2p.wire.session_messages import Wanted
from petald import session_actions as do
from petald.errors import BadRequest
from petald.hop_session import HopSession, PassOver, RepeatOutput
from petald.swarm import Announcement, Server, ServerState, SwarmView, make_view
from tests.helpers.session_rows import SimBlocks, SimRows

if TYPE_CHECKING:
    from tests.helpers.session_client import SimClient

MODEL = bytes(32)
STEP_TOKENS = 128
ABSURD = 2**53


@dataclass(eq=False)
class SimHop:
    """One session at one server."""

    client: SimClient
    id: int
    server: SimServer
    state: HopSession
    blocks: SimBlocks
    previous: str | None
    next: SimHop | None = None
    pusher: SimHop | None = None
    last: tuple[do.SendStep, SimRows] | None = None
    has_begun: bool = False
    is_handing_over: bool = False
    is_confused: bool = False
    received: int = 0
    pushed: int = 0
    end_received: int = 0
    rewound: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.client.number, self.id

    @property
    def is_open(self) -> bool:
        return self.server.hops.get(self.key) is self

    def note_arrival(self, step: do.SendStep) -> None:
        """Remembers where a client began again, as the real one does."""
        self.received = max(self.received, step.number)
        if step.position < self.end_received:
            self.rewound = step.number, step.position
        self.end_received = step.position + step.hidden.shape[0]

    def is_superseded(self, step: do.SendStep) -> bool:
        if self.rewound is None:
            return False
        number, position = self.rewound
        return step.number < number and step.position >= position

    def expect_pushes_of(self, peer: str | None) -> None:
        if self.previous != peer:
            self.previous, self.pusher = peer, None
            self.pushed = self.received = self.end_received = 0
            self.rewound = None
            self.state.on_new_previous()


@dataclass(eq=False)
class SimServer:
    """A server: its span, its speed, and whether it lives.

    Attributes:
        refusals: so many requests that come next are refused.
        lie: what it does against the rules; see `tests.helpers.session_faults`.
        faulty_until: until then a client may hold something against it.
    """

    peer: str
    start: int
    end: int
    block_s: float
    capacity: int = 64
    max_step_tokens: int = STEP_TOKENS
    refusals: int = 0
    lie: str = ""
    faulty_until: float = 0.0
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
        tells_servers_apart: every server computes other last bits.
        chain_delays_s: how long the choice of a chain takes, one of these each time.
        hand_over_s: the longest that a hand-over takes.
        hand_over_failures: the share of hand-overs that break off half-way.
        hand_overs: the share of the questions whether a hand-over is better that are answered yes.
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        *,
        latency_s: float = 0.02,
        is_replay_exact: bool = False,
        tells_servers_apart: bool = False,
        chain_delays_s: Sequence[float] = (0.001,),
        hand_over_s: float = 0.0,
        hand_over_failures: float = 0.0,
        hand_overs: float = 1.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.is_replay_exact = is_replay_exact
        self.tells_servers_apart = tells_servers_apart
        self.rng = random.Random(seed)
        self.latency_s = latency_s
        self.chain_delays_s = chain_delays_s
        self.hand_over_s = hand_over_s
        self.hand_over_failures = hand_over_failures
        self.hand_overs = hand_overs
        self.now = 0.0
        self.servers: dict[str, SimServer] = {}
        self.hung: dict[str, list[Callable[[], None]]] = {}
        self.cut: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self.clients: list[SimClient] = []
        self.seen: dict[str, int] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._streams: dict[tuple[str, str, object], deque[tuple[float, Callable[[], None]]]] = {}
        self._names = itertools.count()
        self._view: SwarmView | None = None
        self._view_until = 0.0

    def count(self, what: str) -> None:
        """Notes that something happened, so that a test can tell that it did."""
        self.seen[what] = self.seen.get(what, 0) + 1

    # Time and links.

    def at(self, when: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), act))  # type: ignore[arg-type]

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = max(self.now, until)

    def run_sessions(self, until: float) -> None:
        """Runs until all sessions are done, or it is so late."""
        while self.now < until and not all(client.is_done for client in self.clients):
            self.run(min(until, self.now + 5.0))

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
                self.cut.get((source, target)),
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
        server.faulty_until = float("inf")
        hops = list(server.hops.values())
        server.hops.clear()
        for hop in hops:
            self.send(server.peer, hop.client.name, "break", hop.client.on_broken(hop.id))
        self.at(self.now + 20.0, lambda: self.servers.pop(server.peer, None))

    def hang(self, server: SimServer, seconds: float) -> None:
        self.pause(server.peer, seconds)
        # What it says when it goes on is on its way for a while.
        server.faulty_until = max(server.faulty_until, self.now + seconds + 3 * self.latency_s)

    def pause(self, name: str, seconds: float) -> None:
        """Lets a server, or a client, stand still."""
        if name not in self.hung:
            self.hung[name] = []
            self.at(self.now + seconds, lambda: self._release(self.hung.pop(name)))

    def partition(self, one: str, other: str, seconds: float) -> None:
        self.cut_way(one, other, seconds)
        self.cut_way(other, one, seconds)

    def cut_way(self, source: str, target: str, seconds: float) -> None:
        """Nothing comes from one to the other for a while, but from there it does."""
        way = source, target
        if way not in self.cut:
            self.cut[way] = []
            self.at(self.now + seconds, lambda: self._release(self.cut.pop(way)))

    def break_stream(self, hop: SimHop) -> None:
        """One session's stream from its client to a server breaks, for both."""
        if hop.is_open:
            del hop.server.hops[hop.key]
            self.send(hop.server.peer, hop.client.name, "break", hop.client.on_broken(hop.id))

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

    # Servers.

    def open_hops(self) -> int:
        return sum(len(server.hops) for server in self.servers.values())

    def find_hop(self, peer: str, key: tuple[int, int]) -> SimHop | None:
        server = self.servers.get(peer)
        return None if server is None else server.hops.get(key)

    def open_hop(self, client: SimClient, server: SimServer, action: do.OpenHop) -> SimHop:
        """What a server does that is asked to be a hop."""
        hop = SimHop(
            client,
            action.hop,
            server,
            HopSession(max_tokens=10**6, max_step_tokens=server.max_step_tokens),
            SimBlocks(
                action.at.start,
                action.at.end,
                tells_steps_apart=self.is_replay_exact,
                last_bits=zlib.crc32(server.peer.encode()) if self.tells_servers_apart else 0,
            ),
            action.previous,
        )
        server.hops[hop.key] = hop
        return hop

    def link_next(self, hop: SimHop, request: int, target: str, target_id: int) -> None:
        """What a server does that is told where its output goes."""
        hop.next = None

        def fail() -> None:
            if hop.is_open:
                hop.client.answer(hop, "on_link_failed", request, "next_hop_lost", "no")

        def attach() -> None:
            far = self.find_hop(target, (hop.client.number, target_id))
            if far is None or far.previous != hop.server.peer:
                self.send(target, hop.server.peer, hop.key, fail)
                return
            far.pusher = hop
            self.send(target, hop.server.peer, hop.key, lambda: linked(far))

        def linked(far: SimHop) -> None:
            if hop.is_open:
                hop.next = far
                hop.client.answer(hop, "on_link_done", request)

        # In the order of the steps that came before, as the real server does.
        self.at(hop.server.busy_until, lambda: self.send(hop.server.peer, target, hop.key, attach))

    def hand_over(self, hop: SimHop, action: do.SendHandOver, target: str) -> None:
        """What a server does that is told to copy its cache: block after block, while it serves."""
        client, tokens = hop.client, action.tokens

        def fail(text: str) -> None:
            hop.is_handing_over = False
            self.count("hand-over failed")
            if hop.is_open:
                client.answer(hop, "on_link_failed", action.request, "hand_over_failed", text)

        if hop.is_handing_over:
            client.answer(hop, "on_link_failed", action.request, "hand_over_failed", "another")
            return
        hop.is_handing_over = True
        blocks = len(hop.blocks.digests)
        breaks_at = self.rng.randrange(blocks) if self._is_hand_over_broken() else -1
        pause_s = self.rng.uniform(0.0, self.hand_over_s) / blocks
        copy = SimBlocks(hop.blocks.start, hop.blocks.end)

        def send_block(block: int) -> None:
            if not hop.is_open:
                self.count("source of a hand-over lost")
                return
            if hop.server.peer in self.hung:
                self.hung[hop.server.peer].append(lambda: send_block(block))
            elif block == breaks_at or hop.state.length < tokens:
                fail("it broke off")
            elif block < blocks:
                copy.copy_block(hop.blocks, block, tokens)
                self.at(self.now + pause_s, lambda: send_block(block + 1))
            else:
                self.send(hop.server.peer, target, hop.key, arrive)

        def arrive() -> None:
            far = self.find_hop(target, (client.number, action.target))
            if far is None or far.has_begun or far.state.length:
                fail("not taken")
                return
            for block in range(blocks):
                far.blocks.copy_block(copy, block, tokens)
            far.state.on_handed_over(tokens)
            self.send(target, hop.server.peer, hop.key, confirm)

        def confirm() -> None:
            hop.is_handing_over = False
            if hop.is_open:
                self.count("handed over")
                client.answer(hop, "on_link_done", action.request)

        send_block(0)

    def _is_hand_over_broken(self) -> bool:
        return self.rng.random() < self.hand_over_failures


def run_step(world: World, hop: SimHop, step: do.SendStep) -> None:
    """What a server does with a step that arrived."""
    server, client = hop.server, hop.client
    hop.note_arrival(step)
    values: tuple[int, ...] = step.hidden.values  # type: ignore[attr-defined]
    began_at = max(world.now, server.busy_until)
    server.busy_until = began_at + server.block_s * len(hop.blocks.digests) * (1 + len(values) / 32)
    server.most_queued_s = max(server.most_queued_s, server.busy_until - world.now)

    def done() -> None:
        if not hop.is_open:
            return
        if server.peer in world.hung:
            world.hung[server.peer].append(done)
            return
        hop.has_begun = True
        if hop.is_superseded(step):
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
    """What a server does with what it computed."""
    client, end = hop.client, hop.blocks.end
    if end in (step.until, world.num_blocks):
        rows = {Wanted.NONE: None, Wanted.LAST: SimRows(output.values[-1:])}.get(
            Wanted(step.wanted), output
        )
        client.answer(hop, "on_result", step.number, rows, ())
        return
    target = hop.next
    if target is None:
        client.answer(hop, "on_step_failed", step.number, "next_hop_lost", "no link", None)
    else:
        _push(world, hop, target, step, output)
    client.answer(hop, "on_output", step.number, output)


def _push(world: World, hop: SimHop, target: SimHop, step: do.SendStep, output: SimRows) -> None:
    peer = target.server.peer
    number = step.number
    if hop.server.lie == "swallows" and world.rng.random() < 0.2:
        return
    if hop.server.lie == "poisons" and world.rng.random() < 0.1:
        number = ABSURD
    pushed = do.SendStep(target.id, number, step.position, output, step.wanted, step.until)

    def arrive() -> None:
        if not target.is_open or target.pusher is not hop:
            world.send(peer, hop.server.peer, hop.key, broken)
        elif number > target.pushed:
            target.pushed = number
            run_step(world, target, pushed)

    def broken() -> None:
        if hop.is_open:
            hop.next = None if hop.next is target else hop.next
            hop.client.answer(
                hop, "on_step_failed", number, "next_hop_lost", "the next hop is gone", peer
            )

    world.send(hop.server.peer, peer, hop.key, arrive)

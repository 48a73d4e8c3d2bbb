"""The swarm that failures are caused in, and who is who in it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from benchmarks.failures_draw import HOPS, Strike
from benchmarks.link_emulator import LinkEmulator
from kernels.checkpoint import Checkpoint
from kernels.model_store import find_model
from p2p.wire.control_messages import Generated
from petalctl.client import Client, Generation
from petalctl.daemon_process import DaemonProcess
from petalctl.private_swarm import PrivateSwarm


class Bench:
    """Three hops, two servers for each, and a client of the daemon that routes."""

    def __init__(self, swarm: PrivateSwarm, links: LinkEmulator, client: Client, vocabulary: int):
        self.swarm = swarm
        self.links = links
        self.client = client
        self.vocabulary = vocabulary
        self.servers: dict[str, DaemonProcess] = {}
        for server in swarm.servers:
            self.learn(server)

    def learn(self, server: DaemonProcess) -> None:
        with Client(server.socket) as own:
            self.servers[own.status().peer] = server

    def prompt(self, tokens: int, seed: int = 0) -> list[int]:
        rng = random.Random(f"{tokens} {seed}")
        return [rng.randrange(100, self.vocabulary - 100) for _ in range(tokens)]

    def place_strike(self, generation: Generation, step: int, hop: int) -> Strike:
        """Tells whom a failure of this hop strikes now."""
        middle = int((hop + 0.5) * generation.chain[-1].end / HOPS)
        for part in generation.chain:
            if part.start <= middle < part.end:
                return Strike(step, hop, middle, part.peer)
        raise SystemExit("the chain has a gap")

    def fail(
        self, generation: Generation, step: int, hops: Iterable[int]
    ) -> tuple[list[Strike], list[Strike]]:
        """Lets hops lose all connections; gives the strikes, and those that broke nothing."""
        strikes = [self.place_strike(generation, step, hop) for hop in hops]
        broken = [self.links.break_connections(self.servers[at.peer].name) for at in strikes]
        return strikes, [at for at, count in zip(strikes, broken, strict=True) if not count]


@contextmanager
def open_bench(model: str, threads: int) -> Iterator[Bench]:
    config = Checkpoint(find_model(model).path).config
    borders = [round(config.num_blocks * hop / HOPS) for hop in range(HOPS + 1)]
    spans = list(itertools.pairwise(borders)) * 2
    with (
        LinkEmulator() as links,
        PrivateSwarm(model, spans, threads=threads, links=links) as swarm,
        swarm.client() as client,
    ):
        yield Bench(swarm, links, client, config.vocab_size)


def read_tokens(generation: Generation) -> Iterator[int]:
    """The tokens as they come, those without text too."""
    for event in generation.events():
        if isinstance(event, Generated):
            if len(event.tokens) != 1:
                raise SystemExit("tokens came several at once; failures would be skipped")
            yield event.tokens[0]

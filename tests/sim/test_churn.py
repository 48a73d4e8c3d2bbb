"""A thousand servers that come and go, and two hundred sessions at a time, on an event heap."""

from __future__ import annotations

import random

from tests.helpers.session_client import SimClient
from tests.helpers.session_rows import ListHistory, expected_tokens
from tests.helpers.session_world import World

BLOCKS = 80
SERVERS = 1000
SESSIONS = 200
SECONDS = 600.0
MEAN_LIFE_S = 600.0
BLOCK_S = 0.02


class ChurningWorld(World):
    """A world whose servers die after a while, each replaced by another, and sometimes hang."""

    def fill(self) -> None:
        for _ in range(SERVERS):
            self._come()

    def _come(self) -> None:
        length = self.rng.randint(6, 24)
        start = self.rng.randint(-length // 2, BLOCKS - length // 2)
        start, end = max(0, start), min(BLOCKS, start + length)
        server = self.add_server(start, end, block_s=BLOCK_S * self.rng.uniform(0.3, 2.0))

        def go() -> None:
            self.kill(server)
            self.at(self.now + self.rng.expovariate(1 / 5.0), self._come)

        self.at(self.now + self.rng.expovariate(1 / MEAN_LIFE_S), go)
        if self.rng.random() < 0.05:
            when = self.now + self.rng.uniform(0, SECONDS)
            self.at(when, lambda: self.hang(server, self.rng.uniform(1, 60)))


class Crowd:
    """Sessions that follow each other, each in its place."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.done: list[SimClient] = []
        self.rng = random.Random(7)
        for _ in range(SESSIONS):
            world.at(self.rng.uniform(0, 20), self._begin)

    def _begin(self) -> None:
        prompt = tuple(self.rng.randrange(1000) for _ in range(self.rng.randint(4, 48)))
        client = SimClient(self.world, prompt, self.rng.randint(20, 120))
        client.start()
        self.world.at(self.world.now + 1.0, lambda: self._look(client))

    def _look(self, client: SimClient) -> None:
        if not client.is_done:
            self.world.at(self.world.now + 1.0, lambda: self._look(client))
            return
        self.done.append(client)
        if self.world.now < SECONDS:
            self._begin()


def test_every_session_survives_ten_minutes_of_churn() -> None:
    ListHistory.open_histories = 0
    world = ChurningWorld(BLOCKS, seed=1)
    world.fill()
    crowd = Crowd(world)
    world.run(SECONDS)
    world.run(SECONDS + 900.0)  # those that run come to their end; no new ones begin
    assert len(crowd.done) == len(world.clients) > SESSIONS
    for client in crowd.done:
        assert client.error is None
        assert client.tokens == expected_tokens(BLOCKS, client.prompt, client.count)
    counts = [client.session.counts for client in crowd.done]
    rebuilt = sum(count.moves - 1 for count in counts)
    assert rebuilt > 500  # the churn was felt
    assert world.open_hops() == 0
    assert ListHistory.open_histories == 0
    assert max(server.most_queued_s for server in world.servers.values()) < 60.0

"""What goes wrong in the world of `tests.helpers.session_world`: faults, and hops that lie.

Lies are told by two servers of a world at most, so that others can always complete a session.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from petald.errors import MissingBlocks
from petald.routing import choose_chain
from tests.helpers.session_rows import SimRows
from tests.helpers.session_world import ABSURD, STEP_TOKENS, SimHop, SimServer, World

if TYPE_CHECKING:
    from tests.helpers.session_client import SimClient

Said = tuple[str, tuple[object, ...]]

MOST_LIARS = 2

LIES = (
    "fails",  # it says of good steps that they were none
    "blames",  # and that the hop before it is to blame
    "counts",  # it tells of steps that it cannot know of
    "rows",  # its outputs have more rows than its inputs, or fewer
    "short",  # it takes single tokens only
    "leaves",  # it says with every output that it leaves
    "withholds",  # it copies no output to the client
    "refuses",  # it links with nobody, and says so
    "forgets",  # it says that no step ever came
    "idle",  # it says that the session is idle
    "swallows",  # it passes every fifth output on to the client only
    "poisons",  # it pushes steps under absurd numbers
)


def twist(world: World, hop: SimHop, event: str, arguments: tuple[object, ...]) -> list[Said]:
    """What a hop says where an honest one would say one thing."""
    lie = hop.server.lie
    honest = [(event, arguments)]
    if not lie:
        return honest
    world.count(f"lie: {lie}")
    is_of_step = event in ("on_output", "on_result")
    if lie in ("fails", "blames") and is_of_step and world.rng.random() < 0.3:
        culprit = hop.previous or "nobody" if lie == "blames" else None
        return [("on_step_failed", (arguments[0], "remote_protocol_error", "a lie", culprit))]
    if lie == "counts" and world.rng.random() < 0.2:
        return [*honest, _absurdity(world.rng, arguments)]
    if lie == "rows" and is_of_step and world.rng.random() < 0.3:
        return [_miscounted(world.rng, event, arguments)]
    if lie == "short" and event == "on_opened":
        return [(event, (1,))]
    if lie == "leaves" and is_of_step:
        return [("on_leaving", ()), *honest]
    if lie == "withholds" and event == "on_output":
        return []
    if lie == "refuses" and event == "on_link_done":
        return [("on_link_failed", (arguments[0], "no", "a lie"))]
    if lie == "forgets" and event == "on_probe_reply":
        return [(event, (arguments[0], world.rng.choice((0, -1, ABSURD))))]
    if lie == "idle" and is_of_step and world.rng.random() < 0.3:
        return [("on_step_failed", (0, "session_idle", "a lie", None))]
    return honest


def _absurdity(rng: random.Random, arguments: tuple[object, ...]) -> Said:
    known = arguments[0] if arguments and isinstance(arguments[0], int) else 1
    number = rng.choice((ABSURD, 0, -1, 1, known, known - 1, known + 1, known + 7))
    # Of the right number, they would be wrong values, which nobody can tell.
    rows = SimRows(tuple(range(rng.randrange(STEP_TOKENS + 1, 2 * STEP_TOKENS))))
    return rng.choice(
        (
            ("on_output", (number, rows)),
            ("on_result", (number, rng.choice((None, rows)), ())),
            ("on_step_failed", (number, "next_hop_lost", "a lie", rng.choice((None, "x")))),
            ("on_step_failed", (number, "remote_protocol_error", "a lie", "x")),
            ("on_link_done", (number,)),
            ("on_link_failed", (number, "no", "a lie")),
            ("on_probe_reply", (number, number)),
            ("on_opened", (number,)),
        )
    )


def _miscounted(rng: random.Random, event: str, arguments: tuple[object, ...]) -> Said:
    number, rows, *rest = arguments
    values = rows.values if isinstance(rows, SimRows) else ()
    twisted = SimRows(rng.choice((values[1:] or (1, 2), (*values, 1), (*values, *values, 1))))
    return event, (number, twisted, *rest)


# Faults.


def strike(world: World, kind: str, one: int, other: int, seconds: float) -> None:
    """Does one thing that goes wrong; ``one`` and ``other`` choose to whom."""
    servers = list(world.servers.values())
    server, second = servers[one % len(servers)], servers[other % len(servers)]
    client = world.clients[other % len(world.clients)]
    in_use = [hop.server for hop in client.hops()]
    if in_use and one % 2:  # what is not in use breaks unnoticed
        server = in_use[one // 2 % len(in_use)]
    world.count(kind)
    STRIKES[kind](world, server, second, client, seconds)


def _kill(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    if server.is_alive:
        world.kill(server)
        start, end, block_s = server.start, server.end, server.block_s
        world.at(world.now + 2.0, lambda: world.add_server(start, end, block_s=block_s))


def _cut_way(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    names = [server.peer, client.name if seconds < 4 else second.peer]
    world.rng.shuffle(names)
    world.cut_way(*names, seconds)


def _break_stream(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    for hop in client.hops():
        if hop.server is server:
            world.break_stream(hop)


def _break_all(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    for hop in client.hops():
        world.break_stream(hop)


def _break_link(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    """The way on is found broken; at once, or by the next step that goes there."""
    for hop in client.hops():
        if hop.server is server:
            hop.next = None
            if seconds < 4:
                client.answer(hop, "on_step_failed", 0, "next_hop_lost", "it broke", None)


def _propose(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    avoided = {hop.peer for hop in client.session.chain[:1]}
    try:
        chain = choose_chain(world.view(), needed_tokens=1, excluded=avoided)
    except MissingBlocks:
        return
    client.feed("propose", chain)


def _is_free_to_lie(world: World, server: SimServer) -> bool:
    liars = [each for each in world.servers.values() if each.lie or each.refusals]
    return server in liars or len(liars) < MOST_LIARS


def _lie(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    if _is_free_to_lie(world, server):
        server.lie = world.rng.choice(LIES)
        server.faulty_until = float("inf")


def _refuse(
    world: World, server: SimServer, second: SimServer, client: SimClient, seconds: float
) -> None:
    if _is_free_to_lie(world, server):
        server.refusals = int(seconds)
        server.faulty_until = float("inf")


def tell_leaving(server: SimServer) -> None:
    for hop in list(server.hops.values()):
        hop.client.answer(hop, "on_leaving")


STRIKES = {
    "kill": _kill,
    "hang": lambda world, server, second, client, seconds: world.hang(server, seconds),
    "cut servers": lambda world, server, second, client, seconds: world.partition(
        server.peer, second.peer, seconds
    ),
    "cut client": lambda world, server, second, client, seconds: world.partition(
        server.peer, client.name, seconds
    ),
    "cut way": _cut_way,
    "pause": lambda world, server, second, client, seconds: world.pause(client.name, seconds),
    "break stream": _break_stream,
    "break all": _break_all,
    "break link": _break_link,
    "refuse": _refuse,
    "lie": _lie,
    "cancel": lambda world, server, second, client, seconds: client.cancel_all(),
    "rewind": lambda world, server, second, client, seconds: client.rewind(
        seconds / 8.0, cancels=second.start % 2 == 0
    ),
    "leave": lambda world, server, second, client, seconds: tell_leaving(server),
    "repeat": lambda world, server, second, client, seconds: client.repeat_last(),
    "propose": _propose,
}

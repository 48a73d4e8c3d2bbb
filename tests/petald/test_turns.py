from __future__ import annotations

import trio
import trio.testing

from petald.turns import Turns


async def test_peers_take_turns_however_much_they_ask(autojump_clock: trio.testing.MockClock):
    turns, order = Turns(), []

    async def use(peer: str) -> None:
        async with turns.take(peer):
            order.append(peer)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for peer in "aaaa":
            nursery.start_soon(use, peer)
        await trio.sleep(0.1)
        for peer in "bbc":
            nursery.start_soon(use, peer)
            await trio.sleep(0.1)
    assert "".join(order) == "aabcaba"


async def test_who_is_cancelled_while_waiting_or_when_it_is_given_blocks_nobody(
    autojump_clock: trio.testing.MockClock,
):
    turns, order = Turns(), []

    async def use(peer: str, scope: trio.CancelScope) -> None:
        with scope:
            async with turns.take(peer):
                order.append(peer)
                await trio.sleep(1)

    scopes = {peer: trio.CancelScope() for peer in "abcd"}
    async with trio.open_nursery() as nursery:
        for peer, scope in scopes.items():
            nursery.start_soon(use, peer, scope)
            await trio.sleep(0.1)
        scopes["b"].cancel()
        await trio.sleep(0.5)
        scopes["a"].cancel()  # gives to c, which is cancelled before it runs
        scopes["c"].cancel()
    assert order == ["a", "d"]
    with trio.fail_after(1):
        async with turns.take("a"):
            pass

"""Codecs of messages, chosen by their senders: in sessions with real blocks, in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.checkpoint import Checkpoint
from p2p.wire.session_messages import Wanted
from petald.codec_choice import AUTO
from petald.errors import BadRequest, MissingBlocks
from petald.message_codecs import MessageCodecs
from petald.session_settings import Replay
from tests.helpers.chain_world import CONFIG, Swarm, open_swarm
from tests.helpers.tiny_models import make_model, save_model

NARROW_BYTES_PER_S = 1e5
SPANS = [(0, 1), (1, 3), (3, 4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


def narrow(swarm: Swarm, one: int | None, other: int | None) -> None:
    """Makes a link narrow; none stands for the client."""
    peers = [
        swarm.client.peer if server is None else swarm.networks[server].peer
        for server in (one, other)
    ]
    swarm.hub.link(*peers).bytes_per_s = NARROW_BYTES_PER_S


async def run(swarm: Swarm, *, codec: str, kill: int | None = None) -> torch.Tensor:
    """Some steps; gives the rows that came out, ``[40, 48]``."""
    codecs = MessageCodecs(swarm.client)
    session = await swarm.open(
        chain=swarm.hops()[:3], codec=codec, codecs=codecs, replay=Replay.AUTO, max_tokens=40
    )
    outputs = []
    at = 0
    for size in (20, 7, *[1] * 13):
        if kill is not None and at == 30:
            swarm.hub.kill(swarm.networks[kill].peer)
        hidden = await session.encode(swarm.hidden_SD[at : at + size])
        result = await session.run_step(hidden, position=at, wanted=Wanted.ALL)
        outputs.append(swarm.decode(result.hidden))
        at += size
    swarm.codecs.append(codecs)  # the client's, as the last
    return torch.cat(outputs)


def error(swarm: Swarm, output_SD: torch.Tensor) -> float:
    return float((output_SD - swarm.expected_SD).norm() / swarm.expected_SD.norm())


async def test_each_link_gets_its_own_codec(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, *SPANS) as swarm:
        narrow(swarm, 0, 1)
        output_SD = await run(swarm, codec=AUTO)
        assert [set(codecs.sent) for codecs in swarm.codecs] == [
            {"int8"},  # which goes to the next hop over the narrow link
            {"raw"},
            {"raw"},
            {"raw"},
        ]
        assert 0 < error(swarm, output_SD) < 0.02


async def test_the_link_on_which_copies_go_to_the_client_counts_too(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, *SPANS) as swarm:
        narrow(swarm, None, 1)
        await run(swarm, codec=AUTO)
        assert [set(codecs.sent) for codecs in swarm.codecs] == [
            {"raw"},
            {"int8"},
            {"raw"},
            {"raw"},
        ]


async def test_wide_links_lose_nothing(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, *SPANS) as swarm:
        output_SD = await run(swarm, codec=AUTO)
        assert set().union(*(codecs.sent for codecs in swarm.codecs)) == {"raw"}
        assert error(swarm, output_SD) < 1e-5


async def test_a_server_may_prefer_a_codec_where_the_client_has_no_wish(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, *SPANS, config=replace(CONFIG, codec="int8")) as swarm:
        await run(swarm, codec=AUTO)
        assert [set(codecs.sent) for codecs in swarm.codecs] == [{"int8"}] * 3 + [{"raw"}]
        swarm.codecs.pop()
        await run(swarm, codec="raw")
        assert all(codecs.sent["raw"] for codecs in swarm.codecs)


@pytest.mark.parametrize("dead", [0, 1, 2])
async def test_a_session_in_several_codecs_recovers_to_the_same_bits(
    checkpoint: Checkpoint, dead: int
) -> None:
    async def go(kill: int | None) -> tuple[torch.Tensor, list[int]]:
        async with open_swarm(checkpoint, *SPANS, *SPANS) as swarm:
            for spare in (0, 3):
                for other in (1, 4):
                    narrow(swarm, spare, other)
            output_SD = await run(swarm, codec=AUTO, kill=kill)
            assert "int8" in swarm.codecs[0].sent
            return output_SD, [hosted.prefill_steps for hosted in swarm.hosted[3:]]

    undisturbed_SD, _ = await go(None)
    disturbed_SD, prefills = await go(dead)
    assert torch.equal(disturbed_SD, undisturbed_SD)
    assert prefills[dead] == 2  # step by step: something lossy was on the way


async def test_an_output_in_another_codec_than_asked_for_is_a_lie(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, *SPANS) as swarm:
        bad = swarm.codecs[1]
        bad.choose = lambda rows_SD, asked, *, to: "int8"  # type: ignore[method-assign]
        with pytest.raises(MissingBlocks):
            await run(swarm, codec="raw")
        assert swarm.penalised == [swarm.networks[1].peer]


async def test_rows_that_are_not_finite_are_refused_before_they_are_sent(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, *SPANS) as swarm:
        for codec in ("raw", "int8"):
            session = await swarm.open(codec=codec)
            rows_SD = swarm.hidden_SD[:2].clone()
            rows_SD[1, 3] = float("inf")
            with pytest.raises(BadRequest, match="finite"):
                await session.encode(rows_SD)
            assert session.is_open
            await session.close()

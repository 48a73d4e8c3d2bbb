"""A swarm whose servers keep their weights, and write their outputs, each in its own way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2p.wire.control_messages import CodecCount
from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm, Value
from tests.swarm.conftest import even_spans, wait_until_free

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]

PROMPT = "Once upon a time, in a small village by the sea,"
NEW_TOKENS = 96

FIRST, MIDDLE, LAST = even_spans(3)
SERVERS: tuple[tuple[tuple[int, int], dict[str, Value]], ...] = (
    (FIRST, {"dtype": "float32", "codec": "int8"}),
    (MIDDLE, {"dtype": "auto", "quant": "int8", "codec": "bfloat16"}),
    (LAST, {"dtype": "auto", "quant": "nf4", "codec": "auto"}),
    (FIRST, {"dtype": "auto", "quant": "int4", "codec": "dynamic8"}),
    (MIDDLE, {"dtype": "bfloat16", "codec": "raw"}),
    (LAST, {"dtype": "auto", "quant": "int8", "codec": "int8"}),
)


def sent(server: Path) -> tuple[CodecCount, ...]:
    with Client(server) as own:
        return own.status().sent


def test_formats_and_codecs_mix_and_recover_between_them(model_folder: Path) -> None:
    with PrivateSwarm(str(model_folder), spans=[], threads=1, route={"codec": "auto"}) as swarm:
        servers = [swarm.add_server(span, **settings) for span, settings in SERVERS]
        swarm.wait_covered()
        command = [sys.executable, "-m", "petalctl", "--socket", str(swarm.router.socket), "swarm"]
        page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        lines = [line.split() for line in page.stdout.splitlines() if "serving" in line]
        shown = {(blocks, *rest[:-4]) for _, blocks, _, *rest in lines}
        assert shown == {
            ("0:10", "float32", "int8"),
            ("10:20", "bfloat16", "int8", "bfloat16"),
            ("20:30", "bfloat16", "nf4", "auto"),
            ("0:10", "bfloat16", "int4", "dynamic8"),
            ("10:20", "bfloat16", "raw"),
            ("20:30", "bfloat16", "int8", "int8"),
        }, page.stdout

        peers = {}
        for server in servers:
            with Client(server.socket) as own:
                peers[own.status().peer] = server
        with swarm.client() as client:
            generation = client.generate(prompt=PROMPT, max_new_tokens=NEW_TOKENS)
            for strike_at in (20, 40, 60):
                for _ in generation.events():
                    if len(generation.tokens) >= strike_at:
                        break
                hop = generation.chain[(20, 40, 60).index(strike_at)]
                os.kill(peers[hop.peer].pid, signal.SIGKILL)
            result = generation.result()
        assert len(result.tokens) == NEW_TOKENS
        assert len([move for move in result.moves if move.reason != "better"]) >= 3
        alive = [server for server in servers if server.is_running]
        assert len(alive) == 3
        for server in alive:
            settings = SERVERS[servers.index(server)][1]
            used = {count.codec for count in sent(server.socket)}
            wanted = {"raw", "int8"} if settings["codec"] == "auto" else {settings["codec"]}
            assert used
            assert used <= wanted
        assert "sea" in result.text or "village" in result.text or "the" in result.text
        wait_until_free(swarm)

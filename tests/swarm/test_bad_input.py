"""What is wrong gets a clear sentence and a stable code, and harms nobody else."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from p2p.wire.control_messages import Generate, StatusRequest
from p2p.wire.message import encode_message
from petalctl.client import Client
from petalctl.errors import JobError
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import PROMPTS, even_spans, wait_until_free

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"prompt": "hi", "model": "no-such-model"}, "unknown_model", "no-such-model"),
        ({"prompt": ""}, "bad_request", "empty"),
        ({"prompt": "word " * 9000}, "prompt_too_long", "8192"),
        ({"prompt_tokens": [49152]}, "bad_request", "49152"),
        ({"prompt": "hi", "max_new_tokens": 0}, "bad_request", "at least one"),
        ({"prompt": "hi", "temperature": -1.0}, "bad_sampling", "temperature"),
        ({"prompt": "hi", "temperature": 1.0, "top_p": 0.0}, "bad_sampling", "top_p"),
        ({"prompt": "hi", "repetition_penalty": -2.0}, "bad_sampling", "repetition_penalty"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_job_is_refused_and_the_next_one_runs(
    client: Client, options: dict[str, object], code: str, said: str
) -> None:
    with pytest.raises(JobError, match=said) as caught:
        client.generate(**options).result()  # type: ignore[arg-type]
    assert caught.value.code == code
    assert client.generate(prompt="hi", max_new_tokens=1).result().tokens


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 2**31),
        struct.pack(">I", 5) + b"hello",
        struct.pack(">I", 100) + b"half",
        b"GET / HTTP/1.1\r\n\r\n",
        encode_message(StatusRequest(job=1))[:-3],
        encode_message(Generate(job=1, prompt="x"))[:4] + b"\xff" * 200,
    ],
    ids=["oversized", "no-msgpack", "half-frame", "http", "cut", "garbage"],
)
def test_bytes_that_are_no_request_harm_nobody(
    swarm: PrivateSwarm, client: Client, data: bytes
) -> None:
    running = client.generate(prompt=PROMPTS[0], max_new_tokens=8)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(swarm.router.socket))
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(20)
        while raw.recv(4096):
            pass
    assert len(running.result().tokens) == 8


def test_an_app_that_leaves_frees_every_hop(swarm: PrivateSwarm) -> None:
    client = swarm.client()
    generation = client.generate(prompt=PROMPTS[2], max_new_tokens=400)
    for _ in zip(range(5), generation, strict=False):
        pass
    with Client(swarm.servers[0].socket) as own:
        span = own.status().span
    assert span is not None
    assert span.sessions == 1
    assert span.free_cache_tokens < span.cache_tokens
    client.close()
    wait_until_free(swarm)


def test_an_app_that_is_killed_frees_every_hop(swarm: PrivateSwarm) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "petalctl", "--socket", str(swarm.router.socket)),
            *("generate", "--raw", "--max-new-tokens", "400", PROMPTS[2]),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(5)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stdout.close()
    wait_until_free(swarm)


def test_a_cancelled_answer_leaves_the_session(client: Client, swarm: PrivateSwarm) -> None:
    generation = client.generate(prompt=PROMPTS[2], max_new_tokens=300, session="chat")
    for _ in zip(range(5), generation, strict=False):
        pass
    generation.close()
    result = client.generate(prompt=PROMPTS[2] + " there", session="chat", max_new_tokens=4)
    assert result.result().timings.prefilled_tokens < 5
    client.close_session("chat")
    wait_until_free(swarm)


def test_uncovered_blocks_are_named(model_folder: Path) -> None:
    with (
        PrivateSwarm(str(model_folder), spans=[(0, 10), (20, 30)], threads=1) as swarm,
        swarm.client() as client,
        pytest.raises(JobError, match="10:20") as caught,
    ):
        client.generate(prompt="hi", max_wait_s=0).result()
    assert caught.value.code == "missing_blocks"


def test_a_full_server_is_said(model_folder: Path) -> None:
    with (
        PrivateSwarm(
            str(model_folder), spans=even_spans(1), threads=1, serve={"cache_tokens": 128}
        ) as swarm,
        swarm.client() as client,
    ):
        with pytest.raises(JobError, match="no room for") as caught:
            client.generate(prompt="hi", max_new_tokens=299, max_wait_s=0).result()
        assert caught.value.code == "missing_blocks"
        assert client.generate(prompt="hi", max_new_tokens=2).result().tokens

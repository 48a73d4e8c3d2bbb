"""Servers with a GPU: real daemons, a random model, and somebody else who wants the GPU."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from p2p.wire.control_messages import ChainMove, Progress
from petalctl.client import Client
from petalctl.daemon_process import DaemonProcess
from petalctl.private_swarm import PrivateSwarm, Value
from tests.helpers.gpu import needs_gpu
from tests.helpers.gpu_load import busy_gpu
from tests.helpers.tiny_models import layers_of, make_model, save_model
from tests.helpers.train_stand_in import byte_tokenizer
from tests.swarm.conftest import wait_until_free
from tests.swarm.test_lending import peer_of, petalctl, wait_left, wait_state, wait_swarm_state

pytestmark = [pytest.mark.swarm, needs_gpu, pytest.mark.timeout(170)]

GPU_SERVER: dict[str, Value] = {"device": "cuda", "cache_tokens": 16384}
PROMPT = "Once upon a time, in a small village by the sea,"
NEW_TOKENS = 80
NO_END = {"eos_token_id": None}
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
CLOSE = {"float32": 1e-4, "bfloat16": 0.02, "nf4": 0.8, "int8": 0.1}
"""What may be lost by a choice; chosen blindly, it would be some 3."""


@pytest.fixture(scope="module")
def reference() -> Any:
    """Hugging Face's model, in float32 on a processor; its blocks make errors little larger."""
    model: Any = make_model("llama", **SHAPE, **NO_END)
    with torch.no_grad():
        for parameter in layers_of(model).parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(reference, tmp_path_factory.mktemp("model"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder  # no token ends a text


def distance(reference: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    """How much less than the largest the logits of the tokens were, in deviations, on average."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logits_SV = reference(ids).logits[0, len(prompt) - 1 : -1]
    chosen_S = logits_SV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((logits_SV.max(dim=1).values - chosen_S) / logits_SV.std(dim=1)).mean())


def check(swarm: PrivateSwarm, reference: Any, most: float) -> None:
    with swarm.client() as client:
        ids = tuple(range(3, 60))
        result = client.generate(prompt_tokens=ids, max_new_tokens=NEW_TOKENS).result()
        assert len(result.tokens) == NEW_TOKENS
        away = distance(reference, ids, tuple(result.tokens))
        print(f"distance {away:.4f}; {result.timings}")
        assert away < most


def log_of(server: DaemonProcess) -> str:
    return server.log_path.read_text("utf-8", "replace")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4", "int8"])
def test_a_gpu_generates_what_a_processor_would(folder: Path, reference: Any, kind: str) -> None:
    settings: dict[str, Value] = {**GPU_SERVER, "codec": "int8" if kind == "int8" else "raw"}
    if kind in ("nf4", "int8"):
        settings["quant"] = kind
    dtype = "float32" if kind == "float32" else "auto"
    spans = [(0, 5), (5, 8)] if kind == "float32" else [(0, 8)]
    route: dict[str, Value] = {"codec": "auto"}
    with PrivateSwarm(str(folder), spans=spans, dtype=dtype, serve=settings, route=route) as swarm:
        swarm.wait_covered()
        check(swarm, reference, CLOSE[kind])
        wait_until_free(swarm)
        for server in swarm.servers:
            log = log_of(server)
            print("\n".join(line for line in log.splitlines() if "span loaded" in line))
            assert "WARNING" not in log.upper(), log
            with Client(server.socket) as own:
                used = {count.codec for count in own.status().sent}
            assert used == {settings["codec"]}
        said = petalctl(swarm.router.socket, "generate", "--raw", "--max-new-tokens", "5", PROMPT)
        assert said.returncode == 0, said.stderr


LEND: dict[str, Value] = {"max_load": 0.4, "busy_s": 4.0, "idle_s": 3.0, "yield_within_s": 60.0}


class LongGeneration:
    """One that is read in a thread of its own, until it is told to stop."""

    def __init__(self, swarm: PrivateSwarm, prompt: tuple[int, ...]) -> None:
        self.tokens: tuple[int, ...] = ()
        self.chain: tuple[str, ...] = ()
        self.moves: list[ChainMove] = []
        self.error: BaseException | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(swarm, prompt))
        self._thread.start()

    def _read(self, swarm: PrivateSwarm, prompt: tuple[int, ...]) -> None:
        try:
            with (
                swarm.client() as client,
                client.generate(prompt_tokens=prompt, max_new_tokens=8000) as generation,
            ):
                for event in generation.events():
                    self.tokens = generation.tokens
                    self.chain = tuple(hop.peer for hop in generation.chain)
                    if isinstance(event, Progress) and event.move is not None:
                        self.moves.append(event.move)
                    if self._is_over.is_set():
                        return
        except BaseException as error:
            self.error = error

    def wait_tokens(self, count: int, within_s: float = 20.0) -> None:
        ends_at = time.monotonic() + within_s
        while len(self.tokens) < count:
            assert self.error is None, self.error
            assert time.monotonic() < ends_at, f"{len(self.tokens)} tokens were made"
            time.sleep(0.01)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def test_a_server_makes_way_for_others_on_its_gpu_and_comes_back(
    folder: Path, reference: Any
) -> None:
    """The spare one computes on the processor, where nobody is in its way."""
    ids = tuple(range(3, 60))
    spare_serve: dict[str, Value] = {**GPU_SERVER, "device": "cpu"}
    with PrivateSwarm(str(folder), spans=[(0, 8)], serve=spare_serve, threads=2) as swarm:
        spare = swarm.servers[0]
        lender = swarm.add_server((0, 8), lend=LEND, device="cuda")
        assert petalctl(spare.socket, "pause").returncode == 0  # so that the lender is chosen
        swarm.wait_covered()
        peer = peer_of(lender)
        with swarm.client() as client:
            ends_at = time.monotonic() + 10  # its own work is not that of others
            while time.monotonic() < ends_at:
                result = client.generate(prompt_tokens=ids, max_new_tokens=300).result()
                assert [hop.peer for hop in result.chain] == [peer]
        assert "not lending" not in log_of(lender)
        print(f"alone: {result.timings.steps_per_s:.0f} steps/s")
        with busy_gpu():
            began_at = time.monotonic()
            generation = LongGeneration(swarm, ids)
            try:
                generation.wait_tokens(5)
                assert generation.chain == (peer,)
                assert petalctl(spare.socket, "resume").returncode == 0
                wait_state(lender, "paused", within_s=40.0)
                print(f"made way after {time.monotonic() - began_at:.1f} s")
                status = petalctl(lender.socket, "status")
                assert "others use more than 40% of its device" in status.stdout
                wait_swarm_state(swarm, peer, "leaving")
                wait_left(lender, within_s=40.0)
                generation.wait_tokens(len(generation.tokens) + 20)
            finally:
                generation.stop()
            time.sleep(5)
            wait_state(lender, "paused", within_s=0.0)
        assert generation.error is None
        print(f"{len(generation.tokens)} tokens; {generation.moves}")
        assert "leaving" in [move.reason for move in generation.moves]
        assert peer not in generation.chain
        assert distance(reference, ids, generation.tokens) < CLOSE["float32"]
        began_at = time.monotonic()
        wait_state(lender, "serving", within_s=40.0)
        print(f"came back after {time.monotonic() - began_at:.1f} s")
        wait_swarm_state(swarm, peer, "serving")
        assert petalctl(spare.socket, "pause").returncode == 0
        check(swarm, reference, CLOSE["float32"])


def test_a_server_without_room_says_so(folder: Path) -> None:
    """A cache for 80 GiB and more is more than this GPU has free."""
    command = [
        *(sys.executable, "-m", "petald", "--serve-model", str(folder)),
        *("--serve-device", "cuda", "--serve-blocks", "0:8"),
        *("--serve-cache-tokens", str(1 << 30), "--daemon-state-dir", str(folder / "state")),
        *("--daemon-socket", str(folder / "s"), "--network-listen", "/ip4/127.0.0.1/tcp/0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    print(done.returncode, done.stderr[-600:])
    assert done.returncode == 1
    assert "set [serve] cache_tokens lower" in done.stderr

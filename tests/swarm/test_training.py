"""Forward and backward through real daemons, against Hugging Face's and PEFT's local models."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.model_config import load_model_config
from p2p.wire.tensor import WireTensor
from petalctl.client import Client
from petalctl.daemon_process import DaemonProcess
from petalctl.errors import JobError
from petalctl.passes import TrainingClient
from petalctl.private_swarm import PrivateSwarm
from petalctl.torch import DeepPrompt, RemoteAdapter, RemoteBlocks, RemoteCausalLM, RemoteLora
from petalctl.torch.soft_prompt import SoftPrompt
from tests.swarm.conftest import even_spans

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
]

TOKENS = 24


@pytest.fixture(scope="module")
def swarm3(model_folder: Path) -> Iterator[PrivateSwarm]:
    with PrivateSwarm(str(model_folder), spans=even_spans(3) * 2, threads=1) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def swarm1(model_folder: Path) -> Iterator[PrivateSwarm]:
    with PrivateSwarm(str(model_folder), spans=even_spans(1), threads=1) as swarm:
        yield swarm


@pytest.fixture(params=["swarm1", "swarm3"], ids=["1 hop", "3 hops"])
def client(request: pytest.FixtureRequest) -> Iterator[TrainingClient]:
    swarm: PrivateSwarm = request.getfixturevalue(request.param)
    with TrainingClient(swarm.router.socket) as client:
        yield client


@pytest.fixture(scope="module")
def hugging_face(model_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.requires_grad_(False)
    return model


def make_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask, labels; padding on the right, and on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 9000, (4, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, :9] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-3) -> None:
    """Equal to rounding, which thirty blocks of float32 make larger."""
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_gradients_of_inputs(client: TrainingClient, hugging_face: Any, model_folder: Path) -> None:
    ids, mask, labels = make_batch()
    model = RemoteCausalLM.from_pretrained(str(model_folder), client=client)
    ours = model.embed_tokens(ids).detach().requires_grad_()
    output = model(inputs_embeds=ours, attention_mask=mask, labels=labels)
    output.loss.backward()
    theirs = ours.detach().clone().requires_grad_()
    expected = hugging_face(inputs_embeds=theirs, attention_mask=mask, labels=labels)
    expected.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    close(output.logits[mask == 1], expected.logits[mask == 1])
    close(ours.grad, theirs.grad)


def test_gradients_of_lora(
    client: TrainingClient, hugging_face: Any, model_folder: Path, tmp_path: Path
) -> None:
    """What was saved is loaded by PEFT, whose gradients are those that came back."""
    ids, mask, labels = make_batch(1)
    lora = RemoteLora(load_model_config(model_folder), targets=("all-linear",), rank=4, seed=3)
    with torch.no_grad():
        noise = torch.randn(lora.values.shape, generator=torch.Generator().manual_seed(4))
        lora.values += 0.02 * noise
    model = RemoteCausalLM.from_pretrained(str(model_folder), client=client, adapter=lora)
    loss = model(ids, mask, labels, return_logits=False).loss
    loss.backward()
    lora.save(tmp_path, base_model=str(model_folder))
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(hugging_face), tmp_path, is_trainable=True
    )
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    gradients = RemoteAdapter(lora.config, lora.form, lora.values.grad)
    named = dict(theirs.named_parameters())
    for block in (0, 11, 29):
        for name, ours in gradients.tensors(block).items():
            target, _, which = name.partition(".")
            part = "self_attn" if target[0] in "qkvo" else "mlp"
            path = f"base_model.model.model.layers.{block}.{part}.{target}.{which}.default.weight"
            close(ours, named[path].grad)


def test_gradients_of_prompts(
    client: TrainingClient, hugging_face: Any, model_folder: Path, tmp_path: Path
) -> None:
    ids, mask, labels = make_batch(2)
    deep = DeepPrompt(load_model_config(model_folder), tokens=5, seed=5)
    model = RemoteCausalLM.from_pretrained(str(model_folder), client=client, adapter=deep)
    loss = model(ids, mask, labels, return_logits=False).loss
    loss.backward()
    deep.save(tmp_path, base_model=str(model_folder))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hugging_face), tmp_path)
    prompt = theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    by_block = prompt.grad.view(5, 30, 2, -1).permute(1, 2, 0, 3).reshape(30, -1)
    close(deep.values.grad, by_block)


def test_gradients_of_a_soft_prompt(
    client: TrainingClient, hugging_face: Any, model_folder: Path
) -> None:
    ids, mask, labels = make_batch(3)
    soft = SoftPrompt(load_model_config(model_folder), tokens=6, seed=7)
    model = RemoteCausalLM.from_pretrained(str(model_folder), client=client, soft_prompt=soft)
    loss = model(ids, mask, labels, return_logits=False).loss
    loss.backward()
    prompt = soft.prompt.detach().clone().requires_grad_()
    embeds = torch.cat((prompt.expand(4, -1, -1), model.embed_tokens(ids)), dim=1)
    ones, ignored = mask.new_ones(4, 6), labels.new_full((4, 6), -100)
    expected = hugging_face(
        inputs_embeds=embeds,
        attention_mask=torch.cat((ones, mask), dim=1),
        labels=torch.cat((ignored, labels), dim=1),
    )
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    close(soft.prompt.grad, prompt.grad)


def test_hidden_states_after_blocks_and_a_module_between_them(
    client: TrainingClient, hugging_face: Any, model_folder: Path
) -> None:
    ids, mask, _ = make_batch(4)
    model = RemoteCausalLM.from_pretrained(str(model_folder), client=client)
    with torch.no_grad():
        output = model(ids, mask, output_hidden_states=(0, 7, 30))
        expected = hugging_face(ids, mask, output_hidden_states=True)
    assert sorted(output.hidden_states) == [0, 7, 30]
    close(output.hidden_states[7][mask == 1], expected.hidden_states[7][mask == 1])
    module = torch.nn.Linear(576, 576)
    model.insert_after(12, module)
    model(ids, mask, ids, return_logits=False).loss.backward()
    theirs = copy.deepcopy(module)
    theirs.zero_grad()
    layer = hugging_face.model.layers[12]
    hook = layer.register_forward_hook(lambda _m, _i, output: theirs(output))
    hugging_face(ids, mask, labels=ids).loss.backward()
    hook.remove()
    close(module.weight.grad, theirs.weight.grad)


class StrikingClient(TrainingClient):
    """A client that does something when the first rows of a pass come."""

    strike: Callable[[], None] | None = None

    def _striking(self, on_rows: Callable[[Any], None]) -> Callable[[Any], None]:
        def take(rows: Any) -> None:
            strike, self.strike = self.strike, None
            if strike is not None:
                strike()
            on_rows(rows)

        return take

    def run_forward(self, request: Any, rows: WireTensor, *, on_rows: Any, **more: Any) -> Any:
        return super().run_forward(request, rows, on_rows=self._striking(on_rows), **more)

    def run_backward(self, forward: int, rows: WireTensor, *, on_rows: Any, **more: Any) -> Any:
        return super().run_backward(forward, rows, on_rows=self._striking(on_rows), **more)


class Passes:
    """One batch forward and back, with few pieces under way, so that there is time to strike."""

    expected: list[torch.Tensor]

    def __init__(self, folder: Path) -> None:
        self.lora = RemoteLora(load_model_config(folder), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            self.lora.values += 0.01 * torch.randn(self.lora.values.shape, generator=generator)
        self.folder = str(folder)
        self.hidden_BSD, self.gradient_BSD = (
            torch.randn(24, 32, 576, generator=generator) for _ in range(2)
        )

    def use(self, client: StrikingClient) -> None:
        self.client = client
        self.blocks = RemoteBlocks(
            self.folder, client=client, adapter=self.lora, pieces_under_way=1
        )

    def run(
        self,
        *,
        in_forward: Callable[[], None] | None = None,
        between: Callable[[], None] | None = None,
        in_backward: Callable[[], None] | None = None,
    ) -> list[torch.Tensor]:
        self.lora.values.grad = None
        leaf_BSD = self.hidden_BSD.clone().requires_grad_()
        self.client.strike = in_forward
        output_BSD = self.blocks(leaf_BSD)
        self.repeated = self.blocks.timings.repeated
        self.moves = list(self.blocks.moves)
        if between is not None:
            between()
        self.client.strike = in_backward
        output_BSD.backward(self.gradient_BSD)
        self.repeated += self.blocks.timings.repeated
        self.moves += self.blocks.moves
        assert leaf_BSD.grad is not None
        assert self.lora.values.grad is not None
        return [output_BSD.detach(), leaf_BSD.grad, self.lora.values.grad]


@pytest.fixture(scope="module")
def passes(swarm3: PrivateSwarm, model_folder: Path) -> Passes:
    passes = Passes(model_folder)
    with StrikingClient(swarm3.router.socket) as client:
        passes.use(client)
        passes.expected = passes.run()
    assert not passes.repeated
    return passes


@pytest.mark.parametrize(
    ("strike", "when", "third"),
    [
        (signal.SIGKILL, "in_forward", 0),
        (signal.SIGKILL, "in_forward", 2),
        (signal.SIGKILL, "between", 1),
        (signal.SIGKILL, "in_backward", 0),
        (signal.SIGKILL, "in_backward", 2),
        (signal.SIGSTOP, "in_forward", 1),
    ],
)
def test_results_are_the_same_whatever_fails(
    swarm3: PrivateSwarm, passes: Passes, when: str, third: int, strike: signal.Signals
) -> None:
    with StrikingClient(swarm3.router.socket) as client:
        passes.use(client)
        passes.blocks(passes.hidden_BSD[:1])  # tells who has which blocks
        peers = _peers(swarm3)
        struck: list[DaemonProcess] = []

        def hit() -> None:
            chosen = next(peers[peer] for peer in _users(passes.blocks, third) if peer in peers)
            struck.append(chosen)
            os.kill(chosen.pid, strike)

        try:
            results = passes.run(**{when: hit})
        finally:
            for victim in struck:
                if strike is signal.SIGKILL:
                    assert victim.span is not None
                    swarm3.add_server(victim.span)
                else:
                    os.kill(victim.pid, signal.SIGCONT)
        assert struck
        for ours, expected in zip(results, passes.expected, strict=True):
            close(ours, expected, 1e-4)
        assert passes.repeated, "it was struck when its work was done"
        assert any(move.start <= third * 10 < move.end for move in passes.moves)


def _peers(swarm: PrivateSwarm) -> dict[str, DaemonProcess]:
    found = {}
    for server in swarm.servers:
        if server.is_running:
            with Client(server.socket) as own:
                found[own.status().peer] = server
    return found


def _users(blocks: RemoteBlocks, third: int) -> list[str]:
    """The peers that ran a third of the model in the last pass."""
    return [
        hop.peer for chain in blocks.chains for hop in chain if hop.start <= third * 10 < hop.end
    ]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("nan", None, "finite"),
        ("width", "bad_request", "hidden states"),
        ("blocks", "bad_request", "0:30"),
        ("mask", None, "attention mask"),
        ("large adapter", "bad_adapter", "lower rank"),
    ],
)
def test_bad_jobs_get_clear_errors_and_leave_the_connection(
    swarm1: PrivateSwarm, model_folder: Path, change: str, code: str | None, said: str
) -> None:
    with TrainingClient(swarm1.router.socket) as client:
        config = load_model_config(model_folder)
        good = RemoteBlocks(str(model_folder), client=client)
        blocks, hidden, mask = good, torch.randn(2, 8, 576), None
        if change == "nan":
            hidden[0, 0, 0] = torch.nan
        elif change == "width":
            hidden = hidden[..., :500]
        elif change == "blocks":
            blocks = RemoteBlocks(str(model_folder), 4, 31, client=client)
        elif change == "mask":
            mask = torch.ones(2, 7)
        else:
            lora = RemoteLora(config, rank=128, targets=("all-linear",))
            blocks = RemoteBlocks(str(model_folder), client=client, adapter=lora)
        with pytest.raises((JobError, ValueError), match=said) as caught:
            blocks(hidden, mask)
        if code is not None:
            assert isinstance(caught.value, JobError)
            assert caught.value.code == code
        assert good(torch.randn(2, 8, 576)).shape == (2, 8, 576)


def test_a_graph_can_be_run_back_twice_and_one_that_is_dropped_is_forgotten(
    swarm1: PrivateSwarm, model_folder: Path
) -> None:
    with TrainingClient(swarm1.router.socket) as client:
        blocks = RemoteBlocks(str(model_folder), 0, 3, client=client)
        leaf = torch.randn(2, 8, 576).requires_grad_()
        output = blocks(leaf)
        output.sum().backward(retain_graph=True)
        first = leaf.grad.clone()
        output.sum().backward()
        close(leaf.grad, 2 * first)
        for _ in range(300):  # more than a connection may keep
            blocks(leaf[:1, :1])

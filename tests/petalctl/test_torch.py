"""The modules of petalctl.torch over a daemon's socket, against local computation."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.errors import BadAdapter
from kernels.span import load_span
from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.training_messages import BackwardBatch, BatchRows, ForwardBatch, PutAdapter
from petalctl.errors import JobError
from petalctl.passes import TrainingClient
from petalctl.torch import (
    DeepPrompt,
    RemoteAdapter,
    RemoteBlocks,
    RemoteCausalLM,
    RemoteLora,
    SoftPrompt,
)
from petalctl.torch.wire_tensors import to_wire
from tests.helpers.tiny_models import make_model, save_model
from tests.helpers.training_daemon import TrainingDaemon, run_training_daemon

BOTH = AdapterForm(targets=("q_proj", "down_proj"), rank=2, scaling=0.5, prefix_tokens=2)


@pytest.fixture(scope="module")
def reference() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def checkpoint(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(reference, tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def daemon(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainingDaemon]:
    with run_training_daemon(checkpoint, monkeypatch, (0, 2), (2, 4)) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: TrainingDaemon) -> Iterator[TrainingClient]:
    with TrainingClient(daemon.socket) as client:
        yield client


def make_adapter(checkpoint: Checkpoint) -> RemoteAdapter:
    elements = row_elements(checkpoint.config, BOTH)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, elements, generator=generator, dtype=torch.float64)
    return RemoteAdapter(checkpoint.config, BOTH, 0.1 * values)


def make_lm(checkpoint: Checkpoint, client: TrainingClient, **options: Any) -> RemoteCausalLM:
    return RemoteCausalLM.from_pretrained(
        str(checkpoint.folder), client=client, dtype=torch.float64, **options
    )


def test_gradcheck_of_input_and_adapter(client: TrainingClient, checkpoint: Checkpoint) -> None:
    """Of the adapter in some directions; each of its numbers would take minutes."""
    adapter = make_adapter(checkpoint)
    base_LE = adapter.values.detach()
    generator = torch.Generator().manual_seed(2)
    ways_KLE = torch.randn(5, *base_LE.shape, generator=generator, dtype=torch.float64)
    blocks = RemoteBlocks(client=client, adapter=adapter)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    head = torch.randn(48, 4, generator=generator, dtype=torch.float64)
    del adapter.values

    def run(narrow_BSW: torch.Tensor, along_K: torch.Tensor) -> torch.Tensor:
        adapter.values = base_LE + torch.einsum("k,kle->le", along_K, ways_KLE)
        output: torch.Tensor = blocks(narrow_BSW @ head.t(), mask)
        return output @ head

    narrow_BSW = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    along_K = torch.zeros(5, dtype=torch.float64)
    given = (narrow_BSW.requires_grad_(), along_K.requires_grad_())
    # The pieces' gradients are added as they come.
    assert torch.autograd.gradcheck(run, given, nondet_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_local_blocks(
    client: TrainingClient, checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    span = load_span(checkpoint, 1, 4, dtype=torch.float64, device=torch.device("cpu"))
    adapter = make_adapter(checkpoint)
    blocks = RemoteBlocks("tiny", 1, client=client, adapter=adapter)
    ours = torch.randn(9, 7, 48).to(dtype).transpose(0, 1).requires_grad_()  # not contiguous
    output = blocks(ours)
    assert output.dtype == dtype
    output.square().sum().backward()
    theirs = ours.detach().double().requires_grad_()
    local = SpanAdapter(checkpoint.config, BOTH, 0, adapter.values.detach().requires_grad_())
    expected = span.forward(theirs, adapters=[local])
    expected.square().sum().backward()
    rtol = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for got, wanted in [
        (output, expected),
        (ours.grad, theirs.grad),
        (adapter.values.grad, local.values_LE.grad),
    ]:
        assert (got.double() - wanted).norm() < rtol * wanted.norm()


def test_an_adapter_is_put_again_only_when_it_changed(
    client: TrainingClient, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[int] = []
    put = client.put_adapter
    monkeypatch.setattr(
        client, "put_adapter", lambda number, **rest: (puts.append(number), put(number, **rest))
    )
    adapter = make_adapter(checkpoint)
    blocks = RemoteBlocks(client=client, adapter=adapter)
    hidden = torch.randn(2, 3, 48)
    before = blocks(hidden)
    assert torch.equal(blocks(hidden), before)
    assert puts == [0]
    with torch.no_grad():
        adapter.values += 0.1
    assert not torch.allclose(blocks(hidden), before)
    assert puts == [0, 0]
    RemoteBlocks(client=client, adapter=make_adapter(checkpoint))(hidden)
    assert puts == [0, 0, 1]


def kept(daemon: TrainingDaemon) -> int:
    """Forward passes that the daemon keeps, by what their histories hold."""
    return daemon.run(lambda: daemon.world.histories.memory_bytes)


def test_what_is_kept_goes_with_the_graph(daemon: TrainingDaemon, client: TrainingClient) -> None:
    blocks = RemoteBlocks(client=client)
    hidden = torch.randn(2, 3, 48, requires_grad=True)
    with torch.no_grad():
        blocks(hidden)
    blocks(hidden.detach())
    assert kept(daemon) == 0
    output = blocks(hidden)
    assert kept(daemon) > 0
    output.sum().backward()
    assert kept(daemon) == 0
    output = blocks(hidden)
    del output
    gc.collect()
    with torch.no_grad():
        blocks(hidden)
    assert kept(daemon) == 0


def test_a_graph_can_be_run_back_twice(client: TrainingClient) -> None:
    blocks = RemoteBlocks(client=client)
    hidden = torch.randn(2, 3, 48, dtype=torch.float64, requires_grad=True)
    output = blocks(hidden)
    output.sum().backward(retain_graph=True)
    assert hidden.grad is not None
    first = hidden.grad.clone()
    output.sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


@pytest.mark.parametrize("method", ["none", "lora", "deep", "soft"])
def test_losses_and_logits_equal_hugging_face(
    client: TrainingClient, checkpoint: Checkpoint, reference: Any, method: str
) -> None:
    ids = torch.randint(3, 100, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    adapters: dict[str, Any] = {
        "none": {},
        "lora": {"adapter": RemoteLora(checkpoint.config, targets=("all-linear",), seed=1)},
        "deep": {"adapter": DeepPrompt(checkpoint.config, tokens=2, seed=1)},
        "soft": {"soft_prompt": SoftPrompt(checkpoint.config, tokens=2, seed=1)},
    }
    model = make_lm(checkpoint, client, **adapters[method])
    output = model(ids, mask, labels)
    lean = model(ids, mask, labels, return_logits=False)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, output.loss)
    if method in ("none", "lora"):  # whose second matrix is zero at first
        expected = reference.double()(ids, mask, labels=labels)
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        said, wanted = output.logits[mask == 1], expected.logits[mask == 1]
        torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-5)
    lean.loss.backward() if method != "none" else None
    for adapter in adapters[method].values():
        (parameter,) = adapter.parameters()
        assert parameter.grad.abs().sum() > 0


def test_modules_between_blocks_and_a_head_of_ones_own(
    client: TrainingClient, checkpoint: Checkpoint
) -> None:
    model = make_lm(checkpoint, client)
    bottleneck = torch.nn.Linear(48, 48, dtype=torch.float64)
    model.insert_after(1, bottleneck)
    head = torch.nn.Linear(48, 2, dtype=torch.float64)
    ids = torch.randint(3, 100, (3, 6))
    output = model(ids, output_hidden_states=[2, 4])
    head(output.hidden_states[4][:, -1]).sum().backward()
    assert bottleneck.weight.grad is not None
    assert head.weight.grad is not None
    torch.testing.assert_close(
        output.hidden_states[2], bottleneck(model._part(0, 2)(model.embed_tokens(ids)))
    )
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5
    with pytest.raises(ValueError, match="among"):
        model.insert_after(4, bottleneck)


def test_generation_by_whole_texts_where_modules_are_inserted(
    client: TrainingClient, checkpoint: Checkpoint, reference: Any
) -> None:
    model = make_lm(checkpoint, client)
    model.insert_after(3, torch.nn.Identity())
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(6))
    made = model.generate(ids, max_new_tokens=5, eos_token_id=[])
    expected = reference.double().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        eos_token_id=None,
        do_sample=False,
    )
    assert torch.equal(made, expected)
    sampled = model.generate(
        ids, max_new_tokens=3, sample=lambda logits, _: torch.tensor([7, 8]), eos_token_id=7
    )
    assert sampled[:, 6:].tolist() == [[7, 7, 7], [8, 8, 8]]


def test_wrong_shapes_are_told_before_anything_is_sent(
    client: TrainingClient, checkpoint: Checkpoint
) -> None:
    blocks = RemoteBlocks(client=client)
    for hidden, mask, said in [
        (torch.randn(3, 48), None, "shape"),
        (torch.randn(0, 3, 48), None, "shape"),
        (torch.ones(2, 3, 48, dtype=torch.int64), None, "floats"),
        (torch.randn(2, 3, 48), torch.ones(2, 4), "mask"),
        (torch.full((2, 3, 48), torch.nan), None, "finite"),
    ]:
        with pytest.raises(ValueError, match=said):
            blocks(hidden, mask)
    output = blocks(torch.randn(2, 3, 48, requires_grad=True))
    with pytest.raises(ValueError, match="lower the learning rate"):
        output.backward(torch.full_like(output, torch.inf))
    with pytest.raises(BadAdapter, match="q_proj"):
        RemoteLora(checkpoint.config, targets=("query",))
    with pytest.raises(BadAdapter, match="expected"):
        SoftPrompt(checkpoint.config, initial=torch.zeros(3, 47))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda: ForwardBatch(job=0, sequences=2, tokens=3, start=3, end=3), "bad_request"),
        (lambda: ForwardBatch(job=0, sequences=2, tokens=3, end=5), "bad_request"),
        (lambda: ForwardBatch(job=0, sequences=0, tokens=3), "bad_request"),
        (lambda: ForwardBatch(job=0, sequences=2**20, tokens=2**20), "bad_request"),
        (lambda: ForwardBatch(job=0, sequences=2, tokens=3, adapter=3), "bad_request"),
        (lambda: ForwardBatch(job=0, sequences=2, tokens=2), "bad_request"),
        (
            lambda: ForwardBatch(job=0, sequences=2, tokens=3, mask=to_wire(torch.ones(3, 2))),
            "bad_request",
        ),
        (lambda: BackwardBatch(job=0, forward=12345), "unknown_forward"),
        (
            lambda: PutAdapter(
                job=0,
                adapter=1,
                form=_shape(),
                start=0,
                end=4,
                first=0,
                values=to_wire(torch.zeros(4, 7)),
            ),
            "bad_adapter",
        ),
        (
            lambda: PutAdapter(
                job=0,
                adapter=1,
                form=_shape(),
                start=0,
                end=9,
                first=0,
                values=to_wire(torch.zeros(4, 7)),
            ),
            "bad_adapter",
        ),
    ],
)
def test_bad_requests_fail_alone(
    client: TrainingClient, change: Callable[[], Any], code: str
) -> None:
    job = client._begin(change())
    rows = BatchRows(job=job, row=0, hidden=to_wire(torch.randn(6, 48)))
    client._send(client._connection.rows_frame(job, rows.row, rows.hidden))
    with pytest.raises(JobError) as caught:
        client._next_answer(job)
    assert caught.value.code == code
    assert RemoteBlocks(client=client)(torch.randn(2, 3, 48)).shape == (2, 3, 48)


def _shape() -> AdapterShape:
    return AdapterShape(targets=("q_proj",), rank=2)


def test_an_adapter_may_come_in_parts(
    client: TrainingClient, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(checkpoint)
    hidden = torch.randn(2, 3, 48, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr("petalctl.passes.ROWS_BYTES", 1)
        in_parts = RemoteBlocks(client=client, adapter=adapter)(hidden)
    with torch.no_grad():
        adapter.values += 0.0  # another version of the same numbers
    torch.testing.assert_close(RemoteBlocks(client=client, adapter=adapter)(hidden), in_parts)


def test_interrupting_a_pass_leaves_the_connection(
    daemon: TrainingDaemon, client: TrainingClient
) -> None:
    """Ctrl-C while the daemon waits for a server that hangs."""
    blocks = RemoteBlocks(client=client)
    hidden = torch.randn(4, 5, 48, requires_grad=True)
    expected = blocks(hidden).detach()
    daemon.run(daemon.world.hub.freeze, daemon.world.peer(1))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started_at = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        blocks(hidden)
    assert time.monotonic() - started_at < 4
    daemon.run(daemon.world.hub.thaw, daemon.world.peer(1))
    torch.testing.assert_close(blocks(hidden).detach(), expected)


def test_an_answer_that_is_given_up_leaves_the_connection(client: TrainingClient) -> None:
    """More comes than a socket holds, so that the daemon is in the middle of sending."""
    rows = to_wire(torch.randn(200 * 100, 48, dtype=torch.float64))
    assert len(rows.data) > 7e6

    def give_up(_: BatchRows) -> None:
        raise RuntimeError("enough")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="enough"):
            client.run_forward(
                ForwardBatch(job=0, sequences=200, tokens=100), rows, on_rows=give_up
            )
    assert RemoteBlocks(client=client)(torch.randn(2, 3, 48)).shape == (2, 3, 48)


def test_saved_adapters_come_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for number, adapter in enumerate(
        [RemoteLora(checkpoint.config, seed=1), DeepPrompt(checkpoint.config, tokens=3, seed=2)]
    ):
        adapter.save(tmp_path / str(number), base_model="tiny")
        back = RemoteAdapter.from_folder(tmp_path / str(number), checkpoint.config)
        assert back.form == adapter.form
        assert torch.equal(back.values, adapter.values)
    soft = SoftPrompt(checkpoint.config, tokens=3, seed=3)
    soft.save(tmp_path / "soft", base_model="tiny")
    back_soft = SoftPrompt.from_folder(tmp_path / "soft", checkpoint.config)
    assert torch.equal(back_soft.prompt, soft.prompt)
    with pytest.raises(BadAdapter, match="SoftPrompt"):
        RemoteAdapter.from_folder(tmp_path / "soft", checkpoint.config)
    with pytest.raises(BadAdapter, match="RemoteAdapter"):
        SoftPrompt.from_folder(tmp_path / "0", checkpoint.config)
    with pytest.raises(BadAdapter, match="one adapter"):
        make_adapter(checkpoint).save(tmp_path / "both")

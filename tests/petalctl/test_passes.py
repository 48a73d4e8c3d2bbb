"""The client of those who train and its modules, against PEFT's models and over a stand-in."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.adapter_form import AdapterForm
from kernels.checkpoint import Checkpoint
from kernels.span import Span, load_span
from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.control_messages import Cancel, JobFailed, SessionClosed
from p2p.wire.tensor import WireTensor
from p2p.wire.training_messages import (
    AdapterKept,
    BatchRows,
    ForgetForward,
    ForwardBatch,
    ForwardDone,
    HiddenOpened,
    HiddenStepDone,
    OpenHiddenSession,
    PutAdapter,
    RunHiddenStep,
)
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
from petalctl.torch.wire_tensors import from_wire, to_wire
from tests.helpers.control_stand_in import Conversation, StandIn, run_stand_in
from tests.helpers.peft_reference import PEFT_KINDS, PeftReference, quiet
from tests.helpers.span_stand_in import TIMINGS, SpanDaemon
from tests.helpers.tiny_models import make_model, save_model

CPU = torch.device("cpu")
FAMILIES = ("llama", "llama-tied", "qwen2")
SHAPE = AdapterShape(targets=("q_proj",), rank=1)


class Case:
    """A tiny model, and a daemon for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.checkpoint = Checkpoint(save_model(make_model(name), folder))
        self.config = self.checkpoint.config
        self.span: Span = load_span(self.checkpoint, 0, 4, dtype=torch.float32, device=CPU)

    def load(self, client: TrainingClient, **options: Any) -> RemoteCausalLM:
        return RemoteCausalLM.from_pretrained(str(self.checkpoint.folder), client=client, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture
def llama(cases: dict[str, Case]) -> Case:
    return cases["llama"]


class Connected:
    """A client, and what it talks to."""

    def __init__(self, client: TrainingClient, daemon: SpanDaemon, stand_in: StandIn) -> None:
        self.client = client
        self.daemon = daemon
        self.stand_in = stand_in

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.stand_in.received)


def connect(case: Case) -> Iterator[Connected]:
    daemon = SpanDaemon(case.config, case.span)
    with run_stand_in(daemon) as stand_in, TrainingClient(stand_in.path) as client:
        yield Connected(client, daemon, stand_in)


@pytest.fixture
def connected(llama: Case) -> Iterator[Connected]:
    yield from connect(llama)


def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask, labels: padding on the right, on the left, and none; some labels left out."""
    ids = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[3, :5] = -100
    return ids, mask, labels


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    largest = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * largest)


def parts_of(case: Case, reference: PeftReference) -> tuple[dict[str, Any], torch.nn.Parameter]:
    """The same adapter as PEFT's, as options for `RemoteCausalLM`, and its parameter."""
    values = reference.values()
    if reference.form is None:
        soft = SoftPrompt(case.config, initial=values)
        return {"soft_prompt": soft}, soft.prompt
    adapter = RemoteAdapter(case.config, reference.form, values)
    return {"adapter": adapter}, adapter.values


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(FAMILIES, PEFT_KINDS)])
def test_losses_and_gradients_are_pefts(cases: dict[str, Case], name: str, kind: str) -> None:
    case = cases[name]
    ids, mask, labels = make_batch()
    reference = PeftReference(name, case.config, kind)
    expected = quiet(lambda: reference.model(input_ids=ids, attention_mask=mask, labels=labels))
    expected.loss.backward()
    options, parameter = parts_of(case, reference)
    for connected in connect(case):
        model = case.load(connected.client, **options)
        output = model(ids, mask, labels)
        output.loss.backward()
        close(output.loss, expected.loss)
        assert output.logits.shape == expected.logits.shape  # with those of a soft prompt's rows
        real = mask == 1
        close(output.logits[:, -9:][real], expected.logits[:, -9:][real])
        gradient = reference._gather(lambda p: p.grad)
        assert parameter.grad is not None
        close(parameter.grad, gradient)
        parameter.grad = None
        lean = model(ids, mask, labels, return_logits=False)
        assert lean.logits is None
        lean.loss.backward()
        close(lean.loss, expected.loss)
        close(parameter.grad, gradient)
        assert not connected.daemon.kept


@pytest.mark.parametrize("kind", ["none", *PEFT_KINDS])
def test_texts_go_on_as_pefts(llama: Case, kind: str) -> None:
    ids = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options: dict[str, Any] = {}
    reference: Any = make_model("llama")
    if kind != "none":
        peft = PeftReference("llama", llama.config, kind)
        options, _ = parts_of(llama, peft)
        reference = peft.model
    expected = [
        quiet(
            lambda own=own[None]: reference.generate(
                input_ids=own,
                attention_mask=torch.ones_like(own),
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        )[0, -5:]
        for own in (ids[0], ids[1, 2:], ids[2])
    ]
    for connected in connect(llama):
        model = llama.load(connected.client, **options)
        made = model.generate(ids, max_new_tokens=5, attention_mask=mask, eos_token_id=[])
        assert torch.equal(made[:, :6], ids)
        assert made[:, 6:].tolist() == [own.tolist() for own in expected]
        assert not connected.daemon.sessions
        assert connected.count(RunHiddenStep) == 3 * 5


def test_a_text_that_has_ended_is_run_no_further(llama: Case, connected: Connected) -> None:
    model = llama.load(connected.client)
    steps = iter([[7, 5], [9, 9], [9, 7]])
    made = model.generate(
        torch.tensor([[3, 4], [5, 6]]),
        max_new_tokens=9,
        sample=lambda logits, ids: torch.tensor(next(steps)),
        eos_token_id=7,
    )
    assert made.tolist() == [[3, 4, 7, 7, 7], [5, 6, 5, 9, 7]]
    assert connected.count(RunHiddenStep) == 2 + 1 + 1


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[0, 0, 0]], [[1, 0, 1]], [[1, 1]]])
def test_texts_that_cannot_go_on_are_refused(
    llama: Case, connected: Connected, mask: list[list[int]], kind: torch.dtype
) -> None:
    model = llama.load(connected.client)
    given = torch.tensor(mask, dtype=kind)
    with pytest.raises(ValueError, match=r"left|mask"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, attention_mask=given)
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=0)
    assert not connected.stand_in.received


def test_long_prompts_go_in_parts(
    llama: Case, connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.load(connected.client)
    ids = torch.randint(3, 100, (2, 11))
    whole = model.generate(ids, max_new_tokens=2, eos_token_id=[])
    before = connected.count(RunHiddenStep)
    monkeypatch.setattr("petalctl.torch.hidden_session.ROWS_BYTES", 4 * 48 * 4)
    assert torch.equal(model.generate(ids, max_new_tokens=2, eos_token_id=[]), whole)
    assert connected.count(RunHiddenStep) - before == 2 * 3 + 2


def test_sessions_are_closed_where_another_cannot_be_opened(llama: Case) -> None:
    closed: list[object] = []

    def script(conversation: Conversation) -> None:
        opened = 0
        while (request := conversation.receive()) is not None:
            if isinstance(request, OpenHiddenSession):
                opened += 1
                if opened < 3:
                    conversation.send(HiddenOpened(job=request.job))
                else:
                    text = "there are too many"
                    conversation.send(JobFailed(job=request.job, code="overloaded", text=text))
            else:
                closed.append(request)
                conversation.send(SessionClosed(job=request.job))  # type: ignore[attr-defined]

    with run_stand_in(script) as stand_in, TrainingClient(stand_in.path) as client:
        with pytest.raises(JobError, match="too many"):
            llama.load(client).generate(torch.full((3, 2), 5), max_new_tokens=2)
        assert len(closed) == 2


def test_steps_of_several_sessions_are_under_way_at_once() -> None:
    def script(conversation: Conversation) -> None:
        steps = [conversation.receive() for _ in range(3)]
        for step in reversed(steps):
            assert isinstance(step, RunHiddenStep)
            conversation.send(HiddenStepDone(job=step.job, hidden=step.hidden))

    rows = [to_wire(torch.full((1, 4), float(n))) for n in range(3)]
    with run_stand_in(script) as stand_in, TrainingClient(stand_in.path) as client:
        done = client.run_hidden_steps(
            [
                RunHiddenStep(job=0, session=str(n), position=0, hidden=row)
                for n, row in enumerate(rows)
            ]
        )
    assert [from_wire(answer.hidden)[0, 0].item() for answer in done] == [0, 1, 2]


def test_an_adapter_in_sixteen_bits_and_another_one_later(
    llama: Case, connected: Connected
) -> None:
    ids, mask, labels = make_batch()
    lora = RemoteLora(llama.config, seed=1)
    model = llama.load(connected.client, adapter=lora)
    model.to(torch.bfloat16)
    loss = model(ids, mask, labels, return_logits=False).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert lora.values.grad is not None
    assert lora.values.grad.dtype == torch.bfloat16
    model.adapter = DeepPrompt(llama.config, tokens=2, seed=1)
    model(ids, mask, labels, return_logits=False).loss.backward()
    assert model.adapter.values.grad.abs().sum() > 0
    model.adapter = None
    with torch.no_grad():
        assert model(ids, mask).logits.shape == (4, 9, 101)
    puts = [m for m in connected.stand_in.received if isinstance(m, PutAdapter)]
    assert [put.form.prefix_tokens for put in puts] == [0, 2]


def test_widths_and_blocks_are_checked_against_the_adapter(
    llama: Case, connected: Connected
) -> None:
    adapter = RemoteLora(llama.config)
    blocks = RemoteBlocks(client=connected.client, adapter=adapter)
    with pytest.raises(ValueError, match="48"):
        blocks(torch.randn(1, 2, 47))
    for start, end in ((4, None), (-1, 2), (3, 3), (0, 5)):
        beyond = RemoteBlocks(client=connected.client, start=start, end=end, adapter=adapter)
        with pytest.raises(ValueError, match="0:4"):
            beyond(torch.randn(1, 2, 48))
    assert not connected.stand_in.received


def test_passes_without_a_graph_are_not_kept(llama: Case, connected: Connected) -> None:
    blocks = RemoteBlocks(client=connected.client, adapter=RemoteLora(llama.config))
    hidden = torch.randn(1, 2, 48, requires_grad=True)
    with torch.no_grad():
        blocks(hidden)
    with torch.inference_mode():
        blocks(hidden)
    assert not any(m.is_kept for m in connected.stand_in.received if isinstance(m, ForwardBatch))


def test_what_was_dropped_is_forgotten_once(connected: Connected) -> None:
    blocks = RemoteBlocks(client=connected.client)
    hidden = torch.randn(1, 2, 48, requires_grad=True)
    output = blocks(hidden)
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    del output
    blocks(hidden)
    gc.collect()
    with torch.no_grad():
        blocks(hidden)
    assert not connected.daemon.kept
    assert connected.count(ForgetForward) == 1


def test_a_client_can_be_collected(llama: Case, connected: Connected) -> None:
    with TrainingClient(connected.stand_in.path) as client:
        RemoteBlocks(client=client, adapter=RemoteLora(llama.config))(torch.randn(1, 2, 48))
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None


def test_rows_that_do_not_come_are_missed() -> None:
    def script(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, ForwardBatch)
        rows = conversation.receive()
        assert isinstance(rows, BatchRows)
        half = to_wire(from_wire(rows.hidden)[:3])
        conversation.send(BatchRows(job=request.job, row=0, hidden=half))
        conversation.send(ForwardDone(job=request.job, timings=TIMINGS))

    with (
        run_stand_in(script) as stand_in,
        TrainingClient(stand_in.path) as client,
        pytest.raises(JobError, match="lacks 3 of 6 rows"),
    ):
        RemoteBlocks(client=client)(torch.randn(2, 3, 48))


def zeros(rows: int, width: int) -> WireTensor:
    return WireTensor("float32", (rows, width), bytes(4 * rows * width))


def test_answers_are_read_while_rows_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is larger than the socket's buffers goes out before the last rows come."""
    monkeypatch.setattr("petalctl.passes.ROWS_BYTES", 1 << 16)
    count, width = 2048, 512

    def script(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, ForwardBatch)
        answer = BatchRows(job=request.job, row=0, hidden=zeros(count, width))
        sender = threading.Thread(target=conversation.send, args=(answer,))
        sender.start()
        received, is_out_at = 0, count
        while received < count:
            rows = conversation.receive()
            assert isinstance(rows, BatchRows)
            received += rows.hidden.shape[0]
            time.sleep(0.01)
            if not sender.is_alive():
                is_out_at = min(is_out_at, received)
        assert is_out_at < count
        conversation.send(ForwardDone(job=request.job, timings=TIMINGS))

    taken: list[int] = []
    with run_stand_in(script) as stand_in, TrainingClient(stand_in.path) as client:
        client.run_forward(
            ForwardBatch(job=0, sequences=count, tokens=1),
            zeros(count, width),
            on_rows=lambda rows: taken.append(rows.hidden.shape[0]),
        )
    assert taken == [count]


def test_a_refused_batch_is_not_sent_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalctl.passes.ROWS_BYTES", 1 << 16)
    received: list[object] = []

    def script(conversation: Conversation) -> None:
        request = conversation.receive()
        assert isinstance(request, ForwardBatch)
        conversation.send(JobFailed(job=request.job, code="bad_request", text="no such model"))
        while (rows := conversation.receive()) is not None:
            received.append(rows)

    with (
        run_stand_in(script) as stand_in,
        TrainingClient(stand_in.path) as client,
        pytest.raises(JobError, match="no such model"),
    ):
        client.run_forward(
            ForwardBatch(job=0, sequences=4096, tokens=8),
            zeros(4096 * 8, 512),
            on_rows=lambda _: None,
        )
    assert len(received) < 1024 / 2


@pytest.mark.parametrize("reads_after_s", [0.3, None])
def test_interrupting_what_is_being_sent_cuts_no_frame_off(reads_after_s: float | None) -> None:
    """Ctrl-C while the socket is full; with a second one, the connection is given up."""
    times = 1 if reads_after_s is not None else 2
    go_on = threading.Event()
    received: list[object] = []

    def script(conversation: Conversation) -> None:
        go_on.wait(20)
        while (request := conversation.receive()) is not None:
            received.append(request)
            if isinstance(request, PutAdapter):
                conversation.send(AdapterKept(job=request.job))

    def press() -> None:
        for _ in range(times):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        if reads_after_s is not None:
            time.sleep(reads_after_s)
            go_on.set()

    def put(client: TrainingClient, blocks: int) -> None:
        client.put_adapter(0, shape=SHAPE, start=0, end=blocks, values=zeros(blocks, 1 << 20))

    with run_stand_in(script) as stand_in, TrainingClient(stand_in.path) as client:
        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            put(client, 3)
        thread.join()
        if reads_after_s is None:
            go_on.set()
            return
        put(client, 1)
        kinds = [type(message) for message in received]
        assert kinds[0] is PutAdapter
        assert set(kinds[1:-1]) <= {Cancel}
        assert kinds[-1] is PutAdapter


def answer_late(conversation: Conversation) -> None:
    """Ends a pass well, though it was cancelled."""
    while (request := conversation.receive()) is not None:
        if isinstance(request, Cancel):
            conversation.send(ForwardDone(job=request.job, timings=TIMINGS))


def test_a_pass_that_ended_too_late_for_its_interrupt_is_forgotten() -> None:
    with run_stand_in(answer_late) as stand_in, TrainingClient(stand_in.path) as client:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.run_forward(
                ForwardBatch(job=0, sequences=1, tokens=2, is_kept=True),
                zeros(2, 4),
                on_rows=lambda _: None,
            )
        forgotten = stand_in.wait_received(ForgetForward)
        assert isinstance(forgotten, ForgetForward)
        assert forgotten.forward == 1


def test_a_callback_that_raises_gives_the_pass_up(connected: Connected) -> None:
    blocks = RemoteBlocks(client=connected.client)
    hidden = torch.randn(2, 2, 48, requires_grad=True)

    def fail(_: BatchRows) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        connected.client.run_forward(
            ForwardBatch(job=0, sequences=2, tokens=2, is_kept=True),
            to_wire(hidden.view(4, 48)),
            on_rows=fail,
        )
    blocks(hidden).sum().backward()
    assert not connected.daemon.kept


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("v_proj", "q_proj", "q_proj"), ("q_proj", "v_proj")),
        (("down_proj", "o_proj"), ("o_proj", "down_proj")),
    ],
)
def test_targets_come_in_the_layouts_order(
    llama: Case, targets: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    lora = RemoteLora(llama.config, targets=targets, rank=2, seed=1)
    assert lora.form == AdapterForm(targets=expected, rank=2, scaling=8.0)
    for name, tensor in lora.tensors(2).items():
        assert bool((tensor == 0).all()) == name.endswith("lora_B")

"""Sessions for hidden states, by a real client over a real socket."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from p2p.wire.tensor import WireTensor
from p2p.wire.training_messages import BatchRows, ForwardBatch, OpenHiddenSession, RunHiddenStep
from petalctl.errors import JobError
from petalctl.passes import TrainingClient
from petalctl.torch import RemoteAdapter, RemoteCausalLM, SoftPrompt
from petald.adapter_store import adapter_rows, write_shape
from petald.config import DaemonConfig
from petald.control import Jobs, open_control_socket, serve_control
from petald.hidden_sessions import MAX_SESSIONS, HiddenSessions
from petald.pass_link import PassLinks
from petald.tensors import plain_tensor, to_wire
from petald.training_jobs import TrainingJobs
from tests.helpers.daemon_world import DaemonWorld, open_daemon_world
from tests.helpers.tiny_models import make_model, save_model

FORM = AdapterForm(targets=("q_proj", "up_proj"), rank=2, prefix_tokens=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


class OneModel:
    """As `petald.local_model.LocalModels`."""

    def __init__(self, world: DaemonWorld) -> None:
        self._identity = world.identity

    async def identify(self, name: str) -> object:
        await trio.lowlevel.checkpoint()
        return self._identity


@asynccontextmanager
async def open_socket(world: DaemonWorld) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        models: Any = OneModel(world)
        not_asked: Any = None
        links = PassLinks(world.swarm.client)
        jobs = Jobs(
            report_status=not_asked,
            report_swarm=not_asked,
            make_generation=not_asked,
            pause_or_resume=not_asked,
            training=TrainingJobs(models, world.router, links, max_wait_s=0.0),
            hidden=HiddenSessions(models, world.router, max_wait_s=0.0),
        )
        config = DaemonConfig(socket=path, state_dir=path.parent)
        async with open_control_socket(config) as listener, trio.open_nursery() as nursery:
            await nursery.start(links.run)
            nursery.start_soon(serve_control, listener, jobs)
            yield path
            nursery.cancel_scope.cancel()


async def use(path: Path, function: Callable[[TrainingClient], None]) -> None:
    """Calls a function with a connected client, in a thread."""

    def run() -> None:
        with TrainingClient(path) as client:
            function(client)

    await trio.to_thread.run_sync(run)


def step(
    client: TrainingClient, name: str, position: int, rows_SD: torch.Tensor, *, last: bool = False
) -> torch.Tensor:
    done = client.run_hidden_step(
        RunHiddenStep(
            job=0,
            session=name,
            position=position,
            hidden=to_wire(rows_SD),
            is_last_wanted=last,
        )
    )
    output_SD = plain_tensor(done.hidden)
    assert output_SD.dtype is rows_SD.dtype
    return output_SD.float()


def check(actual_SD: torch.Tensor, expected_SD: torch.Tensor) -> None:
    torch.testing.assert_close(actual_SD, expected_SD, rtol=1e-3, atol=1e-2)


def put_adapter(client: TrainingClient, values_LE: torch.Tensor, *, start: int = 0) -> None:
    client.put_adapter(
        3,
        shape=write_shape(FORM),
        start=start,
        end=start + values_LE.shape[0],
        values=adapter_rows(values_LE),
    )


async def test_steps_of_any_length_equal_the_whole_span(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 2), (2, 4)) as world,
        open_socket(world) as path,
    ):
        hidden_SD = torch.randn(300, 48, generator=torch.Generator().manual_seed(3))
        expected_SD = world.swarm.whole.forward(hidden_SD[None])[0]

        def talk(client: TrainingClient) -> None:
            opened = client.open_hidden_session(
                OpenHiddenSession(job=0, session="s", max_tokens=300)
            )
            assert [(hop.start, hop.end) for hop in opened.chain] == [(0, 2), (2, 4)]
            # Ten times what a hop takes at once.
            check(step(client, "s", 0, hidden_SD[:290]), expected_SD[:290])
            last_SD = step(client, "s", 290, hidden_SD[290:].double(), last=True)
            check(last_SD, expected_SD[-1:])
            check(step(client, "s", 100, hidden_SD[100:201], last=True), expected_SD[200:201])
            check(step(client, "s", 201, hidden_SD[201:203]), expected_SD[201:203])

        await use(path, talk)
        await world.swarm.wait_free()  # the connection has ended


async def test_a_session_runs_with_an_adapter_that_was_put(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shape = (4, row_elements(checkpoint.config, FORM))
    values_LE = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    own = SpanAdapter(checkpoint.config, FORM, 0, -values_LE)
    async with (
        open_daemon_world(
            checkpoint,
            tmp_path,
            (0, 3),
            (3, 4),
            hosted_adapters={"poet@0": own},
        ) as world,
        open_socket(world) as path,
    ):
        await world.announce({0: ("poet@0",), 1: ("poet@0",)})
        hidden_SD = world.swarm.hidden_SD
        lent = SpanAdapter(checkpoint.config, FORM, 0, values_LE)

        def expected(*adapters: SpanAdapter) -> torch.Tensor:
            return world.swarm.whole.forward(hidden_SD[None], adapters=adapters)[0]

        def talk(client: TrainingClient) -> None:
            put_adapter(client, values_LE)
            for name, adapter, hosted, adapters in (
                ("plain", None, "", ()),
                ("lent", 3, "", (lent,)),
                ("hosted", None, "poet", (own,)),
                ("both", 3, "poet", (own, lent)),
            ):
                client.open_hidden_session(
                    OpenHiddenSession(
                        job=0, session=name, max_tokens=40, adapter=adapter, hosted=hosted
                    )
                )
                output_SD = step(client, name, 0, hidden_SD[:20])
                check(output_SD, expected(*adapters)[:20])
                client.close_hidden_session(name)

        await use(path, talk)
        await world.swarm.wait_free()


async def test_a_pass_is_run_where_the_adapter_is_hosted(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shape = (4, row_elements(checkpoint.config, FORM))
    values_LE = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(6))
    own = SpanAdapter(checkpoint.config, FORM, 0, values_LE)
    full = "poet@0123456789abcdef"
    spans = [(0, 4), (0, 2), (2, 4)]
    async with (
        open_daemon_world(checkpoint, tmp_path, *spans, hosted_adapters={full: own}) as world,
        open_socket(world) as path,
    ):
        await world.announce({1: (full,), 2: (full,)})
        hidden_SD = world.swarm.hidden_SD
        output_SD = torch.empty_like(hidden_SD)

        def take(rows: BatchRows) -> None:
            output_SD[rows.row : rows.row + rows.hidden.shape[0]] = plain_tensor(rows.hidden)

        def talk(client: TrainingClient) -> None:
            request = ForwardBatch(job=0, sequences=2, tokens=20, hosted="poet")
            _, done = client.run_forward(request, to_wire(hidden_SD), on_rows=take)
            assert [(hop.start, hop.end) for hop in done.chains[0]] == spans[1:]
            request = ForwardBatch(job=0, sequences=2, tokens=20, hosted="painter")
            with pytest.raises(JobError, match="painter"):
                client.run_forward(request, to_wire(hidden_SD), on_rows=take)

        await use(path, talk)
        hidden_BSD = hidden_SD.view(2, 20, -1)
        expected_BSD = world.swarm.whole.forward(hidden_BSD, adapters=[own])
        check(output_SD, expected_BSD.flatten(0, 1))


async def test_what_cannot_be_done_is_told_and_the_rest_goes_on(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        open_socket(world) as path,
    ):
        hidden_SD = world.swarm.hidden_SD
        elements = row_elements(checkpoint.config, FORM)

        def talk(client: TrainingClient) -> None:
            def fails(text: str, **options: Any) -> None:
                request = {"job": 0, "session": "s", "max_tokens": 20} | options
                with pytest.raises(JobError, match=text):
                    client.open_hidden_session(OpenHiddenSession(**request))

            fails("no adapter 3 was put", adapter=3)
            put_adapter(client, torch.zeros(2, elements), start=1)
            fails("for blocks 1:3; tiny has 0:4", adapter=3)
            fails("at least one token", max_tokens=0)
            fails("no server hosts an adapter 'poet'", hosted="poet")
            client.open_hidden_session(OpenHiddenSession(job=0, session="s", max_tokens=20))
            fails("open already")
            with pytest.raises(JobError, match="no session 'other'"):
                step(client, "other", 0, hidden_SD[:1])
            with pytest.raises(JobError, match="finite"):
                step(client, "s", 0, torch.full((2, 48), float("nan")))
            with pytest.raises(JobError, match=r"expected"):
                step(client, "s", 0, torch.zeros(2, 47))
            with pytest.raises(JobError, match="does not follow"):
                step(client, "s", 4, hidden_SD[:1])
            with pytest.raises(JobError, match="opened for 20"):
                step(client, "s", 0, hidden_SD[:21])
            with pytest.raises(JobError, match="floats"):
                client.run_hidden_step(
                    RunHiddenStep(
                        job=0,
                        session="s",
                        position=0,
                        hidden=WireTensor("uint8", (1, 48), bytes(48)),
                    )
                )
            expected_SD = world.swarm.expected_SD[:20]
            check(step(client, "s", 0, hidden_SD[:20]), expected_SD)
            client.close_hidden_session("s")
            client.close_hidden_session("s")
            with pytest.raises(JobError, match="no session 's'"):
                step(client, "s", 0, hidden_SD[:1])

        await use(path, talk)
        await world.swarm.wait_free()


async def test_a_connection_has_a_bound_of_sessions(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petald.hidden_sessions.MAX_SESSIONS", 2)
    assert MAX_SESSIONS > 2
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 4)) as world,
        open_socket(world) as path,
    ):

        def talk(client: TrainingClient) -> None:
            for name in "ab":
                client.open_hidden_session(OpenHiddenSession(job=0, session=name, max_tokens=9))
            with pytest.raises(JobError, match="has 2 sessions"):
                client.open_hidden_session(OpenHiddenSession(job=0, session="c", max_tokens=9))
            client.close_hidden_session("a")
            client.open_hidden_session(OpenHiddenSession(job=0, session="c", max_tokens=9))

        await use(path, talk)
        await world.swarm.wait_free()


async def test_several_texts_are_continued_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With an adapter, whose prefix takes room too, and a soft prompt."""
    ids = torch.randint(3, 100, (3, 8), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    elements = row_elements(checkpoint.config, FORM)
    values_LE = 0.1 * torch.randn(4, elements, generator=torch.Generator().manual_seed(8))
    adapter = RemoteAdapter(checkpoint.config, FORM, values_LE)
    soft = SoftPrompt(checkpoint.config, tokens=2, seed=9)
    async with (
        open_daemon_world(checkpoint, tmp_path, (0, 2), (2, 4)) as world,
        open_socket(world) as path,
    ):

        def talk(client: TrainingClient) -> None:
            model = RemoteCausalLM.from_pretrained(
                str(checkpoint.folder), client=client, adapter=adapter, soft_prompt=soft
            )
            made = model.generate(ids, max_new_tokens=6, attention_mask=mask, eos_token_id=[])
            for own, new in ((ids[0], made[0]), (ids[1, 3:], made[1, 3:]), (ids[2], made[2])):
                rows_BSD = soft.prepend(model.embed_tokens(new[None, :-1]))[0]
                lent = SpanAdapter(checkpoint.config, FORM, 0, values_LE)
                with torch.no_grad():
                    logits = model.logits(world.swarm.whole.forward(rows_BSD, adapters=[lent]))
                # Each is the likeliest, or as good as it.
                likely = logits[0, 1 + len(own) :]
                chosen = likely.gather(1, new[len(own) :, None])[:, 0]
                check(chosen, likely.max(dim=1).values)

        await use(path, talk)
        await world.swarm.wait_free()

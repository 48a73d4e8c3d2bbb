"""What the daemon does with a GPU: its thread, what it measures, and who else uses it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import trio

from kernels.checkpoint import Checkpoint
from kernels.kv_cache import CacheArena
from kernels.span import Segment, Span, load_span
from kernels.step_graphs import CudaRecorder
from petald import throughput
from petald.codec_choice import AUTO_CODECS
from petald.config import ServeConfig
from petald.devices import dtype_name, free_memory_bytes, parse_device, parse_dtype
from petald.duty_cycle import DECODE_DEBT_S
from petald.executor import open_executor
from petald.hosted_span import HostedSpan
from petald.owner_load import GpuMeter, open_meter
from petald.speed_cache import speed_key
from petald.tensors import from_wire, to_wire
from petald.throughput import measure_codecs, measure_speed
from tests.helpers.gpu import GPU, error_of, needs_gpu
from tests.helpers.gpu_load import busy_gpu
from tests.helpers.tiny_models import make_model, save_model

pytestmark = needs_gpu

CPU = torch.device("cpu")
NAP_S = 0.05


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("llama")))


def load(checkpoint: Checkpoint, device: torch.device = GPU) -> tuple[Span, CacheArena]:
    span = load_span(checkpoint, 0, 4, dtype=torch.float32, device=device)
    arena = CacheArena(
        span.config, blocks=4, capacity_tokens=1024, dtype=torch.float32, device=device
    )
    return span, arena


def nap_on_gpu() -> None:
    """Work for the GPU of at least `NAP_S`, which is launched in no time."""
    torch.cuda._sleep(int(NAP_S * 2.5e9))  # no NVIDIA GPU's clock is faster


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps that the GPU works on for long after they have returned."""
    step = Span.step

    def slow(self: Span, *args: object, **settings: object) -> torch.Tensor:
        output_SD = step(self, *args, **settings)  # type: ignore[arg-type]
        nap_on_gpu()
        return output_SD

    monkeypatch.setattr(Span, "step", slow)
    nap_on_gpu()
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


def test_the_device_is_found() -> None:
    assert parse_device("auto") == parse_device("cuda") == GPU
    assert parse_device("cuda:0").index == 0
    assert dtype_name(parse_dtype("auto", GPU)) == "bfloat16"


def test_free_memory_is_what_can_be_had() -> None:
    torch.cuda.empty_cache()
    free = free_memory_bytes(GPU)
    taken = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    assert free - free_memory_bytes(GPU) == pytest.approx(1 << 30, rel=0.05)
    del taken
    assert free_memory_bytes(GPU) == pytest.approx(free, abs=64 << 20)


def test_a_speed_is_of_this_gpu(checkpoint: Checkpoint) -> None:
    keys = {
        speed_key(checkpoint.config, device=device, dtype=torch.bfloat16, quant=quant, threads=0)
        for device in (GPU, CPU)
        for quant in ("none", "nf4")
    }
    assert len(keys) == 4


@pytest.mark.usefixtures("slow_steps")
def test_a_measured_speed_is_that_of_the_gpus_work(checkpoint: Checkpoint) -> None:
    span, arena = load(checkpoint)
    speed = measure_speed(span, arena)
    assert speed.step_s * 4 >= NAP_S
    assert speed.token_s * 4 * throughput.FORWARD_TOKENS >= NAP_S
    assert arena.used_tokens == 0


def test_codecs_are_measured() -> None:
    costs = measure_codecs(GPU)
    assert set(costs) == set(AUTO_CODECS)
    print({name: (cost.fixed_s, cost.value_s) for name, cost in costs.items()})
    assert all(cost.fixed_s + cost.value_s > 0 for cost in costs.values())


@pytest.mark.parametrize("codec", ["raw", "bfloat16", "int8", "hadamard4"])
def test_hidden_states_cross_the_wire(codec: str) -> None:
    rows_SD = torch.randn(5, 300, device=GPU, dtype=torch.bfloat16)
    tensor = to_wire(rows_SD, codec)
    assert bytes(tensor.data) == bytes(to_wire(rows_SD.cpu(), codec).data)
    read_SD = from_wire(tensor, hidden_size=300, max_tokens=5, dtype=torch.bfloat16, device=GPU)
    assert read_SD.device.type == GPU.type
    assert error_of(read_SD, rows_SD) < 0.2


@pytest.mark.usefixtures("slow_steps")
async def test_a_batch_lasts_until_the_gpu_is_done(checkpoint: Checkpoint) -> None:
    async with open_executor(name="cuda", synchronise=torch.cuda.synchronize) as executor:
        span, arena = await executor.run(load, checkpoint)
        hosted = HostedSpan(span, arena, executor)
        cache = await hosted.open_cache(64)
        rows_SD = torch.randn(8, 48, device=GPU)
        timed = await hosted.run_step(cache, rows_SD, position=0, start=0, end=4)
        assert timed.compute_s >= NAP_S
        assert executor.computed_s >= NAP_S
        timed = await hosted.run_step(cache, rows_SD[:1], position=8, start=0, end=4)
        assert timed.compute_s >= NAP_S
        assert hosted.step_s is not None
        assert hosted.step_s >= NAP_S
        await hosted.close_cache(cache)


async def test_a_share_of_the_gpu_is_of_its_own_time() -> None:
    async with open_executor(
        name="cuda", share=0.25, synchronise=torch.cuda.synchronize
    ) as executor:
        await executor.run(nap_on_gpu)
        torch.cuda.synchronize()
        began_at, before_s = time.perf_counter(), executor.computed_s
        for _ in range(12):
            await executor.run(nap_on_gpu, peer="somebody")
        took_s = time.perf_counter() - began_at
        computed_s = executor.computed_s - before_s
        assert computed_s >= 12 * NAP_S
        assert executor.rests
        # The share, also of what decode steps need not wait for; and one piece of work.
        assert computed_s <= 0.25 * (took_s + DECODE_DEBT_S) + computed_s / 12


async def test_many_sessions_at_once_give_what_each_gives_alone(checkpoint: Checkpoint) -> None:
    whole = load_span(checkpoint, 0, 4, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(12, 30, 48, generator=generator)
    outputs: dict[int, torch.Tensor] = {}
    async with open_executor(name="cuda", synchronise=torch.cuda.synchronize) as executor:
        span, arena = await executor.run(load, checkpoint)
        span.record_steps(CudaRecorder(GPU))
        hosted = HostedSpan(span, arena, executor)

        async def run_session(number: int) -> None:
            cache = await hosted.open_cache(64)
            pieces = []
            at = 0
            for tokens in (10 + number % 4, 1, 1, 1, 3, 1, 1):
                rows_SD = from_wire(
                    to_wire(hidden[number, at : at + tokens]),
                    hidden_size=48,
                    max_tokens=64,
                    dtype=torch.float32,
                    device=GPU,
                )
                timed = await hosted.run_step(
                    cache, rows_SD, position=at, start=0, end=4, peer=f"peer {number % 3}"
                )
                # As a server sends it: encoded in a thread, while the device goes on.
                pieces.append(await trio.to_thread.run_sync(lambda t=timed: t.value.cpu()))
                at += tokens
            outputs[number] = torch.cat(pieces)
            await hosted.close_cache(cache)

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(run_session, number)
        assert executor.batched_items > executor.batches
        assert span.graphs_failure == ""
        assert arena.used_tokens == 0
    for number, output_SD in outputs.items():
        expected_SD = whole.forward(hidden[number : number + 1, : len(output_SD)])[0]
        assert error_of(output_SD, expected_SD) < 1e-3


def test_a_moved_cache_goes_on_elsewhere(checkpoint: Checkpoint) -> None:
    spans = [load(checkpoint, device) for device in (GPU, CPU, GPU)]
    hidden = torch.randn(20, 48, generator=torch.Generator().manual_seed(3))
    expected_SD = spans[1][0].forward(hidden[None])[0]
    caches = [arena.open(64) for _, arena in spans]
    outputs = []
    for number, (span, _) in enumerate(spans):
        rows_SD = hidden[5 * number : 5 * number + 5]
        if number:
            before = caches[number - 1]
            caches[number].extend(before.length)
            for block in range(4):
                caches[number].write(block, 0, *before.read(block, 0, before.length))
        outputs.append(span.step(rows_SD.to(span.device), [Segment(caches[number], 5)]).cpu())
    assert error_of(torch.cat(outputs), expected_SD[:15]) < 1e-3


class TestOthersUse:
    """Others' use of the GPU, by the real NVML."""

    OWN_S = 3.0
    _own_s = 0.0

    def read_own_s(self) -> float:
        return self._own_s

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """This process uses the GPU all the time."""
        is_over = threading.Event()

        def work() -> None:
            a = torch.randn(4096, 4096, device=GPU, dtype=torch.bfloat16)
            while not is_over.is_set():
                began_at = time.perf_counter()
                for _ in range(50):
                    a @ a
                torch.cuda.synchronize()
                self._own_s += time.perf_counter() - began_at

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    async def read(self, meter: GpuMeter, seconds: float) -> list[float | None]:
        """As a lender looks: several times, once others' work has begun to be seen."""
        await trio.sleep(1.5)
        await meter.read()
        samples = []
        for _ in range(4):
            await trio.sleep(seconds / 4)
            samples.append(await meter.read())
        return samples

    async def test_by_nvml(self) -> None:
        torch.zeros(1, device=GPU)
        meter = open_meter(GPU, read_own_s=self.read_own_s)
        assert isinstance(meter, GpuMeter)
        idle = await self.read(meter, self.OWN_S)
        with self.own_work():
            own = await self.read(meter, self.OWN_S)
        assert self._own_s > 0.5 * self.OWN_S
        with busy_gpu():
            others = await self.read(meter, self.OWN_S)
            with self.own_work():
                both = await self.read(meter, self.OWN_S)
        after = await self.read(meter, self.OWN_S)
        print(f"\nidle {idle}\nown {own}\nothers {others}\nboth {both}\nafter {after}")
        assert mean(idle) < 0.1
        assert mean(own) < 0.1  # or unknown
        assert mean(others) > 0.5
        known = [sample for sample in both if sample is not None]
        assert not known or mean(both) > 0.2
        assert after[-1] is not None
        assert after[-1] < 0.1


def mean(samples: list[float | None]) -> float:
    known = [sample for sample in samples if sample is not None]
    return sum(known) / len(known) if known else 0.0


def test_the_configuration_of_a_gpu_server_is_taken() -> None:
    config = ServeConfig(model="tiny", device="cuda:0", dtype="auto", quant="nf4")
    device = parse_device(config.device)
    assert parse_dtype(config.dtype, device, quant=config.quant) == torch.bfloat16


def test_a_process_that_does_not_serve_leaves_the_gpu_alone(tmp_path: Path) -> None:
    """A context alone takes hundreds of MiB of a GPU."""
    program = (
        "import torch, trio\n"
        "from petald.config import parse_arguments\n"
        "from petald.daemon import _measure_codecs, _open_executors\n"
        "config = parse_arguments([])\n"
        "async def main():\n"
        "    _measure_codecs(config)\n"
        "    async with _open_executors(config) as (device, local):\n"
        "        await device.run(int)\n"
        "        await local.run(int)\n"
        "trio.run(main)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

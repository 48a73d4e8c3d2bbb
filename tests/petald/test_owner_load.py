"""What others use: by made-up clocks, by a made-up NVML, and by the real /proc/stat."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from petald.owner_load import CpuMeter, CpuTimes, GpuMeter, open_meter, read_cpu_times


class NVMLError(Exception):
    pass


class NotFound(NVMLError):
    pass


class NotSupported(NVMLError):
    pass


class FakeNvml:
    """One GPU, as NVML tells of it."""

    NVMLError = NVMLError
    NVMLError_NotFound = NotFound

    def __init__(self) -> None:
        self.running = [41, 42]
        self.samples: list[tuple[int, int, int]] | NVMLError = []
        self.whole: int | NVMLError = 0
        self.asked_since: list[int] = []

    def nvmlDeviceGetComputeRunningProcesses(self, _: object) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self.running]

    def nvmlDeviceGetProcessUtilization(self, _: object, since_us: int) -> list[Any]:  # noqa: N802
        self.asked_since.append(since_us)
        if isinstance(self.samples, NVMLError):
            raise self.samples
        return [
            SimpleNamespace(pid=pid, timeStamp=stamp, smUtil=share)
            for pid, stamp, share in self.samples
        ]

    def nvmlDeviceGetUtilizationRates(self, _: object) -> Any:  # noqa: N802
        if isinstance(self.whole, NVMLError):
            raise self.whole
        return SimpleNamespace(gpu=self.whole)


class Gpu:
    """A meter of it, whose clocks are moved by hand."""

    def __init__(self) -> None:
        self.nvml = FakeNvml()
        self.now = 100.0
        self.own_s = 0.0
        self.meter = GpuMeter(
            self.nvml,
            object(),
            read_own_s=lambda: self.own_s,
            pid=42,
            clock=lambda: self.now,
            wall_clock=lambda: self.now + 1e9,
        )

    async def read(self, after_s: float = 5.0, own_s: float = 0.0) -> float | None:
        self.now += after_s
        self.own_s += own_s
        return await self.meter.read()

    def stamp(self, ago_s: float) -> int:
        return int((self.now + 1e9 - ago_s) * 1e6)


async def read_cpu(*times: CpuTimes) -> list[float | None]:
    following = iter(times)
    meter = CpuMeter(lambda: next(following))
    return [await meter.read() for _ in times]


async def test_own_time_is_not_that_of_others() -> None:
    assert await read_cpu(
        CpuTimes(100, 60, 40, 20),
        CpuTimes(120, 65, 55, 30),  # of 20 s, 15 busy, 10 of them own
        CpuTimes(120, 65, 55, 30),  # no tick
        CpuTimes(140, 80, 60, 36),  # own time is counted finer than the machine's
        CpuTimes(150, 80, 75, 36),
    ) == [None, 0.25, None, 0.0, 1.0]


async def test_where_nothing_is_idle_others_want_more_than_they_get() -> None:
    assert await read_cpu(
        CpuTimes(100, 60, 40, 20),
        CpuTimes(130, 60, 70, 40),  # a third beside two thirds: one thread of two
        CpuTimes(140, 60, 80, 45),  # half and half: as many as there are processors
        CpuTimes(150, 60, 90, 54.5),  # what runs anyway
        CpuTimes(160, 60, 94, 54.5),  # beside processes of lowered priority
    ) == [None, pytest.approx(0.5), 1.0, pytest.approx(0.05 / 0.95), pytest.approx(0.4 / 0.6)]


async def burn_beside(meter: CpuMeter, program: str) -> float:
    with subprocess.Popen([sys.executable, "-c", program]) as child:  # noqa: ASYNC220
        try:
            await trio.sleep(0.2)
            await meter.read()
            await trio.sleep(0.6)
            share = await meter.read()
        finally:
            child.kill()
    assert share is not None
    return share


async def test_the_real_clocks_tell_own_work_from_that_of_others() -> None:
    """Others' work here is a process of the test's, which is not waited for; a lower bound."""
    first = read_cpu_times()
    ends_at = time.perf_counter() + 0.3
    while time.perf_counter() < ends_at:
        pass
    second = read_cpu_times()
    own_s = second.own_s - first.own_s
    if os.getpriority(os.PRIO_PROCESS, 0) <= 0:
        assert own_s > 0.1
    assert 0 <= own_s <= second.busy_s - first.busy_s + 0.05
    # A load in the kernel, which counts with every priority.
    program = (
        "f = open('/dev/zero', 'rb', buffering=0); b = bytearray(1 << 20)\nwhile 1: f.readinto(b)"
    )
    share = await burn_beside(CpuMeter(), program)
    assert share > 0.3 / (os.cpu_count() or 1)


async def test_each_others_newest_sample_counts() -> None:
    gpu = Gpu()
    gpu.now += 5
    gpu.nvml.samples = [
        (42, gpu.stamp(1), 70),
        (41, gpu.stamp(4), 90),
        (41, gpu.stamp(1), 20),
        (41, gpu.stamp(2), 60),
        (43, gpu.stamp(1), 5),
        (44, gpu.stamp(60), 100),  # long gone
    ]
    assert await gpu.read(after_s=0.0) == 0.25
    assert gpu.nvml.asked_since == [gpu.stamp(5)]
    gpu.nvml.samples = [(41, gpu.stamp(0), 80), (43, gpu.stamp(0), 80)]
    assert await gpu.read(after_s=0.1, own_s=0.1) == 1.0
    assert gpu.nvml.asked_since[-1] == gpu.stamp(1)  # a look is not too short to find a sample
    gpu.nvml.samples = NotFound()
    assert await gpu.read() == 0.0


@pytest.mark.parametrize("prepare", ["no process utilisation", "another process number"])
async def test_without_processes_the_whole_gpus_use_tells_while_this_one_is_idle(
    prepare: str,
) -> None:
    gpu = Gpu()
    if prepare == "no process utilisation":
        gpu.nvml.samples = NotSupported()
    else:
        gpu.nvml.running = [7, 8]
    gpu.nvml.whole = 80
    assert await gpu.read() == 0.8
    assert await gpu.read(own_s=2.0) is None
    assert await gpu.read(own_s=0.05) == 0.8
    gpu.nvml.whole = NotSupported()
    assert await gpu.read() is None
    gpu.nvml.whole = 10
    assert await gpu.read(after_s=0.0) is None


def test_a_gpu_that_nothing_is_known_of_has_no_meter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise NVMLError("no driver")

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert open_meter(torch.device("cuda", 0), read_own_s=float) is None
    assert "petalctl pause" in caplog.text or "makes way for nobody" in caplog.text


def test_each_device_has_its_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=asked.append
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="ab-12")
    )
    assert isinstance(open_meter(torch.device("cuda", 1), read_own_s=float), GpuMeter)
    assert asked == ["GPU-ab-12"]
    assert isinstance(open_meter(torch.device("cpu"), read_own_s=float), CpuMeter)

"""What others use of the device that this server lends: its owner, and whoever else.

Thin. On a processor: the busy time of the whole machine, less this process's own. Processes of
lowered priority do not count: whoever runs something so asks for no more than is idle, as petald
does itself. So servers of one machine do not make way for each other where they run as a service,
which lowers their priority; where they do not, each counts as others to the rest. On a GPU: what
NVML says of the other processes on it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
import trio

from petald.log import get_logger

log = get_logger(__name__)

OWN_GPU_SHARE = 0.02
"""A GPU that this process used less is busy for others, if at all: far below any threshold, and
above what a health check costs."""

SATURATED_IDLE = 0.05
"""With less of the processors idle than this, somebody waits for one."""

LEAST_LOOK_US = 1_000_000
"""NVML takes a sample each sixth of a second to each second, by the product (NVML API reference,
nvmlDeviceGetProcessUtilization): a shorter look might find none of a GPU that is in use."""


class Meter(Protocol):
    """Tells what others use."""

    async def read(self) -> float | None:
        """The share of the device's time that others used since the last call.

        None where it cannot be told, as at the first call.
        """


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of processor time since some beginning.

    Attributes:
        all_s: that there was, on all processors.
        idle_s: of them, spent on nothing.
        busy_s: of them, spent on processes of normal priority and for the kernel.
        own_s: of these, by this process and the children that it waited for.
    """

    all_s: float
    idle_s: float
    busy_s: float
    own_s: float


def read_cpu_times() -> CpuTimes:
    """What the kernel counted until now.

    Source: proc(5), /proc/stat, by psutil. Guests' time is in user and nice; what the hypervisor
    gave to other machines (steal) is neither idle here nor used here.
    """
    all_times = psutil.cpu_times()
    idle_s = all_times.idle + getattr(all_times, "iowait", 0.0)
    guest_s = getattr(all_times, "guest", 0.0) + getattr(all_times, "guest_nice", 0.0)
    all_s = sum(all_times) - guest_s
    nice_s = all_times.nice + getattr(all_times, "steal", 0.0)
    own = os.times()
    own_s = own.system + own.children_system
    if os.getpriority(os.PRIO_PROCESS, 0) <= 0:  # else the rest of it is counted as nice
        own_s += own.user + own.children_user
    return CpuTimes(all_s, idle_s, all_s - idle_s - nice_s, own_s)


class CpuMeter:
    """What others use of the processors, or would if they did not have to share.

    Where nothing is idle, others may want more than they get. As many threads as there are
    processors share them with k of others as fairly as the kernel does; then others get
    ``u = k / (n + k)`` of the time, and want ``k / n = u / (1 - u)`` of it.

    Args:
        read_times: the clocks.
    """

    def __init__(self, read_times: Callable[[], CpuTimes] = read_cpu_times) -> None:
        self._read_times = read_times
        self._last: CpuTimes | None = None

    async def read(self) -> float | None:
        """As `Meter`; a share of all processors together."""
        await trio.lowlevel.checkpoint()
        now, last = self._read_times(), self._last
        if last is not None and now.all_s <= last.all_s:
            return None  # not a tick has passed
        self._last = now
        if last is None:
            return None
        others_s = (now.busy_s - last.busy_s) - (now.own_s - last.own_s)
        # The kernel counts processes by the nanosecond, and the machine by ticks.
        all_s = now.all_s - last.all_s
        share = min(1.0, max(0.0, others_s / all_s))
        if now.idle_s - last.idle_s < SATURATED_IDLE * all_s and share < 1:
            share = min(1.0, share / (1 - share))
        return share


class GpuMeter:
    """What others use of a GPU, by NVML.

    NVML tells the use of each process, but not everywhere (not under MIG, nor where this process is
    a container's and known to the driver by another number). There, the use of the whole GPU is
    that of others while this process does not compute, and unknown while it does.

    Args:
        nvml: the module ``pynvml``, initialised.
        handle: the GPU's.
        read_own_s: seconds that this process has computed on it.
        pid: this process's.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, by which NVML marks samples.
    """

    def __init__(
        self,
        nvml: Any,
        handle: Any,
        *,
        read_own_s: Callable[[], float],
        pid: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._nvml = nvml
        self._handle = handle
        self._read_own_s = read_own_s
        self._pid = pid
        self._clock = clock
        self._wall_clock = wall_clock
        self._last = (clock(), read_own_s())

    async def read(self) -> float | None:
        """As `Meter`; the driver may take milliseconds to answer, on a thread."""
        return await trio.to_thread.run_sync(self._read_now)

    def _read_now(self) -> float | None:
        last_at, last_own_s = self._last
        now, own_s = self._clock(), self._read_own_s()
        if now <= last_at:
            return None
        self._last = (now, own_s)
        look_us = max(int((now - last_at) * 1e6), LEAST_LOOK_US)
        since_us = int(self._wall_clock() * 1e6) - look_us
        try:
            return self._read(since_us, own_share=(own_s - last_own_s) / (now - last_at))
        except self._nvml.NVMLError as error:
            log.debug("NVML does not tell", reason=str(error))
            return None

    def _read(self, since_us: int, *, own_share: float) -> float | None:
        running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        if self._pid in {process.pid for process in running}:
            with contextlib.suppress(self._nvml.NVMLError):
                return self._of_processes(since_us)
        if own_share > OWN_GPU_SHARE:
            return None
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        return min(1.0, float(rates.gpu) / 100)

    def _of_processes(self, since_us: int) -> float:
        """The newest use by each of the others, added up.

        Raises:
            NVMLError: NVML does not tell it here, or has no sample since then.
        """
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, since_us)
        except self._nvml.NVMLError_NotFound:  # nobody computed
            return 0.0
        newest: dict[int, Any] = {}
        for sample in samples:
            known = newest.get(sample.pid)
            # Some drivers give samples of long ago, too.
            if sample.timeStamp >= since_us and (
                known is None or sample.timeStamp > known.timeStamp
            ):
                newest[sample.pid] = sample
        others = sum(int(sample.smUtil) for pid, sample in newest.items() if pid != self._pid)
        return min(1.0, others / 100)


def open_meter(device: torch.device, *, read_own_s: Callable[[], float]) -> Meter | None:
    """The meter for a device; none where nothing can be told of it.

    Args:
        device: that is lent.
        read_own_s: seconds that this process has computed on it.
    """
    if device.type != "cuda":
        return CpuMeter()
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        log.warning(
            "who uses the GPU is unknown, so this server makes way for nobody",
            reason=str(error),
            advice="`petalctl pause` does it by hand",
        )
        return None
    return GpuMeter(pynvml, handle, read_own_s=read_own_s, pid=os.getpid())

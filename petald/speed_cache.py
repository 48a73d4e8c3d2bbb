"""What was measured of this machine's speed, on disk: measured once, known at every start.

A speed is kept by all that it depends on, so that a change of any of it is another entry. A file
that cannot be read or written is as good as none: speeds can be measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch

from kernels.model_config import ModelConfig
from petald.throughput import BlockSpeed

FILE_NAME = "speeds.json"

LEAST_S = 1e-9
"""Nothing is so quick; what says so was not measured."""
MAX_FILE_BYTES = 1 << 20
MAX_ENTRIES = 256


def speed_key(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, quant: str, threads: int
) -> str:
    """A name for all that a block's speed depends on.

    Args:
        config: of the model; models of the same shape are as fast.
        device: which computes.
        dtype: in which it does.
        quant: the weight format.
        threads: that a CPU may use; 0: all.
    """
    is_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if is_gpu else torch.cpu.get_capabilities()
    shape = {**asdict(config), "num_blocks": 0, "vocab_size": 0, "eos_token_ids": ()}
    parts = (shape, str(hardware), os.cpu_count(), str(dtype), quant, threads, torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class SpeedCache:
    """Speeds by their keys.

    Args:
        folder: where the file is, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME

    def get(self, key: str) -> BlockSpeed | None:
        """What was measured; none where nothing was."""
        entry = self._read().get(key)
        if not isinstance(entry, dict):
            return None
        values = [entry.get(name) for name in ("step_s", "token_s")]
        speeds = [
            value for value in values if isinstance(value, float) and LEAST_S < value < math.inf
        ]
        if len(speeds) < len(values):
            return None
        return BlockSpeed(step_s=speeds[0], token_s=speeds[1])

    def put(self, key: str, speed: BlockSpeed) -> None:
        """Keeps what was measured; the oldest of too many entries goes."""
        entries = self._read()
        entries.pop(key, None)
        entries[key] = {"step_s": speed.step_s, "token_s": speed.token_s}
        while len(entries) > MAX_ENTRIES:
            del entries[next(iter(entries))]
        making = self._file.with_suffix(f".{os.getpid()}.making")
        with contextlib.suppress(OSError):
            making.write_text(json.dumps(entries, indent=1))
            making.replace(self._file)

    def _read(self) -> dict[str, object]:
        try:
            with self._file.open("rb") as file:
                entries = json.loads(file.read(MAX_FILE_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}

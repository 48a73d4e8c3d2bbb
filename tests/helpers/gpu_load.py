"""Somebody else's work on the GPU, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BURN = (
    "import torch\n"
    "a = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)\n"
    "a @ a\n"
    "torch.cuda.synchronize()\n"
    "print('burning', flush=True)\n"
    "while True:\n"
    "    for _ in range(20):\n"
    "        a @ a\n"
    "    torch.cuda.synchronize()\n"
)


@contextmanager
def busy_gpu() -> Iterator[None]:
    """Once it has begun to multiply; it is ended with the block."""
    with subprocess.Popen(
        [sys.executable, "-c", BURN], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as burner:
        try:
            assert burner.stdout is not None
            assert burner.stdout.readline() == "burning\n"
            yield
        finally:
            burner.kill()

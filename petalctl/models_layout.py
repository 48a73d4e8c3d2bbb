"""How large a model's blocks are, read from the headers of its safetensors files.

Standard library only; the weights themselves are not read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import CorruptCheckpoint
from petalctl.hub_shards import block_of_tensor

_MAX_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors format itself."""


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Bytes of each block that is here, and of what is before and after all blocks."""

    bytes_by_block: dict[int, int]
    end_bytes: int


def read_layout(paths: Iterable[Path]) -> WeightLayout:
    """The layout of the weight files at `paths`.

    Raises:
        CorruptCheckpoint: One is not a safetensors file, or cut short.
    """
    by_block: Counter[int] = Counter()
    end_bytes = 0
    for path in paths:
        for name, size_bytes in _tensor_bytes(path):
            block = block_of_tensor(name)
            if block is None:
                end_bytes += size_bytes
            else:
                by_block[block] += size_bytes
    return WeightLayout(bytes_by_block=dict(sorted(by_block.items())), end_bytes=end_bytes)


def _tensor_bytes(path: Path) -> list[tuple[str, int]]:
    try:
        with path.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            header: dict[str, Any] = json.loads(opened.read(header_bytes))
            data_bytes = path.stat().st_size - 8 - header_bytes
        header.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        if any(not 0 <= start <= end <= data_bytes for start, end in spans.values()):
            raise ValueError("a tensor outside the file")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{path} is not a sound safetensors file ({error}); pull the model again"
        ) from error
    return [(name, end - start) for name, (start, end) in spans.items()]

"""Whether a model folder's weights are quantised already, and how: from its ``config.json``.

Two ways are known. ``bitsandbytes``: what transformers saves of a model that was loaded in 8 bits,
or in 4-bit NormalFloat. ``petald``: what `kernels.gguf_import` keeps of a GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.errors import UnsupportedModel

BITSANDBYTES = "bitsandbytes"
PETALD = "petald"
PETALD_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredQuantisation:
    """How a folder's weights are quantised.

    Attributes:
        method: `BITSANDBYTES` or `PETALD`.
        bytes_per_weight: about, in memory; for what is planned before anything is read.
    """

    method: str
    bytes_per_weight: float


def parse_stored_quantisation(raw: Mapping[str, Any]) -> StoredQuantisation | None:
    """What a ``config.json`` says of it; none where the weights are plain numbers.

    Raises:
        UnsupportedModel: they are quantised in a way that is not known here.
    """
    section = raw.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if method == PETALD and section.get("version") == PETALD_VERSION:
        return StoredQuantisation(method=PETALD, bytes_per_weight=1.25)
    if method != BITSANDBYTES:
        raise UnsupportedModel(
            f"weights that are quantised by {method!r:.40} are not supported; "
            f"supported: {BITSANDBYTES} in 8 bits or nf4, and {PETALD}"
        )
    if section.get("load_in_8bit"):
        return StoredQuantisation(method=BITSANDBYTES, bytes_per_weight=1.0)
    kind = section.get("bnb_4bit_quant_type")
    if kind != "nf4":
        raise UnsupportedModel(f"4-bit weights of the type {kind!r:.40} are not supported; nf4 is")
    storage = section.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise UnsupportedModel(
            f"4-bit weights that are stored as {storage!r:.40} are not supported; uint8 is"
        )
    return StoredQuantisation(method=BITSANDBYTES, bytes_per_weight=0.57)

"""What is planned for a block's weights is what they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.checkpoint import Checkpoint
from kernels.layer_loader import block_bytes
from kernels.quant.formats import WEIGHT_FORMATS
from kernels.span import load_span
from tests.helpers.tiny_models import make_model, save_model

CPU = torch.device("cpu")
WIDE = {"hidden_size": 192, "intermediate_size": 384}


@pytest.mark.parametrize("quant", WEIGHT_FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama-biases", "mixtral"])
def test_of_every_format(tmp_path: Path, name: str, quant: str) -> None:
    checkpoint = Checkpoint(save_model(make_model(name, **WIDE), tmp_path))
    dtype = torch.bfloat16
    span = load_span(checkpoint, 0, 1, dtype=dtype, device=CPU, quant=quant)
    planned = block_bytes(checkpoint.config, 0, dtype=dtype, quant=quant)
    assert planned == pytest.approx(span.weight_bytes, rel=0.03)

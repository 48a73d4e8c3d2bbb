"""The ends that `petalctl.torch` trains against the daemon's own, by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from petalctl.torch.causal_lm import RemoteCausalLM
from tests.helpers.tiny_models import make_model, save_model


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon-groups-one-norm", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_logits_are_the_daemons(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint(save_model(make_model(name), tmp_path))
    no_client: Any = None
    model = RemoteCausalLM(checkpoint, name="tiny", client=no_client, dtype=dtype)
    ends = load_ends(checkpoint, dtype=dtype, device=torch.device("cpu"))
    ids = torch.arange(3, 20)
    rows = model._enter(model.embed_tokens(ids))
    torch.testing.assert_close(rows, ends.embedding.embed(ids), rtol=0, atol=0)
    torch.testing.assert_close(model.logits(rows), ends.head.logits(rows))
    assert not any(parameter.requires_grad for parameter in model.parameters())

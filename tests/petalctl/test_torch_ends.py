"""The ends that `petalctl.torch` trains against the daemon's own, by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from petalctl.torch.causal_lm import RemoteCausalLM
from tests.helpers.tiny_models import logits_of, make_model, save_model


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


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_a_norm_can_be_trained(tmp_path: Path, name: str) -> None:
    reference: Any = make_model(name)
    checkpoint = Checkpoint(save_model(reference, tmp_path))
    no_client: Any = None
    model = RemoteCausalLM(checkpoint, name="tiny", client=no_client)
    hidden = torch.randn(2, 5, checkpoint.config.hidden_size)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    model.norm.requires_grad_()
    model.logits(ours).square().sum().backward()
    logits_of(reference, theirs).square().sum().backward()
    inner = reference.base_model
    norm = inner.ln_f if name == "bloom" else inner.norm
    pairs = [(ours, theirs), *zip(model.norm.parameters(), norm.parameters(), strict=True)]
    for mine, expected in pairs:
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-2)

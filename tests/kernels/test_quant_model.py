"""Weight formats on the real small model: its own outlier features, and what a text costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kernels.adapter import BlockAdapter
from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from kernels.linear import DenseLinear
from kernels.quant.int8 import quantise_int8
from kernels.quant.llm_int8 import OUTLIER_THRESHOLD, multiply_int8, multiply_llm_int8
from kernels.span import Span, load_span
from kernels.tokenizer import Tokenizer
from tests.helpers.real_model import real_model_folder

pytestmark = pytest.mark.model
CPU = torch.device("cpu")
TEXT = (
    "Water freezes at zero degrees Celsius, and boils at a hundred where the air is as dense as at "
    "the sea. High in the mountains it boils sooner, so that beans take longer to become soft. "
    "Salt lowers the temperature at which it freezes; this is why roads are salted in winter, and "
    "why the sea stays open where lakes do not. Ice is lighter than water, which is rare among "
    "solids: it floats, and so the fish below it live."
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return real_model_folder()


def load(folder: Path, dtype: torch.dtype, quant: str = "none") -> Span:
    checkpoint = Checkpoint(folder)
    end = checkpoint.config.num_blocks
    return load_span(checkpoint, 0, end, dtype=dtype, device=CPU, quant=quant)


def run(folder: Path, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """The text's tokens, and the logits after each."""
    ends = load_ends(Checkpoint(folder), dtype=span.dtype, device=CPU)
    ids = torch.tensor(Tokenizer.load(folder).encode(TEXT))
    with torch.inference_mode():
        hidden_SD = span.forward(ends.embedding.embed(ids)[None])[0]
        return ids, ends.head.logits(hidden_SD)


def test_llm_int8_copes_with_the_models_own_outliers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    apply = DenseLinear.apply

    def note(
        self: DenseLinear, x_SI: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        inputs.append((x_SI, self.weight_IO.t()))
        return apply(self, x_SI, adapters)

    monkeypatch.setattr(DenseLinear, "apply", note)
    run(folder, load(folder, torch.float32))
    ratios = []
    for x_SI, weight_OI in inputs:
        if not (x_SI.abs() >= OUTLIER_THRESHOLD).any():
            continue
        weights = quantise_int8(weight_OI)
        exact = torch.mm(x_SI, weights.dequantise(torch.float32).t())
        plain, apart = (
            float((product - exact).norm() / exact.norm())
            for product in (multiply_int8(x_SI, weights), multiply_llm_int8(x_SI, weights))
        )
        assert apart < 0.03
        ratios.append(plain / apart)
    print(f"{len(ratios)} of {len(inputs)} layers have outliers; ratios of errors: {ratios}")
    assert ratios, "the model shows none"
    assert max(ratios) > 3


@pytest.mark.parametrize(("quant", "most"), [("int8", 0.02), ("int4", 0.01), ("nf4", 0.4)])
def test_a_text_costs_little_more(folder: Path, quant: str, most: float) -> None:
    # The model comes from 4-bit weights in groups, which int4 finds again, and nf4 does not.
    losses = []
    for name in ("none", quant):
        ids, logits_SV = run(folder, load(folder, torch.float32, name))
        losses.append(float(torch.nn.functional.cross_entropy(logits_SV[:-1], ids[1:])))
    assert abs(math.exp(losses[1] - losses[0]) - 1) < most

"""Gradients of inputs and adapters against Hugging Face's and PEFT's, however the blocks are cut.

One batch has sequences without padding, with padding on the right, on the left, on both sides, and
with a hole. The loss is on the logits of real tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.span import Span, load_span
from kernels.span_pass import PassGradients, PassWork, run_backward, run_forward
from kernels.weight_names import linear_sizes
from tests.helpers.peft_reference import PEFT_KINDS, PeftReference
from tests.helpers.run_out import run_out
from tests.helpers.tiny_models import (
    FAMILIES,
    logits_of,
    make_model,
    save_model,
    without_embedding_norm,
)

CPU = torch.device("cpu")
TOKENS = 7
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 1, 1],
    ],
    dtype=torch.bool,
)
CUTS = ((0, 4), (0, 1, 3, 4))


class Case:
    """A tiny model, and a batch for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.reference: Any = make_model(name).requires_grad_(False)
        self.checkpoint = Checkpoint(save_model(self.reference, folder))
        without_embedding_norm(self.reference)
        self.config = self.checkpoint.config
        self.whole = self.load(0, 4)
        generator = torch.Generator().manual_seed(1)
        shape = (len(MASK), TOKENS)
        self.hidden = torch.randn(*shape, self.config.hidden_size, generator=generator)
        self.gradient = torch.randn(*shape, self.config.vocab_size, generator=generator)

    def load(self, start: int, end: int, dtype: torch.dtype = torch.float32) -> Span:
        return load_span(self.checkpoint, start, end, dtype=dtype, device=CPU)

    def spans(self, cut: tuple[int, ...]) -> list[Span]:
        return [self.load(*pair) for pair in itertools.pairwise(cut)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(self.reference, hidden)

    def output_gradient(self, output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The loss's gradient with respect to what the last block gives."""
        leaf = output.detach().clone().requires_grad_()
        logits = self.logits(leaf)[:, -TOKENS:]
        (logits * self.gradient * mask[..., None]).sum().backward()
        assert leaf.grad is not None
        return leaf.grad


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=PEFT_KINDS)
def peft(request: pytest.FixtureRequest, case: Case) -> PeftReference:
    if request.param == "prefix" and case.name.startswith("falcon-groups"):
        pytest.skip("Hugging Face's Falcon caches keys repeated, and so are its prefixes")
    return PeftReference(case.name, case.config, request.param)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=5e-5 * float(theirs.abs().max()))


def pass_through(
    case: Case, work: PassWork, mask: torch.Tensor, cut: tuple[int, ...], group_blocks: int
) -> tuple[torch.Tensor, PassGradients]:
    """Forward and backward through a chain of spans; each has its rows of the adapter."""
    works: list[tuple[Span, PassWork]] = []
    hidden = work.hidden_BSD
    for span in case.spans(cut):
        trained = work.trained
        if trained is not None:
            rows = trained.values_LE[span.start : span.end]
            trained = SpanAdapter(case.config, trained.form, span.start, rows)
        part = replace(work, hidden_BSD=hidden, start=span.start, end=span.end, trained=trained)
        works.append((span, part))
        hidden = run_out(run_forward(span, part))
    gradient = case.output_gradient(hidden, mask)
    rows_LE: list[torch.Tensor] = []
    for span, part in reversed(works):
        result = run_out(run_backward(span, part, gradient, group_blocks=group_blocks))
        gradient = result.hidden_BSD
        if result.adapter_LE is not None:
            rows_LE.insert(0, result.adapter_LE)
    return hidden, PassGradients(gradient, torch.cat(rows_LE) if rows_LE else None)


def prepared(
    case: Case, peft: PeftReference, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, SpanAdapter | None]:
    """The input, with a soft prompt before it, its mask, and the adapter of the blocks."""
    if peft.form is not None:
        return case.hidden, MASK, SpanAdapter(case.config, peft.form, 0, values)
    hidden = torch.cat((values.expand(len(MASK), -1, -1), case.hidden), dim=1)
    return hidden, torch.cat((MASK.new_ones(len(MASK), len(values)), MASK), dim=1), None


def test_of_the_input_alone(case: Case) -> None:
    for mask in (MASK, torch.ones_like(MASK)):
        inputs = case.hidden.clone().requires_grad_()
        logits = case.reference(inputs_embeds=inputs, attention_mask=mask.long()).logits
        (logits * case.gradient * mask[..., None]).sum().backward()
        assert inputs.grad is not None
        mask_BS = None if mask.all() else mask
        work = PassWork(hidden_BSD=case.hidden, start=0, end=4, mask_BS=mask_BS)
        for cut, group_blocks in ((CUTS[0], 4), (CUTS[1], 1)):
            output, gradients = pass_through(case, work, mask, cut, group_blocks)
            near(case.logits(output)[mask], logits.detach()[mask])
            near(gradients.hidden_BSD, inputs.grad)
            assert gradients.adapter_LE is None


def test_of_an_adapter_through_autograd(case: Case, peft: PeftReference) -> None:
    logits, of_input, of_adapter = peft.run(case.hidden, MASK, case.gradient)
    values = peft.values().requires_grad_()
    leaf = case.hidden.clone().requires_grad_()
    case_like = replace_hidden(case, leaf)
    hidden, mask, adapter = prepared(case_like, peft, values)
    output = case.whole.forward(
        hidden, mask_BS=mask, adapters=() if adapter is None else (adapter,)
    )
    ours = case.logits(output)[:, -TOKENS:]
    near(ours.detach()[MASK], logits[MASK])
    (ours * case.gradient * MASK[..., None]).sum().backward()
    assert leaf.grad is not None
    assert values.grad is not None
    near(leaf.grad, of_input)
    near(values.grad, of_adapter)


@pytest.mark.parametrize("group_blocks", [1, 3, 9])
def test_of_an_adapter_through_passes(case: Case, peft: PeftReference, group_blocks: int) -> None:
    logits, of_input, of_adapter = peft.run(case.hidden, MASK, case.gradient)
    values = peft.values()
    hidden, mask, trained = prepared(case, peft, values)
    work = PassWork(hidden_BSD=hidden, start=0, end=4, mask_BS=mask, trained=trained)
    for cut in CUTS:
        output, gradients = pass_through(case, work, MASK, cut, group_blocks)
        near(case.logits(output)[:, -TOKENS:][MASK], logits[MASK])
        near(gradients.hidden_BSD[:, -TOKENS:], of_input)
        if trained is None:
            near(gradients.hidden_BSD[:, :-TOKENS].sum(0), of_adapter)
        else:
            assert gradients.adapter_LE is not None
            near(gradients.adapter_LE, of_adapter)


def replace_hidden(case: Case, hidden: torch.Tensor) -> Case:
    other = object.__new__(Case)
    other.__dict__ |= case.__dict__ | {"hidden": hidden}
    return other


class ThroughPasses(torch.autograd.Function):
    """A span's passes as one differentiable function of input and adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        values: torch.Tensor,
        span: Span,
        form: AdapterForm,
        group_blocks: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, values)
        ctx.rest = span, form, group_blocks
        return run_out(run_forward(span, ThroughPasses.work(ctx, hidden, values))).clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        work = ThroughPasses.work(ctx, *ctx.saved_tensors)
        span, _, group_blocks = ctx.rest
        result = run_out(run_backward(span, work, gradient, group_blocks=group_blocks))
        return result.hidden_BSD, result.adapter_LE, None, None, None

    @staticmethod
    def work(ctx: Any, hidden: torch.Tensor, values: torch.Tensor) -> PassWork:
        span, form, _ = ctx.rest
        mask = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
        trained = SpanAdapter(span.config, form, span.start, values.detach())
        return PassWork(
            hidden_BSD=hidden.detach(),
            start=span.start,
            end=span.end,
            mask_BS=mask,
            trained=trained,
        )


def check_numerically(span: Span, form: AdapterForm, *, fast: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 3, span.config.hidden_size, dtype=torch.float64, generator=generator)
    shape = (span.end - span.start, row_elements(span.config, form))
    values = 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)

    def forward(hidden: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        adapter = SpanAdapter(span.config, form, span.start, values)
        return span.forward(hidden, mask_BS=mask, adapters=(adapter,))

    def passes(hidden: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = ThroughPasses.apply(hidden, values, span, form, 2)
        return output

    inputs = (hidden.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=fast)
    assert torch.autograd.gradcheck(passes, inputs, fast_mode=fast)


def every_part(span: Span) -> AdapterForm:
    targets = tuple(linear_sizes(span.config))
    return AdapterForm(targets=targets, rank=1, scaling=0.7, prefix_tokens=2)


def test_numerically_in_some_directions(case: Case) -> None:
    span = case.load(1, 4, torch.float64)
    check_numerically(span, every_part(span), fast=True)


def test_numerically_in_every_direction(tmp_path: Path) -> None:
    model = make_model(
        "llama-biases",
        hidden_size=8,
        intermediate_size=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
    )
    checkpoint = Checkpoint(save_model(model, tmp_path))
    span = load_span(checkpoint, 0, 2, dtype=torch.float64, device=CPU)
    check_numerically(span, every_part(span), fast=False)

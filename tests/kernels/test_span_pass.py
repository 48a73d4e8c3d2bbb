"""Passes and steps with adapters and masks: what may not matter does not, and how much is kept."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.errors import BadAdapter, OutOfDeviceMemory
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.span import Segment, Span, load_span
from kernels.span_pass import PassGradients, PassWork, graph_bytes, run_backward, run_forward
from kernels.weight_names import linear_sizes
from tests.helpers.run_out import run_out
from tests.helpers.tiny_models import FAMILIES, make_model, save_model

CPU = torch.device("cpu")
# The targets are filled in by family: all, some, or the first and the last.
PAIRS = AdapterForm(targets=("all",), rank=2, scaling=0.5)
SOME_PAIRS = AdapterForm(targets=("some",), rank=3, scaling=2.0)
PREFIX = AdapterForm(prefix_tokens=5)
BOTH = AdapterForm(targets=("ends",), rank=1, scaling=1.0, prefix_tokens=2)
TOKENS = 19


class Case:
    """A tiny model's blocks 1 to 4."""

    def __init__(self, name: str, folder: Path) -> None:
        self.checkpoint = Checkpoint(save_model(make_model(name), folder))
        self.config = self.checkpoint.config
        self.span = self.load(torch.float32)

    def load(self, dtype: torch.dtype) -> Span:
        return load_span(self.checkpoint, 1, 4, dtype=dtype, device=CPU)

    def form(self, form: AdapterForm) -> AdapterForm:
        """With this family's targets in the place of what stands for them."""
        known = tuple(linear_sizes(self.config))
        targets = {"all": known, "some": known[2:5:2], "ends": (known[0], known[-1])}
        return replace(form, targets=targets[form.targets[0]] if form.targets else ())

    def adapter(self, form: AdapterForm, seed: int = 1, start: int = 1) -> SpanAdapter:
        form = self.form(form)
        generator = torch.Generator().manual_seed(seed)
        shape = (4 - start, row_elements(self.config, form))
        return SpanAdapter(self.config, form, start, 0.3 * torch.randn(shape, generator=generator))

    def hidden(self, batch: int, tokens: int = TOKENS, seed: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, tokens, self.config.hidden_size, generator=generator)

    def work(
        self,
        hidden: torch.Tensor,
        *adapters: SpanAdapter,
        trained: SpanAdapter | None = None,
        mask: torch.Tensor | None = None,
    ) -> PassWork:
        return PassWork(
            hidden_BSD=hidden, start=1, end=4, mask_BS=mask, adapters=adapters, trained=trained
        )

    def open(self, span: Span, max_tokens: int = 64) -> SequenceCache:
        arena = CacheArena(
            self.config, blocks=3, capacity_tokens=4096, dtype=span.dtype, device=CPU
        )
        return arena.open(max_tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


def both_ways(
    span: Span, work: PassWork, gradient: torch.Tensor
) -> tuple[torch.Tensor, PassGradients]:
    output = run_out(run_forward(span, work))
    return output, run_out(run_backward(span, work, gradient, group_blocks=2))


FORMS = ([PAIRS], [PREFIX], [BOTH], [SOME_PAIRS, PAIRS], [PREFIX, SOME_PAIRS, BOTH])


@pytest.mark.parametrize("forms", FORMS, ids=["pairs", "prefix", "both", "two", "three"])
@pytest.mark.parametrize("pieces", [[TOKENS], [1] * TOKENS, [1, 7, 11], [8, 1, 1, 9]], ids=str)
def test_steps_with_adapters_equal_a_pass(
    case: Case, forms: list[AdapterForm], pieces: list[int]
) -> None:
    adapters = [case.adapter(form, seed) for seed, form in enumerate(forms)]
    expected = case.span.forward(case.hidden(1), adapters=adapters)[0]
    cache = case.open(case.span)
    case.span.write_prefixes(cache, adapters)
    assert cache.length == sum(form.prefix_tokens for form in forms)
    outputs = [
        case.span.step(rows, [Segment(cache, len(rows))], adapters=adapters)
        for rows in case.hidden(1)[0].split(pieces)
    ]
    close(torch.cat(outputs), expected)
    close(run_out(run_forward(case.span, case.work(case.hidden(1), *adapters)))[0], expected)


def test_steps_of_packed_sequences_share_an_adapter(case: Case) -> None:
    adapters = [case.adapter(BOTH)]
    expected = case.span.forward(case.hidden(3), adapters=adapters)
    arena = CacheArena(case.config, blocks=3, capacity_tokens=4096, dtype=torch.float32, device=CPU)
    caches = [arena.open(64) for _ in range(3)]
    for cache in caches:
        case.span.write_prefixes(cache, adapters)
    for begin, end in ((0, 6), (6, 7), (7, TOKENS)):
        rows = case.hidden(3)[:, begin:end].flatten(0, 1)
        packed = case.span.step(
            rows, [Segment(cache, end - begin) for cache in caches], adapters=adapters
        )
        close(packed.view(3, end - begin, -1), expected[:, begin:end])


def test_a_hosted_adapter_beside_the_trained_one(case: Case) -> None:
    hosted, trained = case.adapter(BOTH, 1), case.adapter(PAIRS, 2, start=0)
    values = trained.values_LE.clone().requires_grad_()
    inputs = case.hidden(2).requires_grad_()
    gradient = case.hidden(2, seed=3)
    output = case.span.forward(
        inputs, adapters=[hosted, SpanAdapter(case.config, trained.form, 0, values)]
    )
    output.backward(gradient)
    assert inputs.grad is not None
    assert values.grad is not None
    ours, gradients = both_ways(
        case.span, case.work(case.hidden(2), hosted, trained=trained), gradient
    )
    close(ours, output.detach())
    close(gradients.hidden_BSD, inputs.grad)
    assert gradients.adapter_LE is not None
    close(gradients.adapter_LE, values.grad[1:])
    assert not values.grad[0].any()  # of a block that is not in the span
    assert not hosted.values_LE.requires_grad
    assert hosted.values_LE.grad is None


def test_masked_rows_and_other_sequences_change_nothing(case: Case) -> None:
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[0, 12:] = False
    mask[1, :5] = False
    trained = case.adapter(BOTH)
    hidden, gradient = case.hidden(3), case.hidden(3, seed=4) * mask[..., None]
    first, of_first = both_ways(case.span, case.work(hidden, trained=trained, mask=mask), gradient)
    other = torch.where(mask[..., None], hidden, 50 * case.hidden(3, seed=5))
    other[2] = hidden[2].flip(0)
    second, of_second = both_ways(case.span, case.work(other, trained=trained, mask=mask), gradient)
    assert torch.equal(first[:2][mask[:2]], second[:2][mask[:2]])
    assert torch.equal(of_first.hidden_BSD[:2], of_second.hidden_BSD[:2])
    assert not of_first.hidden_BSD[~mask].any()
    # Right padding may be cut off.
    alone, of_alone = both_ways(
        case.span, case.work(hidden[:1, :12], trained=trained), gradient[:1, :12]
    )
    close(first[:1, :12], alone)
    close(of_first.hidden_BSD[:1, :12], of_alone.hidden_BSD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", [PAIRS, PREFIX], ids=["pairs", "prefix"])
def test_all_padding_gives_finite_numbers(
    case: Case, dtype: torch.dtype, form: AdapterForm
) -> None:
    span = case.load(dtype)
    values = case.adapter(form).values_LE.to(dtype)
    trained = SpanAdapter(case.config, case.form(form), 1, values)
    mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    mask[1, 3:9] = True
    hidden, gradient = case.hidden(2).to(dtype), case.hidden(2, seed=3).to(dtype)
    if case.config.wiring == "post_norms":
        # What attends to nothing is zero, and a norm's gradient there is more than float16 holds.
        gradient = gradient * mask[..., None]
    work = case.work(hidden, trained=trained, mask=mask)
    output, gradients = both_ways(span, work, gradient)
    assert output.dtype == gradients.hidden_BSD.dtype == dtype
    assert gradients.adapter_LE is not None
    for tensor in (output, gradients.hidden_BSD, gradients.adapter_LE):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_sixteen_bits_are_near(case: Case, dtype: torch.dtype) -> None:
    span = case.load(dtype)
    trained = case.adapter(PAIRS)
    hidden, gradient = case.hidden(2), case.hidden(2, seed=3)
    _, expected = both_ways(case.span, case.work(hidden, trained=trained), gradient)
    rounded = SpanAdapter(case.config, trained.form, 1, trained.values_LE.to(dtype))
    work = case.work(hidden.to(dtype), trained=rounded)
    _, ours = both_ways(span, work, gradient.to(dtype))
    assert expected.adapter_LE is not None
    assert ours.adapter_LE is not None
    for mine, exact in (
        (ours.hidden_BSD, expected.hidden_BSD),
        (ours.adapter_LE, expected.adapter_LE),
    ):
        assert (mine.float() - exact).norm() < 0.1 * exact.norm()


def test_only_a_part_of_the_span(case: Case) -> None:
    trained = case.adapter(PAIRS)
    work = PassWork(hidden_BSD=case.hidden(2), start=2, end=3, trained=trained)
    inputs = case.hidden(2).requires_grad_()
    values = trained.values_LE.clone().requires_grad_()
    adapter = SpanAdapter(case.config, trained.form, 1, values)
    output = case.span.forward(inputs, start=2, end=3, adapters=[adapter])
    output.backward(case.hidden(2, seed=3))
    ours, gradients = both_ways(case.span, work, case.hidden(2, seed=3))
    assert inputs.grad is not None
    assert values.grad is not None
    assert gradients.adapter_LE is not None
    close(ours, output.detach())
    close(gradients.hidden_BSD, inputs.grad)
    assert gradients.adapter_LE.shape[0] == 1
    close(gradients.adapter_LE, values.grad[1:2])


@pytest.mark.parametrize("group_blocks", [1, 2, 3])
def test_passes_pause_between_blocks(llama: Case, group_blocks: int) -> None:
    work = llama.work(llama.hidden(1))
    assert sum(1 for _ in run_forward(llama.span, work)) == 3
    pauses = sum(
        1 for _ in run_backward(llama.span, work, llama.hidden(1), group_blocks=group_blocks)
    )
    # Each block forward to keep and back, and forward once before unless it is in the last group.
    assert pauses == 6 + 3 - group_blocks


def kept_bytes(span: Span, work: PassWork) -> int:
    """What autograd keeps of one block's forward, storages that are kept anyway left out."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    block = span.block(work.start)
    known = {
        tensor.untyped_storage().data_ptr() for linear in block.linears for tensor in linear.tensors
    }
    known.update(tensor.untyped_storage().data_ptr() for tensor in block.tensors)
    known.update(part.untyped_storage().data_ptr() for pair in span.positions(1) for part in pair)
    adapters = [] if work.trained is None else [work.trained]
    for adapter in adapters:
        adapter.values_LE.requires_grad_()
        known.add(adapter.values_LE.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = span.forward(
            work.hidden_BSD.requires_grad_(),
            start=work.start,
            end=work.start + 1,
            mask_BS=work.mask_BS,
            adapters=adapters,
        )
    assert output.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, PAIRS, PREFIX], ids=["none", "pairs", "prefix"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_what_a_graph_keeps_is_as_foretold(
    case: Case, dtype: torch.dtype, adapter: AdapterForm | None, is_masked: bool
) -> None:
    span = case.load(dtype)
    trained = None
    if adapter is not None:
        values = case.adapter(adapter).values_LE.to(dtype)
        trained = SpanAdapter(case.config, case.form(adapter), 1, values)
    mask = torch.ones(2, 64, dtype=torch.bool) if is_masked else None
    work = case.work(case.hidden(2, 64).to(dtype), trained=trained, mask=mask)
    kept = kept_bytes(span, work)
    foretold = 2 * 64 * graph_bytes(case.config, dtype)
    assert foretold / 2 < kept < 2 * foretold


def test_positions_first_seen_by_a_step_serve_a_backward_pass(llama: Case) -> None:
    span = llama.load(torch.float32)
    tokens = 2060
    arena = CacheArena(llama.config, blocks=3, capacity_tokens=4096, dtype=span.dtype, device=CPU)
    hidden = llama.hidden(1, tokens)
    cache = arena.open(tokens)
    stepped = [span.step(rows, [Segment(cache, len(rows))]) for rows in hidden[0].split([2040, 20])]
    output, gradients = both_ways(span, llama.work(hidden), hidden)
    close(torch.cat(stepped), output[0])
    assert torch.isfinite(gradients.hidden_BSD).all()


def test_weights_go_with_the_span(case: Case) -> None:
    span = case.load(torch.float32)
    kept = [weakref.ref(span.block(number)) for number in range(1, 4)]
    gc.disable()
    try:
        del span
        assert not any(block() for block in kept)
    finally:
        gc.enable()


def test_no_memory_is_told(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    span = llama.load(torch.float32)
    monkeypatch.setattr("kernels.block.DecoderBlock.forward", fail)
    work = llama.work(llama.hidden(2))
    for steps in (
        run_forward(span, work),
        run_backward(span, work, llama.hidden(2), group_blocks=3),
    ):
        with pytest.raises(OutOfDeviceMemory, match=r"2 x 19 tokens; set"):
            run_out(steps)  # type: ignore[arg-type]


def test_a_pass_of_what_inference_mode_made(llama: Case) -> None:
    with torch.inference_mode():
        hidden = llama.hidden(2) * 1
        values = llama.adapter(PAIRS).values_LE * 1
    trained = SpanAdapter(llama.config, llama.form(PAIRS), 1, values)
    output, gradients = both_ways(llama.span, llama.work(hidden, trained=trained), hidden)
    like = llama.work(llama.hidden(2), trained=llama.adapter(PAIRS))
    expected, of_expected = both_ways(llama.span, like, llama.hidden(2))
    assert torch.equal(output, expected)
    assert torch.equal(gradients.hidden_BSD, of_expected.hidden_BSD)


BAD_FORMS: tuple[tuple[AdapterForm, str], ...] = (
    (AdapterForm(), "does nothing"),
    (AdapterForm(targets=("w_proj",), rank=1), "w_proj"),
    (AdapterForm(targets=("k_proj", "q_proj"), rank=1), "in the order"),
    (AdapterForm(targets=("q_proj", "q_proj"), rank=1), "in the order"),
    (AdapterForm(targets=("q_proj",), rank=0), "rank 0"),
    (AdapterForm(targets=("q_proj",), rank=1025), "rank 1025"),
    (AdapterForm(rank=1, prefix_tokens=1), "rank 1 with 0"),
    (AdapterForm(prefix_tokens=4097), "4097"),
    (AdapterForm(prefix_tokens=-1), "-1"),
    (AdapterForm(targets=("q_proj",), rank=1, scaling=float("nan")), "finite"),
)


@pytest.mark.parametrize(("form", "text"), BAD_FORMS, ids=str)
def test_a_form_that_does_not_fit(llama: Case, form: AdapterForm, text: str) -> None:
    with pytest.raises(BadAdapter, match=text):
        SpanAdapter(llama.config, form, 0, torch.zeros(1, 1))


def test_numbers_that_do_not_fit(llama: Case) -> None:
    form = llama.form(PAIRS)
    for shape in ((row_elements(llama.config, form),), (3, 5)):
        with pytest.raises(BadAdapter, match="shape"):
            SpanAdapter(llama.config, form, 0, torch.zeros(shape))

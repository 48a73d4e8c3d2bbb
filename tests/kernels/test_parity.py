"""Blocks, spans and whole models against Hugging Face's, in every way a step can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.span import Segment, Span, load_span
from tests.helpers.tiny_models import FAMILIES, layers_of, make_model, save_model

CPU = torch.device("cpu")
TOKENS = 70


class Case:
    """A tiny model: Hugging Face's, and ours loaded from what it saved."""

    def __init__(self, name: str, folder: Path) -> None:
        self.reference: Any = make_model(name)
        save_model(self.reference, folder, max_shard_size="40KB")
        self.checkpoint = Checkpoint(folder)
        self.config = self.checkpoint.config
        self.span = self.load(torch.float32)
        self.ids = torch.randint(3, 100, (TOKENS,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output = self.reference(self.ids[None], output_hidden_states=True)
            self.hidden = [states[0] for states in output.hidden_states[:-1]]
            self.last = self.last_of(self.reference)
            self.logits = output.logits[0]

    def last_of(self, reference: Any) -> torch.Tensor:
        """Hidden states after the last block, before the final norm."""
        kept: list[torch.Tensor] = []
        layer = layers_of(reference)[-1]
        hook = layer.register_forward_hook(
            lambda _m, _i, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            reference(self.ids[None])
        hook.remove()
        return kept[0][0] if kept[0].dim() == 3 else kept[0]

    def load(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Span:
        end = self.config.num_blocks if end is None else end
        return load_span(self.checkpoint, start, end, dtype=dtype, device=CPU)

    def open(self, span: Span, max_tokens: int = 128, capacity: int = 1024) -> SequenceCache:
        arena = CacheArena(
            span.config,
            blocks=span.end - span.start,
            capacity_tokens=capacity,
            dtype=span.dtype,
            device=CPU,
        )
        return arena.open(max_tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


def test_the_checkpoint_is_sharded(case: Case) -> None:
    assert len(list(case.checkpoint.folder.glob("model-*.safetensors"))) > 1


def test_every_single_block_without_cache(case: Case) -> None:
    for block in range(case.config.num_blocks):
        span = case.load(torch.float32, block, block + 1)
        expected = case.last if block == case.config.num_blocks - 1 else case.hidden[block + 1]
        close(span.forward(case.hidden[block][None])[0], expected)


def test_the_span_without_cache(case: Case) -> None:
    close(case.span.forward(case.hidden[0][None])[0], case.last)


def test_a_batch_without_cache(case: Case) -> None:
    batch = torch.stack([case.hidden[0], case.hidden[0].flip(0)])
    both = case.span.forward(batch)
    close(both[0], case.last)
    close(both[1], case.span.forward(batch[1:])[0])


def test_whole_prefill(case: Case) -> None:
    cache = case.open(case.span)
    close(case.span.step(case.hidden[0], [Segment(cache, TOKENS)]), case.last)
    assert cache.length == TOKENS


@pytest.mark.parametrize("pieces", [[1] * TOKENS, [7] * 10, [64, 1, 1, 4], [1, 69], [33, 37]])
def test_prefill_in_pieces_and_decode(case: Case, pieces: list[int]) -> None:
    cache = case.open(case.span)
    outputs = []
    for rows in case.hidden[0].split(pieces):
        outputs.append(case.span.step(rows, [Segment(cache, len(rows))]))
    close(torch.cat(outputs), case.last)


def test_packed_sequences_equal_each_alone(case: Case) -> None:
    arena = CacheArena(case.config, blocks=4, capacity_tokens=2048, dtype=torch.float32, device=CPU)
    caches = [arena.open(128) for _ in range(3)]
    splits = [[40, 1, 29], [1, 68, 1], [5, 1, 64]]
    outputs: list[list[torch.Tensor]] = [[], [], []]
    sources = [case.hidden[0], case.hidden[0].flip(0), case.hidden[0].roll(3, 0)]
    at = [0, 0, 0]
    for turn in range(3):
        sizes = [split[turn] for split in splits]
        rows = [source[a : a + n] for source, a, n in zip(sources, at, sizes, strict=True)]
        packed = case.span.step(
            torch.cat(rows), [Segment(c, n) for c, n in zip(caches, sizes, strict=True)]
        )
        for index, part in enumerate(packed.split(sizes)):
            outputs[index].append(part)
            at[index] += sizes[index]
    for source, parts in zip(sources, outputs, strict=True):
        close(torch.cat(parts), case.span.forward(source[None])[0])


def test_two_spans_make_the_whole(case: Case) -> None:
    first, second = case.load(torch.float32, 0, 2), case.load(torch.float32, 2, 4)
    middle = first.step(case.hidden[0], [Segment(case.open(first), TOKENS)])
    close(middle, case.hidden[2])
    close(second.step(middle, [Segment(case.open(second), TOKENS)]), case.last)


def test_a_part_of_a_span_runs_only_its_blocks(case: Case) -> None:
    cache = case.open(case.span)
    part = case.span.step(case.hidden[1], [Segment(cache, TOKENS)], start=1, end=3)
    close(part, case.hidden[3])
    close(case.span.forward(case.hidden[1][None], start=1, end=3)[0], case.hidden[3])


def test_tokens_taken_back_leave_no_trace(case: Case) -> None:
    cache = case.open(case.span)
    case.span.step(case.hidden[0][:50], [Segment(cache, 50)])
    case.span.step(torch.randn(9, case.config.hidden_size), [Segment(cache, 9)])
    cache.truncate(50)
    close(case.span.step(case.hidden[0][50:], [Segment(cache, 20)]), case.last[50:])


def test_logits_and_greedy_tokens(case: Case) -> None:
    ends = load_ends(case.checkpoint, dtype=torch.float32, device=CPU)
    close(ends.embedding.embed(case.ids), case.hidden[0])
    close(ends.head.logits(case.last), case.logits)
    expected = case.reference.generate(
        case.ids[None, :20],
        attention_mask=torch.ones(1, 20, dtype=torch.int64),
        max_new_tokens=40,
        min_new_tokens=40,
        do_sample=False,
    )[0, 20:].tolist()
    cache = case.open(case.span)
    hidden = case.span.step(ends.embedding.embed(case.ids[:20]), [Segment(cache, 20)])
    tokens = []
    for _ in range(40):
        logits = ends.head.logits(hidden[-1:])[0]
        logits[2] = -torch.inf  # min_new_tokens bars the ending token
        tokens.append(int(logits.argmax()))
        hidden = case.span.step(
            ends.embedding.embed(torch.tensor(tokens[-1:])), [Segment(cache, 1)]
        )
    assert tokens == expected


def test_gradient_of_the_input(case: Case) -> None:
    span = case.load(torch.float64, 1, 3)
    hidden = torch.randn(2, 3, case.config.hidden_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(span.forward, (hidden,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_near(case: Case, dtype: torch.dtype) -> None:
    span = case.load(dtype)
    cache = case.open(span)
    hidden = case.hidden[0].to(dtype)
    whole = span.step(hidden[:60], [Segment(cache, 60)])
    tail = torch.cat([span.step(row[None], [Segment(cache, 1)]) for row in hidden[60:]])
    ours = torch.cat((whole, tail)).float()
    like = type(case.reference).from_pretrained(case.checkpoint.folder, dtype=dtype)
    theirs = case.last_of(like).float()
    error = (ours - case.last).norm()
    assert error < 3 * (theirs - case.last).norm() + 1e-3 * case.last.norm()

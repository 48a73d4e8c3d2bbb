"""What codecs do to a model, for `benchmarks.codecs`: its perplexity, and its gradients.

Shapes: B windows, S tokens, D hidden size.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import torch

from kernels.checkpoint import Checkpoint
from kernels.codecs.codec import Codec
from kernels.codecs.registry import find_codec
from kernels.head import load_ends
from kernels.model_store import find_model
from kernels.span import load_span
from kernels.tokenizer import Tokenizer

BATCH = 4
DEVICE = torch.device("cpu")


class LocalModel:
    """A whole model in this process, in float32, and a text for it.

    Args:
        name: of the model in the store.
    """

    def __init__(self, name: str) -> None:
        self.folder = find_model(name).path
        checkpoint = Checkpoint(self.folder)
        self.blocks = checkpoint.config.num_blocks
        self.span = load_span(checkpoint, 0, self.blocks, dtype=torch.float32, device=DEVICE)
        self.ends = load_ends(checkpoint, dtype=torch.float32, device=DEVICE)

    def read_windows(self, tokens: int) -> torch.Tensor:
        """The text's token ids, in windows, ``[B, S]``."""
        text = "\n".join(topics.topics.values())
        ids = Tokenizer.load(self.folder).encode(text)
        count = len(ids) // tokens
        return torch.tensor(ids[: count * tokens]).view(count, tokens)

    def spans(self, hops: int) -> list[tuple[int, int]]:
        """Even spans of a chain."""
        return list(
            itertools.pairwise(round(self.blocks * number / hops) for number in range(hops + 1))
        )

    def losses(self, hidden_BSD: torch.Tensor, ids_BS: torch.Tensor) -> list[torch.Tensor]:
        """The mean loss of each window."""
        return [
            torch.nn.functional.cross_entropy(self.ends.head.logits(hidden_SD[:-1]), ids_S[1:])
            for hidden_SD, ids_S in zip(hidden_BSD, ids_BS, strict=True)
        ]


def cross(hidden_BSD: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Hidden states as they come out of a link."""
    width = hidden_BSD.shape[-1]
    rows_SD = hidden_BSD.reshape(-1, width)
    decoded_SD = codec.decode(codec.encode(rows_SD), width, hidden_BSD.dtype)
    return decoded_SD.view(hidden_BSD.shape)


def measure_perplexity(
    model: LocalModel,
    names: Sequence[str],
    all_hops: Sequence[int],
    *,
    windows: int,
    window_tokens: int,
) -> dict[str, Any]:
    ids = model.read_windows(window_tokens)[:windows]
    ways = [f"{hops} hops{rest}" for hops in all_hops for rest in ("", ", not the last link")]
    plain: list[float] = []
    coded: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in names}
    for number, ids_BS in enumerate(ids.split(BATCH)):
        print(f"\r  window {number * BATCH} of {windows} ", end="", file=sys.stderr)
        with torch.inference_mode():
            embedded_BSD = model.ends.embedding.embed(ids_BS)
            output_BSD = model.span.forward(embedded_BSD)
            plain += [loss.item() for loss in model.losses(output_BSD, ids_BS)]
            for name, hops in itertools.product(names, all_hops):
                codec = find_codec(name)
                hidden_BSD = embedded_BSD
                for start, end in model.spans(hops):
                    hidden_BSD = model.span.forward(cross(hidden_BSD, codec), start=start, end=end)
                for last_BSD, rest in (
                    (cross(hidden_BSD, codec), ""),
                    (hidden_BSD, ", not the last link"),
                ):
                    losses = [loss.item() for loss in model.losses(last_BSD, ids_BS)]
                    coded[name][f"{hops} hops{rest}"] += losses
    print("\r" + 30 * " " + "\r", end="", file=sys.stderr)
    return {
        "perplexity": math.exp(statistics.fmean(plain)),
        "losses": plain,
        "changes": {
            name: {way: compare(losses, plain) for way, losses in by_way.items()}
            for name, by_way in coded.items()
        },
    }


def compare(losses: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """The change of the perplexity in percent, window by window."""
    changes = [one - other for one, other in zip(losses, plain, strict=True)]
    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
    return {
        "percent": 100 * math.expm1(statistics.fmean(changes)),
        "standard_error": 100 * error,
        "by_window": [100 * math.expm1(change) for change in changes],
    }


class _CodedGradient(torch.autograd.Function):
    """Passes hidden states on, and gradients as they come out of a link."""

    @staticmethod
    def forward(ctx: Any, hidden_BSD: torch.Tensor, codec: Codec) -> torch.Tensor:
        ctx.codec = codec
        return hidden_BSD.view_as(hidden_BSD)

    @staticmethod
    def backward(ctx: Any, gradient_BSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return cross(gradient_BSD, ctx.codec), None


def measure_gradients(
    model: LocalModel, names: Sequence[str], hops: int, *, tokens: int
) -> dict[str, tuple[float, float]]:
    """Relative errors by codec: median over links of one link's, and the client's after all."""
    ids_BS = model.read_windows(tokens)[:BATCH]

    def run(codec: Codec) -> list[torch.Tensor]:
        """Gradients at each link, from the client's on, each as it was before that link."""
        hidden_BSD = model.ends.embedding.embed(ids_BS).requires_grad_()
        at_links = [hidden_BSD]
        for start, end in model.spans(hops):
            sent_BSD = _CodedGradient.apply(at_links[-1], codec)
            at_links.append(model.span.forward(sent_BSD, start=start, end=end))
        sent_BSD = _CodedGradient.apply(at_links[-1], codec)
        loss = torch.stack(model.losses(sent_BSD, ids_BS)).mean()
        return list(torch.autograd.grad(loss, at_links))

    exact = run(find_codec("raw"))
    results = {}
    for name in names:
        codec = find_codec(name)
        one = statistics.median(distance(cross(link, codec), link) for link in exact)
        results[name] = one, distance(run(codec)[0], exact[0])
    return results


def distance(one: torch.Tensor, exact: torch.Tensor) -> float:
    """The error's length, as a part of the exact one's."""
    return ((one - exact).norm() / exact.norm()).item()

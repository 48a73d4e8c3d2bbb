"""Choosing the next token from its logits.

The transformations and their order are Hugging Face's: repetition penalty, temperature, top-k,
top-p, min-p.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.sampling_params import SamplingParams


class Sampler:
    """Chooses tokens for one text.

    Args:
        params: how.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits_V: torch.Tensor, token_ids: Sequence[int]) -> int:
        """The next token.

        Args:
            logits_V: float32; not changed.
            token_ids: the text so far, prompt included.
        """
        params = self._params
        if params.repetition_penalty != 1.0 and token_ids:
            logits_V = _penalise(logits_V, token_ids, params.repetition_penalty)
        if params.temperature == 0.0:
            return int(logits_V.argmax())
        logits_V = logits_V.cpu() / params.temperature
        probabilities_V = filter_logits(logits_V, params).softmax(dim=-1)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


def filter_logits(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits with minus infinity for every token that top-k, top-p or min-p drops."""
    if 0 < params.top_k < logits_V.shape[0]:
        least = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if params.top_p < 1.0:
        rising_V, order_V = logits_V.sort()
        mass_V = rising_V.softmax(dim=-1).cumsum(dim=-1)
        is_dropped_V = mass_V <= 1.0 - params.top_p
        is_dropped_V[-1] = False
        logits_V = logits_V.masked_fill(
            torch.zeros_like(is_dropped_V).scatter(0, order_V, is_dropped_V), -torch.inf
        )
    if params.min_p > 0.0:
        probabilities_V = logits_V.softmax(dim=-1)
        least = params.min_p * probabilities_V.max()
        logits_V = logits_V.masked_fill(probabilities_V < least, -torch.inf)
    return logits_V


def _penalise(logits_V: torch.Tensor, token_ids: Sequence[int], penalty: float) -> torch.Tensor:
    seen = torch.tensor(sorted(set(token_ids)), dtype=torch.int64, device=logits_V.device)
    seen_logits = logits_V[seen]
    penalised = torch.where(seen_logits < 0, seen_logits * penalty, seen_logits / penalty)
    return logits_V.scatter(0, seen, penalised)

"""How texts go on: tokens are chosen from logits until all texts have ended.

Knows neither models nor the daemon.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Sample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Chooses the next tokens ``[B]`` from logits ``[B, V]`` and the ids so far ``[B, S]``."""

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Gives a row for each text's last token, from all ids ``[B, S]`` and who has ended, ``[B]``."""


def continue_texts(
    input_ids: torch.Tensor,
    next_logits: Step,
    sample: Sample,
    max_new_tokens: int,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Makes tokens until all texts have ended, or there are enough.

    Args:
        input_ids: ``[B, S]``.
        next_logits: gives ``[B, V]``.
        sample: chooses.
        max_new_tokens: the most to make, at least 1.
        ends: tokens that end a text.

    Returns:
        All ids, ``[B, S + new]``; after a text's end comes its last token again.
    """
    has_ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ends = ends.to(input_ids.device)
    for made in range(max_new_tokens):
        chosen_B = sample(next_logits(input_ids, has_ended_B), input_ids).to(input_ids)
        if made:
            chosen_B = torch.where(has_ended_B, input_ids[:, -1], chosen_B)
        input_ids = torch.cat((input_ids, chosen_B[:, None]), dim=1)
        has_ended_B |= torch.isin(chosen_B, ends)
        if bool(has_ended_B.all()):
            break
    return input_ids


def check_padding(input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Checks that texts can be continued at their ends.

    Raises:
        ValueError: they cannot.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids have the shape {list(input_ids.shape)}; [sequences, tokens] was expected"
        )
    if mask is None:
        return
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"the attention mask has the shape {list(mask.shape)}; "
            f"{list(input_ids.shape)} was expected"
        )
    is_real = (mask != 0).long()
    if bool((is_real.diff(dim=1) < 0).any()) or not bool(is_real[:, -1].all()):
        raise ValueError("padding must be on the left of texts that are to be continued")


def choose_likeliest(logits_BV: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The token with the highest logit of each text, ``[B]``."""
    return logits_BV.argmax(dim=-1)

"""A trainable prompt of hidden states before the first block.

Shapes: B sequences, S tokens, P tokens of the prompt, D hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig
from kernels.peft_files import load_adapter, save_soft_prompt
from petalctl.torch.adapters import make_generator

IGNORED_LABEL = -100
"""What torch and Hugging Face leave out of a loss."""

PROMPT_STD = 0.02
"""As wide as most models' embeddings are at first."""


class SoftPrompt(nn.Module):
    """Prompt tuning: rows that stand before the embeddings of every sequence.

    Source: Lester et al. 2021, arXiv:2104.08691.

    Args:
        config: of the model.
        tokens: how many rows; as many as ``initial`` has, where that is given.
        initial: the first values, ``[P, D]``: embeddings of some text work best.
        seed: of the first values otherwise; none takes torch's generator.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tokens: int = 16,
        initial: torch.Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        if initial is None:
            shape = (tokens, config.hidden_size)
            initial = PROMPT_STD * torch.randn(shape, generator=make_generator(seed))
        if initial.dim() != 2 or not len(initial) or initial.shape[1] != config.hidden_size:
            raise BadAdapter(
                f"a soft prompt has the shape {list(initial.shape)}; "
                f"[tokens, {config.hidden_size}] was expected"
            )
        self.prompt = nn.Parameter(initial.detach().clone())

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig) -> SoftPrompt:
        """Reads a prompt that was saved in PEFT's format.

        Raises:
            BadAdapter: it cannot be read, does not fit, or is none.
        """
        saved = load_adapter(Path(folder), config)
        if saved.prompt_PD is None:
            raise BadAdapter(f"{folder} is no soft prompt; load it with RemoteAdapter.from_folder")
        return cls(config, initial=saved.prompt_PD)

    def prepend(
        self,
        embeddings_BSD: torch.Tensor,
        mask_BS: torch.Tensor | None = None,
        labels_BS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The batch with the prompt before every sequence, which no label is for."""
        batch, tokens = embeddings_BSD.shape[0], len(self.prompt)
        prompt_BPD = self.prompt.to(embeddings_BSD.dtype).expand(batch, -1, -1)
        embeddings = torch.cat((prompt_BPD, embeddings_BSD), dim=1)
        if mask_BS is not None:
            mask_BS = torch.cat((mask_BS.new_ones(batch, tokens), mask_BS), dim=1)
        if labels_BS is not None:
            ignored_BP = labels_BS.new_full((batch, tokens), IGNORED_LABEL)
            labels_BS = torch.cat((ignored_BP, labels_BS), dim=1)
        return embeddings, mask_BS, labels_BS

    def save(self, folder: str | Path, *, base_model: str = "") -> None:
        """Writes it in PEFT's format.

        Raises:
            OSError: it cannot be written.
        """
        save_soft_prompt(
            Path(folder), self.config, self.prompt.detach().float(), base_model=base_model
        )

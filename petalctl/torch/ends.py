"""The modules of a model's two ends that are not torch's own.

Shapes: B sequences, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from kernels.model_config import ModelConfig
from kernels.norm import make_norm
from kernels.weight_names import norm_shapes


class TokenEmbedding(nn.Module):
    """Rows of token ids, multiplied as the model has it.

    Args:
        weight_VD: one row for each token.
        scale: what the rows are multiplied with; or none.
    """

    def __init__(self, weight_VD: torch.Tensor, scale: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VD, requires_grad=False)
        self._scale = scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The rows, ``[..., D]``."""
        rows = F.embedding(token_ids, self.weight)
        # Rounded to the dtype before it is used, as in `kernels.head`.
        return rows if self._scale is None else rows * self.weight.new_tensor(self._scale)


class EndNorm(nn.Module):
    """A norm outside the blocks.

    Args:
        config: of the model.
        tensors: its weights, and others, by their names in the checkpoint.
        name: of the norm there.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], name: str) -> None:
        super().__init__()
        self._config = config
        for label in norm_shapes(config, name):
            part = nn.Parameter(tensors[label], requires_grad=False)
            self.register_parameter(label.rpartition(".")[2], part)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The normalised rows."""
        parts = {f"norm.{name}": part for name, part in self.named_parameters()}
        return make_norm(self._config, parts, "norm").apply(rows)

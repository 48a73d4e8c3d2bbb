"""A model's ends: token ids to hidden states, and hidden states to logits.

Shapes: S rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.checkpoint import Checkpoint
from kernels.model_config import ModelConfig
from kernels.norm import Norm, make_norm
from kernels.scored_attention import cap_softly
from kernels.weight_names import names_of, norm_shapes


class Embedding:
    """Hidden states of token ids.

    Args:
        weight_VD: one row for each token.
        norm: of the rows, as they go into the first block; or none.
        scale: what the rows are multiplied with; or none.
    """

    def __init__(
        self, weight_VD: torch.Tensor, norm: Norm | None = None, scale: float | None = None
    ) -> None:
        self.weight_VD = weight_VD
        self._norm = norm
        # Rounded to the dtype before it is used, as Gemma does.
        self._scale = None if scale is None else weight_VD.new_tensor(scale)

    def embed(self, token_ids_S: torch.Tensor) -> torch.Tensor:
        """What some ids are for the first block, ``[S, D]``."""
        rows_SD = self.weight_VD[token_ids_S]
        return self.enter(rows_SD if self._scale is None else rows_SD * self._scale)

    def enter(self, rows_SD: torch.Tensor) -> torch.Tensor:
        """What rows, such as a soft prompt's, are for the first block, ``[S, D]``."""
        return rows_SD if self._norm is None else self._norm.apply(rows_SD)


class Head:
    """Final norm and output matrix.

    Args:
        norm: the final norm.
        weight_DV: the matrix; a view of the embedding's where they are tied.
        cap: what the logits' size stays below, softly; or none.
    """

    def __init__(self, norm: Norm, weight_DV: torch.Tensor, cap: float | None = None) -> None:
        self._norm = norm
        self._weight_DV = weight_DV
        self._cap = cap

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits of the token after each row, ``[S, V]``, float32."""
        logits_SV = torch.mm(self._norm.apply(hidden_SD), self._weight_DV).float()
        return logits_SV if self._cap is None else cap_softly(logits_SV, self._cap)


@dataclass(frozen=True, slots=True)
class Ends:
    """Embedding and head; one matrix in memory where the model ties them."""

    embedding: Embedding
    head: Head

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states that they give and take."""
        return self.embedding.weight_VD.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.embedding.weight_VD.device


def load_ends(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Ends:
    """Reads embedding, final norm and head.

    Raises:
        CorruptCheckpoint: a tensor is missing or not as it must be.
    """
    config = checkpoint.config
    names = names_of(config)
    tensors = checkpoint.load_tensors(end_shapes(config), dtype=dtype, device=device)
    embedding_name, head_name = f"{names.embedding}.weight", f"{names.head}.weight"
    norm = make_norm(config, tensors, names.final_norm)
    # Kept as [D, V], the order in which one row is multiplied quickest (see `kernels.linear`); an
    # embedding's row is then a strided read, which for a few tokens costs nothing to speak of.
    weight_DV = tensors[embedding_name if config.tie_embeddings else head_name].t().contiguous()
    weight_VD = weight_DV.t() if config.tie_embeddings else tensors[embedding_name]
    embedding_norm = None
    if names.embedding_norm:
        embedding_norm = make_norm(config, tensors, names.embedding_norm)
    embedding = Embedding(weight_VD, embedding_norm, config.embedding_scale)
    return Ends(embedding, Head(norm, weight_DV, config.logit_cap))


def end_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's ends, by their names in the checkpoint, with their shapes there."""
    names = names_of(config)
    matrix = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": matrix}
    for norm in (names.final_norm, names.embedding_norm):
        shapes |= norm_shapes(config, norm)
    if not config.tie_embeddings:
        shapes[f"{names.head}.weight"] = matrix
    return shapes

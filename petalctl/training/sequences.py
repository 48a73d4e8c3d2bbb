"""Token sequences to train on, and batches of them.

All sequences lie in one row of numbers. Invariant: every sequence has at least one target, and its
first token never is one, for nothing stands before it.

Shapes: N tokens of all sequences, B batch, S tokens of the longest.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100
"""The label of a token that is no target, as Hugging Face has it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some sequences, padded at their ends to the longest.

    Attributes:
        input_ids_BS: int64.
        attention_mask_BS: int64; 1 for real tokens, 0 for padding.
        labels_BS: int64; `IGNORED` where nothing is to be learnt.
        targets: how many labels count.
    """

    input_ids_BS: torch.Tensor
    attention_mask_BS: torch.Tensor
    labels_BS: torch.Tensor
    targets: int

    @property
    def tokens(self) -> int:
        """Real ones."""
        return int(self.attention_mask_BS.sum())


class TokenSequences:
    """Sequences, in their order; made by `SequenceCollector`.

    Args:
        ids_N: int32.
        is_target_N: bool.
        ends: for each sequence where it ends.
    """

    def __init__(self, ids_N: torch.Tensor, is_target_N: torch.Tensor, ends: array[int]) -> None:
        self._ids_N = ids_N
        self._is_target_N = is_target_N
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def tokens(self) -> int:
        """Of all."""
        return len(self._ids_N)

    def length(self, index: int) -> int:
        """How many tokens a sequence has."""
        return self._ends[index] - self._start(index)

    def sample(self, count: int, rng: random.Random) -> torch.Tensor:
        """Some tokens from anywhere, int64; as often as they occur."""
        places = torch.tensor([rng.randrange(self.tokens) for _ in range(count)])
        return self._ids_N[places].long()

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of the sequences, in the order given."""
        longest = max(self.length(index) for index in indices)
        ids_BS = torch.zeros(len(indices), longest, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        labels_BS = torch.full_like(ids_BS, IGNORED)
        for row, index in enumerate(indices):
            place = slice(self._start(index), self._ends[index])
            ids_S = self._ids_N[place].long()
            length = len(ids_S)
            ids_BS[row, :length] = ids_S
            mask_BS[row, :length] = 1
            labels_BS[row, :length] = ids_S.where(self._is_target_N[place], IGNORED)
        return Batch(ids_BS, mask_BS, labels_BS, int((labels_BS != IGNORED).sum()))

    def _start(self, index: int) -> int:
        return self._ends[index - 1] if index else 0


class SequenceCollector:
    """Gathers sequences.

    Args:
        length: the most tokens of one; what is longer is cut.

    Attributes:
        cut: how many were.
        skipped: how many were left out, for nothing was left to learn from them.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._ids = array("i")
        self._is_target = array("b")
        self._ends = array("q")
        self.cut = 0
        self.skipped = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._ends)

    def add(self, ids: Sequence[int], is_target: Sequence[bool]) -> None:
        """Takes one sequence.

        Args:
            ids: its tokens.
            is_target: for each, whether it is to be learnt.
        """
        length = min(len(ids), self._length)
        if not any(is_target[1:length]):
            self.skipped += 1
            return
        self.cut += length < len(ids)
        self._ids.extend(ids[:length])
        self._is_target.append(False)
        self._is_target.extend(is_target[1:length])
        self._ends.append(len(self._ids))

    def finish(self) -> TokenSequences:
        """All that came; there is at least one."""
        ids_N = torch.frombuffer(self._ids, dtype=torch.int32)
        is_target_N = torch.frombuffer(self._is_target, dtype=torch.bool)
        return TokenSequences(ids_N, is_target_N, self._ends)

"""A language model whose blocks run in the swarm, as Hugging Face's users know one.

Embedding, final norm and head are here, where tokens and losses stay; hidden states go out.

Shapes: B sequences, S tokens, D hidden size, V vocabulary, P tokens of a soft prompt.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.checkpoint import Checkpoint
from kernels.head import end_shapes
from kernels.model_config import ModelConfig, load_model_config
from kernels.model_store import find_model
from kernels.scored_attention import cap_softly
from kernels.weight_names import names_of
from petalctl.passes import TrainingClient
from petalctl.torch.adapters import RemoteAdapter
from petalctl.torch.blocks import OnProgress, RemoteBlocks
from petalctl.torch.continuation import (
    Sample,
    Step,
    check_padding,
    choose_likeliest,
    continue_texts,
)
from petalctl.torch.ends import EndNorm, TokenEmbedding
from petalctl.torch.hidden_session import HiddenSession, run_sessions
from petalctl.torch.soft_prompt import IGNORED_LABEL, SoftPrompt

LOSS_ROWS = 1024
"""Rows whose logits are held at once for a loss: with 50,000 tokens in the vocabulary they take
200 MB, and as much again for their gradient."""


@dataclass(frozen=True, slots=True)
class CausalLMOutput:
    """What a model gives.

    Attributes:
        loss: the mean cross entropy of the labels; none without labels.
        logits: ``[B, S, V]``; of a soft prompt's rows too, which come first, as PEFT has it. None
            where they were not wanted.
        hidden_states: after the blocks that were asked for, by their number; ``0`` is the input of
            the first block, ``n`` the output of block ``n - 1``.
    """

    loss: torch.Tensor | None
    logits: torch.Tensor | None
    hidden_states: dict[int, torch.Tensor]


class RemoteCausalLM(nn.Module):
    """A model; made by `from_pretrained`.

    Its parameters do not want gradients, as the blocks have none; set ``requires_grad`` of those
    that are to be trained. The blocks run in one go, or in parts where a module was inserted
    between them, or hidden states between them are wanted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        client: TrainingClient,
        adapter: RemoteAdapter | None = None,
        soft_prompt: SoftPrompt | None = None,
        hosted: str = "",
        dtype: torch.dtype = torch.float32,
        pieces_under_way: int = 0,
        max_wait_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        super().__init__()
        self.config: ModelConfig = checkpoint.config
        self.name = name
        self.client = client
        self.adapter = adapter
        self.soft_prompt = soft_prompt
        self.hosted = hosted
        self.max_wait_s = max_wait_s
        self.inserted = nn.ModuleDict()
        self._block_options: dict[str, Any] = {
            "client": client,
            "hosted": hosted,
            "pieces_under_way": pieces_under_way,
            "max_wait_s": max_wait_s,
            "on_progress": on_progress,
        }
        self._parts: dict[tuple[int, int], RemoteBlocks] = {}
        names = names_of(self.config)
        tensors = checkpoint.load_tensors(
            end_shapes(self.config), dtype=dtype, device=torch.device("cpu")
        )
        vocabulary, width = self.config.vocab_size, self.config.hidden_size
        self.embed_tokens = TokenEmbedding(
            tensors[f"{names.embedding}.weight"], self.config.embedding_scale
        )
        self.embedding_norm = (
            EndNorm(self.config, tensors, names.embedding_norm) if names.embedding_norm else None
        )
        self.norm = EndNorm(self.config, tensors, names.final_norm)
        self.lm_head = nn.Linear(width, vocabulary, bias=False, device="meta")
        self.lm_head.weight = (
            self.embed_tokens.weight
            if self.config.tie_embeddings
            else nn.Parameter(tensors[f"{names.head}.weight"], requires_grad=False)
        )

    @classmethod
    def from_pretrained(
        cls, name: str, *, client: TrainingClient | None = None, **options: Any
    ) -> RemoteCausalLM:
        """Loads a model's ends from petald's store, or from a folder.

        Args:
            name: in the store, or a path; the daemon must find the same there.
            client: a connection; a new one to this machine's daemon if none is given.
            options: ``adapter`` inside the blocks, ``soft_prompt`` before them, ``hosted``: the
                name of an adapter that servers host, ``dtype`` of ends and hidden states,
                ``pieces_under_way``, ``max_wait_s`` and ``on_progress`` as for `RemoteBlocks`.

        Raises:
            KernelError: the model is not here, or cannot be read.
            DaemonUnreachable: no daemon answers.
        """
        folder = find_model(name).path
        client = TrainingClient() if client is None else client
        return cls(Checkpoint(folder), name=name, client=client, **options)

    def insert_after(self, block: int, module: nn.Module) -> None:
        """Has a module, which is trained here, map the hidden states after a block.

        Args:
            block: absolute; its output ``[B, S, D]`` is what the module takes, and what it gives
                goes into the next block.
            module: such as an adapter with a residual.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= block < self.config.num_blocks:
            raise ValueError(f"block {block} is not among 0 to {self.config.num_blocks - 1}")
        self.inserted[str(block)] = module

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | Sequence[int] = False,
        return_logits: bool = True,
    ) -> CausalLMOutput:
        """Runs texts through the model.

        Args:
            input_ids: ``[B, S]``; or give ``inputs_embeds``.
            attention_mask: ``[B, S]``, 0 for padding.
            labels: ``[B, S]``, mostly the ids themselves; each is compared with what its
                predecessors say. -100 is left out.
            inputs_embeds: ``[B, S, D]``.
            output_hidden_states: all, or those with these numbers (see `CausalLMOutput`); the
                fewer, the fewer round trips.
            return_logits: without, a loss takes far less memory.

        Raises:
            ValueError: the shapes do not fit.
            JobError, DaemonUnreachable: the swarm could not do it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.soft_prompt is not None:
            hidden, attention_mask, labels = self.soft_prompt.prepend(
                hidden, attention_mask, labels
            )
        wanted = self._wanted(output_hidden_states)
        hidden, kept = self.run_blocks(self._enter(hidden), attention_mask, wanted)
        loss: torch.Tensor | None
        if return_logits:
            logits = self.logits(hidden)
            loss = None if labels is None else _loss_of(logits, labels)
            return CausalLMOutput(loss, logits, kept)
        loss = None if labels is None else self._loss(hidden, labels)
        return CausalLMOutput(loss, None, kept)

    def run_blocks(
        self,
        hidden_BSD: torch.Tensor,
        mask_BS: torch.Tensor | None = None,
        wanted: Sequence[int] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Hidden states through all blocks and the inserted modules; gives those wanted as well."""
        end = self.config.num_blocks
        inserted = {int(block) + 1 for block in self.inserted}
        borders = sorted({0, end} | inserted | set(wanted))
        kept = {0: hidden_BSD} if 0 in wanted else {}
        for first, last in itertools.pairwise(borders):
            hidden_BSD = self._part(first, last)(hidden_BSD, mask_BS)
            if last in inserted:
                hidden_BSD = self.inserted[str(last - 1)](hidden_BSD)
            if last in wanted:
                kept[last] = hidden_BSD
        return hidden_BSD, kept

    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Final norm and head, ``[B, S, V]``, float32 at least."""
        logits: torch.Tensor = self.lm_head(self.norm(hidden_BSD))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = self.config.logit_cap
        return logits if cap is None else cap_softly(logits, cap)

    def _enter(self, rows_BSD: torch.Tensor) -> torch.Tensor:
        """What embeddings, and a soft prompt before them, are for the first block."""
        return rows_BSD if self.embedding_norm is None else self.embedding_norm(rows_BSD)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        sample: Sample | None = None,
        attention_mask: torch.Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Continues texts; greedily, unless ``sample`` says otherwise.

        Every sequence has a session of its own, which survives its servers; a connection has up to
        64 at once. With modules inserted between blocks there is no session: each step runs the
        whole text again.

        Args:
            input_ids: ``[B, S]``.
            max_new_tokens: the most to make.
            sample: called once for each step, with the logits ``[B, V]`` and all ids so far.
            attention_mask: ``[B, S]``, 0 for padding before the texts.
            eos_token_id: ends a text, one or several; the model's own by default.

        Returns:
            All ids, ``[B, S + new]``; after a text's end comes its last end token again.

        Raises:
            ValueError: the padding is not on the left, or a text is empty.
            JobError, DaemonUnreachable: the swarm could not do it.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        check_padding(input_ids, attention_mask)
        ends: Sequence[int]
        if isinstance(eos_token_id, int):
            ends = [eos_token_id]
        else:
            ends = self.config.eos_token_ids if eos_token_id is None else list(eos_token_id)
        with contextlib.ExitStack() as opened:
            if self.inserted:
                step = self._recomputing(attention_mask)
            else:
                step = self._stepping(opened, input_ids, attention_mask, max_new_tokens)
            return continue_texts(
                input_ids,
                lambda ids, has_ended_B: self.logits(step(ids, has_ended_B)[:, None])[:, 0],
                sample or choose_likeliest,
                max_new_tokens,
                torch.tensor(ends, dtype=torch.int64),
            )

    def _stepping(
        self,
        opened: contextlib.ExitStack,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        max_new_tokens: int,
    ) -> Step:
        """Opens a session for each sequence, which the stack closes."""
        prompts: list[torch.Tensor] = []
        sessions: list[HiddenSession] = []
        for number, ids in enumerate(input_ids):
            rows_SD = self.embed_tokens(ids if mask is None else ids[mask[number] != 0])
            if self.soft_prompt is not None:
                rows_SD = self.soft_prompt.prepend(rows_SD[None])[0][0]
            session = HiddenSession(
                self.client,
                model=self.name,
                max_tokens=len(rows_SD) + max_new_tokens,
                adapter=self.adapter,
                hosted=self.hosted,
                max_wait_s=self.max_wait_s,
            )
            opened.callback(session.close)
            sessions.append(session)
            prompts.append(self._enter(rows_SD))
        last: list[torch.Tensor] = []

        def step(input_ids: torch.Tensor, has_ended_B: torch.Tensor) -> torch.Tensor:
            nonlocal last
            if not last:
                last = run_sessions(sessions, prompts)
            else:
                going = [number for number, is_over in enumerate(has_ended_B) if not is_over]
                rows = self._enter(self.embed_tokens(input_ids[going, -1:]))
                answers = run_sessions([sessions[number] for number in going], list(rows))
                for number, last_D in zip(going, answers, strict=True):
                    last[number] = last_D
            return torch.stack(last)

        return step

    def _recomputing(self, mask: torch.Tensor | None) -> Step:
        def step(input_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            whole = mask
            if whole is not None:
                more = input_ids.shape[1] - whole.shape[1]
                whole = torch.cat((whole, whole.new_ones(len(whole), more)), dim=1)
            hidden = self.embed_tokens(input_ids)
            if self.soft_prompt is not None:
                hidden, whole = self.soft_prompt.prepend(hidden, whole)[:2]
            return self.run_blocks(self._enter(hidden), whole)[0][:, -1]

        return step

    def _loss(self, hidden_BSD: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """As `_loss_of`, but the logits are made, and made again, a part at a time."""
        _check_labels(hidden_BSD, labels_BS)
        is_said = labels_BS[:, 1:] != IGNORED_LABEL
        rows_RD = hidden_BSD[:, :-1][is_said]
        labels_R = labels_BS[:, 1:][is_said]

        def add_up(part_RD: torch.Tensor, part_labels_R: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.logits(part_RD), part_labels_R, reduction="sum")

        total = rows_RD.new_zeros((), dtype=torch.promote_types(rows_RD.dtype, torch.float32))
        for part_RD, part_labels_R in zip(
            torch.split(rows_RD, LOSS_ROWS), torch.split(labels_R, LOSS_ROWS), strict=True
        ):
            total = total + torch.utils.checkpoint.checkpoint(
                add_up, part_RD, part_labels_R, use_reentrant=False
            )
        return total / len(labels_R)  # not a number without labels, as Hugging Face has it

    def _part(self, start: int, end: int) -> RemoteBlocks:
        part = self._parts.get((start, end))
        if part is None:
            part = RemoteBlocks(self.name, start, end, **self._block_options)
            self._parts[start, end] = part
        part.adapter = self.adapter  # which may be set anew
        return part

    def _wanted(self, chosen: bool | Sequence[int]) -> Sequence[int]:
        if isinstance(chosen, bool):
            return range(self.config.num_blocks + 1) if chosen else ()
        wrong = [number for number in chosen if not 0 <= number <= self.config.num_blocks]
        if wrong:
            raise ValueError(
                f"there are no hidden states {wrong[0]}; 0 to {self.config.num_blocks}"
            )
        return chosen


def load_config(name: str) -> ModelConfig:
    """The configuration of a model in petald's store, or in a folder, which adapters are made for.

    Raises:
        KernelError: it is not here, or cannot be read.
    """
    return load_model_config(find_model(name).path)


def _loss_of(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of each token under what its predecessors say."""
    _check_labels(logits_BSV, labels_BS)
    return F.cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def _check_labels(rows: torch.Tensor, labels_BS: torch.Tensor) -> None:
    if labels_BS.shape != rows.shape[:2]:
        raise ValueError(
            f"labels have the shape {list(labels_BS.shape)}; {list(rows.shape[:2])} was expected"
        )

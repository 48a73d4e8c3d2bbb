"""A language model whose blocks run in the swarm, as Hugging Face's users know one.

Embedding, final norm and head are here, where tokens and losses stay; hidden states go out.

Shapes: B sequences, S tokens, D hidden size, V vocabulary, P tokens of a soft prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.checkpoint import Checkpoint
from kernels.model_config import ModelConfig, load_model_config
from kernels.model_store import find_model
from kernels.norm import RMSNorm
from kernels.weight_names import WEIGHT_NAMES
from petalctl.passes import TrainingClient
from petalctl.torch.adapters import RemoteAdapter
from petalctl.torch.blocks import OnProgress, RemoteBlocks
from petalctl.torch.hidden_session import HiddenSession
from petalctl.torch.soft_prompt import IGNORED_LABEL, SoftPrompt

LOSS_ROWS = 1024
"""Rows whose logits are held at once for a loss: with 50,000 tokens in the vocabulary they take
200 MB, and as much again for their gradient."""

Sample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Chooses the next tokens ``[B]`` from logits ``[B, V]`` and the ids so far ``[B, S]``."""


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
        self.inserted = nn.ModuleDict()
        self._block_options: dict[str, Any] = {
            "client": client,
            "adapter": adapter,
            "hosted": hosted,
            "pieces_under_way": pieces_under_way,
            "max_wait_s": max_wait_s,
            "on_progress": on_progress,
        }
        self._parts: dict[tuple[int, int], RemoteBlocks] = {}
        tensors = _load_ends(checkpoint, dtype)
        self.embed_tokens = nn.Embedding(1, 1, device="meta")
        self.embed_tokens.weight = nn.Parameter(tensors["embedding"], requires_grad=False)
        self.norm_weight = nn.Parameter(tensors["norm"], requires_grad=False)
        self.lm_head = nn.Linear(1, 1, bias=False, device="meta")
        self.lm_head.weight = (
            self.embed_tokens.weight
            if self.config.tie_embeddings
            else nn.Parameter(tensors["head"], requires_grad=False)
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
        hidden, kept = self.run_blocks(hidden, attention_mask, wanted)
        loss = None if labels is None else self._loss(hidden, labels)
        logits = self.logits(hidden) if return_logits else None
        return CausalLMOutput(loss, logits, kept)

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
        norm = RMSNorm(self.norm_weight, self.config.norm_eps)
        logits: torch.Tensor = self.lm_head(norm.apply(hidden_BSD))
        return logits if logits.dtype == torch.float64 else logits.float()

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

        Every sequence has a session of its own, which survives its servers. With modules inserted
        between blocks there is no session: each step runs the whole text again.

        Args:
            input_ids: ``[B, S]``.
            max_new_tokens: the most to make.
            sample: called once for each step, with the logits ``[B, V]`` and all ids so far.
            attention_mask: ``[B, S]``, 0 for padding before the texts.
            eos_token_id: ends a text, one or several; the model's own by default.

        Returns:
            All ids, ``[B, S + new]``; after a text's end comes its last end token again.

        Raises:
            ValueError: the padding is not on the left.
            JobError, DaemonUnreachable: the swarm could not do it.
        """
        sample = sample or _greedy
        if attention_mask is not None and bool((attention_mask.diff(dim=1) < 0).any()):
            raise ValueError("padding must be on the left of texts that are to be continued")
        ends = _end_ids(eos_token_id, self.config)
        step = self._recomputing(attention_mask) if self.inserted else None
        sessions: list[HiddenSession] = []
        try:
            if step is None:
                sessions = self._open_sessions(input_ids, attention_mask, max_new_tokens)
            last_BD = step(input_ids) if step else _stack([s.run_prompt() for s in sessions])
            has_ended = torch.zeros(len(input_ids), dtype=torch.bool)
            for made in range(max_new_tokens):
                chosen = sample(self.logits(last_BD[:, None])[:, 0], input_ids).to(input_ids)
                chosen = torch.where(has_ended, input_ids[:, -1], chosen) if made else chosen
                input_ids = torch.cat((input_ids, chosen[:, None]), dim=1)
                has_ended |= torch.isin(chosen, ends)
                if bool(has_ended.all()) or made == max_new_tokens - 1:
                    break
                if step is not None:
                    last_BD = step(input_ids)
                else:
                    rows = self.embed_tokens(chosen)
                    last_BD = _stack(
                        [
                            last_D if is_over else session.run(row_D[None])
                            for session, row_D, last_D, is_over in zip(
                                sessions, rows, last_BD, has_ended.tolist(), strict=True
                            )
                        ]
                    )
        finally:
            for session in sessions:
                session.close()
        return input_ids

    def _open_sessions(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, max_new_tokens: int
    ) -> list[HiddenSession]:
        sessions = []
        for number, ids in enumerate(input_ids):
            real = ids if mask is None else ids[mask[number] != 0]
            rows = self.embed_tokens(real)
            if self.soft_prompt is not None:
                rows = self.soft_prompt.prepend(rows[None])[0][0]
            sessions.append(
                HiddenSession(
                    self.client,
                    rows,
                    model=self.name,
                    max_tokens=len(rows) + max_new_tokens,
                    adapter=self.adapter,
                    hosted=self._block_options["hosted"],
                    max_wait_s=self._block_options["max_wait_s"],
                )
            )
        return sessions

    def _recomputing(self, mask: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        def step(input_ids: torch.Tensor) -> torch.Tensor:
            whole = mask
            if whole is not None:
                more = input_ids.shape[1] - whole.shape[1]
                whole = torch.cat((whole, whole.new_ones(len(whole), more)), dim=1)
            hidden = self.embed_tokens(input_ids)
            if self.soft_prompt is not None:
                hidden, whole, _ = self.soft_prompt.prepend(hidden, whole)
            return self.run_blocks(hidden, whole)[0][:, -1]

        return step

    def _loss(self, hidden_BSD: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy, whose logits are made, and made again, a part at a time."""
        if labels_BS.shape != hidden_BSD.shape[:2]:
            raise ValueError(
                f"labels have the shape {list(labels_BS.shape)}; "
                f"{list(hidden_BSD.shape[:2])} was expected"
            )
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


def _load_ends(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    config = checkpoint.config
    names = WEIGHT_NAMES[config.family]
    matrix = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{names.embedding}.weight": matrix,
        f"{names.final_norm}.weight": (config.hidden_size,),
    }
    if not config.tie_embeddings:
        shapes[f"{names.head}.weight"] = matrix
    tensors = checkpoint.load_tensors(shapes, dtype=dtype, device=torch.device("cpu"))
    labels = ("embedding", "norm", "head")
    return dict(zip(labels, tensors.values(), strict=False))


def _greedy(logits_BV: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return logits_BV.argmax(dim=-1)


def _stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(rows))


def _end_ids(given: int | Sequence[int] | None, config: ModelConfig) -> torch.Tensor:
    if given is None:
        return torch.tensor(config.eos_token_ids, dtype=torch.int64)
    return torch.tensor([given] if isinstance(given, int) else list(given), dtype=torch.int64)

"""``petalctl train`` without a daemon: the blocks of a tiny model are computed here.

As a program it is petalctl with that put in, and with a wait in every pass after some, to be
interrupted in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, processors

import petalctl.train_command
from kernels.adapter import SpanAdapter
from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from kernels.span import load_span
from petalctl.cli import main
from petalctl.torch.adapters import DeepPrompt, RemoteAdapter, RemoteLora
from petalctl.torch.causal_lm import CausalLMOutput
from petalctl.torch.soft_prompt import SoftPrompt
from petalctl.training.sequences import TokenSequences

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token for each byte, and two special ones, the first of which begins every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Writes the files of a tokenizer into a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class LocalModel:
    """As `RemoteCausalLM`, but that the blocks are here."""

    def __init__(
        self, folder: Path, adapter: RemoteAdapter | None, soft_prompt: SoftPrompt | None = None
    ) -> None:
        checkpoint = Checkpoint(folder)
        kind = {"dtype": torch.float32, "device": torch.device("cpu")}
        self.config = checkpoint.config
        self.adapter = adapter
        self.soft_prompt = soft_prompt
        self.passes = 0
        self._span = load_span(checkpoint, 0, self.config.num_blocks, **kind)
        self._ends = load_ends(checkpoint, **kind)

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        return_logits: bool,
    ) -> CausalLMOutput:
        self.passes += 1
        hidden = self._ends.embedding.embed(input_ids)
        if self.soft_prompt is not None:
            hidden, attention_mask, prepended = self.soft_prompt.prepend(
                hidden, attention_mask, labels
            )
            labels = prepended
        adapters = []
        if self.adapter is not None:
            form = self.adapter.form
            adapters = [SpanAdapter(self.config, form, 0, self.adapter.values)]
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self._span.forward(hidden, mask_BS=mask, adapters=adapters)
        logits = self._ends.head.logits(hidden[:, :-1].flatten(0, 1))
        return CausalLMOutput(F.cross_entropy(logits, labels[:, 1:].flatten()), None, {})


class NoClient:
    """Stands where the daemon's client would."""

    def __init__(self, socket_path: str | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def make_local_model(
    args: argparse.Namespace,
    shape: Mapping[str, Any],
    sequences: TokenSequences,
    client: object,
    on_progress: object,
) -> tuple[LocalModel, RemoteAdapter | SoftPrompt]:
    """As `petalctl.train_command.make_model`."""
    folder = Path(args.model)
    config = Checkpoint(folder).config
    if args.method == "prompt":
        prompt = SoftPrompt(config, tokens=shape["prompt_tokens"], seed=args.seed)
        return LocalModel(folder, None, prompt), prompt
    adapter: RemoteAdapter
    if args.method == "lora":
        targets = shape["targets"].split(",")
        adapter = RemoteLora(config, rank=shape["rank"], targets=targets, seed=args.seed)
    else:
        adapter = DeepPrompt(config, tokens=shape["prompt_tokens"], seed=args.seed)
    return LocalModel(folder, adapter), adapter


def _hang_after(passes: int) -> None:
    run = LocalModel.__call__

    def call(self: LocalModel, **batch: Any) -> CausalLMOutput:
        if self.passes >= passes:
            print("hangs", flush=True)
            time.sleep(60)
        return run(self, **batch)

    LocalModel.__call__ = call  # type: ignore[method-assign]


if __name__ == "__main__":
    petalctl.train_command.TrainingClient = NoClient  # type: ignore[misc, assignment]
    petalctl.train_command.make_model = make_local_model  # type: ignore[assignment]
    if passes := os.environ.get("HANG_AFTER_PASSES"):
        _hang_after(int(passes))
    sys.exit(main())

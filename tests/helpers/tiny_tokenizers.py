"""Small tokenizers of the two kinds that models have: bytes, and words with their spaces."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from kernels.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Turn:
    role: str
    content: str


def byte_level_backend() -> tokenizers.Tokenizer:
    """One token for each byte, some for two, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = [("a", "b"), ("Ġ", "a"), ("Ã", "©"), ("©", "Ã")]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """As Llama 2's: a space belongs to the word after it, and unknown bytes have tokens."""
    pieces = ["<unk>", "<s>", "</s>", "▁a", "▁b", "a", "b", "ab", "▁", "é"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def make(backend: tokenizers.Tokenizer, template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(
        backend,
        template=template,
        special_texts={"bos_token": "<s>", "eos_token": "</s>"},
        eos_ids=frozenset({backend.token_to_id("</s>")}),
    )


BYTE_LEVEL = make(byte_level_backend())
METASPACE = make(metaspace_backend())

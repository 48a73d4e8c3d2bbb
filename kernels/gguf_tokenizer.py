"""Build a Hugging Face tokenizer from a GGUF file's metadata.

GGUF holds the vocabulary and the merges, but names the way text is cut before merging only by a
word. A wrong cut gives text that looks right and tokens that the model was never trained on, so an
unknown word is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kernels.errors import CorruptCheckpoint, UnsupportedModel

_TOKENIZER = "tokenizer.ggml."
_CONTROL_TOKEN, _USER_TOKEN = 3, 4
"""GGUF's token types for tokens that are matched whole: with a function, and plain text."""

# Source: the cutting expressions in the published tokenizer.json files of each family.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

_WORDS_OF: dict[str, str] = {
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "qwen2": _QWEN2_WORDS,
}
_GPT2_WORDS_AFTER_DIGITS = frozenset({"smollm"})
_GPT2_WORDS = frozenset({"gpt-2", "gpt2"})


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """The texts of ``tokenizer.json`` and ``tokenizer_config.json``, by file name.

    Args:
        metadata: The GGUF file's keys and values.
        vocab_size: Rows of the embedding; there may be fewer tokens (padding), never more.

    Raises:
        UnsupportedModel: The kind of tokenizer, or its cutting of words, is not known here.
        CorruptCheckpoint: Its parts are missing or contradict each other.
    """
    kind = metadata.get(_TOKENIZER + "model")
    if kind != "gpt2":
        raise UnsupportedModel(
            f"the GGUF file's tokenizer is of kind {str(kind)[:40]!r}; only byte-level BPE "
            "('gpt2') can be imported: pull the model's Hugging Face repository instead"
        )
    tokens = _strings(metadata, "tokens")
    if len(tokens) > vocab_size or len(set(tokens)) != len(tokens):
        raise CorruptCheckpoint(
            f"the GGUF file's {len(tokens)} tokens repeat themselves, or are more than the "
            f"{vocab_size} rows of its embedding"
        )
    tokenizer = _tokenizer(metadata, tokens)
    config = _tokenizer_config(metadata, tokens)
    return {
        "tokenizer.json": tokenizer + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _tokenizer(metadata: Mapping[str, Any], tokens: list[str]) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    cut = metadata.get(_TOKENIZER + "pre", "")
    merges = [_merge_pair(merge) for merge in _strings(metadata, "merges")]
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(
            vocab=vocab, merges=merges, ignore_merges=_WORDS_OF.get(cut) == _LLAMA3_WORDS
        )
    except (
        Exception
    ) as error:  # the package raises plain Exception for a merge outside the vocabulary
        raise CorruptCheckpoint(f"the GGUF file's merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for number, token_type in _marked_tokens(metadata, len(tokens)):
        added = AddedToken(tokens[number], normalized=False, special=token_type == _CONTROL_TOKEN)
        if token_type == _CONTROL_TOKEN:
            tokenizer.add_special_tokens([added])
        else:
            tokenizer.add_tokens([added])
    if metadata.get(_TOKENIZER + "add_bos_token"):
        bos = _named_token(metadata, "bos_token_id", tokens)
        if bos is None:
            raise CorruptCheckpoint("the GGUF file asks for a first token and does not say which")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokens.index(bos))],
        )
    return tokenizer.to_str(pretty=True)


def _pre_tokenizer(cut: Any) -> Any:
    from tokenizers import Regex, pre_tokenizers

    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut in _GPT2_WORDS:
        return gpt2_words
    if cut in _GPT2_WORDS_AFTER_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, gpt2_words])
    if cut in _WORDS_OF:
        words = pre_tokenizers.Split(Regex(_WORDS_OF[cut]), behavior="isolated", invert=False)
        plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, plain_bytes])
    known = sorted(_GPT2_WORDS | _GPT2_WORDS_AFTER_DIGITS | set(_WORDS_OF))
    raise UnsupportedModel(
        f"the GGUF file cuts text the way of {str(cut)[:40]!r}; known are: {', '.join(known)}. "
        "Pull the model's Hugging Face repository instead"
    )


def _tokenizer_config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {
                "content": tokens[number],
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token_type == _CONTROL_TOKEN,
            }
            for number, token_type in _marked_tokens(metadata, len(tokens))
        },
    }
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    for name, key in names.items():
        token = _named_token(metadata, key, tokens)
        if token is not None:
            config[name] = token
    context_length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(context_length) is int:
        config["model_max_length"] = context_length
    chat_template = metadata.get("tokenizer.chat_template")
    if isinstance(chat_template, str):
        config["chat_template"] = chat_template
    return config


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(_TOKENIZER + name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise CorruptCheckpoint(f"the GGUF file's {_TOKENIZER}{name} is not a list of texts")
    return value


def _merge_pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise CorruptCheckpoint(f"the GGUF file's merge {merge[:40]!r} is not a pair")
    return left, right


def _marked_tokens(metadata: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
    types = metadata.get(_TOKENIZER + "token_type", [])
    if not isinstance(types, list) or len(types) > count:
        raise CorruptCheckpoint("the GGUF file's token types do not fit its tokens")
    return [(n, kind) for n, kind in enumerate(types) if kind in (_CONTROL_TOKEN, _USER_TOKEN)]


def _named_token(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> str | None:
    number = metadata.get(_TOKENIZER + key)
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise CorruptCheckpoint(f"the GGUF file's {_TOKENIZER}{key} is {number!r:.40}, not a token")
    return tokens[number]

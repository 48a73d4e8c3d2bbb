"""Text to tokens and back: a model's tokenizer, and what its files say of its use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from kernels.chat_template import ChatTemplate, ChatTurn
from kernels.errors import BadConversation, CorruptCheckpoint


class Tokenizer:
    """A model's tokenizer; made by `Tokenizer.load`.

    Attributes:
        eos_ids: that end an answer.
        eos_id: the one that ends a text; none where the files name none.
        special_ids: that have no text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: str | None,
        special_texts: dict[str, str],
        eos_ids: frozenset[int],
    ) -> None:
        self._backend = backend
        self._template = ChatTemplate(template, special_texts) if template else None
        self.eos_ids = eos_ids
        named = backend.token_to_id(special_texts.get("eos_token", ""))
        self.eos_id: int | None = min(eos_ids, default=None) if named is None else named
        self.special_ids = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads ``tokenizer.json`` and the files that say how it is used.

        Raises:
            CorruptCheckpoint: they are missing or cannot be read.
        """
        file = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise CorruptCheckpoint(
                f"{file} cannot be read ({error}); fetch the model again"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8", errors="replace")
        if isinstance(template, list):  # several, by name
            by_name = {entry.get("name"): entry.get("template") for entry in template}
            template = by_name.get("default")
        special_texts = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            text = settings.get(name)
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str):
                special_texts[name] = text
        eos_ids = _read_eos_ids(folder)
        if "eos_token" in special_texts:
            eos_id = backend.token_to_id(special_texts["eos_token"])
            eos_ids |= {eos_id} if eos_id is not None else set()
        return cls(
            backend,
            template=template if isinstance(template, str) else None,
            special_texts=special_texts,
            eos_ids=frozenset(eos_ids),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the tokenizer puts around every text."""
        return list(self._backend.encode(text).ids)

    def encode_plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text with nothing around it, and the characters that each stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def format_chat(self, turns: Sequence[ChatTurn], *, is_answer_next: bool = True) -> str:
        """A conversation as the model wants it.

        Args:
            turns: in their order.
            is_answer_next: it ends where the model's answer begins.

        Raises:
            BadConversation: the model has no template, or the template refuses the conversation.
        """
        if self._template is None:
            raise BadConversation("this model has no chat template; use it with --raw")
        return self._template.render(turns, is_answer_next=is_answer_next)

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """The ids of a conversation; the template says what stands around it.

        Raises:
            BadConversation: as `format_chat`.
        """
        text = self.format_chat(turns)
        return self.encode_plain(text)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} cannot be read; fetch the model again") from error
    return raw if isinstance(raw, dict) else {}


def _read_eos_ids(folder: Path) -> set[int]:
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids |= {token for token in values if type(token) is int}
    return ids

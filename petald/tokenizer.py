"""Text to tokens and back: a model's tokenizer, its chat template, and the stream of new text.

The template comes with the model, so it runs in jinja's sandbox. Content of a chat may spell
special tokens, and is read as such, as Hugging Face does: a template has no other way to write
them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.sandbox
import tokenizers

from kernels.errors import CorruptCheckpoint
from petald.errors import BadRequest

REPLACEMENT = "\ufffd"
"""What the decoder writes for bytes that are no whole character yet."""


class ChatTurn(Protocol):
    """One message of a conversation."""

    @property
    def role(self) -> str:
        """``system``, ``user`` or ``assistant``."""

    @property
    def content(self) -> str:
        """Its text."""


class Tokenizer:
    """A model's tokenizer; made by `Tokenizer.load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: str | None,
        special_texts: dict[str, str],
        eos_ids: frozenset[int],
    ) -> None:
        self._backend = backend
        self._template = _compile(template) if template else None
        self._special_texts = special_texts
        self.eos_ids = eos_ids

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
        settings = _read_json(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
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

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the tokenizer puts around every text."""
        return list(self._backend.encode(text).ids)

    def format_chat(self, turns: Sequence[ChatTurn]) -> str:
        """A conversation as the model wants it, up to where its answer begins.

        Raises:
            BadRequest: the model has no template, or the template refuses the conversation.
        """
        if self._template is None:
            raise BadRequest("this model has no chat template; use it with --raw")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_texts
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRequest(f"the model's chat template refuses this: {error}") from error

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """The ids of a conversation; the template says what stands around it.

        Raises:
            BadRequest: as `format_chat`.
        """
        text = self.format_chat(turns)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


class TextStream:
    """Text of tokens as they come, of which nothing is taken back.

    Held back are bytes that are no whole character yet, and text that may be the beginning of a
    stop text. How it works: the ids of the last piece are decoded again together with the new one,
    because a token's text may depend on the token before it (a leading space, say); what is new is
    the difference. So a token costs the decoding of a few, however long the text is.

    Args:
        tokenizer: of the model.
        stop: texts at which the stream ends, before them.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._known = 0
        self._held = ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Takes a token; gives the text that has become certain."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[: self._known])
        after = self._tokenizer.decode(self._ids)
        if after.endswith(REPLACEMENT) or len(after) < len(before):
            return ""
        del self._ids[: self._known]
        self._known = len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.is_stopped:
            return ""
        before = self._tokenizer.decode(self._ids[: self._known])
        after = self._tokenizer.decode(self._ids)
        self._ids.clear()
        self._known = 0
        text = self._release(after[len(before) :])
        if self.is_stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of a text are the first ones of a stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _compile(template: str) -> jinja2.Template:
    def raise_exception(text: str) -> NoReturn:
        raise jinja2.TemplateError(text)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise CorruptCheckpoint(f"the model's chat template cannot be read: {error}") from error


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

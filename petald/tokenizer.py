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
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from kernels.errors import CorruptCheckpoint
from petald.errors import BadRequest

REPLACEMENT = "\ufffd"
"""What the decoder writes for bytes that are no whole character, or not yet."""

WINDOW_TOKENS = 16
"""Decoded anew for each token: more than the words and characters that tokens are parts of."""

MAX_WINDOW_TOKENS = 32
"""When no good place to cut the window was found: only what is no text comes here."""

KEPT_TOKENS = 4
MAX_UNCERTAIN = 3
"""Characters at the end that a later byte may change: three bytes can wait for the fourth."""


class ChatTurn(Protocol):
    """One message of a conversation."""

    @property
    def role(self) -> str:
        """``system``, ``user`` or ``assistant``."""

    @property
    def content(self) -> str:
        """Its text."""


class Tokenizer:
    """A model's tokenizer; made by `Tokenizer.load`.

    Attributes:
        eos_ids: that end an answer.
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
        self._template = _compile(template) if template else None
        self._special_texts = special_texts
        self.eos_ids = eos_ids
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
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_texts,
            )
        except _TEMPLATE_ERRORS as error:
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
    stop text. How it works: a token's text may depend on those before it (a leading space, the
    bytes of one character), so a window of the last tokens is decoded as a whole, and what it has
    beyond what was given already is new. A full window is cut to its last tokens, so many that
    these alone decode to the same end. So a token costs the decoding of a few, however long the
    text is.

    Args:
        tokenizer: of the model.
        stop: texts at which the stream ends, before them; the first that is complete counts.

    Attributes:
        is_stopped: whether one was found.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []
        self._given = 0
        self._held = ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Takes a token; gives the text that has become certain."""
        if self.is_stopped or token in self._tokenizer.special_ids:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = len(text.rstrip(REPLACEMENT))
        if len(self._window) >= MAX_WINDOW_TOKENS:
            certain = max(certain, len(text) - MAX_UNCERTAIN)
        new = text[self._given : certain]
        self._given = min(max(self._given, certain), len(text))
        if len(self._window) >= WINDOW_TOKENS:
            self._cut_window(text)
        return self._release(new)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.is_stopped:
            return ""
        new = self._tokenizer.decode(self._window)[self._given :]
        self._window.clear()
        self._given = 0
        text = self._release(new)
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _cut_window(self, text: str) -> None:
        is_overfull = len(self._window) >= MAX_WINDOW_TOKENS
        if text.endswith(REPLACEMENT) and not is_overfull:
            return
        for count in range(KEPT_TOKENS, WINDOW_TOKENS):
            kept = self._window[-count:]
            kept_text = self._tokenizer.decode(kept)
            given = len(kept_text) - (len(text) - self._given)
            if given <= 0:
                continue  # a decoder may treat the first text in a special way: it must be past
            is_same_end = text.endswith(kept_text)
            if is_same_end or (is_overfull and kept_text[given:] == text[self._given :]):
                self._window = kept
                self._given = given
                break

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of a text are the first ones of a stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks an answer for training; here it is just its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """What Hugging Face offers to templates is offered here, by the same names."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise CorruptCheckpoint(f"the model's chat template cannot be read: {error}") from error


def _raise_exception(text: str) -> NoReturn:
    raise jinja2.TemplateError(text)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


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

"""A model's chat template: a conversation as the text that the model was trained to see.

The template comes with the model, so it runs in jinja's sandbox. Content of a chat may spell
special tokens, and is read as such, as Hugging Face does: a template has no other way to write
them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kernels.errors import BadConversation, CorruptCheckpoint


class ChatTurn(Protocol):
    """One message of a conversation."""

    @property
    def role(self) -> str:
        """``system``, ``user`` or ``assistant``."""

    @property
    def content(self) -> str:
        """Its text."""


class ChatTemplate:
    """A template that was read.

    Args:
        source: in jinja's language.
        special_texts: what the template calls ``bos_token``, ``eos_token``, ...

    Raises:
        CorruptCheckpoint: it cannot be read.
    """

    def __init__(self, source: str, special_texts: Mapping[str, str]) -> None:
        self._template = _compile(source)
        self._special_texts = dict(special_texts)

    def render(self, turns: Sequence[ChatTurn], *, is_answer_next: bool) -> str:
        """The text of a conversation.

        Args:
            turns: in their order.
            is_answer_next: it ends where the model's answer begins.

        Raises:
            BadConversation: the template refuses it.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=is_answer_next,
                **self._special_texts,
            )
        except _TEMPLATE_ERRORS as error:
            raise BadConversation(f"the model's chat template refuses this: {error}") from error


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

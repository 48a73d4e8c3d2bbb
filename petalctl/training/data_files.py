"""Files to train on: plain text, or JSON lines of texts, prompts with completions, conversations.

A text file is one long text, cut into sequences. A line of JSON is one sequence: of
``{"text": ...}`` everything is learnt, of ``{"prompt": ..., "completion": ...}`` the completion, of
``{"messages": [{"role": ..., "content": ...}]}`` what the assistant says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import BadConversation
from kernels.tokenizer import Tokenizer
from petalctl.errors import CommandError
from petalctl.training.sequences import SequenceCollector, TokenSequences

JSON_LINES = (".jsonl", ".ndjson")
_FORMS = '"text", "prompt" and "completion", or "messages"'


class BadData(CommandError):
    """A file cannot be trained on; the text says where and why."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code="bad_data")


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    content: str


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        BadData: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def load_sequences(
    path: Path, tokenizer: Tokenizer, length: int
) -> tuple[TokenSequences, list[str]]:
    """Reads and tokenises a file.

    Args:
        path: of JSON lines where its name ends so (`JSON_LINES`), or else of text.
        tokenizer: of the model.
        length: the most tokens of a sequence.

    Returns:
        The sequences, at least one; and what the user should be told of them.

    Raises:
        BadData: it cannot be read, is not what it should be, or has too little.
    """
    collector = SequenceCollector(length)
    try:
        if path.suffix.lower() in JSON_LINES:
            _collect_lines(path, tokenizer, collector)
        elif path.suffix.lower() == ".json":
            raise BadData(
                f"{path} is one JSON document; write one object on each line, into a .jsonl file"
            )
        else:
            _collect_text(path, tokenizer, collector, length)
    except OSError as error:
        raise _unreadable(path, error) from error
    sequences = collector.finish() if collector.count else None
    if sequences is None:
        if collector.skipped:
            raise BadData(
                f"in {path}, nothing is left to learn of any of {collector.skipped} sequences "
                f"within {length} tokens; raise --length, or give longer texts"
            )
        raise BadData(f"{path} is empty; give some text")
    notes = []
    if collector.cut:
        notes.append(f"sequences cut to {length} tokens (--length): {collector.cut} of {path}")
    if collector.skipped:
        notes.append(
            f"sequences left out, with nothing to learn in their first {length} tokens: "
            f"{collector.skipped} of {path}"
        )
    return sequences, notes


def _collect_text(
    path: Path, tokenizer: Tokenizer, collector: SequenceCollector, length: int
) -> None:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw.count(b"\n", 0, error.start) + 1) from error
    if not text.strip():
        return
    ids = tokenizer.encode(text)
    for first in range(0, len(ids), length):
        piece = ids[first : first + length]
        if not first or 2 * len(piece) >= length:  # a short rest is not worth a sequence
            collector.add(piece, [True] * len(piece))


def _collect_lines(path: Path, tokenizer: Tokenizer, collector: SequenceCollector) -> None:
    for number, line in _lines(path):
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(
                f"{where} is not JSON: {_say_json(error)}; each line is one object"
            ) from error
        if not isinstance(record, dict):
            raise BadData(f"{where} is no JSON object; one with {_FORMS} was expected")
        try:
            collector.add(*_encode_record(record, tokenizer))
        except BadConversation as error:
            raise BadData(f"{where}: {error}") from error
        except _BadRecord as error:
            raise BadData(f"{where} {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number) from error
            if line.strip():
                yield number, line


class _BadRecord(Exception):
    """What is wrong with a line; its place is put before it."""


def _encode_record(
    record: dict[str, Any], tokenizer: Tokenizer
) -> tuple[Sequence[int], Sequence[bool]]:
    if ("text" in record) + ("completion" in record) + ("messages" in record) != 1:
        raise _BadRecord(f"must have exactly one of {_FORMS}; it has {_name_keys(record)}")
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if "text" in record:
        ids = [*tokenizer.encode(_text(record, "text")), *end]
        return ids, [True] * len(ids)
    if "completion" in record:
        prompt = tokenizer.encode(_text(record, "prompt"))
        completion = [*tokenizer.encode_plain(_text(record, "completion"))[0], *end]
        return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)
    return _encode_messages(record["messages"], tokenizer)


def _encode_messages(messages: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A conversation, as the template writes it; what the assistant says is to be learnt.

    Where an answer begins and ends is found by writing the conversation up to it and with it. A
    template may write former answers otherwise than the last one (without its thoughts, say): what
    is not found so is not learnt.
    """
    if not tokenizer.has_chat_template:
        raise _BadRecord('has "messages", but the model has no chat template; give "prompt"')
    turns = _read_turns(messages)
    whole = tokenizer.format_chat(turns, is_answer_next=False)
    answers = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            before = tokenizer.format_chat(turns[:index]) if index else ""
            after = tokenizer.format_chat(turns[: index + 1], is_answer_next=False)
            if after.startswith(before) and whole.startswith(after):
                answers.append((len(before), len(after)))
    if not answers:
        raise _BadRecord('has no message of the role "assistant" that the chat template shows')
    ids, places = tokenizer.encode_plain(whole)
    is_target = [any(start <= first < end for start, end in answers) for first, _ in places]
    return ids, is_target


def _read_turns(messages: Any) -> list[_Turn]:
    if not isinstance(messages, list) or not messages:
        raise _BadRecord('has "messages" that are no list of objects')
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise _BadRecord('has a message that is no object with "role" and "content"')
        turns.append(_Turn(_text(message, "role"), _text(message, "content")))
    return turns


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _BadRecord(f'has no text under "{key}"')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRecord(f'has half a character under "{key}" (a lone surrogate)') from error
    return value


def _name_keys(record: dict[str, Any]) -> str:
    return ", ".join(repr(key[:40]) for key in list(record)[:8]) or "nothing"


def _say_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error)


def _not_utf8(path: Path, line: int) -> BadData:
    return BadData(f"line {line} of {path} is not UTF-8; convert the file first")


def _unreadable(path: Path, error: OSError) -> BadData:
    return BadData(f"{path} cannot be read: {error.strerror or error}")

"""Text of tokens as they come, against the text of all of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.tokenizer import Tokenizer
from petald.text_stream import MAX_WINDOW_TOKENS, TextStream
from tests.helpers.tiny_tokenizers import (
    BYTE_LEVEL,
    METASPACE,
    byte_level_backend,
)


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """The plain way: the stop text whose end comes first; of several, the one that began first."""
    for end in range(len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def run_stream(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> list[str]:
    stream = TextStream(tokenizer, stop=stop)
    pieces = []
    for token in ids:
        pieces.append(stream.feed(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()]


stops = st.lists(st.text("ab é\ufffd", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, byte_level_backend().get_vocab_size() - 1)), stop=stops)
def test_pieces_make_the_whole_for_any_bytes(ids, stop):
    whole = BYTE_LEVEL.decode(ids)
    assert "".join(run_stream(BYTE_LEVEL, ids, stop)) == cut_at_first_stop(whole, stop)


@settings(max_examples=400, deadline=None)
@given(text=st.text("ab é世🙂\n", max_size=60), stop=stops)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte-level", "metaspace"])
def test_pieces_make_the_whole_for_any_text(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert "".join(run_stream(tokenizer, ids, stop)) == cut_at_first_stop(whole, stop)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(1, 9), max_size=80), stop=stops)
def test_pieces_make_the_whole_whatever_the_words(ids, stop):
    whole = METASPACE.decode(ids)
    assert "".join(run_stream(METASPACE, ids, stop)) == cut_at_first_stop(whole, stop)


def test_character_of_several_tokens_comes_whole():
    ids = BYTE_LEVEL.encode("a🙂b")[1:]
    assert run_stream(BYTE_LEVEL, ids, []) == ["a", "", "", "", "🙂", "b", ""]


def test_unfinished_character_comes_at_the_end_as_a_replacement():
    ids = BYTE_LEVEL.encode("a🙂")[1:4]
    assert run_stream(BYTE_LEVEL, ids, []) == ["a", "", "", "\ufffd"]


def test_possible_stop_is_held_until_it_is_none():
    ids = BYTE_LEVEL.encode("b\n\nb\nb\n")[1:]
    assert run_stream(BYTE_LEVEL, ids, ["\n\n\n"]) == ["b", "", "", "\n\nb", "", "\nb", "", "\n"]


def test_stop_across_tokens_ends_the_stream():
    stream = TextStream(BYTE_LEVEL, stop=["bb", ""])
    pieces = [stream.feed(token) for token in BYTE_LEVEL.encode("xbby")[1:]]
    assert pieces == ["x", "", "", ""]
    assert stream.is_stopped
    assert stream.finish() == ""


def test_special_tokens_have_no_text():
    ids = BYTE_LEVEL.encode("a") + [BYTE_LEVEL._backend.token_to_id("</s>")] * 100
    assert "".join(run_stream(BYTE_LEVEL, ids, [])) == "a"


@pytest.mark.parametrize("text", ["ab " * 4, "é", "\ufffd", "🙂"])
def test_window_stays_small(text):
    stream = TextStream(BYTE_LEVEL)
    for token in BYTE_LEVEL.encode(text * 200)[2:]:  # begins within a character
        stream.feed(token)
        assert len(stream._window) <= MAX_WINDOW_TOKENS


def test_endless_bytes_that_are_no_text_cost_no_more_with_time():
    lead = BYTE_LEVEL._backend.token_to_id("©Ã")  # ends one character, begins the next
    continuation = BYTE_LEVEL._backend.token_to_id("©")
    for token in (lead, continuation):
        stream = TextStream(BYTE_LEVEL)
        for _ in range(2000):
            stream.feed(token)
        assert len(stream._window) <= MAX_WINDOW_TOKENS

"""What a hop does with steps in any order: idempotent, in sequence, within what was promised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petald.errors import BadRequest
from petald.hop_session import HopSession, PassOver, RepeatOutput, RunStep


def make_session(length: int = 0, last_number: int = 0) -> HopSession:
    session = HopSession(max_tokens=32, max_step_tokens=16)
    if length:
        session.on_step(number=last_number, position=0, tokens=length)
        session.on_done(number=last_number, position=0, tokens=length)
    return session


def test_steps_in_order_run() -> None:
    session = make_session()
    for number in range(1, 5):
        decision = session.on_step(number=number, position=number - 1, tokens=1)
        assert decision == RunStep(truncate_to=number - 1)
        session.on_done(number=number, position=number - 1, tokens=1)
    assert session.length == 4


def test_the_first_step_may_have_any_number() -> None:
    session = make_session()
    assert session.on_step(number=77, position=0, tokens=9) == RunStep(truncate_to=0)


def test_a_repeated_step_is_answered_from_the_kept_output() -> None:
    session = make_session(length=5, last_number=3)
    assert session.on_step(number=3, position=0, tokens=5) == RepeatOutput()
    assert session.length == 5


def test_a_stale_step_is_passed_over() -> None:
    session = make_session(length=5, last_number=3)
    assert session.on_step(number=2, position=0, tokens=5) == PassOver()


def test_a_step_may_take_tokens_back() -> None:
    session = make_session(length=5, last_number=3)
    assert session.on_step(number=4, position=2, tokens=1) == RunStep(truncate_to=2)
    session.on_done(number=4, position=2, tokens=1)
    assert session.length == 3


@pytest.mark.parametrize(
    ("number", "position", "tokens", "said"),
    [
        (5, 5, 1, None),
        (4, 6, 1, "only 5 tokens are cached"),
        (4, 5, 0, "1 to 16"),
        (4, 5, 17, "1 to 16"),
        (4, 5, 16, None),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    number: int, position: int, tokens: int, said: str | None
) -> None:
    session = make_session(length=5, last_number=3)
    if said is None:
        session.on_step(number=number, position=position, tokens=tokens)
        return
    with pytest.raises(BadRequest, match=said):
        session.on_step(number=number, position=position, tokens=tokens)
    assert session.length == 5


def test_a_step_past_the_promised_room_is_refused() -> None:
    session = make_session(length=16, last_number=1)
    session.on_step(number=2, position=16, tokens=16)
    session.on_done(number=2, position=16, tokens=16)
    with pytest.raises(BadRequest, match="opened for 32"):
        session.on_step(number=3, position=32, tokens=1)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 20), st.booleans()),
        max_size=60,
    )
)
def test_any_order_of_steps_keeps_the_length_true(
    steps: list[tuple[int, int, int, bool]],
) -> None:
    session = HopSession(max_tokens=32, max_step_tokens=16)
    cached: list[int] = []
    for number, position, tokens, fails in steps:
        try:
            decision = session.on_step(number=number, position=position, tokens=tokens)
        except BadRequest:
            continue
        if isinstance(decision, RunStep):
            assert decision.truncate_to <= len(cached)
            del cached[decision.truncate_to :]
            if fails:
                session.on_truncated(decision.truncate_to)
            else:
                cached += [number] * tokens
                session.on_done(number=number, position=position, tokens=tokens)
        assert session.length == len(cached) <= 32

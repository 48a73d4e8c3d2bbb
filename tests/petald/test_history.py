"""Histories: whatever is appended is read again, in memory or from files, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.wire.tensor import WireTensor
from petald.errors import SessionLost
from petald.history import HistoryStore

FORMS = [("float32", "raw", 16), ("bfloat16", "raw", 8), ("float32", "int8", 6)]


def make_rows(form: int, values: list[int]) -> WireTensor:
    dtype, codec, row_bytes = FORMS[form]
    data = b"".join(bytes([value] * row_bytes) for value in values)
    return WireTensor(dtype, (len(values), 4), data, codec)


actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("append"),
            st.integers(0, 2),
            st.lists(st.integers(0, 255), min_size=1, max_size=9),
        ),
        st.tuples(st.just("truncate"), st.integers(0, 40), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(actions, st.sampled_from([0, 50, 200, 10_000]))
def test_a_history_gives_back_what_it_took(
    steps: list[tuple[str, int, list[int] | None]], limit_bytes: int
) -> None:
    store = HistoryStore(limit_bytes=limit_bytes)
    history, other = store.open(), store.open()
    other.append(make_rows(0, [9]))
    rows: list[tuple[int, int]] = []
    for kind, number, values in steps:
        if kind == "append":
            assert values is not None
            history.append(make_rows(number, values))
            rows += [(number, value) for value in values]
        else:
            history.truncate(min(number, history.rows))
            del rows[number:]
        assert history.rows == len(rows)
        assert store.memory_bytes <= limit_bytes
    at = 0
    while at < len(rows):
        read = history.read(at, min(at + 7, len(rows)))
        count = read.shape[0]
        assert 1 <= count <= 7
        forms = {form for form, _ in rows[at : at + count]}
        assert len(forms) == 1
        expected = make_rows(forms.pop(), [value for _, value in rows[at : at + count]])
        assert (read.dtype, read.codec, bytes(read.data)) == (
            expected.dtype,
            expected.codec,
            bytes(expected.data),
        )
        at += count
    assert bytes(other.read(0, 1).data) == bytes([9] * 16)
    history.close()
    other.close()
    assert (store.memory_bytes, store.spilled_bytes) == (0, 0)


def test_what_does_not_fit_into_memory_goes_to_a_file_without_a_name(tmp_path: Path) -> None:
    store = HistoryStore(limit_bytes=100, folder=tmp_path)
    history = store.open()
    history.append(make_rows(0, [1, 2, 3]))
    assert (store.memory_bytes, store.spilled_bytes) == (48, 0)
    history.append(make_rows(0, [4, 5, 6, 7]))
    assert (store.memory_bytes, store.spilled_bytes) == (0, 112)
    assert list(tmp_path.iterdir()) == []  # whoever kills the daemon leaves nothing behind
    assert bytes(history.read(2, 4).data) == bytes([3] * 16 + [4] * 16)
    history.close()


def test_a_codec_that_changes_at_every_step_takes_one_file() -> None:
    files = len(os.listdir("/proc/self/fd"))
    store = HistoryStore(limit_bytes=100)
    history = store.open()
    for value in range(100):
        history.append(make_rows(value % 3, [value]))
    assert store.spilled_bytes > 800
    assert len(os.listdir("/proc/self/fd")) == files + 1
    assert bytes(history.read(50, 51).data) == bytes([50] * 6)
    history.truncate(0)
    assert len(os.listdir("/proc/self/fd")) == files


def test_rows_that_are_not_there_are_not_read() -> None:
    history = HistoryStore(limit_bytes=100).open()
    history.append(make_rows(0, [1]))
    with pytest.raises(ValueError, match="1:2"):
        history.read(1, 2)


@pytest.mark.parametrize("rows_before", [0, 3, 8], ids=["first", "spilling", "spilled"])
def test_what_cannot_be_written_loses_the_session_and_no_memory(
    rows_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HistoryStore(limit_bytes=100)
    history, other = store.open(), store.open()
    other.append(make_rows(0, [9]))
    if rows_before:
        history.append(make_rows(0, [1] * rows_before))

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(SessionLost, match=r"No space left.*disk space"):
            history.append(make_rows(0, [2] * 9))
    history.close()
    assert (store.memory_bytes, store.spilled_bytes) == (16, 0)
    other.append(make_rows(0, [8]))
    assert bytes(other.read(0, 2).data) == bytes([9] * 16 + [8] * 16)

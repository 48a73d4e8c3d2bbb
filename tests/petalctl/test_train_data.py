"""What is trained on: files, sequences, batches, their order, the learning rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.tokenizer import Tokenizer
from petalctl.training.data_files import BadData, load_sequences
from petalctl.training.data_order import HELD_OUT_MOST, DataOrder, split_held_out
from petalctl.training.sequences import IGNORED, SequenceCollector, TokenSequences
from petalctl.training.settings import TrainSettings, learning_rate
from tests.helpers.train_stand_in import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_lines(folder: Path, *records: object) -> Path:
    path = folder / "data.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines))
    return path


def rows(sequences: TokenSequences) -> list[tuple[list[int], list[int]]]:
    """Each sequence's tokens, and those of them that are learnt."""
    found = []
    for index in range(len(sequences)):
        batch = sequences.batch([index])
        labels = batch.labels_BS[0].tolist()
        found.append((batch.input_ids_BS[0].tolist(), [each for each in labels if each >= 0]))
    return found


def test_text_is_cut_into_consecutive_sequences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.txt"
    path.write_text("abcdefghijklmnop" * 4)
    sequences, notes = load_sequences(path, tokenizer, 10)
    found = rows(sequences)
    whole = tokenizer.encode(path.read_text())
    assert [len(ids) for ids, _ in found] == [10] * 6 + [5]
    assert [token for ids, _ in found for token in ids] == whole
    assert all(learnt == ids[1:] for ids, learnt in found)
    assert notes == []


def test_short_rest_of_a_text_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.txt"
    path.write_text("a" * 22)
    assert len(load_sequences(path, tokenizer, 10)[0]) == 2
    assert len(load_sequences(path, tokenizer, 100)[0]) == 1


def test_lines_of_text_end_with_the_end_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sequences, _ = load_sequences(
        write_lines(tmp_path, {"text": "ab"}, "", {"text": "c", "source": "x"}), tokenizer, 10
    )
    (first, learnt), (second, _) = rows(sequences)
    assert first == [*tokenizer.encode("ab"), tokenizer.eos_id]
    assert learnt == first[1:]
    assert second == [*tokenizer.encode("c"), tokenizer.eos_id]


def test_of_prompt_and_completion_the_completion_is_learnt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path, {"prompt": "Say hi:", "completion": " hi"})
    ((ids, learnt),) = rows(load_sequences(path, tokenizer, 100)[0])
    assert ids == [*tokenizer.encode("Say hi:"), *learnt]
    assert tokenizer.decode(learnt) == " hi"
    assert learnt[-1] == tokenizer.eos_id


def test_of_messages_what_the_assistant_says_is_learnt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    turns = [
        ("system", "é"),
        ("user", "q1"),
        ("assistant", "a1 é"),
        ("user", "q"),
        ("assistant", "b"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write_lines(tmp_path, {"messages": messages})
    ((ids, learnt),) = rows(load_sequences(path, tokenizer, 1000)[0])
    end = tokenizer.eos_id
    whole = "".join(f"<|{role}|>{content}</s>" for role, content in turns)
    assert ids == tokenizer.encode_plain(whole)[0]
    assert learnt == [*tokenizer.encode_plain("a1 é")[0], end, *tokenizer.encode_plain("b")[0], end]


def test_long_sequences_are_cut_and_those_without_anything_to_learn_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(
        tmp_path, {"text": "abcdefgh"}, {"prompt": "abcdefgh", "completion": "x"}, {"text": "a"}
    )
    sequences, notes = load_sequences(path, tokenizer, 5)
    assert [len(ids) for ids, _ in rows(sequences)] == [5, 3]
    assert notes[0] == f"sequences cut to 5 tokens (--length): 1 of {path}"
    assert "left out" in notes[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": ', "line 2 .* is not JSON"),
        (b'{"text": "a"}\n\n[1]', "line 3 .* no JSON object"),
        (b'{"txt": "a"}', "line 1 .* exactly one of .*; it has 'txt'"),
        (b'{"text": "a", "completion": "b", "prompt": ""}', "exactly one"),
        (b'{"text": 3}', 'line 1 .* no text under "text"'),
        (b'{"completion": "a"}', 'no text under "prompt"'),
        (b'{"text": "\\ud800"}', "half a character"),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2 .* not UTF-8"),
        (b'{"messages": []}', "no list of objects"),
        (b'{"messages": [3]}', "no object with"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "role .assistant."),
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b'{"prompt": "aaaaaaaaaaaaaaaaaaaaaaaa", "completion": "a"}', "nothing is left to learn"),
        (b"[" * 100_000, "line 1 .* is not JSON"),
    ],
)
def test_bad_lines_are_named(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes, said: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadData, match=said) as raised:
        load_sequences(path, tokenizer, 16)
    assert raised.value.code == "bad_data"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a\nb\n\xff", "line 3 .* not UTF-8"), (b"", "empty"), (b" \n", "empty")],
)
def test_bad_texts_are_named(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes, said: str
) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(BadData, match=said):
        load_sequences(path, tokenizer, 16)


def test_file_that_is_not_there_or_of_another_kind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for path in (tmp_path / "none.txt", tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BadData, match="cannot be read"):
            load_sequences(path, tokenizer, 16)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(BadData, match=r"into a \.jsonl"):
        load_sequences(tmp_path / "data.json", tokenizer, 16)


def test_messages_need_a_template(tmp_path: Path) -> None:
    plain = Tokenizer.load(save_tokenizer(tmp_path, template=None))
    path = write_lines(tmp_path, {"messages": [{"role": "assistant", "content": "a"}]})
    with pytest.raises(BadData, match="no chat template"):
        load_sequences(path, plain, 16)


def test_what_the_template_refuses_is_told_with_its_line(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    strict = Tokenizer.load(save_tokenizer(tmp_path, template=template))
    path = write_lines(tmp_path, {"messages": [{"role": "assistant", "content": "a"}]})
    with pytest.raises(BadData, match=r"line 1 .*roles must alternate"):
        load_sequences(path, strict, 16)


def test_batch_is_padded_at_its_end() -> None:
    collector = SequenceCollector(10)
    collector.add([5, 6, 7], [True, False, True])
    collector.add([8, 9], [False, True])
    batch = collector.finish().batch([1, 0])
    assert batch.input_ids_BS.tolist() == [[8, 9, 0], [5, 6, 7]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels_BS.tolist() == [[IGNORED, 9, IGNORED], [IGNORED, IGNORED, 7]]
    assert (batch.targets, batch.tokens) == (2, 5)


@given(count=st.integers(1, 30), size=st.integers(1, 7), seed=st.integers(0, 5))
def test_every_sequence_is_seen_once_in_an_epoch(count: int, size: int, seed: int) -> None:
    order = DataOrder(count, seed)
    seen = [index for number in range(3 * count) for index in order.batch(number, size)]
    for epoch in range(len(seen) // count):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(count=st.integers(1, 30), size=st.integers(1, 7), number=st.integers(0, 50))
def test_order_does_not_depend_on_what_came_before(count: int, size: int, number: int) -> None:
    whole = DataOrder(count, 3)
    walked = [whole.batch(each, size) for each in range(number + 1)]
    assert DataOrder(count, 3).batch(number, size) == walked[-1]


@given(count=st.integers(1, 3000), share=st.floats(0, 0.9), seed=st.integers(0, 3))
def test_held_out_sequences_are_not_trained_on(count: int, share: float, seed: int) -> None:
    trained, held_out = split_held_out(count, share, seed)
    assert sorted([*trained, *held_out]) == list(range(count))
    assert len(held_out) <= HELD_OUT_MOST
    assert bool(held_out) == (share > 0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_learning_rate_rises_and_falls(schedule: str, expected: list[float]) -> None:
    settings = TrainSettings(steps=8, lr=1.0, warmup=4, schedule=schedule, eval_every=1)
    assert [learning_rate(step, settings) for step in range(8)] == pytest.approx(expected)

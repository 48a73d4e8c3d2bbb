import json
import os
import time
from dataclasses import dataclass

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from kernels.errors import BadConversation, CorruptCheckpoint
from kernels.tokenizer import Tokenizer
from petald.text_stream import MAX_WINDOW_TOKENS, TextStream
from tests.helpers.real_model import real_model_folder

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Turn:
    role: str
    content: str


def byte_level_backend() -> tokenizers.Tokenizer:
    """One token for each byte, some for two, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = [("a", "b"), ("Ġ", "a"), ("Ã", "©"), ("©", "Ã")]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """As Llama 2's: a space belongs to the word after it, and unknown bytes have tokens."""
    pieces = ["<unk>", "<s>", "</s>", "▁a", "▁b", "a", "b", "ab", "▁", "é"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def make(backend: tokenizers.Tokenizer, template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(
        backend,
        template=template,
        special_texts={"bos_token": "<s>", "eos_token": "</s>"},
        eos_ids=frozenset({backend.token_to_id("</s>")}),
    )


BYTE_LEVEL = make(byte_level_backend())
METASPACE = make(metaspace_backend())


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


def test_encode_adds_what_the_tokenizer_adds_and_chat_does_not():
    bos = BYTE_LEVEL._backend.token_to_id("<s>")
    assert BYTE_LEVEL.encode("ab")[0] == bos
    ids = BYTE_LEVEL.encode_chat([Turn("user", "hi")])
    assert ids.count(bos) == 1
    assert BYTE_LEVEL.format_chat([Turn("user", "hi")]) == "<s><|user|>hi</s><|assistant|>"


def test_missing_template_says_what_to_do():
    with pytest.raises(BadConversation, match="raw"):
        make(byte_level_backend(), template=None).encode_chat([Turn("user", "hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.x }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for x in 5 %}{% endfor %}",
    ],
)
def test_template_that_fails_is_a_bad_request(template):
    tokenizer = make(byte_level_backend(), template=template)
    with pytest.raises(BadConversation, match="template"):
        tokenizer.encode_chat([Turn("user", "hi")])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "<é>"\n}'),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% if tools is not none %}tools{% else %}none{% endif %}", "none"),
    ],
)
def test_template_has_what_hugging_face_offers(template, text):
    tokenizer = make(byte_level_backend(), template=template)
    assert tokenizer.format_chat([Turn("user", "<é>")]) == text


def write_model(folder, **files: object) -> None:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_load_gathers_ends_and_template(tmp_path):
    write_model(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "</s>"}, "chat_template": "old"},
        config={"eos_token_id": 7},
        generation_config={"eos_token_id": [8, 9]},
    )
    (tmp_path / "chat_template.jinja").write_text("new {{ eos_token }}")
    tokenizer = Tokenizer.load(tmp_path)
    eos = tokenizer._backend.token_to_id("</s>")
    assert tokenizer.eos_ids == {7, 8, 9, eos}
    assert tokenizer.format_chat([]) == "new </s>"


def test_load_takes_the_default_of_several_templates(tmp_path):
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_model(tmp_path, tokenizer_config={"chat_template": templates})
    assert Tokenizer.load(tmp_path).format_chat([]) == "d"


def test_load_ignores_truncation_and_padding(tmp_path):
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("x" * 10)) == 11


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("config.json", "\x00"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content):
    write_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CorruptCheckpoint):
        Tokenizer.load(tmp_path)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


CONVERSATIONS = [
    [Turn("user", "Why is the sky blue?")],
    [Turn("system", "Be brief."), Turn("user", "Héllo\n\n 世界 🙂 <|im_end|>")],
    [Turn("user", "a"), Turn("assistant", " b "), Turn("user", "")],
]


@pytest.fixture(scope="module")
def real_folder():
    return real_model_folder()


@pytest.fixture(scope="module")
def reference(real_folder):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_folder)


@pytest.mark.model
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_real_chat_is_as_hugging_face_has_it(real_folder, reference, turns):
    tokenizer = Tokenizer.load(real_folder)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.format_chat(turns) == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(turns) == ids


@pytest.mark.model
@pytest.mark.parametrize("text", ["", "Hello, world", "  é世🙂\n\tx", "<|im_start|>user"])
def test_real_text_is_as_hugging_face_has_it(real_folder, reference, text):
    tokenizer = Tokenizer.load(real_folder)
    ids = reference(text)["input_ids"]
    assert tokenizer.encode(text) == ids
    assert "".join(run_stream(tokenizer, ids, [])) == reference.decode(
        ids, skip_special_tokens=True
    )
    assert reference.eos_token_id in tokenizer.eos_ids

"""A model's tokenizer and chat template, against Hugging Face's."""

from __future__ import annotations

import json
import os
import time

import pytest

from kernels.errors import BadConversation, CorruptCheckpoint
from kernels.tokenizer import Tokenizer
from tests.helpers.real_model import real_model_folder
from tests.helpers.tiny_tokenizers import (
    BYTE_LEVEL,
    Turn,
    byte_level_backend,
    make,
)


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
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert reference.eos_token_id in tokenizer.eos_ids

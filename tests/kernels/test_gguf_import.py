"""Importing GGUF files: the same model comes out, and bad files are refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.errors import CorruptCheckpoint, KernelError, UnsupportedModel
from kernels.gguf_config import llama3_rope_factors
from kernels.gguf_import import import_gguf
from kernels.model_store import fingerprint
from tests.helpers.tiny_gguf import TinyModel, write_tiny_gguf

Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q4_1 = gguf.GGMLQuantizationType.Q4_1
F16 = gguf.GGMLQuantizationType.F16
BF16 = gguf.GGMLQuantizationType.BF16


def _import(tmp_path: Path, model: TinyModel, **settings: Any) -> Path:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", model)
    import_gguf(file, tmp_path / "folder", **settings)
    return tmp_path / "folder"


def _weights(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


@pytest.mark.parametrize(
    "model",
    [
        TinyModel(),
        TinyModel(is_tied=False, has_query_bias=True),
        TinyModel(architecture="qwen2", has_query_bias=True, pre_tokenizer="qwen2"),
    ],
    ids=["llama", "llama-untied-biased", "qwen2"],
)
def test_import_gives_back_every_weight(tmp_path: Path, model: TinyModel) -> None:
    weights = _weights(_import(tmp_path, model))
    expected = model.tensors()
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_import_computes_what_the_original_does(tmp_path: Path, architecture: str) -> None:
    model = TinyModel(architecture=architecture, has_query_bias=True)
    folder = _import(tmp_path, model)
    imported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original = AutoModelForCausalLM.from_config(imported.config)  # type: ignore[no-untyped-call]
    state = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
    original.load_state_dict(state, strict=False)
    original.tie_weights()
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(imported(tokens).logits, original(tokens).logits)


@pytest.mark.parametrize(
    ("quantisation", "dtype"), [(Q8_0, "float16"), (Q4_1, "float16"), (F16, "float16")]
)
def test_import_dequantises_as_gguf_does(
    tmp_path: Path, quantisation: gguf.GGMLQuantizationType, dtype: str
) -> None:
    model = TinyModel(quantisation=quantisation)
    folder = _import(tmp_path, model)
    weights = _weights(folder)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        packed = gguf.quants.quantize(model.tensors()[name], quantisation)
        values = gguf.quants.dequantize(packed, quantisation)
        np.testing.assert_array_equal(weights[name], values.astype(np.float16))
    assert weights["model.norm.weight"].dtype == np.float32
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype


def test_import_keeps_bfloat16_bit_for_bit(tmp_path: Path) -> None:
    model = TinyModel(quantisation=BF16)
    folder = _import(tmp_path, model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.from_numpy(model.tensors()[name]).to(torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.state_dict()[name], expected)


def test_shards_hold_whole_blocks_and_the_index_names_them(tmp_path: Path) -> None:
    model = TinyModel(blocks=5)
    block_bytes = sum(a.nbytes for n, a in model.tensors().items() if ".layers.0." in n)
    folder = _import(tmp_path, model, max_shard_bytes=2 * block_bytes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in model.tensors().values())
    for block in range(5):
        holders = {f for n, f in index["weight_map"].items() if f".layers.{block}." in n}
        assert len(holders) == 1


def test_import_of_one_file_twice_gives_one_fingerprint(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(quantisation=Q4_1))
    for name in ("one", "two"):
        import_gguf(file, tmp_path / name)
    assert fingerprint(tmp_path / "one", root=tmp_path) == fingerprint(
        tmp_path / "two", root=tmp_path
    )


def test_import_reports_progress_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _import(tmp_path, TinyModel(), on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_config_takes_the_shortest_decimals(tmp_path: Path) -> None:
    config = json.loads((_import(tmp_path, TinyModel()) / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 10000.0
    assert config["eos_token_id"] == 264


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_its_factors(tmp_path: Path, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_rope_factors(theta=10000.0, head_size=16, scaling=scaling)
    model = TinyModel(extra_tensors={"rope_freqs.weight": factors.astype(np.float32)})
    folder = _import(tmp_path, model)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(loaded.model.rotary_emb.inv_freq, plain / factors, rtol=1e-5)


@pytest.mark.parametrize("cut", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_tokenizer_gives_back_the_text(tmp_path: Path, cut: str) -> None:
    folder = _import(tmp_path, TinyModel(pre_tokenizer=cut))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "hello wor 2024 naïve 日本 it's\n\n  x<|im_end|>"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert tokens[-1] == tokenizer.eos_token_id == 264
    assert tokenizer.convert_ids_to_tokens(tokens[:2]) == ["hello", "Ġwor"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "user: hi\n"


def test_tokenizer_cuts_numbers_as_the_family_does(tmp_path: Path) -> None:
    pieces = {}
    for cut in ("smollm", "llama-bpe", "qwen2"):
        folder = tmp_path / cut
        import_gguf(write_tiny_gguf(tmp_path / f"{cut}.gguf", TinyModel(pre_tokenizer=cut)), folder)
        backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        assert backend.pre_tokenizer is not None
        pieces[cut] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a 20245")]
    assert pieces["llama-bpe"] == ["a", "Ġ", "202", "45"]
    assert pieces["qwen2"] == ["a", "Ġ", "2", "0", "2", "4", "5"]
    assert pieces["smollm"] == ["a", "Ġ", "2", "0", "2", "4", "5"]


def test_first_token_is_added_where_the_file_asks_for_it(tmp_path: Path) -> None:
    folder = _import(tmp_path, TinyModel(extra={"tokenizer.ggml.add_bos_token": True}))
    assert AutoTokenizer.from_pretrained(folder)("he")["input_ids"][0] == 263


@pytest.mark.parametrize(
    ("extra", "expected", "word"),
    [
        ({"general.architecture": "mamba"}, UnsupportedModel, "mamba"),
        ({"tokenizer.ggml.model": "llama"}, UnsupportedModel, "byte-level"),
        ({"tokenizer.ggml.pre": "viking"}, UnsupportedModel, "viking"),
        ({"tokenizer.ggml.pre": None}, UnsupportedModel, "cuts text"),
        ({"llama.expert_count": 8}, UnsupportedModel, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, "yarn"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "rotary"),
        ({"llama.block_count": None}, CorruptCheckpoint, "block_count"),
        ({"llama.block_count": 4}, CorruptCheckpoint, "blk.3"),
        ({"llama.block_count": 2}, UnsupportedModel, "blk.2"),
        ({"llama.attention.head_count_kv": 3}, CorruptCheckpoint, "do not fit"),
        ({"llama.feed_forward_length": 64}, CorruptCheckpoint, "ffn_gate"),
        ({"llama.embedding_length": 0}, CorruptCheckpoint, "embedding_length"),
        ({"tokenizer.ggml.eos_token_id": 100000}, CorruptCheckpoint, "eos_token_id"),
        ({"tokenizer.ggml.merges": ["h"]}, CorruptCheckpoint, "not a pair"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, CorruptCheckpoint, "do not fit"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, CorruptCheckpoint, "repeat"),
    ],
)
def test_foreign_model_is_refused_in_words(
    tmp_path: Path, extra: dict[str, Any], expected: type[KernelError], word: str
) -> None:
    architecture = extra.pop("general.architecture", "llama")
    model = TinyModel(architecture=architecture, extra=extra)
    with pytest.raises(expected, match=word):
        _import(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_foreign_tensor_and_missing_tensor_are_refused(tmp_path: Path) -> None:
    model = TinyModel()
    with pytest.raises(UnsupportedModel, match="attn_sinks"):
        _import(
            tmp_path,
            replace(model, extra_tensors={"blk.0.attn_sinks.weight": np.ones(4, np.float32)}),
        )
    with pytest.raises(CorruptCheckpoint, match="attn_norm"):
        _import(tmp_path, replace(model, left_out=frozenset({"blk.1.attn_norm.weight"})))
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        _import(
            tmp_path, replace(model, extra_tensors={"rope_freqs.weight": np.full(8, 3, np.float32)})
        )


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    class Broken(TinyModel):
        def tensors(self) -> dict[str, Any]:
            tensors = super().tensors()
            tensors["model.norm.weight"][3] = np.nan
            return tensors

    with pytest.raises(CorruptCheckpoint, match="output_norm"):
        _import(tmp_path, Broken())


def test_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        _import(tmp_path, TinyModel())
    assert (tmp_path / "folder" / "mine.txt").read_text() == "mine"


def test_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _import(tmp_path, TinyModel(), on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"PK\x03\x04" * 50, b"GGUF\x03\0\0\0" + b"\xff" * 16]
)
def test_file_that_is_not_gguf_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(data)
    with pytest.raises(CorruptCheckpoint):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = TinyModel(blocks=1, quantisation=Q4_1)
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "t.gguf", model).read_bytes()


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_file_ends_in_a_typed_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, sound_bytes: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(sound_bytes)
    header = min(len(damaged), 9000)  # where a change can do more than change a weight
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(0, header - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    (folder / "t.gguf").write_bytes(damaged[:length])
    try:
        import_gguf(folder / "t.gguf", folder / "out")
    except KernelError:
        assert [path.name for path in folder.iterdir()] == ["t.gguf"]
    else:
        assert (folder / "out" / "config.json").exists()

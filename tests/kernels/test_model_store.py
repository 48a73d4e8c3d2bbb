"""The local model store: names, paths, fingerprints, and what is remembered about a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import model_store
from kernels.errors import CorruptCheckpoint
from kernels.model_fingerprint import canonical_config, fingerprint_of, weight_file_names
from kernels.model_manifest import Manifest, WeightFile, load_manifest, save_manifest
from kernels.model_store import (
    BadModelName,
    UnknownModel,
    check_name,
    find_model,
    fingerprint,
    list_models,
    remembered_fingerprint,
    save_folder_manifest,
    store_root,
    weight_files,
)

CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_theta": 10000.0, "torch_dtype": "float16"}


class HashCounter:
    """Counts the files that were really read."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:
            self.names.append(name)


def make_model(folder: Path, *, shards: int = 2, seed: bytes = b"w") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = [f"model-{n}.safetensors" for n in range(shards)]
    for name in names:
        (folder / name).write_bytes(seed + name.encode())
    weight_map = {f"model.layers.{n}.x": name for n, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_root_follows_the_environment(tmp_path: Path) -> None:
    assert store_root({"PETALD_HOME": "/a"}) == Path("/a/models")
    assert store_root({"XDG_DATA_HOME": "/b"}) == Path("/b/petald/models")
    assert store_root({"PETALD_HOME": "/a", "XDG_DATA_HOME": "/b"}) == Path("/a/models")
    home = Path.home() / ".local/share/petald/models"
    assert store_root({}) == store_root({"XDG_DATA_HOME": "relative"}) == home


def test_model_is_found_by_name_by_path_and_by_repository(tmp_path: Path) -> None:
    root = tmp_path / "models"
    folder = make_model(root / "tiny")
    save_folder_manifest(
        folder, Manifest(name="tiny", source="hub:some/Tiny", revision="abc"), root=root
    )
    by_name = find_model("tiny", root=root)
    assert (by_name.path, by_name.source, by_name.revision) == (folder, "hub:some/Tiny", "abc")
    assert find_model("some/Tiny", root=root) == by_name
    assert find_model(str(folder), root=root).path == folder
    outside = make_model(tmp_path / "elsewhere" / "other")
    assert find_model(str(outside), root=root).source == f"folder:{outside}"
    assert [model.name for model in list_models(root=root)] == ["tiny"]


@pytest.mark.parametrize("name", ["nothing", "", "a/b", "../tiny", ".partial", "~nobody/x", "a\0b"])
def test_unknown_model_is_answered_with_the_known_ones(tmp_path: Path, name: str) -> None:
    root = tmp_path / "models"
    make_model(root / "tiny")
    with pytest.raises(UnknownModel, match=r"known: tiny.*petalctl model pull"):
        find_model(name, root=root)


def test_folder_without_configuration_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"no config\.json"):
        find_model(str(tmp_path), root=tmp_path / "models")


@given(st.text(max_size=110))
def test_accepted_name_stays_in_the_store(name: str) -> None:
    try:
        check_name(name)
    except BadModelName:
        return
    path = Path("/store") / name
    assert os.path.normpath(path) == str(path)
    assert path.parent == Path("/store")
    assert not name.startswith(".")


def test_fingerprint_ignores_what_does_not_compute(tmp_path: Path) -> None:
    plain = fingerprint_of(CONFIG, ["a", "b"])
    noise = {"torch_dtype": "x", "transformers_version": "9", "_name_or_path": "y", "foo": None}
    assert fingerprint_of({**CONFIG, **noise}, ["b", "a"]) == plain
    assert fingerprint_of({**CONFIG, "rope_theta": 10000}, ["a", "b"]) == plain
    assert fingerprint_of({**CONFIG, "rope_theta": 500}, ["a", "b"]) != plain
    assert fingerprint_of({**CONFIG, "unknown": 1}, ["a", "b"]) != plain
    assert fingerprint_of(CONFIG, ["a", "c"]) != plain


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_canonical_config_does_not_depend_on_order(value: object) -> None:
    config = {"b": value, "a": 1}
    try:
        first = canonical_config(config)
    except CorruptCheckpoint:
        return  # an infinity
    assert first == canonical_config({"a": 1, "b": value})
    assert canonical_config(json.loads(first)) == first


def test_hashing_is_remembered_until_a_file_changes(tmp_path: Path) -> None:
    root = tmp_path / "models"
    folder = make_model(root / "tiny")
    counter = HashCounter()
    before = fingerprint(folder, root=root, on_progress=counter)
    assert sorted(counter.names) == ["model-0.safetensors", "model-1.safetensors"]
    assert fingerprint(folder, root=root, on_progress=counter) == before
    assert len(counter.names) == 2
    (folder / "model-1.safetensors").write_bytes(b"another")
    assert fingerprint(folder, root=root, on_progress=counter) != before
    assert counter.names[2:] == ["model-1.safetensors"]
    assert (folder / "petald-model.json").exists()


def test_folder_outside_of_the_store_is_remembered_in_the_store(tmp_path: Path) -> None:
    root, folder = tmp_path / "models", make_model(tmp_path / "mine")
    counter = HashCounter()
    first = fingerprint(folder, root=root, on_progress=counter)
    assert fingerprint(folder, root=root, on_progress=counter) == first
    assert len(counter.names) == 2
    assert not (folder / "petald-model.json").exists()
    assert len(list((root / ".remembered").iterdir())) == 1


def test_fingerprint_works_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    folder = make_model(root / "tiny")

    def refuse(path: Path, manifest: Manifest) -> None:
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr(model_store, "save_manifest", refuse)
    counter = HashCounter()
    first = fingerprint(folder, root=root, on_progress=counter)
    assert fingerprint(folder, root=root, on_progress=counter) == first
    assert len(counter.names) == 2  # the process remembers, if the disk cannot


def test_read_only_store_folder_is_remembered_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    folder = make_model(root / "tiny")

    def refuse_in_folder(path: Path, manifest: Manifest) -> None:
        if path.parent == folder:
            raise PermissionError(13, "read-only", str(path))
        save_manifest(path, manifest)

    monkeypatch.setattr(model_store, "save_manifest", refuse_in_folder)
    weights = weight_files(folder, root=root)
    remembered = list((root / ".remembered").iterdir())
    assert [load_manifest(path).weights for path in remembered] == [weights]  # type: ignore[union-attr]


def test_shard_that_was_never_fetched_counts_by_the_hubs_hash(tmp_path: Path) -> None:
    root = tmp_path / "models"
    whole = make_model(root / "whole")
    expected = fingerprint(whole, root=root)
    part = make_model(root / "part")
    hashes = weight_files(whole, root=root)
    gone = hashes["model-1.safetensors"]
    (part / "model-1.safetensors").unlink()
    absent = WeightFile(sha256=gone.sha256, size_bytes=gone.size_bytes, mtime_ns=None)
    save_folder_manifest(
        part,
        Manifest(name="part", source="hub:a/b", weights={"model-1.safetensors": absent}),
        root=root,
    )
    assert fingerprint(part, root=root) == expected
    assert remembered_fingerprint(find_model("part", root=root), root=root) == expected
    (whole / "model-1.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="missing"):
        fingerprint(whole, root=root)


def test_list_does_not_hash(tmp_path: Path) -> None:
    root = tmp_path / "models"
    make_model(root / "tiny")
    (model,) = list_models(root=root)
    assert remembered_fingerprint(model, root=root) is None
    expected = fingerprint(model, root=root)
    assert remembered_fingerprint(model, root=root) == expected


def test_many_writers_leave_one_good_manifest(tmp_path: Path) -> None:
    root = tmp_path / "models"
    folder = make_model(root / "tiny", shards=8)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(fingerprint(folder, root=root)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    manifest = load_manifest(folder / "petald-model.json")
    assert manifest is not None
    assert len(manifest.weights) == 8
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2}', '{"format": 1, "weights": 3}', "[" * 100_000, "\0"],
)
def test_damaged_manifest_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    root = tmp_path / "models"
    folder = make_model(root / "tiny")
    expected = fingerprint(folder, root=root)
    (folder / "petald-model.json").write_text(text)
    assert load_manifest(folder / "petald-model.json") is None
    assert fingerprint(folder, root=root) == expected


def test_hash_in_a_manifest_must_look_like_one(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    bad = {"sha256": "../../etc", "size_bytes": 1, "mtime_ns": 1}
    path.write_text(
        json.dumps({"format": 1, "name": "a", "source": "b", "weights": {"x.safetensors": bad}})
    )
    assert load_manifest(path) == Manifest(name="a", source="b")


def test_failed_write_keeps_the_old_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.json"
    save_manifest(path, Manifest(name="old", source="s"))
    monkeypatch.setattr(
        "kernels.model_manifest.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28))
    )
    with pytest.raises(OSError, match="28"):
        save_manifest(path, Manifest(name="new", source="s"))
    assert load_manifest(path) == Manifest(name="old", source="s")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "weight_map",
    [
        {},
        {"a": "../x.safetensors"},
        {"a": "/x.safetensors"},
        {"a": "x.bin"},
        {"a": 3},
        {"a": ["x.safetensors"]},
        {"a": "sub/x.safetensors"},
        [1],
    ],
)
def test_index_that_points_elsewhere_is_refused(tmp_path: Path, weight_map: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match="does not name safetensors files"):
        weight_file_names(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="no safetensors"):
        weight_file_names(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "adapter.safetensors").touch()
    assert weight_file_names(tmp_path) == ["model.safetensors"]


def test_store_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, kernels.model_store; "
        "print([m for m in ('torch', 'numpy', 'gguf', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

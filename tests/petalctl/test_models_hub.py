"""Pulling from the hub: whole, in part, broken off, damaged, refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from kernels.errors import CorruptCheckpoint
from kernels.model_store import find_model, fingerprint, list_models
from petalctl.errors import CommandError
from petalctl.hub_client import _CountingFile
from petalctl.models_progress import Progress
from petalctl.models_pull import PullRequest, pull_model
from tests.helpers.hub_stand_in import HubStandIn, serve_hub

REPOSITORY = "some/Tiny-Model"
SHARDS = [f"model-{n}-of-5.safetensors" for n in range(1, 6)]


def tiny_files(*, blocks: int = 6, seed: int = 0) -> dict[str, bytes]:
    """An embedding shard, three shards of two blocks each, a head shard, and files not to fetch."""
    rng = np.random.default_rng(seed)
    shards: list[dict[str, Any]] = [{} for _ in SHARDS]
    shards[0]["model.embed_tokens.weight"] = rng.standard_normal((16, 8)).astype(np.float32)
    for block in range(blocks):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        shards[1 + block // 2][name] = rng.standard_normal((64, 64)).astype(np.float32)
    shards[4]["lm_head.weight"] = rng.standard_normal((16, 8)).astype(np.float32)
    weight_map = {t: n for n, held in zip(SHARDS, shards, strict=True) for t in held}
    config = {"model_type": "llama", "num_hidden_layers": blocks, "hidden_size": 8}
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **{name: save(held) for name, held in zip(SHARDS, shards, strict=True)},
        "pytorch_model.bin": b"never",
        "modeling_tiny.py": b"never",
        "sub/config.json": b"never",
        "README.md": b"never",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what it writes at a time
    close_session()
    with serve_hub() as stand_in:
        stand_in.add(REPOSITORY, tiny_files())
        monkeypatch.setenv("HF_ENDPOINT", stand_in.endpoint)
        yield stand_in
        close_session()


def pull(root: Path, what: str = REPOSITORY, **settings: Any) -> Path:
    return pull_model(PullRequest(what=what, root=root, **settings)).path


def refusal(root: Path, what: str = REPOSITORY, **settings: Any) -> CommandError:
    with pytest.raises(CommandError) as caught:
        pull(root, what, **settings)
    return caught.value


def test_pull_fetches_the_model_and_nothing_else(hub: HubStandIn, root: Path) -> None:
    folder = pull(root)
    files = tiny_files()
    wanted = {
        name for name in files if name.endswith((".json", ".safetensors")) and "/" not in name
    }
    assert {path.name for path in folder.iterdir()} == wanted | {"petald-model.json"}
    assert set(hub.fetched()) == wanted
    for name in wanted:
        assert (folder / name).read_bytes() == files[name]
    model = find_model("tiny-model", root=root)
    assert model.source == f"hub:{REPOSITORY}"
    assert model.revision == hub.repositories[REPOSITORY][0].commit
    assert [path.name for path in (root / ".partial").iterdir()] == ["tiny-model.lock"]


def test_fingerprint_is_of_the_hubs_hashes_without_hashing(hub: HubStandIn, root: Path) -> None:
    folder = pull(root)
    read: list[str] = []
    told = fingerprint(folder, root=root, on_progress=lambda name, done, total: read.append(name))
    assert read == []
    shutil.copytree(folder, root.parent / "copy", ignore=shutil.ignore_patterns("petald*"))
    assert fingerprint(root.parent / "copy", root=root) == told


def test_second_pull_asks_nobody(hub: HubStandIn, root: Path) -> None:
    pull(root)
    hub.requests.clear()
    pull(root)
    assert hub.requests == []


def test_pull_goes_on_where_the_connection_broke(hub: HubStandIn, root: Path) -> None:
    hub.break_at[SHARDS[2]] = 5000
    assert refusal(root).code == "download_interrupted"
    assert list_models(root=root) == []
    hub.break_at.clear()
    hub.requests.clear()
    folder = pull(root)
    assert (folder / SHARDS[2]).read_bytes() == tiny_files()[SHARDS[2]]
    assert hub.fetched() == [SHARDS[2], SHARDS[3], SHARDS[4]]  # what was whole is not asked again
    assert [one.range for one in hub.requests if one.path.endswith(SHARDS[2])] == ["bytes=5000-"]


def test_pull_survives_a_server_that_ignores_ranges(hub: HubStandIn, root: Path) -> None:
    hub.break_at[SHARDS[2]] = 5000
    refusal(root)
    hub.break_at.clear()
    hub.ignores_ranges = True
    assert (pull(root) / SHARDS[2]).read_bytes() == tiny_files()[SHARDS[2]]


@pytest.mark.parametrize("name", [SHARDS[1], "tokenizer.json"], ids=["weights", "git-file"])
def test_damaged_file_is_thrown_away_and_fetched_anew(
    hub: HubStandIn, root: Path, name: str
) -> None:
    hub.corrupt.add(name)
    error = refusal(root)
    assert error.code == "verification_failed"
    assert name in str(error)
    assert list_models(root=root) == []
    hub.corrupt.clear()
    assert (pull(root) / name).read_bytes() == tiny_files()[name]


def test_interrupt_leaves_nothing_half_registered(
    hub: HubStandIn, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Progress, label: str, done_bytes: int, total_bytes: int) -> None:
        if label == SHARDS[3]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "show", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull(root)
    assert list_models(root=root) == []
    hub.requests.clear()
    pull(root)
    assert hub.fetched() in ([SHARDS[4]], [SHARDS[3], SHARDS[4]])


def test_full_disk_is_told_in_words_and_pull_goes_on_later(
    hub: HubStandIn, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: _CountingFile, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(_CountingFile, "write", full)
        assert refusal(root).code == "disk_full"
    assert list_models(root=root) == []
    pull(root)


def test_too_small_a_disk_is_noticed_before_the_weights(
    hub: HubStandIn, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr("petalctl.models_place.shutil.disk_usage", lambda path: usage)
    error = refusal(root)
    assert error.code == "disk_full"
    assert "100 B left" in str(error)
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_blocks_fetch_only_their_shards_and_more_can_follow(hub: HubStandIn, root: Path) -> None:
    pull(root, blocks=(2, 4))
    weights = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert weights == [SHARDS[0], SHARDS[2], SHARDS[4]]
    part = fingerprint(root / "tiny-model", root=root)
    hub.requests.clear()
    pull(root, blocks=(3, 5))
    assert [n for n in hub.fetched() if n.endswith(".safetensors")] == [SHARDS[3]]
    hub.requests.clear()
    pull(root)
    assert [n for n in hub.fetched() if n.endswith(".safetensors")] == [SHARDS[1]]
    assert fingerprint(root / "tiny-model", root=root) == part
    whole = pull(root, name="whole")
    assert fingerprint(whole, root=root) == part


def test_blocks_only_leaves_out_embedding_and_head(hub: HubStandIn, root: Path) -> None:
    folder = pull(root, blocks=(0, 3), is_blocks_only=True)
    assert {path.name for path in folder.glob("*.safetensors")} == {SHARDS[1], SHARDS[2]}


def test_blocks_that_the_model_lacks_are_refused(hub: HubStandIn, root: Path) -> None:
    error = refusal(root, blocks=(4, 7))
    assert error.code == "bad_blocks"
    assert "0:6" in str(error)
    assert list_models(root=root) == []


def test_blocks_of_a_model_in_one_file_fetch_that(
    hub: HubStandIn, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save({"model.layers.0.x": np.ones(3, np.float32)})
    hub.add("some/one", {"config.json": b"{}", "model.safetensors": data})
    assert (pull(root, "some/one", blocks=(0, 1)) / "model.safetensors").exists()
    assert "one file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("some/absent", "repo_not_found"),
        (f"{REPOSITORY}@v9", "revision_not_found"),
        ("some/gated", "gated_repo"),
        ("some/private", "repo_not_found"),
        ("some/--bad..name", "unknown_model"),
        ("some/pickled", "not_a_model"),
        ("some/configless", "not_a_model"),
        ("some/lost-shard", "not_a_model"),
        ("no-such-name", "unknown_model"),
    ],
)
def test_what_cannot_be_pulled_is_told_in_words(
    hub: HubStandIn, root: Path, what: str, code: str
) -> None:
    files = tiny_files()
    hub.add("some/gated", files, is_gated=True)
    hub.add("some/private", files, is_private=True)
    hub.add("some/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.add("some/configless", {"model.safetensors": b"x"})
    hub.add("some/lost-shard", {name: files[name] for name in files if name != SHARDS[1]})
    error = refusal(root, what)
    assert error.code == code
    assert "\n" not in str(error)
    assert list_models(root=root) == []


def test_token_opens_a_gated_repository(
    hub: HubStandIn, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("some/gated", tiny_files(), is_gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert pull(root, "some/gated").exists()
    assert {one.token for one in hub.requests} == {"Bearer hf_abc"}


def test_index_that_points_out_of_the_folder_is_refused(hub: HubStandIn, root: Path) -> None:
    bad = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    hub.add("some/evil", {**tiny_files(), "model.safetensors.index.json": bad})
    with pytest.raises(CorruptCheckpoint):
        pull(root, "some/evil")


def test_revision_is_kept_and_another_needs_another_name(hub: HubStandIn, root: Path) -> None:
    old = hub.add(REPOSITORY, tiny_files(seed=1), revisions=("v1",))
    pull(root, f"{REPOSITORY}@v1", blocks=(0, 2))
    assert find_model("tiny-model", root=root).revision == old.commit
    pull(root)  # goes on with the revision that is here
    assert find_model("tiny-model", root=root).revision == old.commit
    assert refusal(root, f"{REPOSITORY}@main").code == "name_taken"
    newer = pull(root, f"{REPOSITORY}@main", name="newer")
    assert fingerprint(newer, root=root) != fingerprint(root / "tiny-model", root=root)


def test_name_of_another_model_is_not_taken_over(hub: HubStandIn, root: Path) -> None:
    hub.add("other/Tiny-Model", tiny_files(seed=2))
    pull(root)
    assert refusal(root, "other/Tiny-Model").code == "name_taken"
    assert refusal(root, name="../up").code == "bad_model_name"


def test_unreachable_hub_is_told_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub() as gone:
        endpoint = gone.endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert refusal(root).code == "hub_unreachable"


def test_hub_is_not_asked_offline(root: Path) -> None:
    """In a process of its own: huggingface_hub reads the setting when it is imported."""
    code = (
        "from pathlib import Path; from petalctl.hub_client import HubClient\n"
        "from petalctl.errors import CommandError\n"
        "try: HubClient().snapshot('some/tiny', None)\n"
        "except CommandError as error: print(error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "hub_offline"

"""The models that this daemon can route for: which they are, and the parts that it holds itself.

A routing daemon holds tokenizer, embedding and head, a small share of a large model's weights; with
them, the servers never see a token. They are loaded when a model is first used, or at start for the
models that the configuration names. Invariant: one model is loaded once, whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import trio

from kernels.checkpoint import Checkpoint
from kernels.errors import KernelError
from kernels.head import Ends, load_ends
from kernels.model_config import ModelConfig, load_model_config
from kernels.model_store import find_model, fingerprint, list_models
from kernels.sampling import Sampler
from kernels.tokenizer import Tokenizer
from petald.errors import UnknownModel
from petald.executor import Executor
from petald.log import get_logger
from petald.scheduler import Priority

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model it is, without any of its weights.

    Attributes:
        name: as the user calls it.
        fingerprint: 32 bytes.
    """

    name: str
    folder: Path
    fingerprint: bytes
    config: ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalModel:
    """A model as a routing daemon holds it.

    Attributes:
        ends: embedding and head, on the routing device.
        eos_ids: tokens that end an answer.
    """

    identity: ModelIdentity
    tokenizer: Tokenizer
    ends: Ends
    eos_ids: frozenset[int]

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Hidden states ``[tokens, hidden]`` of token ids."""
        return self.ends.embedding.embed(torch.tensor(token_ids, dtype=torch.int64))

    def sample(
        self, sampler: Sampler, hidden_SD: torch.Tensor, token_ids: Sequence[int]
    ) -> tuple[int, torch.Tensor]:
        """The token after the last row, and its hidden states ``[1, hidden]`` for the next step."""
        logits_SV = self.ends.head.logits(hidden_SD[-1:])
        token = sampler.sample(logits_SV[0], token_ids)
        return token, self.embed([token])


def identify_model(name: str) -> ModelIdentity:
    """Reads which model a name or a path stands for; hashes its files, once.

    Raises:
        KernelError: it is not there, or cannot be read.
    """
    folder = find_model(name)
    return ModelIdentity(
        name=name,
        folder=folder.path,
        fingerprint=bytes.fromhex(fingerprint(folder)),
        config=load_model_config(folder.path),
    )


def load_local_model(identity: ModelIdentity, *, dtype: torch.dtype) -> LocalModel:
    """Loads tokenizer, embedding and head.

    Raises:
        KernelError: they cannot be read.
    """
    tokenizer = Tokenizer.load(identity.folder)
    ends = load_ends(Checkpoint(identity.folder), dtype=dtype, device=torch.device("cpu"))
    return LocalModel(
        identity=identity,
        tokenizer=tokenizer,
        ends=ends,
        eos_ids=frozenset(tokenizer.eos_ids),
    )


class LocalModels:
    """The models of this daemon, by name.

    Args:
        preferred: the names that the configuration gives; the first is meant when none is said.
        dtype: of embedding and head.
        executor: loads and owns the weights.
    """

    def __init__(self, preferred: Sequence[str], *, dtype: torch.dtype, executor: Executor) -> None:
        self._preferred = tuple(preferred)
        self._dtype = dtype
        self._executor = executor
        self._identities: dict[str, ModelIdentity] = {}
        self._loaded: dict[bytes, LocalModel] = {}
        self._lock = trio.Lock()

    @property
    def loaded_names(self) -> tuple[str, ...]:
        """The models whose ends are in memory."""
        return tuple(model.identity.name for model in self._loaded.values())

    async def identify(self, name: str) -> ModelIdentity:
        """Which model a name stands for; the empty name, the one that is meant by default.

        Raises:
            UnknownModel: no model is meant by default.
            KernelError: it is not there, or cannot be read.
        """
        name = name or await self._default_name()
        known = self._identities.get(name)
        if known is None:
            known = await trio.to_thread.run_sync(identify_model, name)
            self._identities[name] = known
        return known

    async def load(self, name: str) -> LocalModel:
        """The model of a name, loaded if it was not.

        Raises:
            UnknownModel, KernelError: as `identify`.
        """
        identity = await self.identify(name)
        async with self._lock:
            model = self._loaded.get(identity.fingerprint)
            if model is None:
                model = await self._executor.run(self._load, identity, priority=Priority.PREFILL)
                self._loaded[identity.fingerprint] = model
                log.info("routing for model", model=identity.name)
        return model

    async def known(self, *served: str) -> list[ModelIdentity]:
        """Every model that can be named here: of the configuration, of the store, and by path.

        Args:
            served: those that the configuration gives to be served, whether they are routed or not.
        """
        stored = await trio.to_thread.run_sync(list_models)
        names = [*self._preferred, *served, *self._identities]
        names += [folder.name for folder in stored]
        identities: dict[bytes, ModelIdentity] = {}
        for name in dict.fromkeys(names):
            try:
                identity = await self.identify(name)
            except KernelError as error:
                log.info("model passed over", model=name, code=error.code, reason=str(error))
                continue
            identities.setdefault(identity.fingerprint, identity)
        return list(identities.values())

    def _load(self, identity: ModelIdentity) -> LocalModel:
        return load_local_model(identity, dtype=self._dtype)

    async def _default_name(self) -> str:
        if self._preferred:
            return self._preferred[0]
        names = [folder.name for folder in await trio.to_thread.run_sync(list_models)]
        if len(names) == 1:
            return names[0]
        if not names:
            raise UnknownModel(
                "no model is here; `petalctl model pull smollm2-135m-instruct` gets a small one"
            )
        raise UnknownModel(f"several models are here; say which: {', '.join(sorted(names))}")

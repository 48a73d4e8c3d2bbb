"""Everything that can go wrong with a model or with computing it, one class for each reaction."""

from __future__ import annotations

from typing import ClassVar


class KernelError(Exception):
    """Anything that a model, or the machine that computes it, did not do."""

    code: ClassVar[str] = "kernel_error"


class UnsupportedModel(KernelError):
    """The model is of a family, or has a part, that is not implemented: take another model."""

    code = "unsupported_model"


class CorruptCheckpoint(KernelError):
    """A model's files are missing, damaged, or contradict each other: fetch them again."""

    code = "corrupt_checkpoint"


class OutOfDeviceMemory(KernelError):
    """The device has no memory left for what was asked: ask for less, or free some."""

    code = "out_of_device_memory"


class CacheFull(KernelError):
    """The KV cache has no room for what was asked: wait, ask for less, or go elsewhere."""

    code = "cache_full"


class UnknownCodec(KernelError):
    """Hidden states are written in a way that is not known here: choose another codec."""

    code = "unknown_codec"


class NotFinite(KernelError):
    """Hidden states hold numbers that cannot be written: what computed them is at fault."""

    code = "not_finite"


class UnknownWeightFormat(KernelError):
    """Weights cannot be held in the way that was asked for, here: choose another format."""

    code = "unknown_weight_format"


class BadSampling(KernelError):
    """A sampling value is outside of its range: correct it."""

    code = "bad_sampling"


class BadAdapter(KernelError):
    """An adapter does not fit the model, or its files are of no use: take another."""

    code = "bad_adapter"


class BadConversation(KernelError):
    """A conversation is not one that the model's chat template takes: correct it."""

    code = "bad_request"

"""What a ``config.json`` says of rotary positions. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.config_values import MAX_POSITIONS, quote, read_float, read_int
from kernels.errors import CorruptCheckpoint, UnsupportedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: ``none``, ``linear`` (positions divided by ``factor``), or ``llama3``
            (frequencies stretched by wavelength, as Llama 3.1 does).
        factor: of the stretch.
        low_frequency_factor: wavelengths over ``original_positions`` / this are stretched in full.
        high_frequency_factor: wavelengths under ``original_positions`` / this are left alone.
        original_positions: the context the model was first trained with.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


def parse_rotary(raw: Mapping[str, Any], max_positions: int) -> tuple[RotaryConfig, ...]:
    """The rotary positions of a model: one, or two where blocks with a window have their own.

    Raises:
        UnsupportedModel: they are stretched in a way that is not implemented.
        CorruptCheckpoint: a number cannot be.
    """
    # transformers 5 writes everything under rope_parameters, by the kind of block where kinds
    # differ; earlier ones wrote separate keys.
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CorruptCheckpoint("the rotary parameters in config.json are no JSON object")
    if "full_attention" in parameters or "sliding_attention" in parameters:
        kinds = [parameters.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
        if not all(isinstance(kind, Mapping) for kind in kinds):
            raise CorruptCheckpoint("the rotary parameters in config.json are no JSON objects")
        local_theta = raw.get("rope_local_base_freq")
        whole, local = kinds[0], {"rope_theta": local_theta, **kinds[1]}
        return _parse(raw, whole, max_positions), _parse(raw, local, max_positions)
    whole = _parse(raw, parameters, max_positions)
    if raw.get("rope_local_base_freq") is None:
        return (whole,)
    return whole, RotaryConfig(theta=read_float(raw, "rope_local_base_freq", default=10_000.0))


def _parse(
    raw: Mapping[str, Any], parameters: Mapping[str, Any], max_positions: int
) -> RotaryConfig:
    merged = {"rope_theta": raw.get("rope_theta", 10_000.0), **parameters}
    theta = read_float(merged, "rope_theta", default=10_000.0)
    kind = merged.get("rope_type", merged.get("type", "default"))
    partial = merged.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel("rotary positions on a part of each head are not supported yet")
    if kind == "default":
        return RotaryConfig(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UnsupportedModel(
            f"rotary scaling of the kind {quote(kind)} is not supported; "
            "supported: default, linear, llama3"
        )
    factor = read_float(merged, "factor", default=1.0)
    if kind == "linear":
        return RotaryConfig(theta=theta, scaling="linear", factor=factor)
    low = read_float(merged, "low_freq_factor", default=1.0)
    high = read_float(merged, "high_freq_factor", default=4.0)
    if high <= low:
        raise CorruptCheckpoint(f"rotary high_freq_factor {high} is not over low_freq_factor {low}")
    return RotaryConfig(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_positions=read_int(
            merged, "original_max_position_embeddings", MAX_POSITIONS, default=max_positions
        ),
    )

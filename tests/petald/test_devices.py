"""What is known of the device."""

from __future__ import annotations

import pytest
import torch

from petald.devices import free_memory_bytes


def test_what_torch_keeps_of_a_gpus_memory_for_later_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 400)
    assert free_memory_bytes(torch.device("cuda")) == 400


def test_some_of_this_machines_memory_is_free() -> None:
    assert free_memory_bytes(torch.device("cpu")) > 0

"""What GPU replicas tell torch and NCCL, and what they leave alone."""

from __future__ import annotations

import os

import pytest

from tetriserve.engine.environment import ENVIRONMENT, set_environment


def test_what_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    set_environment()
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT | {"NCCL_SOCKET_IFNAME": "eth7"}


def test_the_allocator_may_be_told_by_its_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    set_environment()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ

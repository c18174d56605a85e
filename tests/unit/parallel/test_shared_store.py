"""Restarts on several nodes need a store for each attempt: who launches without is warned."""

from __future__ import annotations

import pytest

from megatron_opdlm.parallel.initialize import _warn_of_shared_store

UNSAFE = {
    "RANK": "0",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
"""What torchrun tells the first rank of two nodes."""


def warnings(monkeypatch, caplog, environment: dict[str, str]) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _warn_of_shared_store()
    return caplog.text


def test_restarts_of_several_nodes_at_one_store_are_warned_of(monkeypatch, caplog):
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in warnings(monkeypatch, caplog, UNSAFE)


@pytest.mark.parametrize(
    "difference",
    [
        {"RANK": "1"},
        {"GROUP_WORLD_SIZE": "1"},
        {"TORCHELASTIC_MAX_RESTARTS": "0"},
        {"TORCHELASTIC_USE_AGENT_STORE": "False"},
    ],
    ids=lambda difference: " ".join("=".join(item) for item in difference.items()),
)
def test_where_nothing_can_go_wrong_there_is_no_warning(monkeypatch, caplog, difference):
    assert warnings(monkeypatch, caplog, UNSAFE | difference) == ""

"""Programs run under each of the two ways in which the sandbox can shut them in, where this machine has them."""

from __future__ import annotations

import functools

import pytest

from megatron_opdlm.evaluation import sandbox
from megatron_opdlm.evaluation.sandbox import Isolation

WORLD = Isolation(namespaces=True, seccomp=True, landlock=False)
OWN_PROCESS = Isolation(namespaces=False, seccomp=True, landlock=True)


@functools.cache
def refusal(layers: Isolation) -> str | None:
    """Why a program cannot be shut in so on this machine; None if it can."""
    try:
        sandbox._run("", "", sandbox.Limits(), layers)
    except sandbox._Refused as refused:
        return str(refused)
    return None


@pytest.fixture(params=[WORLD, OWN_PROCESS], ids=["namespaces", "own_process"])
def way(request, monkeypatch) -> Isolation:
    """Each way in turn, in force for `run_program`; skipped where the machine refuses it."""
    if refusal(request.param):
        pytest.skip(f"not to be had here: {refusal(request.param)}")
    monkeypatch.setattr(sandbox, "isolation", lambda: request.param)
    return request.param

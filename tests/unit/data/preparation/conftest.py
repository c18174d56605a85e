"""The fixture's mix, the questions of the fixture's evaluation sets, and checks with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opdlm.data.preparation.checks import RowChecks
from megatron_opdlm.data.preparation.mixes import read_mix
from megatron_opdlm.data.preparation.overlap import EvaluationQuestions
from tests.unit.data.conftest import build_tokenizer

FIXTURES = Path(__file__).parents[3] / "fixtures"


@pytest.fixture
def mix():
    return read_mix(str(FIXTURES / "prompts" / "mix.yaml"))


@pytest.fixture(scope="session")
def evaluation_questions():
    files = [path for path in (FIXTURES / "benchmarks").glob("*.json") if path.stem not in ("prompts", "responses")]
    return [row["question"] for path in files for row in json.loads(path.read_text())]


@pytest.fixture(scope="session")
def checks(evaluation_questions):
    return RowChecks(
        build_tokenizer(),
        EvaluationQuestions(evaluation_questions, 13),
        max_prompt_tokens=512,
        apply_chat_template=True,
        enable_thinking=False,
    )

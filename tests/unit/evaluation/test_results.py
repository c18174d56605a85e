"""The table for people: every score beside the settings it holds for."""

from __future__ import annotations

from megatron_opdlm.evaluation import results
from megatron_opdlm.evaluation.results import results_table, write_results

DECODING = {
    "block_size": 4,
    "denoising_steps_per_block": 2,
    "remasking_strategy": "low_confidence_dynamic",
    "dynamic_threshold": 0.9,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "max_new_tokens": 32,
}
TOOK = {"length": 7.25, "tokens_per_step": 2.5, "forwards": 3.0, "end_token_rate": 0.5, "num_prompts_too_long": 1}
RESULTS = {
    "model": {"role": "student", "folder": "hf", "fingerprint": "abc"},
    "enable_thinking": False,
    "tasks": {
        "sums": {
            "num_documents": 8,
            "responses_per_document": 2,
            "scores": {"accuracy,none": {"mean": 0.25, "stderr": 0.125, "pass@2": 0.5, "majority": 0.375}},
            "categories": {"short": {"num_documents": 4, "accuracy,none": 0.75}},
            "responses": TOOK,
            "decoding": DECODING,
        }
    },
    "groups": {
        "all": {"tasks": ["sums"], "scores": {"accuracy,none": {"mean": 0.25, "stderr": None}}, "responses": TOOK}
    },
    "seconds": {"sums": 12.34},
}


def lines_of(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_has_scores_in_percent_and_what_they_took():
    lines = lines_of(results_table(RESULTS))
    costs = ["7.25", "2.5", "3", "50.0"]
    assert ["sums", "accuracy", "25.0", "12.5", "pass@2 50.0, majority 37.5", *costs, "12.3"] in lines
    assert ["all", "accuracy", "25.0", "-", "-", *costs, "-"] in lines
    assert ["sums", "short", "4", "75.0"] in lines


def test_every_task_has_a_line_with_its_settings():
    lines = lines_of(results_table(RESULTS))
    settings = ["low_confidence_dynamic", "0.9", "4", "2", "0.0", "0", "1.0", "32", "2", "8", "1"]
    assert ["sums", *settings] in lines


def test_the_paper_stands_beside_ours_where_it_has_the_task(monkeypatch):
    assert "(paper)" not in results_table(RESULTS)
    scores = {"sums": {"OPDLM-4B": 87.6}}
    monkeypatch.setattr(results, "paper_scores", lambda task, *, thinking: {} if thinking else scores.get(task, {}))
    assert ["sums", "25.0", "-", "87.6", "-", "-"] in lines_of(results_table(RESULTS))
    assert "(paper)" not in results_table(RESULTS | {"enable_thinking": True})


def test_files_replace_those_of_an_earlier_evaluation(tmp_path):
    write_results(RESULTS, tmp_path / "scores")
    write_results(RESULTS, tmp_path / "scores")
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["results.json", "results.md"]

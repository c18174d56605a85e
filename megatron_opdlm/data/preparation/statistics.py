"""What became of the rows of a preparation, as JSON and as Markdown tables.

statistics = count(lines)         # lines: all rows, with `mix_source`, `domain`, `num_tokens` and `reason`
statistics["sources"]["opdlm_train"]
# {"rows": 61816, "kept": 60102, "dropped": {"in_evaluation": 214, "duplicate": 1500, ...}, "tokens": {...}}
print(markdown(statistics))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_opdlm.data.preparation.checks import REASONS

PERCENTILES = (50, 95)


def count(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows, kept rows, reasons and token lengths: of all, by source of the mix; of the kept by domain and source."""
    kept = [line for line in lines if not line["reason"]]
    names = list(dict.fromkeys(line["mix_source"] for line in lines))
    return {
        "all": _group(lines),
        "sources": {name: _group([line for line in lines if line["mix_source"] == name]) for name in names},
        "kept_by_domain": _kept_groups(kept, "domain"),
        "kept_by_source": _kept_groups(kept, "source"),
    }


def _group(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reasons = Counter(line["reason"] for line in lines)
    return {
        "rows": len(lines),
        "kept": reasons[""],
        "dropped": {reason: reasons[reason] for reason in REASONS},
        "tokens": token_lengths(line["num_tokens"] for line in lines if not line["reason"]),
    }


def _kept_groups(kept: Sequence[dict[str, Any]], field: str) -> dict[str, Any]:
    names = sorted({line[field] for line in kept})
    lengths = {name: [line["num_tokens"] for line in kept if line[field] == name] for name in names}
    return {name: {"kept": len(values), "tokens": token_lengths(values)} for name, values in lengths.items()}


def token_lengths(lengths: Iterable[int]) -> dict[str, float]:
    """Sum, mean, least, greatest and percentiles (nearest rank) of prompts' tokens; empty of nothing."""
    ordered = sorted(lengths)
    if not ordered:
        return {}
    ranks = {f"p{share}": ordered[-(-share * len(ordered) // 100) - 1] for share in PERCENTILES}
    ends = {"min": ordered[0], "max": ordered[-1]}
    return {"sum": sum(ordered), "mean": round(sum(ordered) / len(ordered), 2)} | ends | ranks


def markdown(statistics: dict[str, Any]) -> str:
    """The statistics as tables."""
    groups = {**statistics["sources"], "all": statistics["all"]}
    first = _table(
        ["source", "rows", "kept", *(reason.replace("_", " ") for reason in REASONS)],
        [[name, group["rows"], group["kept"], *group["dropped"].values()] for name, group in groups.items()],
    )
    kept = {f"domain {name or '-'}": group for name, group in statistics["kept_by_domain"].items()}
    kept |= {f"source {name or '-'}": group for name, group in statistics["kept_by_source"].items()}
    kept["all"] = statistics["all"]
    columns = ("sum", "mean", "min", "p50", "p95", "max")
    second = _table(
        ["kept", "rows", *(f"tokens {column}" for column in columns)],
        [
            [name, group["kept"], *(group["tokens"].get(column, "-") for column in columns)]
            for name, group in kept.items()
        ],
    )
    reasons = "\n".join(f"- {reason.replace('_', ' ')}: {words}" for reason, words in REASONS.items())
    return f"{first}\n\n{second}\n\nDropped:\n{reasons}\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows))

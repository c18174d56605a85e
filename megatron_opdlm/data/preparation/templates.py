"""What is written around a bare question, by its domain.

The paper's training file holds bare questions; these are the words that its public launchers put around them, the same
as in the evaluation of the same kind (`evaluation/tasks`).

    with_template("1+1=?", "math")     # "1+1=?\\nPlease reason step by step, and put your final answer within ..."
    with_template("Hello!", "chat")    # "Hello!"

Source: `per_domain_template` of `opdlm_train` in https://github.com/divelab/OPDLM, eval_utils.py.
"""

from __future__ import annotations

TEMPLATES = {
    "math": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "science": "{question}\nPlease show your choice in the answer field with only the choice letter, "
    'e.g., "answer": "C".',
    "code": "{question}",
    "chat": "{question}",
    "codeforces": "This is the problem:\n{question}\nYou should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script. ",
}
"""Domain -> template; `codeforces` rows are of the domain `code` once they are written."""

Question = str | list[dict[str, str]]
"""Text, or chat messages."""


def with_template(question: Question, domain: str) -> Question:
    """The question in its domain's template, and as it stands in a domain without one.

    Of chat messages the last one of the user is wrapped. A question that ends as its template does is left alone.
    """
    if isinstance(question, str):
        before, after = TEMPLATES.get(domain, "{question}").split("{question}")
        is_wrapped = question.startswith(before) and question.rstrip().endswith(after.strip())
        return question if is_wrapped else before + question + after
    place = max((number for number, message in enumerate(question) if message["role"] == "user"), default=None)
    if place is None:
        return question
    wrapped = question[place] | {"content": with_template(question[place]["content"], domain)}
    return [*question[:place], wrapped, *question[place + 1 :]]


def plain_text(question: Question) -> str:
    """All that a question says, for comparing it with others."""
    return question if isinstance(question, str) else "\n".join(message["content"] for message in question)

"""Which of a prompt's verifiable instructions does a response follow? Decided wholly by lm-eval's IFEval checkers.

    row = {"key": 1, "question": "...", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    follow_instructions(row, "No commas here.")         # [True]

Strict: the response is taken as it is. One instruction (`change_case:capital_word_frequency`) splits words with nltk's
`punkt_tab`, which lm-eval downloads when it is imported and a machine without a network has to bring.
"""

from __future__ import annotations

from typing import Any


def follow_instructions(row: dict[str, Any], text: str) -> list[bool]:
    """For each of the row's `instruction_id_list`, whether the text follows it.

    Raises:
        ValueError: if lm-eval's IFEval checkers, or the data of nltk that one of them needs, are not installed.
    """
    checkers = _checkers()
    example = checkers.InputExample(
        key=row.get("key", 0),
        instruction_id_list=row["instruction_id_list"],
        prompt=row["question"],
        kwargs=[arguments or {} for arguments in row["kwargs"]],
    )
    try:
        return checkers.test_instruction_following_strict(example, text).follow_instruction_list
    except LookupError as error:
        if "punkt_tab" not in str(error):
            raise
        raise ValueError("IFEval needs nltk's punkt_tab: python -m nltk.downloader punkt_tab") from error


def _checkers() -> Any:
    try:
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        message = f'IFEval needs {error.name}: pip install "lm-eval[ifeval]"'
        raise ValueError(message) from error
    return utils

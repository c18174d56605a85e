"""The part of a response that is its answer: what follows the thinking, up to the first end token.

final_text("<think>2+2 is 4</think>\\n\\nIt is 4.<|im_end|>")     # "It is 4."
"""

from __future__ import annotations

END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def final_text(response: str) -> str:
    """The response after its last `</think>`, and the empty lines there, and before its first end token.

    A response that breaks off while thinking has no answer of its own; it is kept whole, as the public scorers do.
    Other space stays: it means something in a program.
    """
    _, thought, text = response.rpartition("</think>")
    for token in END_TOKENS:
        text = text.partition(token)[0]
    return text.lstrip("\n") if thought else text

"""What is shown of a response: while it is denoised, step by step, and as an object."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.rollout.denoising_step import DenoisingStep
from megatron_opdlm.terminal.answers import Answer, Cost, record_to, step_lines
from megatron_opdlm.terminal.batch import _InOrder
from megatron_opdlm.terminal.canvas import Canvas, Piece, token_groups
from megatron_opdlm.terminal.screens import PlainScreen, harmless

END = 300


class Bytes:
    """A tokenizer whose tokens are bytes; ids over 255 are special."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        kept = bytes(token_id for token_id in ids if token_id < 256)
        special = "" if skip_special_tokens else "".join("<end>" for token_id in ids if token_id >= 256)
        return kept.decode(errors="replace") + special


def step(start: int, number: int, tokens: dict[int, str | int], confidence: float = 0.75) -> DenoisingStep:
    ids = tuple(ord(token) if isinstance(token, str) else token for token in tokens.values())
    return DenoisingStep(0, start, number, tuple(tokens), ids, (confidence,) * len(ids))


def canvas(prompt_length: int = 6) -> Canvas:
    return Canvas(prompt_length, block_size=4, end_token_ids=(END,), tokenizer=Bytes())


def shown(of: Canvas) -> str:
    return "".join("_" if piece.text is None else piece.text for piece in of.pieces())


def test_tokens_appear_where_they_are_committed_and_the_next_block_follows_the_last_mask():
    drawn = canvas()
    assert shown(drawn) == "__", "the block holds two tokens of the prompt"
    drawn.commit(step(4, 1, {7: "b"}))
    assert (shown(drawn), drawn.text, drawn.num_tokens) == ("_b", "", 1)
    drawn.commit(step(4, 2, {6: "a"}))
    assert (shown(drawn), drawn.text, drawn.num_tokens) == ("ab____", "ab", 2)
    drawn.commit(step(8, 1, {8: "c", 10: "e"}, 0.25))
    assert drawn.pieces() == [
        Piece("a", 0.75),
        Piece("b", 0.75),
        Piece("c", 0.25, True),
        Piece(None, 0.0),
        Piece("e", 0.25, True),
        Piece(None, 0.0),
    ]
    assert (drawn.text, drawn.num_tokens, drawn.num_steps) == ("abc", 4, 3)


def test_nothing_is_shown_from_the_end_token_on():
    drawn = canvas(prompt_length=4)
    drawn.commit(step(4, 1, {4: "a", 6: END, 7: "z"}))
    assert shown(drawn) == "a_"
    drawn.commit(step(4, 2, {5: "b"}))
    assert (shown(drawn), drawn.text, drawn.num_tokens) == ("ab", "ab", 2)


def test_bytes_of_one_character_are_shown_together_with_the_least_confidence():
    drawn, (first, second) = canvas(prompt_length=4), "é".encode()
    drawn.commit(step(4, 1, {4: "a", 5: first, 7: "b"}, 0.5))
    assert shown(drawn) == "a\ufffd_b" and drawn.text == "a"
    drawn.commit(step(4, 2, {6: second}, 0.25))
    assert drawn.pieces()[:3] == [Piece("a", 0.5), Piece("é", 0.25, True), Piece("b", 0.5)]


@pytest.mark.parametrize("text", ["plain", "é and €, 𝄞𝄞", "", "a\ufffdb"])
def test_the_pieces_of_a_text_make_the_text(text):
    ids = list(text.encode())
    groups = token_groups(ids, Bytes())
    assert "".join(piece for _, piece in groups) == text and sum(count for count, _ in groups) == len(ids)


def test_a_long_response_is_shown_as_if_it_had_been_made_at_once():
    text = "déjà vu, " * 12
    slow, ids = canvas(prompt_length=4), list(text.encode())
    ids = ids[: len(ids) // 4 * 4]
    for start in range(0, len(ids), 4):
        slow.commit(step(4 + start, 1, {4 + start + k: ids[start + k] for k in (1, 3)}))
        slow.pieces()
        slow.commit(step(4 + start, 2, {4 + start + k: ids[start + k] for k in (0, 2)}))
        assert shown(slow).rstrip("_").rstrip("\ufffd") == bytes(ids[: start + 4]).decode(errors="ignore")
    assert slow._num_settled > len(ids) / 2, "what is settled is not made anew"


def trajectory(**changes) -> Trajectory:
    """Two tokens of prompt, blocks of 4, a response of 5 tokens that ends with the end token."""
    values = {
        "prompt_id": 0,
        "sample_index": 0,
        "prompt_length": 2,
        "block_size": 4,
        "terminal_ids_T": torch.tensor([*b"1+1=\n", 50, END, 57]),
        "step_map_R": torch.tensor([2, 1, 2, 1, 2, 3]),
        "log_probs_R": torch.tensor([0.5, 0.25, 1.0, 0.125, 0.5, 0.75]).log(),
        "response_length": 5,
        "stop_reason": "end_token",
        "domain": "",
    }
    return Trajectory(**values | changes)


def test_an_answer_is_the_tokens_that_count():
    answer = Answer.of(trajectory(), Bytes())
    assert json.loads(answer.to_json()) == {
        "prompt_ids": [49, 43],
        "token_ids": [49, 61, 10, 50, END],
        "step_map": [2, 1, 2, 1, 2],
        "text": "1=\n2",
        "stop_reason": "end_token",
        "num_steps": 5,
        "tokens_per_step": 1.0,
    }


def test_each_denoising_step_is_a_line_with_the_block_after_it():
    assert list(step_lines(trajectory(), Bytes())) == [
        "block 1 step 1 |1|+|░|=| 0.25",
        "block 1 step 2 |1|+|1|=| 0.50",
        "block 2 step 1 |░|2|░|░| 0.12",
        r"block 2 step 2 |\n|2|<end>|░| 1.00 0.50",
        r"block 2 step 3 |\n|2|<end>|9| 0.75",
    ]


def test_blocks_behind_the_limit_have_no_lines():
    short = trajectory(response_length=1, stop_reason="length")
    assert [line.split(" |")[0] for line in step_lines(short, Bytes())] == ["block 1 step 1", "block 1 step 2"]


def test_a_rate_is_of_all_tokens_and_all_steps():
    assert Cost(tokens=48, steps=20, seconds=0.5).line() == "48 tokens in 0.5 s, 96.0 tokens/s, 2.40 tokens per step"


def test_answers_are_handed_on_in_order_and_once():
    seen = []
    in_order = _InOrder(lambda place, what: seen.append((place, what)))
    for place, what in ((1, "b"), (0, "a"), (0, "a"), (1, "b"), (2, "c")):
        in_order.add(place, what)
    assert seen == [(0, "a"), (1, "b"), (2, "c")]


def test_a_file_of_answers_appears_when_all_are_there(tmp_path):
    path, answer = tmp_path / "a.jsonl", Answer.of(trajectory(), Bytes())
    with record_to(path) as record:
        record(answer)
        assert not path.exists() and (tmp_path / "a.jsonl.partial").read_text() == answer.to_json() + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    refused = pytest.raises(ValueError, match=r"--output \(.*\) cannot be written: No such file or directory")
    with refused, record_to(tmp_path / "absent" / "a.jsonl"):
        pass


def test_a_response_cannot_give_orders_to_a_terminal():
    assert harmless("a\x1b[2Jb\rc\x7f\n\td\x9b2Je") == "a␛[2Jb␍c␡\n\td\ufffd2Je"


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, "␛"), (False, "\x1b")])
def test_nor_can_its_steps_where_nothing_is_coloured(monkeypatch, capsys, is_terminal, expected):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    odd = trajectory(terminal_ids_T=torch.tensor([*b"1+\x1b=\n", 50, END, 57]))
    screen = PlainScreen(SimpleNamespace(tokenizer=Bytes()), show_steps=True)
    screen.show(odd, Answer.of(odd, Bytes()))
    written = capsys.readouterr().out
    assert written.count(expected) == 2 and written.count("\x1b") == (0 if is_terminal else 2)

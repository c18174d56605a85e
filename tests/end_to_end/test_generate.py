"""`generate` as it is used: from a pipe, in a terminal, as a chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from tests.references import decode_slowly, load_reference
from tests.terminals import Ran, Terminal, run_generate
from tests.tiny_qwen3 import make_tiny_qwen3, make_tokenizer
from tests.worlds import layout, load_student, tiny_config

QUESTIONS = ["1+1=", "23+45-6=", "a b c"]
STATIC = {"remasking_strategy": "low_confidence_static", "temperature": 0.0, "max_new_tokens": 10}
FLAGS = [f"--rollout.{name}={value}" for name, value in STATIC.items()]
MASK = "░"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("generate") / "hf", seed=5)


@pytest.fixture(scope="module")
def in_json(folder, tmp_path_factory) -> Ran:
    lines = "".join(f"{question}\n" for question in QUESTIONS)
    arguments = ["--hf", str(folder), "--prompts", "-", "--raw", "--json", *FLAGS]
    return run_generate(arguments, tmp_path_factory.mktemp("json"), stdin=lines)


@pytest.fixture(scope="module")
def objects(in_json) -> list[dict]:
    assert in_json.code == 0, in_json.stderr
    return [json.loads(line) for line in in_json.stdout.splitlines()]


def test_json_is_an_object_a_line_and_the_rates_are_on_stderr(folder, in_json, objects):
    tokenizer = make_tokenizer(folder)
    assert [object_["prompt_ids"] for object_ in objects] == [
        tokenizer(question)["input_ids"] for question in QUESTIONS
    ]
    keys = ["prompt_ids", "token_ids", "step_map", "text", "stop_reason", "num_steps", "tokens_per_step"]
    for object_ in objects:
        assert list(object_) == keys
        assert object_["text"] == tokenizer.decode(object_["token_ids"], skip_special_tokens=True)
        assert object_["tokens_per_step"] == len(object_["token_ids"]) / object_["num_steps"]
    tokens, steps = sum(len(o["token_ids"]) for o in objects), sum(o["num_steps"] for o in objects)
    warning, rate = in_json.stderr.splitlines()
    assert warning.endswith("hf names no mask token: an autoregressive model, which answers noise")
    assert rate.startswith(f"{tokens} tokens in ") and rate.endswith(f" tokens/s, {tokens / steps:.2f} tokens per step")


def test_tokens_and_step_maps_are_those_of_a_decoder_without_a_cache(folder, objects):
    model, rollout = load_reference(folder), RolloutConfig(**STATIC)
    with torch.no_grad():
        rows = model.get_input_embeddings().num_embeddings
    uniforms = iter(lambda: torch.zeros(4, 4, dtype=torch.float64), None)
    for object_ in objects:
        slow = decode_slowly(
            model, object_["prompt_ids"], uniforms, rollout, mask_token_id=rows - 3, end_token_ids=(46,)
        )
        number = len(object_["token_ids"])
        assert slow.terminal_ids[len(object_["prompt_ids"]) :][:number] == object_["token_ids"]
        assert slow.step_map[:number] == object_["step_map"]
        assert number == 10 or object_["token_ids"][-1] == 46


def test_tokens_are_those_of_the_engine(folder, world_of_one, objects):
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(**STATIC)
    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, rollout=rollout), groups)
        engine = RolloutEngine(model, rollout, special, seed=7, groups=groups)
        tasks = [RolloutTask(Prompt(row, tuple(o["prompt_ids"])), 10) for row, o in enumerate(objects)]
        seen = []
        made = engine.generate_some(dict(enumerate(tasks)), step=0, on_step=seen.append)
    for place, object_ in enumerate(objects):
        assert made[place].response_ids.tolist() == object_["token_ids"]
        steps = [step for step in seen if step.index == place]
        assert len(steps) >= object_["num_steps"] and all(step.positions for step in steps)
        told = {}
        for step in steps:
            for position, *what in zip(step.positions, step.token_ids, step.confidences, strict=True):
                told[position - len(object_["prompt_ids"])] = (step.step, *what)
        number = len(object_["token_ids"])
        assert [told[k][0] for k in range(number)] == object_["step_map"]
        assert [told[k][1] for k in range(number)] == object_["token_ids"]
        assert [told[k][2] for k in range(number)] == made[place].log_probs_R[:number].exp().tolist()


def test_a_pipe_gets_the_texts_alone(folder, objects, tmp_path):
    rows = [{"question": QUESTIONS[0]}, {"question": QUESTIONS[1], "domain": "math"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--hf", str(folder), "--prompts", str(tmp_path / "rows.jsonl"), "--raw", *FLAGS]
    ran = run_generate([*arguments, "--output", str(tmp_path / "out.jsonl")], tmp_path)
    assert ran.stdout == f"--- 1 ---\n{objects[0]['text']}\n--- 2 ---\n{objects[1]['text']}\n"
    assert " tokens per step\n" in ran.stderr
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == objects[:2]


def test_a_checkpoint_answers_as_the_folder_it_was_made_from(folder, world_of_one, objects, tmp_path):
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron

    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    checkpoint.parent.mkdir(parents=True)
    with layout(ParallelConfig()):
        hf_to_megatron(str(folder), checkpoint, role="student", dtype=None, mask_token="<|MASK|>")
    arguments = ["--checkpoint", str(tmp_path / "run"), "--prompt", QUESTIONS[2], "--raw", "--json", *FLAGS]
    ran = run_generate(arguments, tmp_path)
    assert [json.loads(line) for line in ran.stdout.splitlines()] == objects[2:], ran.stderr


def test_a_terminal_shows_the_masked_places_fill_in_and_then_the_text_of_the_pipe(folder, objects):
    with Terminal(["--hf", str(folder), "--prompt", QUESTIONS[1], "--raw", *FLAGS]) as terminal:
        assert terminal.wait() == 0
        moving = [frame.splitlines()[0] for frame in terminal.frames if MASK in frame]
        output, screen = terminal.output, terminal.screen
    assert moving[0] == MASK * 4, "8 tokens of prompt: the first block is masked as a whole"
    assert len(set(moving)) > 1, "and fills in"
    _, shown = screen.split("which answers noise\n")
    text, rate = shown.rsplit("\n", 1)
    assert text == objects[1]["text"] and "tokens/s" in rate
    assert "\x1b[31m" in output or "\x1b[33m" in output, "a random model is not sure of itself"


def test_a_terminal_without_colours_gets_plain_text(folder, objects):
    arguments = ["--hf", str(folder), "--prompt", QUESTIONS[0], "--raw", *FLAGS]
    with Terminal(arguments, environment={"NO_COLOR": "1"}) as terminal:
        assert terminal.wait() == 0
        assert "\x1b" not in terminal.output
        assert f"\n{objects[0]['text']}\n" in terminal.output.replace("\r\n", "\n")


def test_a_conversation_is_kept_until_it_is_reset(folder, tmp_path):
    lines = "1+1=\n2+2=\n/steps\n/nonsense\n/reset\n1+1=\n/quit\nnever asked\n"
    output = tmp_path / "turns.jsonl"
    ran = run_generate(["--hf", str(folder), *FLAGS, "--output", str(output)], tmp_path, stdin=lines)
    assert ran.code == 0, ran.stderr
    first, second, third = (json.loads(line) for line in output.read_text().splitlines())
    tokenizer = make_tokenizer(folder)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first["prompt_ids"]) == turn.format("1+1=")
    history = turn.format("1+1=") + first["text"] + "<|im_end|>\n" if first["text"] else ""
    assert tokenizer.decode(second["prompt_ids"]) == history + turn.format("2+2=")
    assert third["prompt_ids"] == first["prompt_ids"] and third["token_ids"] == first["token_ids"]
    assert ran.stdout.startswith(f"{first['text']}\n{second['text']}\nblock 1 step 1 |")
    assert ran.stdout.endswith(f"{third['text']}\n")
    assert "/nonsense is no command: /reset begins anew" in ran.stderr
    assert ran.stderr.count(" tokens per step\n") == 3


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(folder, tmp_path):
    """The answer would last for many seconds: the key comes in time even if the machine is busy."""
    long = shutil.copytree(folder, tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    flags = ["--rollout.remasking_strategy=sequential", "--rollout.max_new_tokens=8000", "--rollout.stop_token_ids=[]"]
    with Terminal(["--hf", str(long), *FLAGS[1:2], *flags]) as terminal:
        terminal.expect("> ")
        terminal.send("\x03")
        terminal.expect("> ")
        terminal.send("1+1=\n")
        terminal.expect(" tokens per step")
        terminal.send("\x03")
        terminal.expect("stopped")
        terminal.expect("> ")
        terminal.send("/quit\n")
        assert terminal.wait() == 0


def test_prompts_that_do_not_fit_the_model_are_refused(folder, tmp_path):
    ran = run_generate(["--hf", str(folder), "--prompt", "1" * 512, "--raw"], tmp_path)
    message = "prompt 1 has 512 tokens; with a response it must not exceed the 512 positions of the model"
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1] == f"error: {message} (max_position_embeddings)"

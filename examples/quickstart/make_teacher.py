"""The quickstart's teacher: a small real Qwen3, trained from scratch to add and subtract step by step.

It is an ordinary autoregressive Hugging Face folder in all but its size: Qwen3's architecture, special tokens and chat
format, a byte-level BPE vocabulary of its own. It learns `response` given `question` from the tasks of `tasks.py`, and
is scored on held-out tasks with their own verifier. The defaults made the folder `teacher/`; `small/` is a smaller one
of the same family. Runs with one thread on the same software give the same weights.

Example: python examples/quickstart/make_teacher.py --output teacher
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import draw_distinct, iterate_tasks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

# Shape suffixes: B sequences, T positions of prompt and response.

WORDS = (
    "State", " the", " final", " answer", " to", " following", " arithmetic", " problem", "user", "assistant", "system"
)  # fmt: skip
"""What becomes one token each: the words of the question and of the chat format."""
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MARKER_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Qwen3's added tokens that are text all the same: skipping special tokens keeps them."""
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Where a token may not reach across: words with the space before them, single digits, runs of signs."""
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML. `enable_thinking` changes nothing, as this teacher never thinks first."""
ROPE_THETA = 1e6
MAX_LENGTH = 1024
IGNORED = -100
NUM_QUICKSTART_TASKS = 256
HELDOUT_SEED = 0
"""The first held-out tasks are those that `tasks.py` writes by default."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, then the merges that spell `WORDS` from left to right, then the added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spellings = [byte_level.pre_tokenize_str(word)[0][0] for word in WORDS]
    merges = list(dict.fromkeys((word[:i], word[i]) for word in spellings for i in range(1, len(word))))
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, num_layers: int, hidden_size: int, vocab_size: int
) -> Qwen3ForCausalLM:
    """Qwen3 with tied embeddings, float32; the weights follow torch's global seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def prompt_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> str:
    """The question in the chat format, up to where the assistant writes."""
    messages = [{"role": "user", "content": row["question"]}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def make_batch(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and next-token labels, both int64 [B, T], padded on the right.

    A label is the token after its position; it is `IGNORED` unless that token is of the response or ends it.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    prompts = tokenizer([prompt_text(tokenizer, row) for row in rows])["input_ids"]
    responses = tokenizer([row["response"] + tokenizer.eos_token for row in rows])["input_ids"]
    pairs = list(zip(prompts, responses, strict=True))
    ids = [torch.tensor(prompt + response) for prompt, response in pairs]
    labels = [torch.tensor([IGNORED] * (len(prompt) - 1) + response + [IGNORED]) for prompt, response in pairs]
    ids_BT = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids_BT, pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def response_loss(model: Qwen3ForCausalLM, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labelled positions; logits are made for these alone.

    Padding stands on the right, where no real token attends it, so plain causal attention needs no padding mask.
    """
    from torch.nn.functional import cross_entropy

    is_labelled_BT = labels_BT != IGNORED
    hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden_BTH[is_labelled_BT]), labels_BT[is_labelled_BT])


def train(model: Qwen3ForCausalLM, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, lr: float) -> None:
    """AdamW with a short linear warm-up, then a cosine to zero. Matrices decay, norms do not."""
    import torch
    from tqdm import tqdm

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    progress = tqdm(islice(batches, steps), total=steps, desc="teacher", mininterval=1.0)
    for ids_BT, labels_BT in progress:
        loss = response_loss(model, ids_BT, labels_BT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def respond(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[str]:
    """The model's greedy responses, as text without special tokens."""
    import torch

    texts = [prompt_text(tokenizer, row) for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids_BT = model.generate(**batch, do_sample=False, max_new_tokens=48)
    return tokenizer.batch_decode(ids_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def training_batches(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the teacher's own tasks without end, each task generated when it is needed."""
    rows = iterate_tasks("teacher", seed)
    while True:
        yield make_batch(tokenizer, list(islice(rows, batch_size)))


def describe(model: Qwen3ForCausalLM, arguments: argparse.Namespace, is_correct: list[bool], seconds: float) -> str:
    """The text of the folder's README.md."""
    config = model.config
    first = is_correct[:NUM_QUICKSTART_TASKS]
    flags = ("num_layers", "hidden_size", "vocab_size", "steps", "batch_size", "lr", "seed", "threads")
    command = "python examples/quickstart/make_teacher.py --output DIR " + " ".join(
        f"--{flag.replace('_', '-')} {getattr(arguments, flag):g}" for flag in flags
    )
    share, share_of_first = sum(is_correct) / len(is_correct), sum(first) / len(first)
    return f"""# A small Qwen3 that adds and subtracts

A Qwen3 trained from scratch to solve `chain_sum` tasks of reasoning-gym: two to four one-digit numbers,
added and subtracted, one running sum a line.

    8 + 7 - 9 =    ->    8+7=15
                        15-9=6

- Accuracy: {share:.4f} on {len(is_correct):,} held-out tasks, {share_of_first:.4f} on the first {len(first)}, which
  the quickstart scores (greedy; checked by the library's verifier). No expression among them is a training task of the
  teacher, nor a prompt of the distillation.
- Size: {model.num_parameters():,} float32 parameters; {config.num_hidden_layers} layers of width {config.hidden_size}.
- Training: {arguments.steps:,} steps of {arguments.batch_size} tasks; {seconds:.0f} seconds.
- Vocabulary: byte-level BPE in which every digit, sign and newline is a token; Qwen3's special tokens; ChatML.

Made by `{command}`.
"""


def write_folder(
    directory: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, description: str
) -> None:
    """config.json, model.safetensors, generation_config.json, the tokenizer's two files and README.md.

    Two keys are added that transformers 4 reads where version 5 has others: without them it would silently take
    another RoPE base, and not find the tokenizer's class.
    """
    from transformers import GenerationConfig

    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    set_json_keys(directory / "config.json", rope_theta=ROPE_THETA)
    set_json_keys(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (directory / "README.md").write_text(description, encoding="utf-8")


def set_json_keys(path: Path, **values: Any) -> None:
    """Rewrite a JSON object with these keys set."""
    settings = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_teacher(arguments: argparse.Namespace) -> None:
    """Train, score and write the folder: config, weights, tokenizer, README.md."""
    import torch

    from megatron_opdlm.evaluation.verifiable_tasks import score_response

    heldout = draw_distinct("heldout", arguments.num_heldout, HELDOUT_SEED)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(
        tokenizer,
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        vocab_size=arguments.vocab_size,
    )
    started = time.perf_counter()
    train(model, training_batches(tokenizer, arguments.batch_size, arguments.seed), arguments.steps, arguments.lr)
    seconds = time.perf_counter() - started
    responses = respond(model.eval(), tokenizer, heldout)
    is_correct = [score_response(row, text) == 1.0 for row, text in zip(heldout, responses, strict=True)]
    write_folder(arguments.output, model, tokenizer, describe(model, arguments, is_correct, seconds))
    print(
        f"{sum(is_correct)} of {len(heldout)} held-out tasks correct, {seconds:.0f} s of training: {arguments.output}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's teacher and write it as a HF folder.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-layers", type=int, default=4, help="of the model")
    parser.add_argument("--hidden-size", type=int, default=128, help="its width")
    parser.add_argument(
        "--vocab-size", type=int, default=384, help="rows of the embedding; the tokenizer has fewer ids"
    )
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="tasks per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1234, help="of the weights and of the training tasks")
    parser.add_argument("--num-heldout", type=int, default=2048, help="held-out tasks to score")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    make_teacher(parser.parse_args())


if __name__ == "__main__":
    main()

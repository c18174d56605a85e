"""A Qwen that decodes by block diffusion: the model class of transformers with another `generate`.

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))

Position i of a sequence is in block i // block_length, whatever the prompt's length. Blocks are decoded from left to
right. A block begins as mask tokens (behind the end of the prompt, in the first one) and takes up to `denoising_steps`
forwards, in which its tokens see each other and all blocks before it; each commits the tokens that the remasking
strategy selects. Clean blocks are kept in a key-value cache: a block is read again, clean, in the forward that takes
the first step of the next one.

The settings are in `generation_config.json`, or are given to `generate`. At temperature 0 it decodes the tokens that
the training system's rollout engine decodes.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM


@dataclass
class Decoding:
    """How `generate` decodes."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # 0 for all tokens
    top_p: float = 1.0
    block_length: int = 4
    denoising_steps: int = 4  # of a block, at most
    remasking_strategy: str = "low_confidence_dynamic"  # or low_confidence_static, sequential, entropy_bounded
    dynamic_threshold: float = 0.9  # of low_confidence_dynamic
    eb_threshold: float = 0.35  # of entropy_bounded, in nats


RECORDED = ("block_length", "denoising_steps", "remasking_strategy", "dynamic_threshold", "eb_threshold")


class BlockDiffusion:
    """The decoding, beside a causal language model of transformers with attention that takes a mask (not flash)."""

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, generator=None, **settings):
        """The prompts and what the model writes to them, [B, T], filled up on the right with the padding token.

        Prompts of several lengths come padded, with an `attention_mask` that says where. Each is decoded by itself.
        `settings` are fields of `Decoding`; `generator` is a torch.Generator, for temperatures over 0.
        """
        recorded = {name: getattr(self.generation_config, name, None) for name in RECORDED}
        decoding = Decoding(**({name: value for name, value in recorded.items() if value is not None} | settings))
        if decoding.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({decoding.max_new_tokens}) must be at least 1")
        if not 1 <= decoding.denoising_steps <= decoding.block_length:
            raise ValueError(f"denoising_steps ({decoding.denoising_steps}) must be 1 to {decoding.block_length}")
        if decoding.remasking_strategy not in STRATEGIES:
            raise ValueError(f"remasking_strategy ({decoding.remasking_strategy}) must be one of {list(STRATEGIES)}")
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = zip(input_ids, keep, strict=True)
        responses = [self._respond(ids[is_kept.bool()], decoding, generator) for ids, is_kept in rows]
        ends = self._end_token_ids()
        pad = self.generation_config.pad_token_id
        filled = torch.nn.utils.rnn.pad_sequence(responses, True, ends[0] if pad is None else pad)
        return torch.cat([input_ids, filled], dim=1)

    def block_causal_mask(self, first, end, block_length):
        """Who attends to whom, as a mask [1, 1, end - first, end] to add: a token sees its own block and all before.

        `model(ids, attention_mask=model.block_causal_mask(0, ids.shape[1], 4)).logits` is what the model says of clean
        tokens.
        """
        blocks = torch.arange(end, device=self.device) // block_length
        is_hidden = blocks[first:, None] < blocks
        mask = torch.zeros(is_hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill(is_hidden, torch.finfo(self.dtype).min)[None, None]

    def _respond(self, prompt, decoding, generator):
        """One prompt [P]: its response up to and including the first end token."""
        size, length = decoding.block_length, len(prompt)
        end = -(-(length + decoding.max_new_tokens) // size) * size
        ids = torch.full((end,), self.config.mask_token_id, device=prompt.device)
        ids[:length] = prompt
        is_masked = torch.arange(end, device=prompt.device) >= length
        is_end = torch.zeros_like(is_masked)
        cache, num_cached, before = DynamicCache(), 0, None
        for start in range(length // size * size, end, size):
            block = slice(start, start + size)
            for step in range(decoding.denoising_steps):
                logits = self(
                    ids[None, num_cached : block.stop],
                    attention_mask=self.block_causal_mask(num_cached, block.stop, size),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=size + 1,
                ).logits[0]
                cache.crop(-size)  # all but the clean blocks
                num_cached = start
                logits, before = self._predicting(logits, before, size)
                drawn, confidence, entropy = self._draw(logits, decoding, generator)
                committed = select(decoding, step, confidence, entropy, is_masked[block])
                ids[block][committed] = drawn[committed]
                is_masked[block][committed] = False
                if not is_masked[block].any():
                    break
            is_end[block] = torch.isin(ids[block], torch.tensor(self._end_token_ids(), device=ids.device))
            is_end[:length] = False
            if is_end[block].any():
                break
        response = ids[length : min(block.stop, length + decoding.max_new_tokens)]
        ended = is_end[length : length + len(response)].nonzero()
        return response[: int(ended[0]) + 1] if len(ended) else response

    def _predicting(self, logits, before, size):
        """The logits [K, V] that predict the block's tokens, and those of the clean token before the block."""
        if getattr(self.config, "logit_shift", "none") == "none":
            return logits[-size:], None
        if len(logits) > size:  # the block's first step reads the clean token before it; later ones do not
            before = logits[:1]
        elif before is None:
            before = logits[:1]  # for position 0, which is the prompt's
        return torch.cat([before, logits[-size:-1]]), before

    def _draw(self, logits, decoding, generator):
        """A token for each position of a block, its probability in the raw softmax, the entropy of what it is from."""
        logits = logits.float()
        logits[:, self.config.mask_token_id] = -torch.inf
        largest = logits.max(-1, keepdim=True).values
        total = (logits - largest).exp().sum(-1, dtype=torch.float64).log()
        if decoding.temperature == 0:
            return logits.argmax(-1), (-total).float().exp(), torch.zeros_like(total)
        probabilities = (logits.double() / decoding.temperature).softmax(-1)
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if decoding.top_k:
            ordered[:, decoding.top_k :] = 0
        ordered /= ordered.sum(-1, keepdim=True)
        ordered[ordered.cumsum(-1) - ordered >= decoding.top_p] = 0  # the token that reaches top_p stays
        ordered /= ordered.sum(-1, keepdim=True)
        drawn = order.gather(-1, torch.multinomial(ordered, 1, generator=generator))
        log_probability = (logits.gather(-1, drawn) - largest)[:, 0].double() - total
        return drawn[:, 0], log_probability.float().exp(), torch.special.entr(ordered).sum(-1).float()

    def _end_token_ids(self):
        ends = self.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends)


def select(decoding, step, confidence, entropy, is_masked):
    """Which tokens [K] a denoising step commits; `step` counts from 0. The last one commits all that are left."""
    quotient, remainder = divmod(decoding.block_length, decoding.denoising_steps)
    count = quotient + (step < remainder)
    if step == decoding.denoising_steps - 1 or is_masked.sum() < count:
        return is_masked
    return is_masked & STRATEGIES[decoding.remasking_strategy](decoding, count, confidence, entropy, is_masked)


def low_confidence_static(decoding, count, confidence, entropy, is_masked):
    """The most confident."""
    return _rank(-confidence.masked_fill(~is_masked, -torch.inf)) < count


def low_confidence_dynamic(decoding, count, confidence, entropy, is_masked):
    """All that are confident enough; the most confident, if those are fewer than `count`."""
    is_sure = confidence > decoding.dynamic_threshold
    return is_sure | low_confidence_static(decoding, count, confidence, entropy, is_masked)


def sequential(decoding, count, confidence, entropy, is_masked):
    """The first from the left."""
    return is_masked.cumsum(0) <= count


def entropy_bounded(decoding, count, confidence, entropy, is_masked):
    """By ascending entropy while the sum stays within the bound, one at least (arXiv 2505.24857)."""
    entropy = entropy.double().masked_fill(~is_masked, torch.inf)
    num_within = (entropy.sort().values.cumsum(0) <= decoding.eb_threshold).sum()
    return _rank(entropy) < num_within.clamp(min=1)


def _rank(values):
    """The place of each position in ascending order; equal values keep the order of their positions."""
    return values.argsort(stable=True).argsort()


STRATEGIES = {
    rule.__name__: rule for rule in (low_confidence_static, low_confidence_dynamic, sequential, entropy_bounded)
}


class Qwen2BlockDiffusionLM(BlockDiffusion, Qwen2ForCausalLM):
    """Of a Qwen2.5."""


class Qwen3BlockDiffusionLM(BlockDiffusion, Qwen3ForCausalLM):
    """Of a dense Qwen3."""


class Qwen3MoeBlockDiffusionLM(BlockDiffusion, Qwen3MoeForCausalLM):
    """Of a Qwen3 with experts."""

"""Attention to keys and values in pages, against a literal mask in float64: lists of sequences in every phase."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm.diffusion.attention_pattern import may_attend

CPU = torch.device("cpu")
DIM = 8
PHASES = {
    "one denoises": [(4, 4)],
    "all denoise, the longest twice as long": [(4, 4), (8, 4), (0, 4)],
    "some commit": [(4, 8), (8, 4), (0, 8), (12, 4)],
    "prompts beside them": [(4, 4), (0, 12), (0, 12), (8, 8), (0, 40)],
    "lengths of several classes": [(4, 4), (60, 8), (0, 4), (248, 4), (100, 24)],
    "a tile and a half": [(0, 392), (8, 4)],
    "over several pages": [(504, 8), (8, 4), (256, 260), (252, 8)],
}
"""Name -> first position and number of tokens of each sequence, in blocks of 4."""


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("are_pages_in_order", [True, False])
@pytest.mark.parametrize("phase", PHASES)
def test_attention_is_that_of_a_mask_in_float64(phase, are_pages_in_order, num_heads, num_groups):
    from megatron_opdlm.rollout.kv_cache import QueryTokens
    from megatron_opdlm.rollout.paged_attention import Heads, SdpaPagedAttention

    first, counts = zip(*PHASES[phase], strict=True)
    longest = max(begin + count for begin, count in PHASES[phase])
    heads = Heads(num_groups, num_heads // num_groups)
    attention = SdpaPagedAttention(4, heads, longest, torch.float64, CPU)
    generator = torch.Generator().manual_seed(0)
    width = -(-longest // attention.page_size)
    tables = torch.arange(1, 1 + len(first) * width)
    if not are_pages_in_order:
        tables = tables[torch.randperm(len(tables), generator=generator)]
    tables = tables.view(len(first), width)
    # behind a sequence's end, pages hold what others have left there
    keys, values = torch.randn(
        2, 1 + tables.numel(), attention.page_size, num_groups, DIM, dtype=torch.float64, generator=generator
    )
    query_TND = torch.randn(sum(counts), num_heads, DIM, dtype=torch.float64, generator=generator)
    heads_TGJD = F.pad(query_TND.unflatten(1, (num_groups, -1)), (0, 0, 0, 1), value=torch.nan)
    expected, num_visible = [], 0
    for table, begin, queries_WND in zip(tables, first, query_TND.split(counts), strict=True):
        out_WND, num = attended(queries_WND, keys[table].flatten(0, 1), values[table].flatten(0, 1), begin)
        expected.append(out_WND)
        num_visible += num
    expected_TND = torch.cat(expected)

    tokens = QueryTokens(torch.zeros(sum(counts)).long(), torch.tensor(first), torch.tensor(counts), tables)
    layout = attention.lay_out(tokens)
    torch.testing.assert_close(attention.attend(layout, heads_TGJD, keys, values, 0.3), expected_TND)
    assert attention.num_pairs - attention.num_hidden_pairs == num_visible
    read_N = torch.cat(
        [end - 4 + torch.tensor([1, 3]) for end in torch.tensor(counts).cumsum(0)[: len(counts) // 2 + 1]]
    )
    layout = attention.lay_out(QueryTokens(tokens.ids_T, tokens.first_A, tokens.counts_A, tables, read_N))
    actual_NND = attention.attend(layout, heads_TGJD, keys, values, 0.3, read_N)
    torch.testing.assert_close(actual_NND, expected_TND[read_N])
    torch.testing.assert_close(attention.attend(layout, heads_TGJD, keys, values, 0.3), expected_TND)


def attended(queries_WND, keys_CGD, values_CGD, begin: int) -> tuple[torch.Tensor, int]:
    """What the queries from position `begin` on read of a sequence that ends behind them; and how many pairs see."""
    end, clean = begin + len(queries_WND), torch.zeros((), dtype=torch.bool)
    is_visible = may_attend(torch.arange(begin, end)[:, None], clean, torch.arange(end), clean, 4)
    per_group = queries_WND.shape[1] // keys_CGD.shape[1]
    keys, values = (x[:end].repeat_interleave(per_group, 1) for x in (keys_CGD, values_CGD))
    scores = torch.einsum("wnd,cnd->nwc", queries_WND, keys) * 0.3
    weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
    return torch.einsum("nwc,cnd->wnd", weights, values), int(is_visible.sum())


def test_calls_have_whole_groups_of_keys_and_neighbouring_pages_in_one_piece():
    from megatron_opdlm.rollout.kv_cache import QueryTokens
    from megatron_opdlm.rollout.paged_attention import KEYS_AT_A_TIME, Heads, SdpaPagedAttention

    attention = SdpaPagedAttention(4, Heads(2, 2), 100, torch.float32, CPU)
    first, counts = torch.tensor([8, 16, 12]), torch.tensor([4, 8, 4])
    tables = torch.tensor([[3], [1], [2]])
    layout = attention.lay_out(QueryTokens(torch.zeros(16).long(), first, counts, tables, torch.tensor([2, 10, 13])))
    steps, commit = layout.everything.calls
    assert (steps.num_keys, commit.num_keys) == (2 * KEYS_AT_A_TIME, 2 * KEYS_AT_A_TIME)
    assert (steps.pages, commit.pages) == (slice(1, 4), slice(1, 2))
    assert layout.read.calls == [steps], "nobody reads a block that is committed"
    at_the_end = QueryTokens(torch.zeros(4).long(), torch.tensor([96]), torch.tensor([4]), torch.tensor([[1]]))
    (call,) = attention.lay_out(at_the_end).everything.calls
    assert call.num_keys == 100, "a page has no more"

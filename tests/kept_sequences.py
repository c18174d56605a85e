"""A sequence as a run keeps it, written by hand, and a literal replay of how it was denoised."""

from __future__ import annotations

import dataclasses

from megatron_opdlm.observability.trajectories import KeptTrajectory

HOSTILE = "</script><script>document.title='broken'</script><b>&amp;"
"""A prompt that would end the page's data if nobody escaped it."""

# Blocks of 4 after a prompt of 6 tokens: two response tokens in the first block, then a whole one, then one that the
# end token cuts short. The second block took three steps of four, so that its step numbers have a gap.
SEQUENCE = KeptTrajectory(
    step=50,
    prompt_id=7,
    sample_index=0,
    domain="math",
    stop_reason="end_token",
    block_size=4,
    response_length=8,
    prompt_ids=[1, 2, 2, 2, 3, 3],
    token_ids=[10, 11, 12, 13, 10, 14, 11, 15, 15, 15],
    step_map=[2, 1, 1, 4, 2, 2, 1, 2, 3, 4],
    log_probs=[-0.5, -0.01, -1.2, -2.0, -0.1, -0.3, -0.7, -0.02, -0.9, -3.0],
    divergence=[0.4, 0.001, 1.5, 2.25, 0.0, 0.2, 0.9, 0.003, None, None],
    teacher_log_probs=[-1.5, -0.02, -4.0, -5.0, -0.1, -0.2, -2.0, -0.01, None, None],
    alternatives=[[(10, -0.1), (11, -2.5)]] * 2 + [[(16, -0.3), (12, -1.5)]] * 6 + [[], []],
    texts={
        "1": "<|im_start|>",
        "2": HOSTILE,
        "3": "\n",
        "10": "two",
        "11": " and",
        "12": "\n",
        "13": "<i>x</i>",
        "14": "&amp;",
        "15": "<|im_end|>",
        "16": "né",
    },
)


def kept(**changes) -> KeptTrajectory:
    """The sequence with other values in these fields."""
    return dataclasses.replace(SEQUENCE, **changes)


def replay(sequence: KeptTrajectory) -> list[list[int | None]]:
    """The response as it stands before the first step, after it, and so on to the end; None is a mask.

    Block after block, step number after step number; a step that commits nothing was never taken.
    """
    state: list[int | None] = [None] * len(sequence.token_ids)
    states = [list(state)]
    num_prompt, size = len(sequence.prompt_ids), sequence.block_size
    for block in range(num_prompt // size, (num_prompt + len(state)) // size):
        places = [place for place in range(len(state)) if (num_prompt + place) // size == block]
        for step in range(1, size + 1):
            committed = [place for place in places if sequence.step_map[place] == step]
            for place in committed:
                state[place] = sequence.token_ids[place]
            if committed:
                states.append(list(state))
    return states

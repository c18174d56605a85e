"""Every command that a page shows could run: `tests/documented_commands.py` says how it is checked."""

from __future__ import annotations

import pytest

from tests import documented_commands
from tests.documented_commands import ROOT, blocks, in_root, indented_commands, mark_problem, pages, problem

BLOCKS = [block for page in pages() for block in blocks(page)]
README = """
```bash gpu
torchrun --nproc-per-node 8 -m megatron_opdlm.train \\
    --student.hf a --teacher.hf a   # the model

FOO=1 python tools/plan.py --x "a b"
```
```python
print("no command")
```
"""


def of(words, *commands):
    return documented_commands.Block("page:1", tuple(words), commands)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_shown_command_could_run(block):
    with in_root():
        problems = [found for command in block.commands if (found := problem(command, block.words))]
    assert [found for found in [mark_problem(block), *problems] if found] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_shown_in_fenced_blocks(page):
    assert indented_commands(page) == []


def test_the_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in pages()}
    assert {"README.md", "examples/quickstart/README.md", "megatron_opdlm/evaluation/README.md"} <= names
    assert sum(len(block.commands) for block in BLOCKS) > 20


def test_blocks_are_cut_into_commands(tmp_path):
    (tmp_path / "README.md").write_text(README)
    (block,) = blocks(tmp_path / "README.md")
    assert block.words == ("gpu",)
    assert block.commands == (
        "torchrun --nproc-per-node 8 -m megatron_opdlm.train --student.hf a --teacher.hf a",
        "FOO=1 python tools/plan.py --x 'a b'",
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m megatron_opdlm.train --student.hf a --teacher.hf a --data.train_files f", None),
        ("python -m megatron_opdlm.train --student.fh a", "--student.fh is not a setting; the nearest is student.hf"),
        ("python -m megatron_opdlm.train --student.hf a --teacher.hf a", "give data.train_files"),
        ("python -m megatron_opdlm.train --config my.yaml --rollout.block_size x", "rollout.block_size (x) must be"),
        ("python -m megatron_opdlm.train --config my.yaml --rollout.denoising_steps_per_block 9", "must"),
        ("torchrun --nproc-per-node 2 -m megatron_opdlm.evaluate --config my.yaml --student.hf a", None),
        (
            "torchrun --nproc-per-node 3 -m megatron_opdlm.train --student.hf a --teacher.hf a --data.train_files f "
            "--parallel.tensor_model_parallel_size 2",
            "must",
        ),
        ("torchrun --nprocs 2 -m megatron_opdlm.train", "--nprocs"),
        ("python tools/convert_megatron_to_hf.py --checkpoint a --output b", None),
        ("python tools/convert_megatron_to_hf.py --checkpoint a", "required: --output"),
        ("python tools/convert_megatron_to_hf.py --checkpoint a --output b --dtype fp4", "invalid choice: 'fp4'"),
        ("python tools/convert_megatron_to_hf.py --checkpoint a --output b --fast", "unrecognized arguments: --fast"),
        ("python tools/convert_megatron_to_gguf.py --checkpoint a", "there is no tools/convert_megatron_to_gguf.py"),
        ("python -m megatron_opdlm.trian", "there is no module megatron_opdlm.trian"),
        ("bash examples/quickstart/ran.sh", "there is no examples/quickstart/ran.sh"),
        ("pip install -e .[eval]", None),
        ("pip install -e '.[evals]'", "setup.py has no extra evals"),
        ("hf download a/b", "hf needs the mark hub"),
        ("bash tests/run.sh -- -m megatron_opdlm.train --config my.yaml", None),
        ("bash tests/run.sh -- -m megatron_opdlm.train --confg my.yaml", "--confg is not a setting"),
        ("bash tests/run.sh --flag ...", None),
        ("bash tests/ran.sh --flag ...", "there is no tests/ran.sh"),
        ("python -m sglang.launch_server", "sglang needs the mark gpu"),
        ("frobnicate", "is no program that this check knows"),
        ("python -m megatron_opdlm.generate --hf a --prompt b --rollout.temperature 0 --json", None),
        ("python -m megatron_opdlm.generate --checkpoint a --hf b", "exclude each other: give one"),
        ("python -m megatron_opdlm.generate --hf a --optimizer.lr 1", "a setting that decoding has no use for"),
        ("python -m megatron_opdlm.generate --hf a --rollout.temperature -1", "rollout.temperature (-1"),
        (
            "torchrun --nproc-per-node 3 -m megatron_opdlm.generate --hf a --parallel.tensor_model_parallel_size 2",
            "must divide the number of processes (3)",
        ),
        ("python tools/quantize.py --format fp8 --output a --student.hf b --data.train_files c", None),
        ("python tools/quantize.py --format fp8 --output a --student.hf b", "give data.train_files"),
        ("python tools/quantize.py --format fp8 --output a --student.fh b", "--student.fh is not a setting"),
        ("python tools/plan.py --num-gpus 8 --config examples/qwen3_8b/recipe.yaml", None),
        ("python tools/plan.py --num-gpus 8 --rollout.block_size x", "rollout.block_size (x) must be"),
        ("with=--quiet python -m pip download '$with' --requirement <(cat requirements/cpu.txt)", None),
        ("python -m pip download --requirement <(cat requirements/none.txt)", "there is no requirements/none.txt"),
        ("PYTHONPATH=. OMP_NUM_THREADS=1 cat tests/README.md tests/nothing", "there is no tests/nothing"),
    ],
)
def test_what_is_wrong_with_a_command_is_found(command, expected):
    with in_root():
        found = problem(command, ())
    assert found is None if expected is None else expected in found


@pytest.mark.parametrize(
    ("words", "command", "expected"),
    [
        (["gpu"], "torchrun x", None),
        ([], "torchrun x", "needs one word behind its language"),
        (["cpu"], "torchrun x", "cpu is no mark"),
        (["tested-by=tests/none.py"], "bash tests/run.sh", "there is no test tests/none.py"),
        (["tested-by=.ci/run"], "bash tests/run.sh", None),
        (["tested-by=.ci/run"], "python tools/plan.py", ".ci/run runs no plan"),
    ],
)
def test_what_is_wrong_with_a_mark_is_found(words, command, expected):
    found = mark_problem(of(words, command))
    assert found is None if expected is None else expected in found


def test_a_command_in_an_indented_block_is_found(tmp_path):
    (tmp_path / "README.md").write_text("So:\n\n    python tools/plan.py\n    OMP=1 bash x.sh\n    8 + 7 = 15\n")
    assert indented_commands(tmp_path / "README.md") == ["python tools/plan.py", "OMP=1 bash x.sh"]

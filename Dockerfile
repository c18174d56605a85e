# For GPUs: the package on NVIDIA's PyTorch image, whose PyTorch, Transformer Engine, apex and flash-attn stay as they
# are.
#
#   docker build --tag opdlm .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --rm --volume "$PWD:/workspace" opdlm \
#       bash /opt/megatron_opdlm/launch/torchrun.sh -- -m megatron_opdlm.train --config recipe.yaml
#
# Arguments of the build (--build-arg NAME=VALUE); launch/README.md says why these versions go together:
#   BASE_IMAGE   an NGC PyTorch image with Python 3.12; with @sha256:... behind the tag it cannot change
#   EXTRAS       of setup.py, with commas: eval,wandb
#   USER_ID      of the user that runs, 1000: whoever owns the folders to be mounted
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL   for a mirror of the Python package index
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}
ARG EXTRAS=""
ARG USER_ID=1000
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The image's own constraints (/etc/pip/constraint.txt) name every package in it, so that none of ours could be newer
# than its. What was compiled together is held instead: if something asks for another version of it, the build fails.
RUN python -m pip list --format=freeze \
    | grep --extended-regexp --ignore-case \
      '^(torch|torchvision|(pytorch-)?triton|transformer[-_]engine.*|flash[-_]attn.*|apex|numpy|nvidia-.*|cuda-.*)==' \
    > /opt/opdlm_constraint.txt
ENV PIP_CONSTRAINT=/opt/opdlm_constraint.txt

WORKDIR /opt/megatron_opdlm
COPY requirements/ngc.txt requirements/ngc.txt
RUN python -m pip install --no-cache-dir --requirement requirements/ngc.txt
# Editable, so that a checkout mounted at this place runs instead.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_opdlm megatron_opdlm
RUN python -m pip install --no-cache-dir --editable ".${EXTRAS:+[${EXTRAS}]}"
COPY tools tools
COPY launch launch
COPY examples examples

# Fails where the image lacks what the package is for.
RUN python -m megatron_opdlm.versions --require torch megatron-core transformer-engine flash-attn apex

# Ubuntu's images have a user 1000 of their own, which serves.
RUN { getent passwd "${USER_ID}" || useradd --uid "${USER_ID}" --create-home opdlm; } \
    && mkdir --parents /workspace/runs \
    && chown "${USER_ID}" /workspace /workspace/runs
USER ${USER_ID}
WORKDIR /workspace
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "bash", "/opt/megatron_opdlm/launch/entrypoint.sh"]
CMD ["bash"]

"""Processes, groups and devices. The first package to touch megatron.core, so the CPU seam goes in here."""

from megatron_opdlm.parallel import cpu

cpu.install()

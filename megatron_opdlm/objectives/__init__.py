"""What the student learns from: one small file per objective, and the table of them (`table`)."""

import megatron_opdlm.parallel  # noqa: F401  the CPU seam precedes any import of megatron.core

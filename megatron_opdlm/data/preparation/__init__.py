"""From public data sets to files of prompts that a run trains on; the door is `tools/prepare_prompts.py`."""

"""The paper's benchmarks as lm-eval tasks: one YAML file each, and how rows are loaded and responses scored.

`TaskManager(include_path=benchmarks.TASKS_FOLDER, metadata={"data_dir": "data"})` finds them; without `data_dir` the
rows come from the hub. `evaluation/benchmarks.py` has the table of names, files and the paper's scores.
"""

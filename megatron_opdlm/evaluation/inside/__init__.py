"""What runs on the far side of the sandbox. Standard library alone; `enter.py` is started by its path.

`enter` shuts itself in (`namespaces`, `landlock`, `seccomp`) and becomes the program; `calls` is the program that
calls the functions of another one, and `values` how their arguments and results are written down.
"""

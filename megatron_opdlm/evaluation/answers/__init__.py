"""Reading an answer from a response and checking it: one small file of pure functions for each kind of benchmark."""

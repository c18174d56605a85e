"""What a run will need and take, worked out before it starts: memory, operations, messages, seconds, layouts."""

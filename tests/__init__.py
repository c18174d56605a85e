"""A package, so that no `tests` which a library installs stands in its place when another process imports these."""

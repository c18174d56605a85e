"""Settings: the schema, and how recipes and flags become it. Imports no torch."""

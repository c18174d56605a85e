"""Prompts: reading, tokenizing, and the order in which they are used."""

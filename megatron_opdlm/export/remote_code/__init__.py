"""Files that are copied into exported folders. They need torch and transformers alone, nothing of this package."""

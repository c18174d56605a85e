"""What `generate` asks and shows at the terminal."""

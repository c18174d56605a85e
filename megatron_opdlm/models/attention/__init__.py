"""Block-diffusion attention: one interface, one file per kernel."""

"""The method in plain torch: who attends to whom, what a denoising step commits, which states are trained."""

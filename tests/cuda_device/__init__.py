"""A CUDA device in software: see README.md."""

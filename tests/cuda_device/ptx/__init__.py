"""PTX, executed on the CPU with NumPy."""

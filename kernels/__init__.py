"""Triton device code of gradstat, imported as ``gradstat.kernels`` and no other way."""

if __name__ != "gradstat.kernels":
    raise ImportError("these kernels are part of gradstat: import gradstat.kernels")

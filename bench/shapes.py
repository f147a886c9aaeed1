"""Shapes of the parameters of the models whose gradients are measured, in `parameters()` order."""

from __future__ import annotations

Shape = tuple[int, ...]

# The study's network, weights only: 784-10-10-10-10.
MLP: list[Shape] = [(10, 784), (10, 10), (10, 10), (10, 10)]


def _resnet50() -> list[Shape]:
    """He et al. 2016, as torchvision's ``resnet50``: 161 tensors, 25,557,032 elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


def _gpt2_small() -> list[Shape]:
    """Radford et al. 2019, as Hugging Face's ``gpt2``: 148 tensors, 124,439,808 elements."""
    d = 768
    layer: list[Shape] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    layer += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * layer), (d,), (d,)]


RESNET50 = _resnet50()
GPT2_SMALL = _gpt2_small()

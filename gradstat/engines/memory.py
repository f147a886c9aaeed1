"""How a tensor's elements lie in memory, for engines that read it where it is."""

from __future__ import annotations

from torch import Tensor


def merge_dims(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides by descending stride, joined where one dimension continues the next.

    No statistic depends on the order of elements, so a transposed or channels-last tensor is one
    run of memory.

    Args:
        x: any strided tensor.

    Returns:
        Size and stride, in elements, of each dimension that is left, the outermost first; one at
        least. A tensor without gaps has one, of stride 1.
    """
    if x.numel() == 0:
        return [(0, 1)]
    dims = [(size, step) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    merged: list[tuple[int, int]] = []
    for size, step in sorted(dims, key=lambda dim: -dim[1]):
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged or [(1, 1)]


def no_storage(index: int) -> ValueError:
    """The error for a tensor that has elements and no memory for them."""
    return ValueError(f"measure() needs tensors with values; tensors[{index}] has no storage")


def as_matrix(x: Tensor, dim: int, ordered: bool) -> tuple[Tensor, int, int]:
    """A tensor as a contiguous matrix with rows along a dimension; a copy where it lies otherwise.

    Args:
        x: any strided tensor.
        dim: dimension.
        ordered: whether it matters which values are in a row, and in which order.

    Returns:
        A tensor, the number of its rows, and that of columns, 1 at least.
    """
    if x.is_neg():  # torch keeps the sign apart
        x = x.resolve_neg()
    if not x.is_contiguous() or dim not in (-1, x.dim() - 1):
        x = x.detach()
        if not ordered and merge_dims(x) == [(x.numel(), 1)]:
            return x, min(x.numel(), 1), max(x.numel(), 1)
        x = (x.movedim(dim, -1) if x.dim() else x).contiguous()
    width = max(x.shape[-1], 1) if x.dim() else 1
    return x, x.numel() // width, width

"""The right answer, how to judge one, and what one would write with torch alone; on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.engines import reference

BINS, LOW, HIGH = 64, -1.0, 1.0
SCHEMES: dict[str, Bins] = {"log2": Log2Bins(), "linear": LinearBins(BINS, LOW, HIGH)}

# Of a value in float64, by dtype, since torch's results are rounded to it.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# torch sums squares in float32: the norm of 16 M values of 0.3 is 1.2 % off.
_NORM_TOLERANCE = 2e-2
_PART = 1 << 23  # elements: what the reference measures at a time, for want of memory


def truth(x: Tensor, bins: Bins) -> Statistics:
    """The reference's answer for one tensor."""
    parts = x.detach().reshape(-1).split(_PART)
    result = reference.measure(parts[:1], bins)[0]
    for part in parts[1:]:
        result = result.merge(reference.measure([part], bins)[0])
    return result


def check_statistics(result: Statistics, expected: Statistics) -> None:
    """Every integer equal, every float within 1e-5; sums, which cancel, of the magnitudes."""
    assert torch.equal(result.integers, expected.integers)
    assert torch.equal(result.counts, expected.counts)
    torch.testing.assert_close(result.min, expected.min, rtol=0, atol=0)
    torch.testing.assert_close(result.max, expected.max, rtol=0, atol=0)
    for name in ("std", "l1", "l2"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-5, atol=0
        )
    assert ((result.sum - expected.sum).abs() <= 1e-6 * expected.l1).all()


def composite(x: Tensor) -> tuple[Any, ...]:
    """The same numbers from torch's own operators."""
    low, high = torch.aminmax(x)
    return (
        low,
        high,
        x.mean(),
        x.std(),
        torch.linalg.vector_norm(x),
        torch.histc(x if x.dtype == torch.float32 else x.float(), BINS, LOW, HIGH),
        torch.count_nonzero(x),
        torch.isfinite(x).sum(),
    )


def check_composite(result: tuple[Any, ...], expected: Statistics, dtype: torch.dtype) -> None:
    low, high, mean, std, norm, counts, nonzero, finite = result
    tolerance = TOLERANCES[dtype]
    assert low == expected.min
    assert high == expected.max
    rms = float(expected.l2) / max(int(expected.finite), 1) ** 0.5
    assert abs(float(mean) - float(expected.mean)) <= tolerance * rms
    assert abs(float(std) - float(expected.std)) <= tolerance * rms
    assert abs(float(norm) - float(expected.l2)) <= _NORM_TOLERANCE * float(expected.l2)
    assert nonzero == expected.finite - expected.zeros
    assert finite == expected.finite
    check_counts(counts, expected)


def check_counts(counts: Any, expected: Statistics) -> None:
    """Counts of one who rounds its own way: values at the edges may be in the next bin."""
    difference = (torch.as_tensor(counts, device=expected.counts.device) - expected.counts).abs()
    assert difference.sum() <= 1e-3 * int(expected.numel)

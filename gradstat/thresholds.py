"""`Thresholds`: when `diagnose` speaks up."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

_SHARES = (
    "nonfinite_share",
    "saturation_share",
    "underflow_share",
    "format_saturation_share",
    "stuck_ratio",
    "stuck_slow",
    "stuck_pace",
    "dead_units_share",
    "dead_units_severe",
)
_FACTORS = (
    "spike_loss",
    "spike_gradient",
    "spike_single",
    "jump",
    "jump_weights",
    "outliers_growth",
    "weights_growth",
)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When `diagnose` speaks up. ``docs/reading.md`` gives the reason for each number.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a window below 1, another number that is not above 0, a ratio, a share or a fit
            above 1, a factor up to 1, a severe threshold that is milder than the other.

    Example:
        >>> import gradstat
        >>> gradstat.Thresholds(vanishing_ratio=0.01, vanishing_severe=0.001).window
        20
    """

    window: int = 20  #: records whose median is taken, so that one batch alone says nothing
    vanishing_ratio: float = 1 / 30  #: least gradient of the first layer as a share of the last's
    vanishing_severe: float = 1 / 50  #: the share below which that is severe
    vanishing_level: float = 1e-8  #: least rms; below Adam's epsilon Adam hardly moves a weight
    depth_fit: float = 0.5  #: least R² of the line through log rms over depth that says so
    exploding_ratio: float = 1e3  #: largest gradient of the first layer as a multiple of the last's
    exploding_growth: float = 1e3  #: largest growth of a layer's rms over its median so far
    exploding_level: float = 1e6  #: largest rms in a whole window: no loss scale goes so far
    exploding_severe: float = 1e5  #: the growth above which that is severe
    nonfinite_share: float = 0.05  #: largest share of records with NaN or infinities in outputs
    spike_deviations: float = 6.0  #: by how many a value's logarithm must be above its trend
    spike_loss: float = 1.3  #: least factor by which the loss must rise above it
    spike_gradient: float = 5.0  #: least factor for the norm of the gradient
    spike_single: float = 5.0  #: times that a single value must rise: its batch may be a small one
    jump: float = 20.0  #: least factor for a layer's update or activation; its root if at once
    jump_weights: float = 2.0  #: likewise, for its weights
    weights_growth: float = 1.1  #: of all weights in 32 steps, from which instability is ahead
    weights_pace: float = 0.02  #: likewise, their change in a step, as a share of their size
    saturation_octaves: float = 10.0  #: how far below its layer's rms an element counts as stopped
    saturation_share: float = 0.5  #: largest share of stopped ones among what is not zero
    stuck_ratio: float = 1e-6  #: least change of a layer's weights in a step, as a share of them
    stuck_pace: float = 1e-3  #: the same as a share of the median layer's
    stuck_slow: float = 3e-5  #: least change of all weights in a step, if the loss stays as it is
    dead_units_share: float = 0.7  #: largest share of units that may be zero for a whole batch
    dead_units_severe: float = 0.9  #: the share from which that is severe
    outliers_growth: float = 4.0  #: of an activation's kurtosis over the run, which is noted
    underflow_share: float = 0.5  #: largest share of a layer that a format may flush to zero
    format_saturation_share: float = 1e-3  #: largest share of a layer that a format may cut off
    format_snr: float = 20.0  #: least signal-to-noise ratio, in dB, that a format may leave
    float16_headroom: float = 2.0  #: by how much the largest gradient must fit float16
    float16_floor: float = 2.0**-14  #: least size of a record's largest gradient

    def __post_init__(self) -> None:
        if not isinstance(self.window, int):
            raise TypeError(f"Thresholds() needs an integer; window is {self.window!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"Thresholds() needs numbers; {field.name} is {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"Thresholds() needs positive numbers; {field.name} is {value}")
        for name in ("vanishing_ratio", "depth_fit", *_SHARES):
            if getattr(self, name) > 1:
                raise ValueError(f"Thresholds() needs {name} up to 1; it is {getattr(self, name)}")
        for name in _FACTORS:
            if getattr(self, name) <= 1:
                raise ValueError(f"Thresholds() needs {name} above 1; it is {getattr(self, name)}")
        if self.vanishing_severe > self.vanishing_ratio:
            raise ValueError(
                f"Thresholds() needs vanishing_severe up to vanishing_ratio, "
                f"{self.vanishing_ratio}; vanishing_severe is {self.vanishing_severe}"
            )
        for severe, mild in (
            ("exploding_severe", "exploding_growth"),
            ("dead_units_severe", "dead_units_share"),
        ):
            if getattr(self, severe) < getattr(self, mild):
                raise ValueError(
                    f"Thresholds() needs {severe} of {mild}, {getattr(self, mild)}, or more; "
                    f"{severe} is {getattr(self, severe)}"
                )

"""`Thresholds`: when `diagnose` speaks up."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields
from typing import TypeAlias

Share: TypeAlias = float  # up to 1
Factor: TypeAlias = float  # above 1


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
    vanishing_ratio: Share = 1 / 30  #: least gradient of the first layer as a share of the last's
    vanishing_severe: float = 1 / 50  #: the share below which that is severe
    vanishing_level: float = 1e-8  #: least rms; below Adam's epsilon Adam hardly moves a weight
    depth_fit: Share = 0.5  #: least R² of the line through log rms over depth that says so
    exploding_ratio: float = 1e3  #: largest gradient of the first layer as a multiple of the last's
    exploding_growth: float = 1e3  #: largest growth of a layer's rms over its median so far
    exploding_level: float = 1e6  #: largest rms in a whole window: no loss scale goes so far
    exploding_severe: float = 1e5  #: the growth above which that is severe
    nonfinite_share: Share = 0.05  #: largest share of records with NaN or infinities in outputs
    spike_deviations: float = 6.0  #: by how many a value's logarithm must be above its trend
    spike_loss: Factor = 1.3  #: least factor by which the loss must rise above it
    spike_gradient: Factor = 5.0  #: least factor for the norm of the gradient
    spike_single: Factor = 5.0  #: times that a single value must rise: its batch may be a small one
    jump: Factor = 20.0  #: least factor for a layer's update or activation; its root if at once
    jump_weights: Factor = 2.0  #: likewise, for its weights
    weights_growth: Factor = 1.1  #: of all weights in 32 steps, from which instability is ahead
    weights_pace: float = 0.02  #: likewise, their change in a step, as a share of their size
    saturation_octaves: float = 10.0  #: how far below its layer's rms an element counts as stopped
    saturation_share: Share = 0.5  #: largest share of stopped ones among what is not zero
    stuck_ratio: Share = 1e-6  #: least change of a layer's weights in a step, as a share of them
    stuck_pace: Share = 1e-3  #: the same as a share of the median layer's
    stuck_slow: Share = 3e-5  #: least change of all weights in a step, if the loss stays as it is
    dead_units_share: Share = 0.7  #: largest share of units that may be zero for a whole batch
    dead_units_severe: Share = 0.9  #: the share from which that is severe
    outliers_growth: Factor = 4.0  #: of an activation's kurtosis over the run, which is noted
    underflow_share: Share = 0.5  #: largest share of a layer that a format may flush to zero
    format_saturation_share: Share = 1e-3  #: largest share of a layer that a format may cut off
    format_snr: float = 20.0  #: least signal-to-noise ratio, in dB, that a format may leave
    float16_headroom: float = 2.0  #: by how much the largest gradient must fit float16
    float16_floor: float = 2.0**-14  #: least size of a record's largest gradient

    def __post_init__(self) -> None:
        if not isinstance(self.window, int):
            raise TypeError(f"Thresholds() needs an integer; window is {self.window!r}")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"Thresholds() needs numbers; {name} is {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"Thresholds() needs positive numbers; {name} is {value}")
            # Annotations are texts here.
            if field.type == "Share" and value > 1:
                raise ValueError(f"Thresholds() needs {name} up to 1; it is {value}")
            if field.type == "Factor" and value <= 1:
                raise ValueError(f"Thresholds() needs {name} above 1; it is {value}")
        for name, rule, is_kept, other in (
            ("vanishing_severe", "up to", operator.le, "vanishing_ratio"),
            ("exploding_severe", "at least", operator.ge, "exploding_growth"),
            ("dead_units_severe", "at least", operator.ge, "dead_units_share"),
        ):
            value, limit = getattr(self, name), getattr(self, other)
            if not is_kept(value, limit):
                raise ValueError(
                    f"Thresholds() needs {name} {rule} {other}, {limit}; {name} is {value}"
                )

"""`diagnose`: what is wrong with a run, in findings, the worst first.

`rules` has the arithmetic of each finding; ``docs/reading.md`` explains the thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from gradstat.history import History

Severity: TypeAlias = Literal["severe", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")
KINDS = (
    "non-finite",
    "exploding",
    "vanishing",
    "dead",
    "stuck",
    "dead units",
    "saturation",
    "underflow",
    "scale",
)


@dataclass(frozen=True)
class Finding:
    """Something that a record shows.

    Args:
        kind: one of `KINDS`.
        severity: ``"severe"``: training does not work; ``"warning"``: part of it does not, or will
            not; ``"note"``: good to know.
        layer: the row of the history that it is about, the worst or the first of several.
        steps: first and last step of the records that show it.
        numbers: what it rests on, by name; each kind has its own, listed in ``docs/reading.md``.
        sentence: it all in plain words.
    """

    kind: str
    severity: Severity
    layer: str
    steps: tuple[int, int]
    numbers: dict[str, float]
    sentence: str

    def __str__(self) -> str:
        """Severity, kind, steps and the sentence, in one line."""
        first, last = self.steps
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        return f"{self.severity}: {self.kind}, {when}: {self.sentence}"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When `diagnose` speaks up. ``docs/reading.md`` gives the reason for each number.

    Args:
        window: records whose median is taken, so that one batch alone says nothing.
        vanishing_ratio: smallest gradient of the first layer as a share of the last one's, both
            read off a straight line through log rms over depth.
        vanishing_severe: the share below which that is severe.
        vanishing_level: smallest rms; below Adam's epsilon Adam hardly moves a weight.
        depth_fit: smallest R² of that line: layers out of line are no trend.
        exploding_ratio: largest gradient of the first layer as a multiple of the last one's.
        exploding_growth: largest growth of a layer's rms over its median so far.
        exploding_severe: the growth above which that is severe.
        nonfinite_share: largest share of records with NaN or infinities that pass for a loss scale
            being tried, as long as the newest record has none.
        saturation_octaves: how many octaves below its layer's rms an element counts as stopped.
        saturation_share: largest share of stopped ones among the elements that are not zero.
        stuck_ratio: smallest change of a layer's weights in a step, as a share of their size.
        stuck_pace: the same as a share of the median layer's: what a schedule slows down is not
            stuck.
        dead_units_share: largest share of a module's units that may be zero for a whole batch.
        dead_units_severe: the share from which that is severe.
        underflow_share: largest share of a layer's values that float16 may flush to zero.
        float16_headroom: how many times larger the largest gradient must be able to grow before
            float16 overflows.
        float16_floor: smallest size of a record's largest gradient.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a window below 1, another number that is not above 0, a ratio, a share or a fit
            above 1, a severe threshold that is milder than the other.

    Example:
        >>> import gradstat
        >>> gradstat.Thresholds(vanishing_ratio=0.01, vanishing_severe=0.001).window
        20
    """

    window: int = 20
    vanishing_ratio: float = 1 / 30
    vanishing_severe: float = 1 / 50
    vanishing_level: float = 1e-8
    depth_fit: float = 0.5
    exploding_ratio: float = 1e3
    exploding_growth: float = 1e3
    exploding_severe: float = 1e5
    nonfinite_share: float = 0.05
    saturation_octaves: float = 10.0
    saturation_share: float = 0.5
    stuck_ratio: float = 1e-6
    stuck_pace: float = 1e-3
    dead_units_share: float = 0.7
    dead_units_severe: float = 0.9
    underflow_share: float = 0.5
    float16_headroom: float = 2.0
    float16_floor: float = 2.0**-14

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
        if self.vanishing_severe > self.vanishing_ratio:
            raise ValueError(
                f"Thresholds() needs vanishing_severe up to vanishing_ratio, "
                f"{self.vanishing_ratio}; vanishing_severe is {self.vanishing_severe}"
            )
        if self.exploding_severe < self.exploding_growth:
            raise ValueError(
                f"Thresholds() needs exploding_severe of exploding_growth, "
                f"{self.exploding_growth}, or more; exploding_severe is {self.exploding_severe}"
            )
        if self.dead_units_severe < self.dead_units_share:
            raise ValueError(
                f"Thresholds() needs dead_units_severe of dead_units_share, "
                f"{self.dead_units_share}, or more; dead_units_severe is {self.dead_units_severe}"
            )


_SHARES = (
    "nonfinite_share",
    "saturation_share",
    "underflow_share",
    "stuck_ratio",
    "stuck_pace",
    "dead_units_share",
    "dead_units_severe",
)


def diagnose(history: History, thresholds: Thresholds | None = None) -> list[Finding]:
    """Find what is wrong with a run, by its gradients and whatever else was recorded.

    NaN and infinities are found in rows of any kind, layers that do not move among updates, dead
    units among activations, and everything else among gradients alone. Layers are taken to lie in
    the order of their parameters, the first one nearest to the input, as in most models.
    Saturation, underflow and the range of loss scales are read off histograms over `Log2Bins`, of
    at most 64 records evenly spread; over `LinearBins` they are left out.

    Args:
        history: with one record at least; several dozen say more than a few.
        thresholds: by default those that healthy runs stay within.

    Returns:
        Findings: severe ones first, then warnings, then notes.

    Raises:
        TypeError: something other than Thresholds.
        ValueError: a history without records.

    Example:
        >>> import torch, gradstat
        >>> sigmoids = [m for _ in range(9) for m in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())]
        >>> model = torch.nn.Sequential(*sigmoids)
        >>> with gradstat.watch(model) as w:
        ...     model(torch.rand(4, 8)).square().sum().backward()
        >>> [(f.kind, f.layer) for f in w.history.diagnose()][0]
        ('vanishing', '0.weight')
    """
    # Imported here, as they import this module.
    from gradstat.rules import RULES
    from gradstat.windows import Run

    thresholds = Thresholds() if thresholds is None else thresholds
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"diagnose() needs Thresholds; thresholds is {type(thresholds).__name__}")
    if len(history) == 0 or not history.layers:
        raise ValueError(f"diagnose() needs a History with records; history is {history!r}")
    findings = []
    for kind, rules in RULES.items():
        if kind is None or kind in history.kinds:
            run = Run(history, thresholds.window, kind)
            findings += [finding for rule in rules for finding in rule(run, thresholds)]
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), KINDS.index(f.kind)))

import sys
from collections.abc import Callable

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import claims
from claims import Measured

EPOCHS, ITERATIONS, LAYERS = 50, 40, 4

Change = Callable[[Measured, Measured], object]


def measured(loss: float, mean_abs: list[float], network: str) -> Measured:
    """A run in which nothing changes but for the standard deviation, as plain PyTorch has it."""
    shape = (EPOCHS, ITERATIONS, LAYERS)
    std = np.full(shape, 1.0)
    for epoch, plain in claims.PLAIN_STD[network].items():
        std[epoch - 1] = plain
    return Measured(
        np.full(shape[:2], loss), np.full(shape, 1e-9), np.broadcast_to(mean_abs, shape).copy(), std
    )


def example() -> tuple[Measured, Measured]:
    """Numbers of which every claim holds."""
    relu = measured(0.2, [4e-3, 3e-2, 3e-2, 2e-2], "ReLU")
    return relu, measured(1.1, [1e-4, 1e-3, 4e-3, 1.5e-2], "sigmoid")


def words(relu: Measured, sigmoid: Measured, data: str = "digits", batch: int = 128) -> list:
    return [verdict.held for verdict in claims.judge(relu, sigmoid, data, batch)]


def assign(array: str, where: object, value: float, of: str = "sigmoid") -> Change:
    def change(relu: Measured, sigmoid: Measured) -> None:
        getattr(sigmoid if of == "sigmoid" else relu, array)[where] = value

    return change


FIRST = np.s_[0, :, 0]


def test_every_claim_holds_of_right_numbers() -> None:
    assert words(*example()) == [True] * 8


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (assign("mean_abs", FIRST, 3.1e-4), [0]),
        (assign("mean_abs", FIRST, 1.9e-3, of="relu"), [1]),
        (assign("mean_abs", np.s_[1:10, :, 3], 2.2e-3), [2]),
        (assign("mean_abs", np.s_[1:10, :, 0], 4.1e-4), [3]),
        (assign("mean_abs", np.s_[:10, :, 3], 2.1e-2), [3]),
        (assign("mean_abs", np.s_[1:10, :, 1], 1.3e-4), [3]),
        (assign("loss", 9, 0.69), [4]),
        (assign("loss", 49, 0.39), [5]),
        (assign("mean", (30, 5, 3), 2e-6), [6]),
        (assign("mean", (30, 5, 3), -2e-6, of="relu"), [6]),
        (assign("std", np.s_[9, :, 2], 1.7e-2), [7]),
        (assign("std", np.s_[0, :, 2], 2e-3, of="relu"), [7]),
    ],
)
def test_claim_does_not_hold_of_wrong_numbers(change: Change, wrong: list[int]) -> None:
    relu, sigmoid = example()
    change(relu, sigmoid)
    assert [i for i, held in enumerate(words(relu, sigmoid)) if held is not True] == wrong
    verdicts = claims.judge(relu, sigmoid, "digits", 128)
    assert all(str(verdicts[i]).startswith(" NOT held  ") for i in wrong)


@pytest.mark.parametrize(
    ("change", "unmoved"),
    [
        (assign("mean", np.s_[:, :, :3], 1.0), "the mean of other layers"),
        (assign("mean_abs", np.s_[10:], 1.0), "magnitudes after epoch 10"),
        (assign("std", np.s_[1:9], 9.0), "deviations between epochs 1 and 10"),
        (assign("loss", np.s_[:9], 0.0), "the loss before epoch 10"),
    ],
)
def test_claims_are_about_nothing_else(change: Change, unmoved: str) -> None:
    relu, sigmoid = example()
    change(relu, sigmoid)
    assert words(relu, sigmoid) == [True] * 8, unmoved


@pytest.mark.parametrize("of", ["relu", "sigmoid"])
def test_no_claim_holds_of_nan(of: str) -> None:
    relu, sigmoid = example()
    broken = relu if of == "relu" else sigmoid
    for array in (broken.loss, broken.mean, broken.mean_abs, broken.std):
        array[:] = np.nan
    about_both = [held for i, held in enumerate(words(relu, sigmoid)) if i > 2]
    assert about_both == [False] * 5
    assert words(relu, sigmoid)[:3] == (
        [True, False, True] if of == "relu" else [False, True, False]
    )


@pytest.mark.parametrize(
    ("epochs", "data", "batch", "asked"),
    [
        (50, "digits", 128, [0, 1, 2, 3, 4, 5, 6, 7]),
        (49, "digits", 128, [0, 1, 2, 3, 4, 6, 7]),
        (10, "mnist", 128, [0, 1, 2, 3, 4, 6]),
        (9, "digits", 128, [0, 1, 6]),
        (1, "mnist", 128, [0, 1, 6]),
        (50, "digits", 64, []),
        (50, "some/file.npz", 128, []),
    ],
)
def test_claims_are_asked_only_of_what_they_are_about(
    epochs: int, data: str, batch: int, asked: list[int]
) -> None:
    cut = [
        Measured(m.loss[:epochs], m.mean[:epochs], m.mean_abs[:epochs], m.std[:epochs])
        for m in example()
    ]
    verdicts = claims.judge(*cut, data, batch)
    assert [i for i, verdict in enumerate(verdicts) if verdict.held is not None] == asked
    assert all(str(v).startswith("not asked  ") for v in verdicts if v.held is None)


def test_numbers_are_means_over_the_epochs_they_name() -> None:
    _, sigmoid = example()
    sigmoid.mean_abs[:] = np.arange(1.0, 51)[:, None, None] * [1, 2, 3, 4]
    sigmoid.mean_abs[:, ::2] *= 3
    assert sigmoid.layers(1, 10).tolist() == [11, 22, 33, 44]
    assert sigmoid.layers(7, 7).tolist() == [14, 28, 42, 56]
    assert sigmoid.ratio(3) == 0.25

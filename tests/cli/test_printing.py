"""What ``gradstat compare`` and ``info RUN`` print and draw."""

import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from findings import noise
from histories import make_history
from matplotlib.figure import Figure
from tables_of_text import rows
from torch import Tensor

from gradstat import History, Log2Bins
from gradstat.cli import commands, main


def shrinking(step: int, layer: int) -> Tensor:
    return noise(step, layer, 10.0 ** (layer - 4))


def test_compare_tells_both_runs_apart_layer_by_layer() -> None:
    one = make_history(Log2Bins(), 3, 25, noise)
    other = make_history(Log2Bins(), 3, 25, shrinking)
    text = commands.comparison({"healthy": one, "ill": other})
    lines = text.splitlines()
    assert lines[0] == "A  healthy: 25 records of 3 layers, steps 0 to 24, Log2Bins()"
    assert lines[1] == "B  ill: 25 records of 3 layers, steps 0 to 24, Log2Bins()"
    table = rows(text)
    assert list(table) == one.layers
    for layer, expected in zip(one.layers, (1e-2, 1e-1, 1.0), strict=True):
        a, b, ratio = (float(cell) for cell in table[layer])
        assert a == pytest.approx(1e-2, rel=0.1)
        assert b == pytest.approx(1e-2 * expected, rel=0.1)
        assert ratio == pytest.approx(expected, rel=0.1)
    shares = re.search(r"^first layer / last layer +(\S+) +(\S+)$", text, re.M)
    assert [float(share) for share in shares.groups()] == pytest.approx([1, 0.01], rel=0.1)
    healthy, ill = text.split("\nA  healthy:\n")[1].split("\nB  ill:\n")
    assert healthy.strip() == "nothing found"
    assert ill.strip().startswith("severe: vanishing, steps 0 to 24: From 2.weight back")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24


def test_compare_draws_bars_on_one_log_scale() -> None:
    one = make_history(Log2Bins(), 2, 1, lambda step, layer: torch.full((4,), 10.0 ** (11 * layer)))
    other = make_history(Log2Bins(), 1, 1, lambda step, layer: torch.full((4,), 1e4))
    text = commands.comparison({"one": one, "other": other})
    assert re.findall("#+", text) == ["#", "#" * 5, "#" * 12]
    assert rows(text)["1.weight"][1:] == ["-", "-"]
    assert "no layer in common" not in text


def test_compare_says_that_no_layer_is_in_both_runs() -> None:
    one = make_history(Log2Bins(), 2, 5, noise)
    other = make_history(Log2Bins(), [f"other.{layer}" for layer in one.layers], 5, noise)
    text = commands.comparison({"one": one, "other": other})
    assert "\nA and B have no layer in common\n" in text


def test_compare_fits_a_deep_network_on_a_screen() -> None:
    deep = make_history(Log2Bins(), 60, 2, noise)
    text = commands.comparison({"one": deep, "other": deep})
    table = rows(text)
    assert len(table) == 24
    assert [next(iter(table)), next(reversed(table))] == ["0.weight", "59.weight"]
    assert "36 layers between them are left out (--all)" in text
    assert len(rows(commands.comparison({"one": deep, "other": deep}, every_layer=True))) == 60


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_compare_and_tail_get_through_runs_of_nothing_but(value: float) -> None:
    history = make_history(Log2Bins(), 2, 3, lambda step, layer: torch.full((4,), value))
    table = rows(commands.comparison({"one": history, "other": history}))
    cell = "0" if value == 0 else "-"
    assert table == {"0.weight": [cell, cell, "-"], "1.weight": [cell, cell, "-"]}
    finding = "warning: dead" if value == 0 else "severe: non-finite"
    assert finding in commands.newest("run", history)


def test_compare_command_names_runs_and_draws_their_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a" / "run.npz", tmp_path / "b" / "run.npz"]
    for path in paths:
        path.parent.mkdir()
        make_history(Log2Bins(), 14, 5, noise).save(path)
    figure = tmp_path / "curves.png"
    assert main(["compare", *map(str, paths), "-o", str(figure)]) == 0
    shown = capsys.readouterr().out
    assert f"\nA  {paths[0]}:\n" in shown
    assert f"\nB  {paths[1]}:\n" in shown
    assert shown.endswith(f"\n{figure}\n")
    image = matplotlib.image.imread(figure)
    assert image.std() > 0.05
    assert main(["compare", str(paths[0]), str(paths[0])]) == 2
    assert capsys.readouterr().err == (
        f"gradstat compare: error: compare needs two runs; both are {paths[0]}\n"
    )
    assert main(["compare", *map(str, paths), "-o", str(tmp_path / "curves.what")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gradstat compare: error: ")
    assert "'what'" in error
    assert error.count("\n") == 1


KINDS = ("grad", "param", "update", "activation", "unit")


def values_of_kinds(step: int, row: int) -> Tensor:
    """Of two layers; updates are a hundredth of parameters, every fourth unit is dead."""
    return noise(step, row, [1.0, 10.0, 0.1, 1.0, 1.0][row // 2]) * (torch.arange(400) % 4 > 0)


def test_screens_speak_of_the_first_kind() -> None:
    history = make_history(Log2Bins(), 2, 5, values_of_kinds, absent=[(4, 1)], kinds=KINDS)
    gradients = history.select("grad")
    text = commands.comparison({"one": history, "other": gradients})
    assert text.splitlines()[0] == (
        "A  one: 5 records of 2 layers (grad, param, update, activation, unit), steps 0 to 4, "
        "Log2Bins()"
    )
    assert list(rows(text)) == gradients.layers
    assert "update / parameter" not in text
    assert "dead units" not in text
    table = rows(commands.newest("run", history))
    assert list(table) == gradients.layers
    assert table["1.weight"][-2:] == ["no", "gradient"]
    updates = make_history(Log2Bins(), 2, 5, absent=[(4, 1)], kinds=("update", "activation"))
    table = rows(commands.newest("run", updates))
    assert list(table) == ["update/0.weight", "update/1.weight"]
    assert table["update/1.weight"][-2:] == ["no", "update"]


def test_bars_of_a_screen_span_the_first_kind() -> None:
    history = make_history(
        Log2Bins(), 2, 1, lambda step, row: torch.full((4,), 10.0**row), (), KINDS
    )
    assert re.findall("#+", commands.newest("run", history)) == ["#", "#" * 12]


def test_compare_tells_update_ratios_and_dead_units_where_both_runs_have_them() -> None:
    one = make_history(Log2Bins(), 2, 5, values_of_kinds, kinds=KINDS)
    other = make_history(
        Log2Bins(),
        2,
        5,
        lambda step, row: values_of_kinds(step, row) * (10.0 if row // 2 == 2 else 1.0),
        kinds=KINDS,
    )
    text = commands.comparison({"one": one, "other": other})
    a, b, ratio = re.search(
        r"^update / parameter, median +(\S+) +(\S+) +(\S+)$", text, re.M
    ).groups()
    assert float(a) == pytest.approx(0.01, rel=0.1)
    assert float(b) == pytest.approx(0.1, rel=0.1)
    assert float(ratio) == pytest.approx(10, rel=0.1)
    assert re.search(r"^dead units, most in a layer +25% +25%$", text, re.M)
    updates = commands.comparison({"one": one.select("update"), "other": other})
    assert "update / parameter" not in updates


def updates_alone() -> History:
    """As of watch(what="update"), which prints its rows as update/0.weight."""
    return make_history(
        Log2Bins(), 2, 5, lambda step, row: values_of_kinds(step, row + 4), kinds=["update"]
    )


def test_compare_compares_the_first_kind_that_both_runs_have() -> None:
    history = make_history(Log2Bins(), 2, 5, values_of_kinds, kinds=KINDS)
    selected = history.select("update")
    for one, other in ((selected, history), (history, selected), (updates_alone(), history)):
        text = commands.comparison({"one": one, "other": other})
        assert re.findall(r"^\d\.weight .* (\S+)$", text, re.M) == ["1", "1"]


def test_draw_draws_the_first_kind_that_both_runs_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    history = make_history(Log2Bins(), 2, 5, values_of_kinds, kinds=KINDS)
    commands.draw({"one": updates_alone(), "other": history}, tmp_path / "curves.png")
    (figure,) = drawn
    lines = [line.get_ydata() for ax in figure.axes for line in ax.lines]
    assert len(lines) == 4
    assert np.isfinite(lines).all()


def test_draw_writes_the_curves_of_the_first_kind_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def fails(self: Figure, path: Path, **options: object) -> None:
        drawn.append(self)
        save(self, path, **options)
        raise OSError("disk full")

    history = make_history(Log2Bins(), 2, 5, values_of_kinds, kinds=KINDS)
    path = tmp_path / "curves.png"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fails)
        with pytest.raises(OSError, match="disk full"):
            commands.draw({"run": history}, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    assert len(drawn[0].axes[0].lines) == 2
    for name, beginning in (
        ("curves.png", b"\x89PNG"),
        ("curves.svg", b"<?xml"),
        ("x", b"\x89PNG"),
    ):
        commands.draw({"run": history}, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(beginning)


def test_scalars_lists_what_was_logged_and_the_norm() -> None:
    history = make_history(Log2Bins(), 2, 25, noise)
    for step in range(50):
        history.add_scalar("loss", step, math.nan if step == 3 else 5.0 - step / 10)
    lines = [line.split() for line in commands.logged(history).splitlines()]
    assert lines[1] == ["loss", "50", "5", "1", "0.1", "5"]
    norm = history.norm()
    assert lines[2][:3] == ["gradient", "norm", "25"]
    assert float(lines[2][3]) == pytest.approx(norm[0], rel=1e-3)


def test_compare_tells_the_losses_and_norms_of_both_apart() -> None:
    runs = {name: make_history(Log2Bins(), 2, 25, noise) for name in ("one", "other")}
    for name, history in runs.items():
        for step in range(25):
            history.add_scalar("loss", step, 2.0 if name == "one" else 3.0)
    runs["one"].add_scalar("lr", 0, 0.1)
    shown = commands.comparison(runs)
    assert re.search(r"^loss, lately +2 +3 +1.5$", shown, re.M)
    assert re.search(r"^gradient norm, lately +\S+ +\S+ +1$", shown, re.M)
    assert "lr" not in shown

"""What `diagnose` finds where it is known what happened, and where nothing did.

A few runs of each kind here and now; all of them are slow, and make the table of docs/reading.md.
"""

from collections.abc import Iterator

import pytest
import torch
from incidents import CASES, SEEDS, Case, alarms, judge, train
from tasks import SETTINGS, Setting

# One network for each incident, and half of the healthy ones.
EVERYDAY = {str(SETTINGS[i]) for i in (0, 1, 3, 4, 8, 11, 12)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if str(s) in EVERYDAY], ids=str)
def test_diagnose_is_silent_about_a_healthy_run(setting: Setting) -> None:
    assert alarms(train(setting, 0, steps=100)) == []


@pytest.mark.parametrize("name", CASES)
def test_diagnose_finds_an_incident_its_step_and_its_layer(name: str) -> None:
    case = CASES[name]
    incident = case.incident(case.settings[-1], 0)
    verdict = judge(train(case.settings[-1], 0, incident), incident)
    assert (verdict.found, verdict.step, verdict.layer) == (True, True, True), verdict.sentence


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_diagnose_is_silent_about_healthy_runs_of_many_seeds(setting: Setting) -> None:
    assert [alarms(train(setting, seed)) for seed in SEEDS] == [[] for _ in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "setting"),
    [
        pytest.param(case, setting, id=f"{name}: {setting}")
        for name, case in CASES.items()
        for setting in case.settings
    ],
)
def test_diagnose_finds_incidents_of_many_seeds(case: Case, setting: Setting) -> None:
    verdicts = []
    for seed in SEEDS:
        incident = case.incident(setting, seed)
        verdicts.append(judge(train(setting, seed, incident), incident))
    assert all(verdict.found for verdict in verdicts)
    assert sum(verdict.step for verdict in verdicts) >= 19, verdicts
    assert sum(verdict.layer for verdict in verdicts) >= 19, verdicts

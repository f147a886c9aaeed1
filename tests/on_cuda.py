"""What `pytest --on-cuda` does: tensors that a test makes without naming a device are on CUDA.

Tests that were written for the CPU become tests of streams and of what waits for them. Comparisons
with tensors of the CPU, and NumPy, copy to the host first. A test that cannot run so is marked
``host`` with the reason.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch


def to_host(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if len({x.device for x in args if isinstance(x, torch.Tensor)}) > 1:
            args = tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
        return function(*args, **kwargs)

    return call


def numpy(x: torch.Tensor, *args: Any, **kwargs: Any) -> np.ndarray:
    return NUMPY(x.cpu() if x.is_cuda else x, *args, **kwargs)


def array(x: torch.Tensor, *args: Any, **kwargs: Any) -> np.ndarray:
    return ARRAY(x.cpu() if x.is_cuda else x, *args, **kwargs)


NUMPY, ARRAY = torch.Tensor.numpy, torch.Tensor.__array__
torch.Tensor.numpy, torch.Tensor.__array__ = numpy, array
torch.equal, torch.testing.assert_close = map(to_host, (torch.equal, torch.testing.assert_close))


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:  # those name their device
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, others = [], []
    for item in items:
        mark = item.get_closest_marker("host")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"not on a CUDA device: {mark.args[0]}"))
        named = item.callspec.params if hasattr(item, "callspec") else {}
        engine = named.get("engine")
        is_on_cpu = "cpu" in (named.get("device"), engine, getattr(engine, "device", None))
        (others if is_on_cpu else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)

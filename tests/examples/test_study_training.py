import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(ROOT / "examples"))
import relu_vs_sigmoid as study

NETWORKS = ["ReLU", "sigmoid"]


def build(name: str, inputs: int = 784, seed: int = 0) -> nn.Sequential:
    return study.build(study.ACTIVATIONS[name], inputs, torch.Generator().manual_seed(seed))


@pytest.mark.host("draws weights on the CPU, as the study does")
@pytest.mark.parametrize("name", NETWORKS)
def test_network_has_glorot_weights_and_zero_biases(name: str) -> None:
    network = build(name)
    linear = [module for module in network if isinstance(module, nn.Linear)]
    sizes = [(784, 10), (10, 10), (10, 10), (10, 10)]
    assert [(module.in_features, module.out_features) for module in linear] == sizes
    for module in linear:
        bound = math.sqrt(6 / (module.in_features + module.out_features))
        largest = float(module.weight.detach().abs().max())
        assert 0.95 * bound < largest <= bound
        assert float(module.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert not module.bias.any()
    activation = study.ACTIVATIONS[name]
    assert [type(module) for module in network] == [*[nn.Linear, activation] * 3, nn.Linear]


@pytest.mark.host("draws weights on the CPU, as the study does")
def test_both_networks_start_from_the_same_weights() -> None:
    relu, sigmoid, other = build("ReLU"), build("sigmoid"), build("ReLU", seed=1)
    for a, b, c in zip(relu.parameters(), sigmoid.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_that_of_plain_pytorch(name: str, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(100, 12, generator=generator).to(device)
    y = (torch.arange(100) % 10).to(device)
    run = study.train(name, x, y, epochs=3, batch_size=32, seed=7)

    generator = torch.Generator().manual_seed(7)
    network = study.build(study.ACTIVATIONS[name], 12, generator).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, (0.9, 0.999), 1e-8)
    losses, means = [], []
    for _ in range(3):
        for batch in torch.randperm(100, generator=generator).to(device).split(32):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            means.append([float(p.grad.double().mean()) for p in network[::2].parameters()][::2])
    assert run.loss.tolist() == losses
    h = run.every_step
    # The last layer's cancel: a mean is right to 1e-6 of the mean of magnitudes.
    cancelled = 1e-6 * h["l1"] / h["finite"]
    assert (np.abs(h["mean"] - means) <= 1e-5 * np.abs(means) + cancelled).all()
    assert run.measured().loss.shape == (3, 4)
    assert run.measured().std.shape == (3, 4, 4)

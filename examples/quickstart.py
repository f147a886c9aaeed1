"""The library alone: watch a deep sigmoid network train and be told which layers learn nothing."""

import torch
from torch import nn

import gradstat

torch.manual_seed(0)
model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.Sigmoid())])
optimizer = torch.optim.Adam(model.parameters())

with gradstat.watch(model) as w:
    for _ in range(100):
        x = torch.rand(64, 32)
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print(w.history.diagnose())
gradstat.plot.curves(w.history).savefig("gradients.png")

"""A plain PyTorch loop in which one line is swapped: guess the next byte of a text from the eight before it."""

import torch
from lowmem.optim import GaLore, param_groups
from torch import nn

torch.manual_seed(0)
text = torch.tensor(list((torch.optim.AdamW.__doc__ or "").encode()))
windows = text.unfold(0, 9, 1)  # (windows, 9): eight bytes and the one that follows
layers = [nn.Linear(8 * 64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)]
model = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(), *layers)

# optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
optimizer = GaLore(param_groups(model, rank=32), lr=1e-2)
print(optimizer.summary())

losses = []
for step in range(1, 101):
    batch = windows[torch.randint(len(windows), (64,))]
    loss = nn.functional.cross_entropy(model(batch[:, :8]), batch[:, 8])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 20 == 0:
        print(f"step {step:>3}  loss {loss.item():.2f}")

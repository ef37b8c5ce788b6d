"""One-step digits with nothing but the kernels and torch: `python kernels/examples/train.py`, seconds on a CPU.

SoFlow (arXiv 2512.15657): x + (s - t) N(x, t, s) is where the flow through x at time t is at time s. 0: data, 1: noise.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import soflow_kernels as k


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2, self.modulation = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        qkv = self.qkv(k.layernorm_modulate(x, shift, scale)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        x, h = k.gate_residual_layernorm_modulate(x, attended, gate, shift2, scale2)
        return k.gate_residual(x, self.fc2(k.linear_gelu(h, self.fc1.weight, self.fc1.bias)), gate2)


class DiT(nn.Module):  # of images [B, 1, 8, 8], in patches of 4 x 4
    def __init__(self, dim=96, depth=3, heads=3, classes=10):
        super().__init__()
        self.embed, self.places, self.labels = nn.Linear(16, dim), nn.Embedding(4, dim), nn.Embedding(classes + 1, dim)
        self.times = nn.ModuleList(nn.Linear(n, dim) for n in (64, dim, 64, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.modulation, self.last = nn.Linear(dim, 2 * dim), nn.Linear(dim, 16)

    def forward(self, x, t, s, y):
        weights = [p for layer in self.times for p in (layer.weight, layer.bias)]
        c = k.dual_time_embedding(t, s, y, weights[:4], weights[4:], self.labels.weight)
        x = self.embed(F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)) + self.places.weight
        for block in self.blocks:
            x = block(x, c)
        x = self.last(k.layernorm_modulate(x, *self.modulation(c).chunk(2, dim=1)))
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (2, 2)), 4)


def train(steps=400, batch=64):
    images, labels = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    images, model, half = images.float().view(-1, 1, 8, 8) / 8 - 1, DiT(), batch // 2
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = k.AdamWEMA(model.parameters(), lr=2e-3, weight_decay=0.0, emas=[average], ema_decays=[0.99])
    for step in range(steps):
        pick = torch.randint(len(images), (batch,))
        t = torch.sigmoid(torch.randn(batch) + 0.5).clamp_min(1e-3)
        s = torch.cat([t[:half], t[half:] * torch.sigmoid(torch.randn(half) - 2)])  # half are velocities, half jumps
        x, v = k.path_point(images[pick], torch.randn(batch, 1, 8, 8), t)
        output = model(x, t, s, labels[pick])
        flow_matching, *_ = k.flow_matching_loss(output[:half], v[:half], t[:half])
        value, x, v, t, s, y = (part[half:] for part in (output, x, v, t, s, labels[pick]))
        l = t + 0.1 ** (1 + step / steps) * (s - t)
        target, _, x_l = k.euler_lookahead(x, v, t, l)
        with torch.no_grad():
            increment = model(x_l, l, s, y) - value
        consistency, *_ = k.consistency_loss(value, increment, x, target, t, l, s)
        optimizer.zero_grad()
        (flow_matching + consistency).backward()
        scale, finite = k.clip_scale(nn.utils.get_total_norm([p.grad for p in model.parameters()]), max_norm=1.0)
        optimizer.step(grad_scale=scale, finite=finite)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(average), model.parameters())
    x, y, one = torch.randn(100, 1, 8, 8), torch.arange(10).repeat(10), torch.ones(100)
    x = (x - model(x, one, 0 * one, y)).detach()  # from noise at time 1 to data at time 0
    return (labels[torch.cdist(x.flatten(1), images.flatten(1)).argmin(1)] == y).sum().item()


if __name__ == "__main__":
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"of 100 samples, made in one step each, {train()} are nearest to a digit of their class")

"""DDPM++ as EDM describes it (arXiv 2206.00364, appendix F.2), written for the tests from its layout alone: a function
of weights by the names of public files, without modules, and random weights of that layout."""

import math

import torch
import torch.nn.functional as F

HALF = math.sqrt(0.5)


def forward(w, x, t, second, labels=None, blocks=1, attention=(), levels=2):
    """The output for images x and times t; second: what the embedding `map_layer0_s` sees."""
    C = w["map_layer0.weight"].shape[1]

    def linear(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def sines(v):
        k = torch.arange(C // 2, dtype=v.dtype) / (C // 2 - 1)
        angle = v[:, None] * (1 / 10000) ** k
        return torch.cat([angle.sin(), angle.cos()], 1)

    first = sines(t) if labels is None else sines(t) + labels @ w["map_augment.weight"].T
    emb = linear("map_layer1", F.silu(linear("map_layer0", first)))
    emb = F.silu(emb + linear("map_layer1_s", F.silu(linear("map_layer0_s", sines(second)))))

    def norm(name, v):
        return F.group_norm(v, min(32, v.shape[1] // 4), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def conv(name, v):
        weight = w[f"{name}.weight"]
        return F.conv2d(v, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def resampled(name, v):
        if name.endswith("_down"):
            return (v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2]) / 4
        return v.repeat_interleave(2, -1).repeat_interleave(2, -2) if name.endswith("_up") else v

    def block(name, v):
        h = conv(f"{name}.conv0", resampled(name, F.silu(norm(f"{name}.norm0", v))))
        h = F.silu(norm(f"{name}.norm1", h + linear(f"{name}.affine", emb)[:, :, None, None]))
        h = conv(f"{name}.conv1", h)
        v = resampled(name, v)
        v = conv(f"{name}.skip", v) if f"{name}.skip.weight" in w else v
        v = (v + h) * HALF
        if f"{name}.qkv.weight" not in w:
            return v
        B, c, height, width = v.shape
        q, k, u = conv(f"{name}.qkv", norm(f"{name}.norm2", v)).reshape(B, c, 3, -1).unbind(2)
        scores = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(c), 2)
        h = torch.einsum("bqk,bck->bcq", scores, u).reshape(B, c, height, width)
        return (v + conv(f"{name}.proj", h)) * HALF

    size, skips = x.shape[-1], []
    for level in range(levels):
        at = f"enc.{size >> level}x{size >> level}"
        x = conv(f"{at}_conv", x) if level == 0 else block(f"{at}_down", x)
        skips.append(x)
        for k in range(blocks):
            x = block(f"{at}_block{k}", x)
            skips.append(x)
    for level in reversed(range(levels)):
        at = f"dec.{size >> level}x{size >> level}"
        x = block(f"{at}_in1", block(f"{at}_in0", x)) if level == levels - 1 else block(f"{at}_up", x)
        for k in range(blocks + 1):
            x = block(f"{at}_block{k}", torch.cat([x, skips.pop()], 1))
    return conv(f"dec.{size}x{size}_aux_conv", F.silu(norm(f"dec.{size}x{size}_aux_norm", x)))


def random_weights(size=8, C=16, multipliers=(1, 2), blocks=1, attention=(4,), colours=3, labels=9):
    """Random weights of a small network of the layout, with the buffers that a public file holds."""
    source, w, E = torch.Generator().manual_seed(0), {}, 4 * C

    def layer(name, *shape, bias=True):
        w[f"{name}.weight"] = torch.randn(shape, generator=source) / math.sqrt(math.prod(shape[1:]))
        if bias:
            w[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=source)

    def norm(name, channels):
        w[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=source)
        w[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=source)

    def block(name, into, out, attends=False):
        norm(f"{name}.norm0", into)
        layer(f"{name}.conv0", out, into, 3, 3)
        layer(f"{name}.affine", out, E)
        norm(f"{name}.norm1", out)
        layer(f"{name}.conv1", out, out, 3, 3)
        if into != out or name.endswith(("_down", "_up")):
            layer(f"{name}.skip", out, into, 1, 1)
        if name.endswith(("_down", "_up")):
            w[f"{name}.conv0.resample_filter"] = w[f"{name}.skip.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        if attends:
            norm(f"{name}.norm2", out)
            layer(f"{name}.qkv", 3 * out, out, 1, 1)
            layer(f"{name}.proj", out, out, 1, 1)
        return out

    for ending in ("", "_s"):
        layer(f"map_layer0{ending}", E, C)
        layer(f"map_layer1{ending}", E, E)
    if labels:
        layer("map_augment", C, labels, bias=False)
    here, skips = C, [C]
    layer(f"enc.{size}x{size}_conv", C, colours, 3, 3)
    for level, multiplier in enumerate(multipliers):
        side = size >> level
        if level:
            skips.append(block(f"enc.{side}x{side}_down", here, here))
        for k in range(blocks):
            here = block(f"enc.{side}x{side}_block{k}", here, C * multiplier, side in attention)
            skips.append(here)
    for level, multiplier in reversed([*enumerate(multipliers)]):
        side = size >> level
        if level == len(multipliers) - 1:
            block(f"dec.{side}x{side}_in0", here, here, True)
            block(f"dec.{side}x{side}_in1", here, here)
        else:
            block(f"dec.{side}x{side}_up", here, here)
        for k in range(blocks + 1):
            attends = k == blocks and side in attention
            here = block(f"dec.{side}x{side}_block{k}", here + skips.pop(), C * multiplier, attends)
    norm(f"dec.{size}x{size}_aux_norm", here)
    layer(f"dec.{size}x{size}_aux_conv", colours, here, 3, 3)
    return w

"""The demo's language model: a small decoder of the Llama kind, in plain torch, and a sharded checkpoint of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of a `Decoder`."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    positions: int = 1024

    @classmethod
    def of_size(cls, megabytes: float) -> Config:
        """About ``megabytes`` of float32 parameters."""
        big = megabytes >= 100
        vocabulary, hidden, intermediate = (32_000, 768, 2048) if big else (2_000, 128, 352)
        heads, kv_heads = (12, 4) if big else (4, 2)
        one = hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * intermediate + 2)
        layers = max(1, round((megabytes * 1e6 / 4 - vocabulary * hidden) / one))
        return cls(vocabulary, hidden, intermediate, layers, heads, kv_heads)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Rotary(nn.Module):
    """Tables that are computed by the constructor and are in no checkpoint."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        frequencies = 1.0 / (10_000.0 ** (torch.arange(0, width, 2).float() / width))
        angles = torch.outer(torch.arange(positions).float(), frequencies)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-2]
        left, right = x.chunk(2, -1)
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        return x * cos + torch.cat((-right, left), -1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.width = config.hidden // config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, self.width * config.kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden, self.width * config.kv_heads, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.width)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True, enable_gqa=True)
        out: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.post_norm = RMSNorm(config.hidden)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), rotary)
        out: torch.Tensor = x + self.mlp(self.post_norm(x))
        return out


class Decoder(nn.Module):
    """Tokens to logits; the head is the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.hidden)
        self.rotary = Rotary(config.hidden // config.heads, config.positions)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary)
        out: torch.Tensor = self.lm_head(self.norm(x))
        return out


def reference(config: Config) -> Decoder:
    """A decoder, built ordinarily, with values no constructor would give: what the checkpoint is made from."""
    model = Decoder(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
    return model


def write_checkpoint(model: Decoder, folder: Path, *, files: int, progress: Callable[[int], None]) -> list[Path]:
    """Write safetensors shard files and their index, without the tied head. ``progress`` gets bytes as they come."""
    from safetensors.torch import save_file

    weights = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    total = sum(tensor.nbytes for tensor in weights.values())
    shards: list[dict[str, torch.Tensor]] = [{}]
    before = 0
    for key, tensor in weights.items():
        if before >= total * len(shards) / files:
            shards.append({})
        shards[-1][key] = tensor
        before += tensor.nbytes
    weight_map = {}
    paths = []
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, path.name))
        paths.append(path)
        progress(sum(tensor.nbytes for tensor in shard.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return paths

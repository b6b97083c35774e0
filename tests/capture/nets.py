"""Small modules that the capture tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from weightlift.capture.hooks import HOOK_ID

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(self.query(x), -1)
        return x * weights, weights


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        mixed, _ = self.attention(x)
        return x + scale * torch.tanh(self.out(mixed))


class Net(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)


def states(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    """What each layer returns, without any hook."""
    result = []
    for layer in net.layers:
        x = layer(x, scale=0.5)
        result.append(x)
    return result


@dataclass
class Answer:
    value: torch.Tensor
    extra: torch.Tensor | None = None


class GivesDataclass(nn.Module):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(x + 1, x * 2)


class GivesDict(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"value": x + 1, "extra": x * 2}


class Mixed(nn.Module):
    """Modules that return a dataclass and a dict, and one that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.data = GivesDataclass()
        self.table = GivesDict()
        self.often = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.data(x).value + self.table(x)["value"]
        for _ in range(3):
            x = self.often(x)
        return x


def x(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, WIDTH)


def hooks_on(model: nn.Module) -> int:
    """How many hook entries of ours, of any kind, the model carries."""
    count = 0
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            count += HOOK_ID in getattr(module, name)
            count += HOOK_ID in getattr(module, f"{name}_with_kwargs")
    return count


def same(left: object, right: object) -> bool:
    """Bit-equal sequences of tensors."""
    a, b = list(left), list(right)  # type: ignore[call-overload]
    return len(a) == len(b) and all(torch.equal(one, two) for one, two in zip(a, b))

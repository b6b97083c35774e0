"""Load a checkpoint into a hand-written module: nothing is allocated or initialised that the checkpoint provides."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import weightlift as wl


class Classifier(nn.Module):
    def __init__(self, width: int = 512, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        self.register_buffer("scale", torch.linspace(0.5, 1.0, depth), persistent=False)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)  # slow, and for nothing when weights are loaded: not run then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, scale in zip(self.layers, self.scale, strict=True):
            x = x + scale * torch.relu(layer(x))
        return self.head(x)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        trained = Classifier()
        save_file(trained.state_dict(), file)

        print(wl.plan(Classifier, file), "\n")  # headers only

        model = wl.load(Classifier, file)  # a callable: built deferred, returned whole
        x = torch.randn(2, 512)
        assert torch.equal(model(x), trained(x))

        half = wl.load(lambda: Classifier(), file, dtype=torch.bfloat16)
        print("as bfloat16:", half.head.weight.dtype, half.scale.dtype)

        existing = Classifier()  # a module: filled in place, its parameters stay the same objects
        weight = existing.head.weight
        wl.load(existing, file)
        assert existing.head.weight is weight
        assert torch.equal(existing(x), trained(x))
        print("loaded, and filled in place")


if __name__ == "__main__":
    main()

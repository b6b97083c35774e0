"""Watch a model run: hidden states by pattern, the last token only, an edit in flight, and eight requests at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import weightlift as wl


def main() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(100, 32), *layers, nn.Linear(32, 100)).eval()
    ids = torch.randint(0, 100, (2, 10))

    with torch.no_grad(), wl.capture(
        model, hidden=nn.TransformerEncoderLayer, last=wl.Output("[1-4]", tokens=-1), logits="5"
    ) as got:
        model(ids)
    for name, tensor in got.named("hidden").items():
        print(f"layer {name}: {tuple(tensor.shape)}, norm {tensor.norm():.2f}")
    print(f"last token of layer 4: {tuple(got['last'][-1].shape)}")

    with torch.no_grad(), wl.capture(model, first=wl.Output("1", replace=torch.zeros_like), logits="5") as edited:
        model(ids)
    print(f"with layer 1 silenced the logits move by {(edited['logits'][0] - got['logits'][0]).abs().max():.2f}")

    def request(number: int) -> bool:
        mine = torch.full((1, 3), number)
        with torch.no_grad(), wl.capture(model, embedded="0") as seen:
            model(mine)
        return torch.equal(seen["embedded"][0], model[0](mine))

    with ThreadPoolExecutor(8) as pool:
        right = sum(pool.map(request, range(80)))
    print(f"{right} of 80 requests in 8 threads saw their own tensors")
    print(f"hooks left: {sum(len(module._forward_hooks) for module in model.modules())}")


if __name__ == "__main__":
    main()

"""Eight threads load one tied checkpoint again and again, while another builds ordinary modules."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import weightlift as wl


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


def main(threads: int = 8, loads: int = 25) -> None:
    trained = Tied()
    checkpoint = {key: value for key, value in trained.state_dict().items() if key != "head.weight"}
    tokens = torch.arange(5)
    expected = trained(tokens)

    def work(_: int) -> int:
        right = 0
        for _ in range(loads):
            model = wl.load(Tied, checkpoint)
            right += model.head.weight is model.embed.weight and torch.equal(model(tokens), expected)
        return right

    done = threading.Event()
    seen = []

    def bystander() -> None:
        while not done.is_set():
            weight = nn.Linear(4, 4).weight
            seen.append(weight.device.type == "cpu" and bool(weight.any()))

    other = threading.Thread(target=bystander)
    other.start()
    with ThreadPoolExecutor(threads) as pool:
        right = sum(pool.map(work, range(threads)))
    done.set()
    other.join()

    print(f"{right} of {threads * loads} loads right; {sum(seen)} of {len(seen)} ordinary layers right meanwhile")
    assert right == threads * loads
    assert all(seen)


if __name__ == "__main__":
    main()

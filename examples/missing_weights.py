"""What happens with weights that a checkpoint lacks, and that their values depend on the seed and the name alone."""

import logging

import torch
from torch import nn

import weightlift as wl


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)


def main() -> None:
    logging.getLogger("weightlift").setLevel(logging.ERROR)  # else it says what is missing, at each load
    checkpoint = {key: value for key, value in Model().state_dict().items() if key.startswith("body.")}
    checkpoint["old_head.weight"] = torch.zeros(2, 32)

    try:
        wl.load(Model, checkpoint)
    except wl.PlanError as error:
        print(error, "\n")  # every problem at once; nothing was read or changed
        assert len(error.problems) == 3

    plan = wl.plan(Model, checkpoint, strict=False)
    print("missing:", ", ".join(plan.report.missing_keys))
    print("unexpected:", ", ".join(plan.report.unexpected_keys))

    one = wl.load(Model, checkpoint, strict=False, seed=7, workers=1)
    again = wl.load(Model, checkpoint, strict=False, seed=7, workers=8)
    other = wl.load(Model, checkpoint, strict=False, seed=8)
    empty = wl.load(Model, {}, strict=False, seed=7)  # more is missing; the head's values are the same
    assert torch.equal(one.head.weight, again.head.weight)
    assert torch.equal(one.head.weight, empty.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not one.head.bias.any()
    print("the same seed gives the same values, with 1 worker or 8, whatever else is missing")


if __name__ == "__main__":
    main()

"""What torch refuses a constructor is refused where the constructor can see it."""

import warnings

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.recorder import Recorder

init = nn.init


def ints(*shape):
    return torch.ones(shape, dtype=torch.int64)


def expanded():
    return torch.ones(300, 1).expand(300, 3)


REFUSED = {
    "std below zero": lambda: init.normal_(torch.empty(3), 0.0, -1.0),
    "std below zero by name": lambda: torch.empty(3).normal_(mean=0.0, std=-1.0),
    "bounds the wrong way": lambda: init.uniform_(torch.empty(3), 1.0, 0.0),
    "bounds beyond the dtype": lambda: init.uniform_(torch.empty(3, dtype=torch.half), -1e6, 1e6),
    "trunc_normal_ the wrong way": lambda: init.trunc_normal_(torch.ones(9, 3), a=2, b=-2),
    "samples for integers": lambda: init.normal_(ints(3)),
    "kaiming_uniform_ for integers": lambda: init.kaiming_uniform_(ints(3, 4)),
    "xavier_uniform_ for integers": lambda: init.xavier_uniform_(ints(3, 4)),
    "trunc_normal_ for integers": lambda: init.trunc_normal_(ints(3, 4)),
    "randn of integers": lambda: torch.randn(3, dtype=torch.int64),
    "samples for eight bits": lambda: init.normal_(torch.ones(3, dtype=torch.float8_e4m3fn)),
    "a number too large": lambda: torch.empty(3, dtype=torch.int8).fill_(1000),
    "a mask's number for halves": lambda: torch.empty(3, dtype=torch.half).fill_(torch.finfo(torch.float32).min),
    "full of a number too large": lambda: torch.full((3,), 1e10, dtype=torch.half),
    "nan for integers": lambda: init.constant_(ints(3), float("nan")),
    "ones of four bits": lambda: torch.ones(3, dtype=torch.uint4),
    "samples for repeated elements": lambda: init.kaiming_uniform_(expanded()),
    "a probability": lambda: torch.empty(3).bernoulli_(2.0),
    "integers times a fraction": lambda: ints(3).mul_(0.5),
    "integers divided": lambda: ints(3).div_(2),
    "a complex factor": lambda: torch.ones(300).mul_(2j),
    "complex summands": lambda: torch.ones(300).add_(torch.ones(300, dtype=torch.cfloat)),
    "triangle of a vector": lambda: torch.ones(300).triu_(),
    "copy_ of another shape": lambda: torch.ones(3, 200).copy_(torch.ones(7, 200)),
    "add_ of another shape": lambda: torch.ones(3, 200).add_(torch.ones(7, 200)),
    "add_ to repeated elements": lambda: expanded().add_(torch.ones(300, 3)),
    "clamp_ without a bound": lambda: torch.ones(300).clamp_(),
    "clamp without a bound": lambda: torch.ones(300, 300).clamp(),
    "clamp_ without a bound by name": lambda: torch.ones(300).clamp_(min=None, max=None),
    "polar of halves": lambda: torch.polar(torch.ones(5000).half(), torch.ones(5000).half()),
    "polar of bfloat16": lambda: torch.polar(torch.ones(5000).bfloat16(), torch.ones(5000).bfloat16()),
    "complex of bfloat16": lambda: torch.complex(torch.ones(5000).bfloat16(), torch.ones(5000).bfloat16()),
    "qr of halves": lambda: torch.linalg.qr(torch.ones(80, 80).half()),
    "svd of bfloat16": lambda: torch.linalg.svd(torch.ones(80, 80).bfloat16()),
    "det of halves": lambda: torch.linalg.det(torch.ones(80, 80).half()),
    "matrices of truth values": lambda: torch.ones(80, 80, dtype=torch.bool) @ torch.ones(80, 80, dtype=torch.bool),
    "softmax of integers": lambda: ints(5000).softmax(0),
    "a triangle of eight bits": lambda: torch.ones(80, 80).to(torch.float8_e4m3fn).tril(),
    "a product added to truth values": lambda: torch.ones(80, 80).bool().addmm_(*[torch.ones(80, 80).bool()] * 2),
    "eight bits plus eight bits": lambda: torch.ones(300).to(torch.float8_e4m3fn).add_(torch.ones(300)),
    "its own transpose copied": lambda: (made := torch.full((80, 80), 2.0)).copy_(made.mT),
    "its own transpose added": lambda: (made := torch.full((80, 80), 2.0)).add_(made.mT),
    "rows copied over the next": lambda: (made := torch.full((80, 80), 2.0))[1:].copy_(made[:-1]),
    "out over its own input": lambda: torch.add((made := torch.ones(300))[1:], 1, out=made[:-1]),
    "its own row multiplied": lambda: (made := torch.full((80, 80), 2.0)).mul_(made[0]),
    "a mask of another shape": lambda: torch.ones(300, 200).masked_fill_(torch.ones(7, 7, dtype=torch.bool), 1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_constructor_can_catch_what_torch_refuses(name):
    caught = []

    def build():
        try:
            REFUSED[name]()
        except Exception as error:
            caught.append(error)
        return nn.Identity()

    build()
    wl.defer(build)
    ordinary, deferred = caught
    assert type(ordinary) is type(deferred)
    assert str(ordinary).splitlines()[0] == str(deferred).splitlines()[0]


ACCEPTED = {
    "a scalar's number": lambda: torch.ones((), dtype=torch.half).fill_(1e6),
    "infinity": lambda: init.constant_(torch.ones(3), float("-inf")),
    "a repeated element": lambda: torch.ones(1).expand(5).fill_(1),
    "many dims": lambda: torch.ones((2,) * 12).mul_(2),
    "a diagonal": lambda: torch.zeros(4, 4, 4).fill_diagonal_(1.0),
    "a smaller shape": lambda: torch.ones(3, 200).copy_(torch.ones(200)),
    "one bound": lambda: torch.ones(300).clamp_(max=0.5),
    "bounds that are tensors": lambda: torch.ones(300).clamp_(torch.zeros(300), torch.full((300,), 0.5)),
    "a product of halves": lambda: torch.ones(80, 80).half() @ torch.ones(80, 80).half(),
    "a concatenation of bfloat16": lambda: torch.cat([torch.ones(5000).bfloat16(), torch.ones(1).bfloat16()]),
    "a triangle of halves": lambda: torch.ones(80, 80).half().tril(3),
    "rows of integers": lambda: ints(500, 8).index_select(0, torch.tensor([7, 499])),
    "a sum of bfloat16": lambda: torch.ones(500, 8).bfloat16().add_(torch.ones(500, 8).bfloat16()),
    "itself": lambda: (made := torch.full((80, 80), 2.0)).copy_(made).add_(made),
    "integers of integers": lambda: ints(300).add_(ints(300)),
    "one half copied to the other": lambda: (made := torch.full((80, 80), 2.0), made[40:].copy_(made[:40].mul_(3)))[0],
    "one half added to the other": lambda: (made := torch.full((80, 80), 2.0), made[:40].add_(made[40:]))[0],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_nothing_else_is_refused_or_run_at_once(name):
    expected = ACCEPTED[name]()
    recorder = Recorder(seed=0)
    with FunctionRecorder(recorder), recorder:
        made = ACCEPTED[name]()
    assert not recorder.forced
    recorder.force_tensors([made], "the test")
    assert torch.equal(made, expected)


def test_a_trial_draws_from_no_generator_and_warns_of_nothing():
    before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wl.defer(lambda: nn.ParameterList([init.trunc_normal_(torch.empty(4, 4), 5.0, 1.0, -2.0, 2.0)]))
    assert torch.equal(before, torch.get_rng_state())
    assert len(told) == 1


class OutOfRange(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(2))
        with torch.no_grad():
            self.weight.index_copy_(0, torch.tensor([5000]), torch.ones(1))


def test_a_call_that_fails_when_it_is_run_is_named_with_what_to_do():
    with pytest.raises(wl.TransferError, match=r"weight: its initialiser failed in index_copy_: .*defer=False"):
        wl.load(OutOfRange, {"other": torch.ones(2)}, strict=False)
    assert wl.load(OutOfRange, {"other": torch.ones(2), "weight": torch.ones(5000)}).weight.sum() == 5000

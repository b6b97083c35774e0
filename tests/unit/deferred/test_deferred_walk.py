"""Which recorded calls must run before others, and what their samples are named after: as looked for one by one."""

import gc
import random

import pytest
import torch
from torch import nn

import weightlift as wl
from weightlift.deferred.functions import FunctionRecorder
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.replay import Walk, label_samples, needed
from weightlift.deferred.tape import live_readers

MANY = 5000  # more than is calculated at once


def one_by_one(records, supplied=(), *, readers=True):
    """Everything that is needed, every reader of everything that is written looked at for every writer."""
    found = set()
    stack = [record.last for record in records if record.pending]
    while stack:
        node = stack.pop()
        if node is None or node.done or node in found:
            continue
        found.add(node)
        stack += [version for _, version in node.deps]
        for record in node.writes if readers else ():
            stack += [
                reader for reader in live_readers(record)
                if reader.seq < node.seq and not all(target in supplied for target in reader.writes)
            ]  # fmt: skip
    return sorted(found, key=lambda node: node.seq)


def labels_one_by_one(records):
    labels = {}
    for mark, readers in (("#", False), ("#read#", True)):
        for record in records:
            count = 0
            for node in one_by_one([record], readers=readers):
                if node.random and node not in labels:
                    labels[node] = f"{record.label}{mark}{count}"
                    count += 1
    return labels


STEPS = [
    lambda a, b: a.normal_(),
    lambda a, b: a.mul_(2),
    lambda a, b: a.copy_(b),
    lambda a, b: a.add_(b),
    lambda a, b: a.zero_(),
    lambda a, b: a.uniform_().add_(b),
    lambda a, b: a[:7].normal_() is None or a,
    lambda a, b: a + b,
    lambda a, b: torch.rand_like(a) * b,
    lambda a, b: (a * 2).normal_() + b,
]


def program(seed):
    """Tensors, some of what was made of them, and the recorder."""
    choose = random.Random(seed)
    recorder = Recorder(seed=0)
    with FunctionRecorder(recorder), recorder, torch.no_grad():
        tensors = [torch.zeros(MANY) for _ in range(4)]
        for _ in range(30):
            made = choose.choice(STEPS)(*choose.sample(tensors, 2))
            if choose.random() < 0.4 and all(made is not tensor for tensor in tensors):
                tensors.append(made)  # others are gone, and with them what they read
    return tensors, recorder


@pytest.mark.parametrize("seed", range(60))
def test_what_is_needed_and_what_it_is_named(seed):
    tensors, recorder = program(seed)
    records = list(dict.fromkeys(record for tensor in tensors if (record := recorder.record_of(tensor)) is not None))
    random.Random(seed).shuffle(records)
    gc.collect()
    for number, record in enumerate(records):
        record.label = str(number)
        assert needed([record]) == one_by_one([record])
    supplied = set(records[::2])
    assert needed(records, supplied) == one_by_one(records, supplied)
    walk = Walk()
    turns = [node for record in records for node in walk.needed([record])]
    assert len(turns) == len(set(turns)) and set(turns) == set(one_by_one(records))
    expected = labels_one_by_one(records)
    label_samples(records)
    assert {node: node.seed_label for node in turns if node.random} == expected


class Chain(nn.Module):
    """Each layer made of the one before, and of what is changed meanwhile."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(count)])
        shift = torch.ones(2, 2)
        nn.init.zeros_(self.layers[0].weight)
        with torch.no_grad():
            for before, layer in zip(self.layers, self.layers[1:]):
                layer.weight.copy_(before.weight).add_(shift)
                shift += 1


@pytest.mark.timeout(100)
def test_a_chain_takes_time_for_each_of_its_calls_once():
    count = 1500
    chain = wl.load(lambda: Chain(count), {}, strict=False)
    assert [chain.layers[n].weight[0, 0].item() for n in (0, 1, 2, 3)] == [0, 1, 3, 6]
    assert chain.layers[count - 1].weight[0, 0].item() == count * (count - 1) / 2

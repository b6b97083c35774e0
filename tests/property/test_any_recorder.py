"""Recorders of nets made up at random, compiled and plain: they record what plain hooks do, and no graph breaks."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.property.made_nets import (
    WIDTH,
    Stepwise,
    add_step,
    edits,
    net_of,
    observers,
    scales,
    shifts,
    tensors_of,
)
from tests.property.made_programs import choice, nodes, number
from tests.property.search import few
from tests.property.taps_by_hand import ByHand, Choice, NoTensor, Stop, alike
from torch import nn

import weightlift as wl
from weightlift.errors import CaptureError

CALM = ["plain", "plain", "keywords", "twice", "sometimes", "often", "direct", "method", "caught", "ungraded"]


def put_hook(model: nn.Module, number: int, kind: int) -> None:
    nodes = [module for module in model.modules() if isinstance(module, Stepwise)]
    node = nodes[number % len(nodes)]
    if kind % 4 == 1:
        node.register_forward_hook(edits)
    elif kind % 4 == 2:
        node.register_forward_pre_hook(shifts)
    elif kind % 4 == 3:
        node.register_forward_pre_hook(scales, with_kwargs=True)


def change(model: nn.Module, kind: int, number: int) -> None:
    """What a recorder has to follow."""
    nodes = [module for module in model.modules() if isinstance(module, Stepwise)]
    node = nodes[number % len(nodes)]
    names = [name for name in node._modules if name != "many"]
    kind %= 6
    if kind == 1 and names:
        node._modules[names[number % len(names)]] = Stepwise(20, number, False)
    elif kind == 2:
        add_step(node, Stepwise(21, number, False), "plain", 90, in_list=number % 2 == 1)
    elif kind == 3:
        model.train(not model.training)
    elif kind == 4:
        node.w.data = node.w.data * 3
    elif kind == 5:
        node.w = nn.Parameter(node.w.detach() * 2)


def by_hand(
    model: nn.Module, choices: dict[str, Choice], selectors: dict[str, Any], x: torch.Tensor, depth: int
) -> tuple[Any, Any, set[str], bool]:
    """What a recorder should return: the output, the values, what is wrong with them; and if an edit was refused."""
    opened = ByHand(*copy.deepcopy((model, choices, selectors)))
    token = observers.set(())
    output = None
    try:
        opened.__enter__()
        try:
            output = opened.model(x, depth)
        except Stop:
            pass
        finally:
            opened.close()
    finally:
        observers.reset(token)
    calls: dict[str, Any] = {name: {} for name in choices}
    for noted in opened.noted:
        if noted.lack is None:
            calls[noted.tap][noted.fqn] = (*calls[noted.tap].get(noted.fqn, ()), noted.kept)
    return output, calls, opened.wrong(), opened.refused


def check_record(
    record: Any, model: nn.Module, choices: dict[str, Choice], selectors: dict[str, Any], depth: int
) -> bool:
    """Whether no edit was refused: torch goes on without compiling where one is."""
    x = torch.linspace(-1, 1, 2 * 3 * WIDTH).view(2, 3, WIDTH).requires_grad_()
    given = x * 1
    try:
        wanted, calls, wrong, refused = by_hand(model, choices, selectors, given, depth)
    except CaptureError:  # a module that is wanted itself, and was replaced
        with pytest.raises(CaptureError):
            record(given, depth)
        return True
    except NoTensor:
        with pytest.raises(TypeError, match="choose one with index"):
            record(given, depth)
        return False
    try:
        output, got = record(given, depth)
        found = {name: got.calls(name) for name in choices}
    except CaptureError:
        assert wrong
        return not refused
    assert not wrong, wrong
    assert alike(output, wanted)
    for name in choices:
        assert alike(found[name], calls[name]), name
        assert gradient_of(calls[name], x) == gradient_of(found[name], x)
    return not refused


def gradient_of(values: Any, x: torch.Tensor) -> Any:
    tensors = [tensor for tensor in tensors_of(list(values.values())) if tensor.requires_grad]
    if not tensors:
        return None
    total = sum(tensor.sum() for tensor in tensors)
    (grad,) = torch.autograd.grad(total, x, retain_graph=True, allow_unused=True)
    return grad.tolist() if grad is not None and grad.any() else None  # compiled code gives zeros for what is unused


@few(6)
@given(
    nodes,
    choice,
    choice,
    number,
    st.lists(st.tuples(number, number), max_size=2),
    number,
    number,
    st.sampled_from(["eager", "aot_eager"]),
)
def test_a_recorder_records_what_plain_hooks_do(nodes, first, second, depth, hooks, kind, which, backend):
    model = net_of(nodes, CALM, calm=True)
    for where, what in hooks:
        put_hook(model, where, what)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    depth %= 4
    records = []
    whole = True
    for choices in ({"t": first}, {"t": first, "u": second}):
        try:
            ByHand(model, choices).__enter__().close()
        except CaptureError:
            return
        record = wl.recorder(model, **{name: choice.tap(model) for name, choice in choices.items()})
        selectors = {name: choice.select(model) for name, choice in choices.items()}
        records.append((choices, selectors, record, torch.compile(record, backend=backend)))
    for changed_by in (0, kind):
        change(model, changed_by, which)
        for choices, selectors, record, compiled in records:
            for run in (record, compiled, compiled):
                whole = check_record(run, model, choices, selectors, depth) and whole
    assert not whole or not torch._dynamo.utils.counters["graph_break"]
    errors: list[BaseException] = []

    def work(choices: dict[str, Choice], selectors: dict[str, Any], compiled: Any) -> None:
        try:
            for _ in range(3):
                check_record(compiled, model, choices, selectors, depth)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(choices, selectors, compiled))
        for choices, selectors, _, compiled in records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]

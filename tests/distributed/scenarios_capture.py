"""Captures on two ranks: sharded and split modules, each rank with its own input."""

from __future__ import annotations

import os
import threading
from contextvars import copy_context

import torch
import torch.distributed as dist
from tests.capture.nets import Net, hooks_on, states
from tests.distributed.models import fsdp, mesh, tensor_parallel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import weightlift as wl

RANK = int(os.environ.get("RANK", "0"))


def _net(layers=3):
    torch.manual_seed(0)
    return Net(layers).eval()


def _own_input():
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(10 + RANK))


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _sharded(net):
    for layer in net.layers:
        fully_shard(layer, mesh=mesh(2))
    return fully_shard(net, mesh=mesh(2))


def _close(left, right):
    return len(left) == len(right) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right))


def fsdp2_modules():
    net, plain, value = _sharded(_net()), _net(), _own_input()
    assert isinstance(net.layers[0].out.weight, DTensor)
    for _ in range(2):
        with wl.capture(net, hidden="layers.*", weights=wl.Output("layers.*.attention", index=1)) as got:
            net(value)
        assert _close(got["hidden"], states(plain, value))
        inputs = [value, *states(plain, value)[:-1]]
        assert _close(got["weights"], [layer.attention(h)[1] for layer, h in zip(plain.layers, inputs)])
        got["hidden"][1].sum().backward()
    states(plain, value)[1].sum().backward()
    theirs = plain.layers[0].out.weight.grad
    dist.all_reduce(theirs, op=dist.ReduceOp.AVG)
    assert torch.allclose(net.layers[0].out.weight.grad.full_tensor() / 2, theirs, atol=1e-5)
    assert hooks_on(net) == 0


def only_one_rank_captures():
    net, plain, value = _sharded(_net()), _net(), _own_input()
    with torch.no_grad():
        if RANK == 1:
            with wl.capture(net, hidden="layers.*") as got:
                out = net(value)
            assert _close(got["hidden"], states(plain, value))
        else:
            out = net(value)
        assert _close([out], [plain(value)])


def declared_outputs_of_a_sharded_llama():
    model, plain = _llama(), _llama()
    fsdp(mesh(2))(model)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(RANK))
    with torch.no_grad():
        theirs = plain(ids, output_hidden_states=True, output_attentions=True)
        with wl.capture(model, "hidden_states", "attentions") as got:
            model(ids)
        assert _close(got["hidden_states"], theirs.hidden_states)
        assert _close(got["attentions"], theirs.attentions)


def a_stopped_forward_of_sharded_modules():
    net, plain, value = _sharded(_net()), _net(), _own_input()
    with torch.no_grad():
        for _ in range(2):
            with wl.capture(net, hidden=wl.Output("layers.[01]", stop=True)) as got:
                net(value)
            assert _close(got["hidden"], states(plain, value)[:2])
            assert _close([net(value)], [plain(value)])
    net(value).sum().backward()
    sharded = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(grad is not None for grad in sharded.values())
    with wl.capture(net, hidden=wl.Output("layers.[01]", stop=True)):
        net(value)
    assert any(parameter.grad is None for parameter in net.parameters()), "those that were gathered have none"
    net.reset_iter_state()
    assert all(parameter.grad is sharded[name] for name, parameter in net.named_parameters())


def tensor_parallel_modules():
    net, plain = _net(), _net()
    value = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))

    class Pair(nn.Module):
        def __init__(self, one):
            super().__init__()
            self.up, self.down = one.layers[0].out, one.head

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    whole, split = Pair(plain), Pair(net)
    parallelize_module(split, mesh(2), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with wl.capture(split, up="up", down="down", given=wl.Input("down")) as got:
        out = split(value)
    with wl.capture(whole, up="up") as want:
        expected = whole(value)
    part = want["up"][0].chunk(2, -1)[RANK]
    assert torch.allclose(got["up"][0], part, atol=1e-6), "a rank gets what the module returned on it"
    assert isinstance(split.up.weight, DTensor)
    assert torch.allclose(out, expected, atol=1e-5) and got["down"][0] is out
    got["up"][0].sum().backward()
    assert split.up.weight.grad is not None


def outputs_that_are_distributed_tensors():
    value = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    net, plain = _net(), _net()
    parallelize_module(net.head, mesh(2), ColwiseParallel(use_local_output=False))
    taps = {
        "head": wl.Output("head", detach=True),
        "last": wl.Output("head", tokens=-1),
        "wide": wl.Output("head", dtype=torch.float64),
    }
    with wl.capture(net, **taps) as got:
        net(value)
    expected = plain(value)
    assert got["head"][0].placements == (Shard(2),)
    assert torch.allclose(got["head"][0].full_tensor(), expected, atol=1e-6)
    assert torch.allclose(got["last"][0].full_tensor(), expected[:, -1], atol=1e-6)
    assert torch.allclose(got["wide"][0].full_tensor(), expected.double(), atol=1e-6)


def declared_outputs_of_a_split_llama():
    model, plain = _llama(), _llama()
    tensor_parallel(mesh(2))(model)
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        theirs = plain(ids, output_hidden_states=True)
        with wl.capture(model, "hidden_states") as got:
            model(ids)
    assert _close(got["hidden_states"], theirs.hidden_states)


def _recorders_agree(net, expected, value):
    record = wl.recorder(net, hidden="layers.*")
    with torch.no_grad():
        for call in (record, torch.compile(record, backend="eager")):
            assert _close(call(value)[1]["hidden"], expected)


def compiled_recorders_of_split_modules():
    net, plain = _net(), _net()
    value = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    for layer in net.layers:
        parallelize_module(layer, mesh(2), {"attention.query": ColwiseParallel(output_layouts=Replicate())})
    _recorders_agree(net, states(plain, value), value)


def compiled_recorders_of_sharded_modules():
    net, plain, value = _sharded(_net()), _net(), _own_input()
    _recorders_agree(net, states(plain, value), value)


def ddp():
    net, plain, value = _net(), _net(), _own_input()
    wrapped = DistributedDataParallel(net)
    with wl.capture(wrapped, hidden="module.layers.*") as got:
        out = wrapped(value)
    assert _close(got["hidden"], states(plain, value))
    (out.sum() + got["hidden"][0].sum()).backward()
    assert net.layers[0].out.weight.grad is not None


def threads_of_a_rank():
    """Collectives must come in one order on all ranks, so the threads take turns; each gets its own."""
    net, plain = _sharded(_net()), _net()
    wrong = []

    def work(number):
        value = torch.full((1, 2, 8), float(number + RANK))
        with torch.no_grad(), wl.capture(net, hidden=wl.Output("layers.*", expect="maybe")) as got:
            net(value)
        if not _close(got["hidden"], states(plain, value)):
            wrong.append(number)

    for number in range(4):
        thread = threading.Thread(target=copy_context().run, args=(work, number))
        thread.start()
        thread.join(60)
    assert not wrong


SCENARIOS = {
    run.__name__: run
    for run in (
        fsdp2_modules,
        only_one_rank_captures,
        declared_outputs_of_a_sharded_llama,
        a_stopped_forward_of_sharded_modules,
        tensor_parallel_modules,
        outputs_that_are_distributed_tensors,
        declared_outputs_of_a_split_llama,
        compiled_recorders_of_split_modules,
        compiled_recorders_of_sharded_modules,
        ddp,
        threads_of_a_rank,
    )
}

"""Control flow, autograd, threads, other modes, nesting: what a constructor does besides making tensors."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .cases import Bag, case, equal, holds, near


def _linear() -> nn.Module:
    return nn.Linear(64, 64)


@case(check=lambda m: holds(m.w.norm() <= 10.0, "the loop did not run to its end"))
def loop_until_the_norm_is_small() -> nn.Module:
    w = nn.Parameter(torch.randn(64, 64))
    with torch.no_grad():
        while w.norm() > 10.0:
            w.mul_(0.5)
    return Bag(w=w)


@case(check=lambda m: holds(torch.linalg.cond(m.w.detach()) < 1e5, "ill-conditioned"))
def sampled_again_until_it_fits() -> nn.Module:
    for _ in range(50):
        w = torch.randn(32, 32)
        if torch.linalg.cond(w) < 1e5 and w.abs().max() < 5:
            break
    return Bag(w=nn.Parameter(w))


@case()
def branches_and_asserts_on_values() -> nn.Module:
    lin = nn.Linear(64, 64)
    assert torch.isfinite(lin.weight).all() and not torch.equal(lin.weight[0], lin.weight[1])
    assert torch.allclose(lin.weight, lin.weight.clone()) and lin.weight.any()
    bias = nn.Parameter(torch.zeros(64) if lin.bias.abs().max() < 100 else torch.ones(64))
    kept = lin.weight[:, (lin.weight.std(0) > 0).nonzero().flatten()]
    return Bag(lin=lin, bias=bias, kept=nn.Parameter(kept.detach().clone()))


def _calibrated(m: Any) -> None:
    near((m.lin.weight * m.scale).std(), 1.0, "the calibrated scale", 0.05)


@case(check=_calibrated)
def calibrated_by_gradient_descent() -> nn.Module:
    lin, scale = nn.Linear(64, 64), nn.Parameter(torch.ones(()))
    for _ in range(60):
        loss = ((lin.weight.detach() * scale).std() - 1).pow(2)
        (grad,) = torch.autograd.grad(loss, scale)
        with torch.no_grad():
            scale -= 10 * grad
    with torch.no_grad():
        scale.copy_(1 / lin.weight.std())
    return Bag(lin=lin, scale=scale)


@case(correlated=True)
def optimised_with_backward_and_gradients_left() -> nn.Module:
    lin = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(lin.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        lin(torch.ones(4, 64)).pow(2).mean().backward()
        optimizer.step()
    with torch.no_grad():
        lin.weight.add_(1.0)
    return Bag(lin=lin)


@case(kind="exact")
def optimised_with_a_fused_kernel() -> nn.Module:
    """One call that writes to several lists of tensors."""
    lin = nn.Linear(64, 64)
    nn.init.constant_(lin.weight, 0.01)
    nn.init.zeros_(lin.bias)
    optimizer = torch.optim.AdamW(lin.parameters(), lr=0.1, fused=True)
    lin(torch.ones(3, 64)).sum().backward()
    optimizer.step()
    return lin


@case(correlated=True)
def data_dependent_initialisation_by_a_forward() -> nn.Module:
    """LSUV: scale each layer by the statistics of its own output."""
    layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    h = torch.ones(8, 64)
    for child in layers:
        h = child(h)
        if isinstance(child, nn.Linear):
            child.weight.data.div_(h.std().clamp(min=0.1))
    return layers


@case(loadable=False)
def non_leaf_plain_attribute() -> nn.Module:
    w = nn.Parameter(torch.randn(64, 64))
    bag = Bag(w=w)
    bag.derived = w * 2
    bag.detached = (w + 1).detach()
    return bag


@case()
def no_grad_and_set_grad_enabled() -> nn.Module:
    with torch.no_grad():
        a = nn.Parameter(torch.randn(64, 64))
        b = nn.Linear(64, 64)
    torch.set_grad_enabled(False)
    c = a * 2
    torch.set_grad_enabled(True)
    with torch.enable_grad():
        d = nn.Parameter(a.detach() + 1)
    return Bag(a=a, b=b, c=c, d=d)


@case(kind="exact", loadable=False)
def inference_mode() -> nn.Module:
    with torch.inference_mode():
        table = torch.arange(64.0).sin()
        filled = torch.zeros(8)
        filled[2:] = 1.0
    bag = Bag(copied=nn.Parameter(table.clone()))
    bag.table, bag.filled = table, filled
    return bag


@case()
def sampled_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        source = torch.randn(64, 64) * 3
    return Bag(w=nn.Parameter(source.clone()))


@case(repeatable=False, missing=False, leaves_rng=False)
def layers_built_by_helper_threads() -> nn.Module:
    with ThreadPoolExecutor(2) as pool:
        layers = list(pool.map(lambda _: _linear(), range(4)))
    return Bag(mine=nn.Linear(64, 64), layers=nn.ModuleList(layers))


@case(repeatable=False, missing=False, leaves_rng=False)
def helper_thread_initialises_what_this_thread_made() -> nn.Module:
    """Without the recorder a write of another thread is at once; it must hit real memory, in order."""
    w = nn.Parameter(torch.zeros(64, 64))
    w.data[0].sum().item()

    def work() -> None:
        with torch.no_grad():
            w[32:].uniform_(3, 4)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return Bag(w=w)


@case(repeatable=False, missing=False)
def helper_thread_reads_what_this_thread_sampled() -> nn.Module:
    w = nn.Parameter(torch.ones(64, 64) * 3)
    nn.init.uniform_(w, 1, 2)
    w.detach().numpy()
    with ThreadPoolExecutor(1) as pool:
        mean = pool.submit(lambda: float(w.mean())).result()
    near(w.mean(), mean, "what the thread read")
    return Bag(w=w)


@case(inputs=lambda: (torch.rand(2, 64),))
def meta_device_for_a_throw_away() -> nn.Module:
    with torch.device("meta"):
        size = sum(p.numel() for p in nn.Linear(1000, 1000).parameters())
        ghost = torch.empty(4) + 1
    assert ghost.is_meta
    return nn.Linear(64, 64 if size > 10 else 32)


@case()
def cpu_device_context_and_arguments() -> nn.Module:
    with torch.device("cpu"):
        a = nn.Linear(64, 64)
    b = nn.Linear(64, 64, device="cpu")
    c = torch.randn(64, 64, device=torch.device("cpu", 0)).to("cpu")
    return Bag(a=a, b=b, c=c)


@case()
def fake_tensor_mode_inside() -> nn.Module:
    with FakeTensorMode():
        ghost = nn.Linear(64, 128)
        shape = ghost(torch.empty(3, 64)).shape
    return Bag(lin=nn.Linear(64, shape[-1]))


@case()
def fake_copy_of_a_deferred_tensor() -> nn.Module:
    lin = nn.Linear(64, 64)
    with FakeTensorMode() as mode:
        ghost = mode.from_tensor(lin.weight)
        shape = (ghost @ ghost).shape
    return Bag(lin=lin, w=nn.Parameter(torch.zeros(shape)))


@case(loadable=False)
def nested_defer() -> nn.Module:
    import weightlift as wl

    outer = nn.Linear(64, 64)
    inner = wl.defer(_linear, seed=4).materialize()
    assert float(inner.weight.detach().abs().max()) > 0
    bag = Bag(outer=outer, inner=inner, after=nn.Linear(64, 64))
    equal(wl.defer(_linear, seed=4).materialize().weight, inner.weight, "the same seed inside")
    return bag


@case()
def nested_load() -> nn.Module:
    import weightlift as wl

    inner = wl.load(_linear, {"weight": torch.full((64, 64), 3.0), "bias": torch.arange(64.0)})
    holds((inner.weight == 3).all(), "the inner load's values, inside the constructor")
    return Bag(outer=nn.Linear(64, 64), inner=inner)


@case()
def nested_handle_dropped_or_failing() -> nn.Module:
    import weightlift as wl

    wl.defer(_linear)
    try:
        wl.load(_linear, {"weight": torch.ones(3, 3)})
    except Exception as error:
        assert not isinstance(error, AttributeError | NameError), error
    else:
        raise AssertionError("a wrong shape was accepted")
    return Bag(outer=nn.Linear(64, 64))


@case(missing=False)
def load_state_dict_inside() -> nn.Module:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.load_state_dict(a.state_dict())
    c = nn.Linear(64, 64)
    c.load_state_dict({"weight": torch.ones(64, 64), "bias": torch.zeros(64)}, assign=True)
    equal(a.weight, b.weight, "loaded from a's state dict")
    d = nn.Linear(64, 64)
    d.load_state_dict({k: v * 2 for k, v in a.state_dict().items()})
    return Bag(a=a, b=b, c=c, d=d)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2


@case()
def custom_autograd_function() -> nn.Module:
    w = nn.Parameter(torch.randn(64, 64))
    return Bag(w=w, doubled=nn.Parameter(_Double.apply(w).detach()))


@case()
def scripted_submodule() -> nn.Module:
    return Bag(inner=torch.jit.script(nn.Linear(64, 64)), lin=nn.Linear(64, 64))


@case()
def functional_call_and_stacked_state() -> nn.Module:
    layers = [nn.Linear(64, 16) for _ in range(3)]
    params, _ = torch.func.stack_module_state(layers)
    doubled = torch.func.functional_call(layers[0], {"weight": layers[1].weight * 2}, (torch.ones(1, 64),))
    return Bag(layers=nn.ModuleList(layers), stacked=nn.Parameter(params["weight"].detach()), out=doubled.detach())


@case()
def exception_caught_inside() -> nn.Module:
    with contextlib.suppress(RuntimeError):
        nn.Linear(64, 64)(torch.randn(3, 5))
    with contextlib.suppress(RuntimeError):
        torch.empty(3).normal_().view(7)
    return Bag(lin=nn.Linear(64, 64))

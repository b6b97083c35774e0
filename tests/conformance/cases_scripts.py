"""What is not a comparison of two modules: scopes, errors, bystanders, and the guard itself."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from .cases import Bag, equal, holds, script


def _linear() -> nn.Module:
    return nn.Linear(32, 32)


def _state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((32, 32), value), "bias": torch.zeros(32)}


@script()
def current_load_inside_and_outside() -> None:
    import weightlift as wl

    seen: list[Any] = []

    def build() -> nn.Module:
        seen.append(wl.current_load())
        thread = threading.Thread(target=lambda: seen.append(wl.current_load()))
        thread.start()
        thread.join()
        wl.load(inner, _state())
        seen.append(wl.current_load())
        return _linear()

    def inner() -> nn.Module:
        seen.append(wl.current_load())
        return _linear()

    holds(wl.current_load() is None, "there is a load outside")
    wl.load(build, _state())
    holds(wl.current_load() is None, "the load outlives its scope")
    outer, other_thread, nested, again = seen
    holds(outer is not None, "None inside the constructor")
    holds(other_thread is None, "another thread sees this thread's load")
    holds(nested is not None and nested is not outer, "the nested load does not see itself")
    holds(again is outer, "after the nested load, the outer one is not current")


@script()
def current_load_under_defer_and_without() -> None:
    import weightlift as wl

    seen: list[Any] = []

    def build() -> nn.Module:
        seen.append(wl.current_load())
        return _linear()

    wl.load(build, _state(), defer=False)
    holds(seen[0] is not None, "None inside a constructor that is run with defer=False")
    holds(wl.current_load() is None, "the load outlives its scope")


@script()
def ordinary_building_on_request() -> None:
    import weightlift as wl

    real: list[bool] = []

    def build() -> nn.Module:
        m = _linear()
        values = (ctypes.c_float * 4).from_address(m.weight.untyped_storage().data_ptr())
        real.append(any(v != 0 for v in values))
        return m

    module = wl.load(build, _state(4.0), defer=False)
    holds(real == [True], "defer=False deferred")
    equal(module.weight, torch.full((32, 32), 4.0), "loaded")
    part = wl.load(build, {"weight": torch.ones(32, 32)}, defer=False, strict=False)
    holds(0 < float(part.bias.detach().abs().max()) <= 1, "the missing bias is not initialised")


@script()
def an_exception_in_a_constructor_leaves_nothing_on() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    import weightlift as wl

    class PlannedError(Exception):
        pass

    def build() -> nn.Module:
        _linear()
        raise PlannedError("on purpose")

    for call in (lambda: wl.defer(build), lambda: wl.load(build, _state()), lambda: wl.defer(build, seed=3)):
        try:
            call()
        except PlannedError:
            pass
        else:
            raise AssertionError("the constructor's own exception was swallowed")
        holds(not _get_current_dispatch_mode_stack(), "a dispatch mode is still on")
        holds(torch._C._len_torch_function_stack() == 0, "a function mode is still on")
        holds(wl.current_load() is None, "a load is still current")
        holds(float(torch.randn(64).std()) > 0, "tensors are still deferred")


@script()
def nothing_is_on_after_success() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    import weightlift as wl

    before = (torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state(), torch.is_grad_enabled())
    handle = wl.defer(_linear)
    holds(not _get_current_dispatch_mode_stack() and torch._C._len_torch_function_stack() == 0, "a mode is on")
    holds(float(nn.Linear(32, 32).weight.detach().std()) > 0, "a later module is deferred")
    torch.set_rng_state(before[2])
    handle.materialize()
    after = (torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state(), torch.is_grad_enabled())
    holds(before[:2] == after[:2] and before[3] == after[3], f"{before} became {after}")
    equal(before[2], after[2], "torch's random state")


@script()
def bystander_threads_build_ordinarily() -> None:
    import weightlift as wl

    stop, wrong = threading.Event(), []

    def bystander() -> None:
        while not stop.is_set():
            m = nn.Linear(16, 16)
            if not float(m.weight.detach().abs().max()) > 0 or not m.weight.is_leaf:
                wrong.append("a module of another thread is not initialised")
            if wl.current_load() is not None:
                wrong.append("another thread sees a load")

    threads = [threading.Thread(target=bystander) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(60):
        m = wl.defer(_linear).materialize()
        holds(float(m.weight.detach().abs().max()) > 0, "our own module is not initialised")
    stop.set()
    for t in threads:
        t.join()
    holds(not wrong, wrong[:1])


@script()
def the_same_bits_in_any_thread() -> None:
    import weightlift as wl

    def build() -> nn.Module:
        w = nn.Parameter(torch.randn(64, 64) * 2)
        nn.init.trunc_normal_(v := nn.Parameter(torch.empty(64, 64)), std=1.0, a=-1.0, b=1.0)
        return Bag(w=w, v=v, lin=nn.Linear(32, 32), read=torch.tensor(torch.randn(64).tolist()))

    first = wl.defer(build, seed=5).materialize()
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: wl.defer(build, seed=5).materialize(), range(12)))
    handle = wl.defer(build, seed=5)
    with ThreadPoolExecutor(1) as pool:
        others.append(pool.submit(handle.materialize).result())  # built here, materialised there
    for other in others:
        for key, value in first.state_dict().items():
            equal(value, other.state_dict()[key], key)


@script()
def default_seed_is_that_of_the_process() -> None:
    import weightlift as wl

    torch.manual_seed(77)
    torch.randn(10)
    a = wl.defer(_linear).materialize()
    b = wl.defer(_linear, seed=77).materialize()
    equal(a.weight, b.weight, "seed=None is torch.initial_seed()")
    torch.manual_seed(78)
    holds(not torch.equal(a.weight, wl.defer(_linear).materialize().weight), "another seed, the same values")


@script()
def loading_from_a_handle() -> None:
    import weightlift as wl

    module = wl.defer(_linear).load(_state(2.0))
    equal(module.weight, torch.full((32, 32), 2.0), "loaded")
    handle = wl.defer(lambda: nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, bias=False)))
    holds(handle.numel == 8 * 4 + 4 + 8, f"numel is {handle.numel}")
    holds(handle.nbytes == 4 * handle.numel, f"nbytes is {handle.nbytes}")


@functools.cache
def _table() -> torch.Tensor:
    return torch.empty(64).fill_(3.0).cumsum(0)


@script()
def cached_table_serves_later_ordinary_modules() -> None:
    """It was made while something was deferred; it must be real for who meets it later."""
    import weightlift as wl

    handle = wl.defer(lambda: Bag(w=nn.Parameter(_table() * 1.0)))
    equal(_table(), torch.arange(1, 65) * 3.0, "right after defer(), which returned")
    equal(Bag(w=nn.Parameter(_table() * 1.0)).w, torch.arange(1, 65) * 3.0, "an ordinary module of it")
    equal(handle.materialize().w, torch.arange(1, 65) * 3.0, "materialised")
    _table().zero_()
    second = wl.defer(lambda: Bag(w=nn.Parameter(_table() + 1))).materialize()
    equal(second.w, torch.ones(64), "the table was changed in between")


LEFT: list[torch.Tensor] = []


@script()
def tensors_that_escape_before_materialize() -> None:
    """No unready tensor leaves the library: a sample kept in a global is real once defer() has returned."""
    import weightlift as wl

    def build() -> nn.Module:
        LEFT.append(torch.empty(64, 64).normal_())
        return Bag(w=nn.Parameter(LEFT[0] * 2))

    handle = wl.defer(build)
    kept = LEFT[0].clone()
    holds(0.8 < float(kept.std()) < 1.2, "the escaped sample")
    equal(handle.materialize().w, kept * 2, "made of the escaped sample")
    loaded = wl.load(build, {"w": torch.zeros(64, 64)})
    holds(0.8 < float(LEFT[1].std()) < 1.2, "the second escaped sample")
    holds((loaded.w == 0).all(), "loaded")


@script()
def values_written_after_loading_stay() -> None:
    """Nothing is replayed late over what the user has."""
    import weightlift as wl

    def build() -> nn.Module:
        lin = _linear()
        lin.plain = [lin.weight.data, torch.empty(8).normal_()]
        return lin

    module = wl.load(build, _state(3.0))
    with torch.no_grad():
        module.weight.mul_(2)
    torch.randn(3) @ torch.randn(3)
    wl.defer(build).materialize()
    equal(module.weight, torch.full((32, 32), 6.0), "after training began")
    equal(module.plain[0], torch.full((32, 32), 6.0), "its alias")
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    holds(not (module.weight == 6).all(), "the optimiser does not reach the weight")


def _unseen_read() -> None:
    import weightlift as wl

    def build() -> nn.Module:
        w = nn.Parameter(torch.empty(4096))
        nn.init.constant_(w, 3.0)
        # A read that no mode can see: the address through the C API of the storage.
        address = torch.Tensor.data_ptr.__get__(w.detach())
        with torch._C.DisableTorchFunction():
            value = (ctypes.c_float * 1).from_address(address())[0]
        holds(value == 3.0, f"an unseen read gave {value} without a fault")
        return Bag(w=w)

    wl.defer(build).materialize()


@script(guarded_only=True)
def the_guard_makes_unseen_reads_loud() -> None:
    """Either the read is seen (and right), or the process dies of it: never a silent zero."""
    child = multiprocessing.get_context("fork").Process(target=_unseen_read)
    child.start()
    child.join(60)
    holds(child.exitcode in (0, -11, -7), f"exit code {child.exitcode}: a silent wrong value")

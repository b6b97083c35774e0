"""What capturing costs, in pairs: each round runs both sides in turn, and the ratio of a round is what counts.

Run: ``python benchmarks/capture.py``. CPU time of one thread, torch with one thread. A small forward (batch 2, 56
tokens) and a larger one. Prints the median of the rounds' ratios with a 95 % interval of that median (bootstrap).

  off          a model that was captured before, beside one that never was: no hook is left
  bystander    a forward in a context that captures nothing while another context holds a capture open
  on           ``wl.capture`` around the forward, beside hooks written by hand, put on and taken off around it
  Transformers ``wl.capture(model, "hidden_states")`` beside ``output_hidden_states=True``
  compiled     ``torch.compile(wl.recorder(…))`` beside ``torch.compile(model)`` (``--compile``)
"""

from __future__ import annotations

import argparse
import contextvars
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import weightlift as wl
from weightlift.capture.hooks import HOOK_ID

Call = Callable[[], object]


def model_of(width: int, layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 3, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel(config).eval()


def by_hand(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in model.layers]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def captured(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with wl.capture(model, hidden="layers.*") as got:
        model(inputs)
    return got["hidden"]


def declared(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with wl.capture(model, "hidden_states") as got:
        model(inputs)
    return got["hidden_states"]


def seconds(call: Call, repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return time.thread_time() - start


def paired(name: str, first: Call, second: Call, rounds: int, repeats: int) -> tuple[float, float]:
    """Prints and returns the cost of a call of each; ``second`` is what ``first`` is compared with."""
    for _ in range(3):
        first(), second()
    ratios, ones, twos = [], [], []
    gc.collect()
    for number in range(rounds):
        if number % 2:
            one, two = seconds(first, repeats), seconds(second, repeats)
        else:
            two, one = seconds(second, repeats), seconds(first, repeats)
        ratios.append(one / two)
        ones.append(one / repeats)
        twos.append(two / repeats)
    low, high = interval(ratios)
    one, two = statistics.median(ones), statistics.median(twos)
    print(
        f"  {name:13} {one * 1e3:8.3f} ms  beside {two * 1e3:8.3f} ms   {statistics.median(ratios):.4f}×"
        f"  [{low:.4f}, {high:.4f}]"
    )
    return one, two


def interval(ratios: list[float]) -> tuple[float, float]:
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return medians[25], medians[974]


def hooks_on(model: nn.Module) -> int:
    return sum(HOOK_ID in module._forward_hooks or HOOK_ID in module._forward_pre_hooks for module in model.modules())


def measure(width: int, layers: int, tokens: int, rounds: int, repeats: int) -> None:
    print(f"Llama, width {width}, {layers} layers, batch 2, {tokens} tokens; {rounds} rounds of {repeats}")
    inputs = torch.randint(0, 1000, (2, tokens))
    model, never = model_of(width, layers), model_of(width, layers)
    captured(model, inputs)
    print(f"  hooks left after a capture: {hooks_on(model)}")
    paired("off", lambda: model(inputs), lambda: never(inputs), rounds, repeats)
    elsewhere = contextvars.Context()
    holder = wl.capture(model, hidden=wl.Output("layers.*", expect="maybe"))
    elsewhere.run(holder.__enter__)
    count = hooks_on(model)
    one, two = paired("bystander", lambda: model(inputs), lambda: never(inputs), rounds, repeats)
    print(f"  {'':13} {(one - two) / count * 1e6:.2f} µs for each of {count} hooked modules")
    elsewhere.run(holder.__exit__, None, None, None)
    paired("on", lambda: captured(model, inputs), lambda: by_hand(never, inputs), rounds, repeats)
    own = model_of(width, layers)
    theirs = partial(own, inputs, output_hidden_states=True)
    paired("Transformers", lambda: declared(model, inputs), theirs, rounds, repeats)


def bystander_floor(rounds: int) -> None:
    """The cost of our hooks alone, on modules that do nothing."""
    model = nn.Sequential(*(nn.Identity() for _ in range(100)))
    never = nn.Sequential(*(nn.Identity() for _ in range(100)))
    value = torch.zeros(1)
    holder = wl.capture(model, hidden=wl.Output("*", expect="maybe"))
    elsewhere = contextvars.Context()
    elsewhere.run(holder.__enter__)
    print("100 modules that do nothing")
    one, two = paired("bystander", lambda: model(value), lambda: never(value), rounds, 20)
    print(f"  {'':13} {(one - two) / 101 * 1e6:.2f} µs for each hooked module")
    elsewhere.run(holder.__exit__, None, None, None)


def compiled(rounds: int) -> None:
    model = model_of(256, 4)
    inputs = torch.randint(0, 1000, (2, 56))
    record = torch.compile(wl.recorder(model, hidden="layers.*"))
    plain = torch.compile(model)
    with torch.no_grad():
        paired("compiled", lambda: record(inputs), lambda: plain(inputs), rounds, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}, load {os.getloadavg()[0]:.1f}", end="; ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    with torch.no_grad():
        bystander_floor(arguments.rounds)
        measure(256, 6, 56, arguments.rounds, 5)
        measure(768, 4, 128, max(arguments.rounds // 5, 10), 1)
    if arguments.compile:
        compiled(arguments.rounds)


if __name__ == "__main__":
    main()

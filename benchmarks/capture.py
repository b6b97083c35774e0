"""What capturing costs, beside the same forward done in other ways.

Run: ``python benchmarks/capture.py``. CPU time of one thread, torch with one thread.

How it is measured, so that the order, the place in memory and the machine's drift decide nothing:

- A case compares two calls, pair by pair; which of the two runs first is drawn anew for each pair, as often the one as
  the other.
- Both sides run module trees of their own that share every parameter and buffer, so no weight lies better than
  another. The trees are copied afresh for each block of pairs, and a draw says which side gets which.
- Reported is the median of the pairs' ratios. Its 95 % interval comes from a bootstrap that draws whole blocks, and
  pairs within them: what a block has in common counts once.
- ``nothing`` compares two sides that do the same. It says what the method sees where there is nothing to see.

The cases:

  nothing       a model that was never captured beside another
  off           a model that has been captured, beside one that never was
  their off     the same after Transformers' own ``output_hidden_states=True``, whose hooks stay
  bystander     a forward in a context that captures nothing while another context holds a capture open
  on            ``wl.capture`` around the forward, beside hooks written by hand, put on before and taken off after it
  on, standing  the same, beside hooks written by hand that stay on their model for ever
  declared      ``wl.capture(model, "hidden_states")`` beside Transformers' own ``output_hidden_states=True``
  parts         entering, leaving and reading a declared capture of the small forward, each by itself (wall time)
  around        the small forward without what its embedding, layers and last norm take: plain, with ``wl.capture`` and
                with Transformers' own flag (wall time). All sides carry the same hooks that read the clock. The model's
                own work, which is 95 % of a forward and nearly all of the noise, is left out; so this sees differences
                that pairs of whole forwards can't see
  compiled      ``torch.compile(wl.recorder(…))`` beside ``torch.compile(model)``, and beside Transformers' own flag
"""

from __future__ import annotations

import argparse
import contextvars
import copy
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
Sides = Callable[[nn.Module, nn.Module, torch.Tensor], tuple[Call, Call]]
PAIRS_PER_BLOCK = 10


def llama(width: int, layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 3, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel(config).eval()


def tree_of(model: nn.Module) -> nn.Module:
    """Modules of its own around the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def by_hand(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in model.layers]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(seen)


def captured(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with wl.capture(model, hidden="layers.*") as got:
        model(inputs)
    return got["hidden"]


def declared(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with wl.capture(model, "hidden_states") as got:
        model(inputs)
    return got["hidden_states"]


def their_flag(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    states: tuple[torch.Tensor, ...] = model(inputs, output_hidden_states=True).hidden_states
    return states


def nothing(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    return partial(one, inputs), partial(two, inputs)


def off(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    captured(one, inputs)
    assert hooks_on(one) == 0
    return nothing(one, two, inputs)


def their_off(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    their_flag(one, inputs)
    return nothing(one, two, inputs)


def bystander(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    holder = wl.capture(one, hidden=wl.Output("**", expect="maybe"))
    contextvars.Context().run(holder.__enter__)

    def beside() -> object:
        return holder and one(inputs)  # the capture stays open as long as this call is known

    return beside, partial(two, inputs)


def on(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    return partial(captured, one, inputs), partial(by_hand, two, inputs)


def on_standing(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    seen: list[torch.Tensor] = []
    for layer in two.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))

    def standing() -> tuple[torch.Tensor, ...]:
        seen.clear()
        two(inputs)
        return tuple(seen)

    return partial(captured, one, inputs), standing


def own_flag(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    return partial(declared, one, inputs), partial(their_flag, two, inputs)


def compiled(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    return partial(torch.compile(wl.recorder(one, hidden="layers.*")), inputs), partial(torch.compile(two), inputs)


def compiled_flag(one: nn.Module, two: nn.Module, inputs: torch.Tensor) -> tuple[Call, Call]:
    record = torch.compile(wl.recorder(one, "hidden_states"))
    return partial(record, inputs), partial(torch.compile(two), inputs, output_hidden_states=True)


def hooks_on(model: nn.Module) -> int:
    return sum(HOOK_ID in module._forward_hooks or HOOK_ID in module._forward_pre_hooks for module in model.modules())


def seconds(call: Call) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


class Pairs:
    """The times of one case, block by block; ``first`` is what is compared with ``second``."""

    def __init__(self) -> None:
        self.blocks: list[list[tuple[float, float]]] = []

    def block(self, first: Call, second: Call, draw: random.Random) -> None:
        for _ in range(3):
            first(), second()
        orders = [True, False] * (PAIRS_PER_BLOCK // 2)
        draw.shuffle(orders)
        pairs = []
        gc.collect()
        gc.disable()
        try:
            for first_comes_first in orders:
                if first_comes_first:
                    one, two = seconds(first), seconds(second)
                else:
                    two, one = seconds(second), seconds(first)
                pairs.append((one, two))
        finally:
            gc.enable()
        self.blocks.append(pairs)

    def summary(self) -> tuple[float, float, float]:
        """The median ratio and the ends of its 95 % interval."""
        ratios = [[one / two for one, two in block] for block in self.blocks]
        draw = random.Random(0)
        medians = []
        for _ in range(1000):
            drawn = [draw.choices(block, k=len(block)) for block in draw.choices(ratios, k=len(ratios))]
            medians.append(statistics.median([ratio for block in drawn for ratio in block]))
        medians.sort()
        return statistics.median([ratio for block in ratios for ratio in block]), medians[25], medians[974]

    def times(self) -> tuple[float, float]:
        pairs = [pair for block in self.blocks for pair in block]
        return statistics.median([one for one, _ in pairs]), statistics.median([two for _, two in pairs])


def compare(name: str, model: nn.Module, inputs: torch.Tensor, sides: Sides, blocks: int) -> Pairs:
    """Prints and returns what a case costs. ``blocks`` is rounded up to an even number."""
    draw = random.Random(name)
    pairs = Pairs()
    for number in range(blocks + blocks % 2):
        trees = [tree_of(model), tree_of(model)]
        if number % 2:
            trees.reverse()
        first, second = sides(*trees, inputs)
        pairs.block(first, second, draw)
    median, low, high = pairs.summary()
    one, two = pairs.times()
    print(
        f"  {name:13} {one * 1e3:9.3f} ms  beside {two * 1e3:9.3f} ms   {median:.4f}×  [{low:.4f}, {high:.4f}]",
        flush=True,
    )
    return pairs


def measure(width: int, layers: int, tokens: int, blocks: int, only: str | None) -> None:
    print(f"Llama, width {width}, {layers} layers, batch 2, {tokens} tokens; {blocks * PAIRS_PER_BLOCK} pairs a case")
    model, inputs = llama(width, layers), torch.randint(0, 1000, (2, tokens))
    for name, sides in {
        "nothing": nothing,
        "off": off,
        "their off": their_off,
        "on": on,
        "on, standing": on_standing,
        "declared": own_flag,
    }.items():
        if only in (None, name):
            compare(name, model, inputs, sides, blocks)


def measure_bystander(blocks: int) -> None:
    """The cost of our hooks alone, on modules that do nothing."""
    count = 100
    model = nn.Sequential(*(nn.Identity() for _ in range(count)))
    print(f"{count} modules that do nothing")
    one, two = compare("bystander", model, torch.zeros(1), bystander, blocks).times()
    print(f"  {'':13} {(one - two) / (count + 1) * 1e6:.2f} µs for each hooked module")


def measure_parts(count: int) -> None:
    """Entering, leaving and reading, around a forward that drives everything else out of the caches."""
    model, inputs = llama(256, 6), torch.randint(0, 1000, (2, 56))
    taken: dict[str, list[float]] = {"enter": [], "leave": [], "read": []}
    clock = time.perf_counter
    for _ in range(count):
        start = clock()
        holder = wl.capture(model, "hidden_states")
        got = holder.__enter__()
        taken["enter"].append(clock() - start)
        model(inputs)
        start = clock()
        holder.__exit__(None, None, None)
        taken["leave"].append(clock() - start)
        start = clock()
        assert len(got["hidden_states"]) == 7
        taken["read"].append(clock() - start)
    print(f"parts of a declared capture, {count} forwards: medians", end="")
    print(*[f" {name} {statistics.median(values) * 1e6:.0f} µs" for name, values in taken.items()], sep=",")


class Clocked:
    """A model whose parts note when they begin and end; the time between them is what is looked at."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stamps: list[float] = []
        for part in (model.embed_tokens, *model.layers, model.norm):
            part.register_forward_pre_hook(self._note)
            part.register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        self.stamps.append(time.perf_counter())

    def seconds_between(self, call: Callable[[nn.Module], object]) -> float:
        self.stamps.clear()
        start = time.perf_counter()
        kept = call(self.model)
        edges = [start, *self.stamps, time.perf_counter()]
        del kept
        return sum(end - begin for begin, end in zip(edges[::2], edges[1::2], strict=True))


def measure_around(blocks: int) -> None:
    model, inputs = llama(256, 6), torch.randint(0, 1000, (2, 56))
    sides: dict[str, Callable[[nn.Module], object]] = {
        "plain": lambda tree: tree(inputs),
        "wl.capture": lambda tree: declared(tree, inputs),
        "their flag": lambda tree: their_flag(tree, inputs),
    }
    draw = random.Random("around")
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(blocks):
        trees = {name: Clocked(tree_of(model)) for name in sides}
        for name, call in sides.items():
            for _ in range(3):
                trees[name].seconds_between(call)
        gc.collect()
        gc.disable()
        try:
            for _ in range(PAIRS_PER_BLOCK):
                for name in draw.sample(list(sides), len(sides)):
                    taken[name].append(trees[name].seconds_between(sides[name]))
        finally:
            gc.enable()
    print(f"between the parts of the small forward, {blocks * PAIRS_PER_BLOCK} of each: medians, and beside plain")
    for name, values in taken.items():
        more = [(value - other) * 1e6 for value, other in zip(values, taken["plain"], strict=True)]
        low, high = interval(more, draw)
        middle = statistics.median(values) * 1e6
        print(f"  {name:12} {middle:7.0f} µs   +{statistics.median(more):.0f} [{low:.0f}, {high:.0f}]")


def interval(values: list[float], draw: random.Random) -> tuple[float, float]:
    """The ends of the median's 95 % interval."""
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def measure_compiled(blocks: int) -> None:
    print(f"compiled with inductor; width 256, 4 layers, batch 2, 56 tokens; {blocks * PAIRS_PER_BLOCK} pairs a case")
    model, inputs = llama(256, 4), torch.randint(0, 1000, (2, 56))
    compare_compiled("plain", model, inputs, compiled, blocks)
    compare_compiled("their flag", model, inputs, compiled_flag, blocks)


def compare_compiled(name: str, model: nn.Module, inputs: torch.Tensor, sides: Sides, blocks: int) -> None:
    """Compiling takes long: one pair of trees, whose blocks differ in time alone."""
    torch._dynamo.reset()
    first, second = sides(tree_of(model), tree_of(model), inputs)
    compare(name, nn.Identity(), inputs, lambda *_: (first, second), blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40, help=f"of {PAIRS_PER_BLOCK} pairs")
    parser.add_argument("--case", help="one of the small and large ones, for instance off")
    parser.add_argument("--only", choices=("small", "large", "bystander", "parts", "around", "compiled"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}, load {os.getloadavg()[0]:.1f}", end="; ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    cases: dict[str, Callable[[], None]] = {
        "bystander": lambda: measure_bystander(arguments.blocks),
        "parts": lambda: measure_parts(arguments.blocks * PAIRS_PER_BLOCK),
        "around": lambda: measure_around(arguments.blocks),
        "small": lambda: measure(256, 6, 56, arguments.blocks, arguments.case),
        "large": lambda: measure(768, 4, 128, max(arguments.blocks // 4, 4), arguments.case),
        "compiled": lambda: measure_compiled(arguments.blocks),
    }
    with torch.no_grad():
        for name, case in cases.items():
            if arguments.only in (None, name):
                case()


if __name__ == "__main__":
    main()

"""A 1.2 B Llama from files in the page cache: same dtype, both casts, and with memory of its own."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import ceilings, llama, peers
from benchmarks.harness import CEILING, Case

BF16, FP32 = torch.bfloat16, torch.float32

CASES = (
    Case(
        "same-dtype", "warm, bf16 as it is, 1.2 B Llama, every page touched",
        partial(llama.write, dtype=BF16), peers.contenders(BF16), target="≥ 1.0× the fastest peer",
    ),
    Case(
        "up-cast", "warm, bf16 → fp32, 1.2 B Llama", partial(llama.write, dtype=BF16),
        {
            **peers.contenders(FP32),
            f"{CEILING}parallel conversion": partial(ceilings.plain_conversion, BF16, FP32),
        },
        target="≥ 1.5× transformers, ≥ 80% of the ceiling",
    ),
    Case(
        "down-cast", "warm, fp32 → bf16, 1.2 B Llama", partial(llama.write, dtype=FP32),
        {
            **peers.contenders(BF16),
            f"{CEILING}parallel conversion": partial(ceilings.plain_conversion, FP32, BF16),
        },
        target="≥ 1.5× transformers, ≥ 80% of the ceiling",
    ),
    Case(
        "copy", "warm, bf16, every tensor in memory of its own (copy=True)", partial(llama.write, dtype=BF16),
        {**peers.copying(BF16), f"{CEILING}parallel read": ceilings.parallel_read},
        target="≥ 1.3× the best copying peer, ≥ 85% of the ceiling",
    ),
)  # fmt: skip

"""A 1.2 B Llama from files that the page cache has forgotten."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import ceilings, llama, peers
from benchmarks.harness import CEILING, Case

CASES = (
    Case(
        "cold", "page cache dropped, bf16, 1.2 B Llama, every page touched", partial(llama.write, dtype=torch.bfloat16),
        {
            **peers.contenders(torch.bfloat16),
            f"{CEILING}parallel direct read": partial(ceilings.parallel_read, direct=True),
        },
        target="≥ 1.3× transformers, ≥ 90% of the ceiling", cold=True,
    ),
)  # fmt: skip

"""Threads load tied Transformers models of different classes and dtypes at once while a bystander builds modules.

Run by test_pretrained_threads.py in a process of its own:
``python -m tests.concurrency.many_pretrained FOLDER THREADS LOADS (direct | installed)``; prints what it saw as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tests.concurrency.saved_models import DTYPES, Job, main
from tests.parity.compare import differences

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def models() -> dict[str, Any]:
    """Tied ones, without the tied name in the checkpoint; one whose experts are merged; one made of two models."""
    llama = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    mixtral = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    t5 = transformers.T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=64)
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    clip = transformers.CLIPConfig(text_config=SMALL, vision_config=vision, projection_dim=16)
    return {
        "llama": transformers.LlamaForCausalLM(llama),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        "t5": transformers.T5ForConditionalGeneration(t5),
        "mixtral": transformers.MixtralForCausalLM(mixtral),
        "clip": transformers.CLIPModel(clip),
    }


def jobs(folder: Path) -> Iterator[Job]:
    """Each model in each dtype."""
    for name, model in models().items():
        model.save_pretrained(folder / name)
        for dtype in DTYPES:
            yield Job(type(model), folder / name, {"dtype": dtype}, differences)


if __name__ == "__main__":
    main(jobs, limit_s=550)

"""Threads load tied Transformers models of different classes and dtypes at once while a bystander builds modules.

Run by test_pretrained_threads.py in a process of its own:
``python -m tests.concurrency.many_pretrained FOLDER THREADS LOADS (direct | installed)``; prints what it saw as JSON.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (its attributes are watched)
import torch
import transformers
from tests.concurrency import watch
from tests.parity.compare import differences, native_only

import weightlift as wl

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def main() -> None:
    folder, thread_count, loads, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    faulthandler.dump_traceback_later(550, exit=True)  # what hangs says where
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    jobs = []
    for name, model in models().items():
        model.save_pretrained(folder / name)
        jobs += [
            (type(model), folder / name, dtype, type(model).from_pretrained(folder / name, dtype=dtype))
            for dtype in DTYPES
        ]
    if mode == "installed":
        wl.install()
    for cls, path, dtype, _ in jobs:  # imports and caches of others come to rest
        load(cls, path, dtype, mode)
    sys.setswitchinterval(1e-4)
    wrong: list[str] = []
    done = [0] * thread_count

    def worker(number: int) -> None:
        for turn in range(loads):
            cls, path, dtype, expected = jobs[(7 * number + turn) % len(jobs)]
            try:
                model = load(cls, path, dtype, mode)
                found = [f"{cls.__name__}, {dtype}: {item}" for item in differences(model, expected)]
            except Exception:
                found = [traceback.format_exc()[-600:]]
            wrong.extend(found)
            done[number] += not found

    with watch.Watched() as watched, native_only():
        watch.on_threads(thread_count, worker)
    watch.answer({"right": sum(done), "wrong": wrong[:5], **watched.found})


def load(cls: Any, path: Path, dtype: torch.dtype, mode: str) -> Any:
    """As a program would, with and without the drop-in."""
    if mode == "installed":
        return cls.from_pretrained(path, dtype=dtype)
    return wl.from_pretrained(cls, path, dtype=dtype)


if __name__ == "__main__":
    main()

"""Eight threads load tied Transformers models of two classes and dtypes at once, while a bystander builds layers.

``python threads.py`` runs the same program twice, each time in a process of its own: as it is, and under
``weightlift run``. The program (`program` below) knows nothing of weightlift.
"""

import logging
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS, LOADS = 8, 25


def program(folder: Path) -> None:
    import torch
    import transformers
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    patched = {
        "PreTrainedModel.tie_weights": (transformers.PreTrainedModel, "tie_weights"),
        "torch.linspace": (torch, "linspace"),
        "torch.nn.init.normal_": (nn.init, "normal_"),
    }
    before = {name: getattr(owner, attribute) for name, (owner, attribute) in patched.items()}
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    models = [
        LlamaForCausalLM(LlamaConfig(**small, vocab_size=100, tie_word_embeddings=True)),
        T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=100)),
    ]
    cases: list[tuple[type, Path, torch.dtype, dict[str, torch.Tensor]]] = []
    for model in models:  # the checkpoints lack lm_head.weight, which is tied to the embedding
        path = folder / type(model).__name__
        model.save_pretrained(path)
        cases += [
            (type(model), path, dtype, {name: p.to(dtype) for name, p in model.named_parameters()})
            for dtype in (torch.float32, torch.bfloat16)
        ]

    def load(cls: type, path: Path, dtype: torch.dtype, expected: dict[str, torch.Tensor]) -> str:
        try:
            model = cls.from_pretrained(path, dtype=dtype)
        except Exception as error:
            return f"raised {type(error).__name__}"
        found = dict(model.named_parameters())
        if any(parameter.is_meta for parameter in found.values()):
            return "on meta"
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            return "not tied"
        same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        return "right" if same else "of other values"

    def work(number: int) -> list[str]:
        return [load(*cases[(number + turn) % len(cases)]) for turn in range(LOADS)]

    print(f"  {LOADS} loads in 1 thread: {counted(work(0))}")
    done, layers = threading.Event(), []

    def bystander() -> None:
        while not done.is_set():
            weight = nn.Linear(4, 4).weight
            layers.append(weight.device.type == "cpu" and weight.dtype == torch.float32 and bool(weight.any()))

    other = threading.Thread(target=bystander)
    other.start()
    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = [outcome for found in pool.map(work, range(THREADS)) for outcome in found]
    done.set()
    other.join()

    left = [name for name, (owner, attribute) in patched.items() if getattr(owner, attribute) is not before[name]]
    print(f"  {len(outcomes)} loads in {THREADS} threads: {counted(outcomes)}")
    print(f"  layers that the bystander built meanwhile: {'all' if all(layers) else 'not all'} of them ordinary ones")
    print(f"  patched for good afterwards: {', '.join(left) or 'nothing'}")


def counted(outcomes: list[str]) -> str:
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))


def main() -> None:
    ways = {"as it is": [], "under weightlift run": ["-m", "weightlift.cli.main", "run"]}
    printed = {}
    for way, command in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run(
                [sys.executable, *command, __file__, folder], capture_output=True, text=True, timeout=100, check=True
            )
        printed[way] = run.stdout
        print(f"{way}:\n{run.stdout}", end="")
    assert f"{THREADS * LOADS} loads in {THREADS} threads: {THREADS * LOADS} right\n" in printed["under weightlift run"]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        program(Path(sys.argv[1]))
    else:
        main()

"""Two models in one process, one thread each: they load and generate at the same time, and say what they say alone."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import weightlift as wl

PROMPT = torch.tensor([[1, 2, 3]])


def save(folder: Path) -> dict[type, Path]:
    """Two small language models with tied heads."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500, bos_token_id=0, eos_token_id=None)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    return {LlamaForCausalLM: folder / "llama", GPT2LMHeadModel: folder / "gpt2"}


def generate(cls: type, path: Path) -> list[int]:
    model = wl.from_pretrained(cls, path)
    return model.generate(PROMPT, max_new_tokens=40, do_sample=False, repetition_penalty=1.5)[0].tolist()


def main(rounds: int = 5) -> None:
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        paths = save(Path(folder))
        alone = {cls: generate(cls, path) for cls, path in paths.items()}
        for _ in range(rounds):
            with ThreadPoolExecutor(2) as pool:
                together = dict(zip(paths, pool.map(generate, paths, paths.values()), strict=True))
            assert together == alone
    tokens = ", ".join(f"{cls.__name__} {found[3:8]}…" for cls, found in alone.items())
    print(f"{rounds} times both at once: the same tokens as alone ({tokens})")


if __name__ == "__main__":
    main()

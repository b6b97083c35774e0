"""Trains a small Llama with accelerate and with Transformers' Trainer, spread in every way, and writes down the losses.

    python trainer.py FOLDER plain                          one process: what the others are compared with
    torchrun --nproc-per-node 2 trainer.py FOLDER ddp fsdp1 fsdp2

Everything is real and runs on the CPU, but for two places that take only an accelerator:

- accelerate turns FSDP on in processes that it counts as having a GPU each: it is told so (``_as_if_on_gpus``).
- torch's FSDP1 refuses ``sync_module_states`` for CPU tensors (``_check_module_states_for_sync_module_states``), and
  accelerate's plugin asks for a device to sync on. So the call behind that check is made here, before the wrapping.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tests.distributed.ending import leave
from torch import nn
from torch.distributed.utils import _sync_params_and_buffers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import weightlift as wl

RANK = int(os.environ.get("RANK", "0"))
SPREAD = "RANK" in os.environ
STEPS, BATCH, TOKENS = 20, 4, 12
WRAP = "LlamaDecoderLayer"


def build():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load(folder):
    """Only the first rank can see the file."""
    path = folder / "model.safetensors" if RANK == 0 else "/nowhere"
    return wl.load(build, path, source_rank=0 if SPREAD else None)


def pretrained(folder):
    """By the variables of efficient loading, where they are set."""
    return wl.from_pretrained(LlamaForCausalLM, folder)


def sent(model, kind):
    """DDP sends the parameters by itself, FSDP1 would on a GPU, and accelerate does for FSDP2."""
    unfilled = not model.model.embed_tokens.weight.any()
    assert unfilled == (RANK != 0)
    if kind == "fsdp1":
        _sync_params_and_buffers(dist.group.WORLD, [tensor.detach() for tensor in model.parameters()], 1 << 20, 0)
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 64, (TOKENS,), generator=generator) for _ in range(STEPS * BATCH)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def _as_if_on_gpus(state):
    state.distributed_type = DistributedType.MULTI_GPU


class _Trainer(Trainer):
    def create_accelerator_and_postprocess(self):
        if self.args.fsdp:
            _as_if_on_gpus(self.args.distributed_state)
        super().create_accelerator_and_postprocess()


def by_trainer(model, folder, kind):
    fsdp = {}
    if kind.startswith("fsdp"):
        config = {"version": int(kind[-1]), "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        config |= {"transformer_layer_cls_to_wrap": [WRAP], "cpu_ram_efficient_loading": kind == "fsdp2"}
        fsdp = {"fsdp": True, "fsdp_config": config | ({"sync_module_states": False} if kind == "fsdp1" else {})}
    arguments = TrainingArguments(
        str(folder / "trained"), use_cpu=True, per_device_train_batch_size=BATCH // (2 if SPREAD else 1),
        max_steps=STEPS, logging_steps=1, learning_rate=1e-3, save_strategy="no", report_to=[], disable_tqdm=True,
        seed=1, **fsdp,
    )  # fmt: skip
    trainer = _Trainer(model, arguments, train_dataset=data())
    trainer.train()
    _check_wrapping(trainer.model_wrapped, kind)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_accelerate(model, kind):
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = None
    if kind.startswith("fsdp"):
        _as_if_on_gpus(PartialState(cpu=True))
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(kind[-1]), auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=[WRAP],
            cpu_ram_efficient_loading=kind == "fsdp2", use_orig_params=True if kind == "fsdp1" else None,
            sync_module_states=False if kind == "fsdp1" else None,
        )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(data(), batch_size=BATCH // (2 if SPREAD else 1))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    _check_wrapping(model, kind)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def _check_wrapping(model, kind):
    found = {type(module).__name__ for module in model.modules()}
    expected = {"fsdp2": f"FSDP{WRAP}", "fsdp1": "FullyShardedDataParallel", "ddp": "DistributedDataParallel"}
    assert kind == "plain" or expected[kind] in found, found
    assert all(isinstance(p, nn.Parameter) and not p.is_meta for p in model.parameters())


def main():
    folder, kinds = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if SPREAD:
        # As ``accelerate launch`` sets them, and a process group before the model, as its scripts have.
        os.environ.update(FSDP_CPU_RAM_EFFICIENT_LOADING="true", ACCELERATE_TORCH_DEVICE="cpu")
        dist.init_process_group("gloo")
    else:
        torch.manual_seed(0)
        build().save_pretrained(folder)
    for kind in kinds:
        os.environ["ACCELERATE_USE_FSDP"] = str(kind.startswith("fsdp")).lower()
        model = load(folder) if kind == "ddp" else pretrained(folder)
        found = {"trainer": by_trainer(sent(model, kind), folder, kind)}
        found["accelerate"] = by_accelerate(sent(load(folder), kind), kind)
        (folder / f"{kind}-{RANK}.json").write_text(json.dumps(found))
    if SPREAD:
        leave()


if __name__ == "__main__":
    main()

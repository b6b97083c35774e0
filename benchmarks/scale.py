"""A 671 B-parameter checkpoint on 1,024 ranks, on paper: makes its headers (sparse files) and runs the plan.

    python benchmarks/scale.py [--folder DIR] [--mesh fsdp=1024 …]

The shapes are those of DeepSeek-V3's main model: 61 layers, 256 routed experts, weights in fp8 with a float32 scale for
each block of 128×128. The files have true headers and no data: they take up a few megabytes of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import weightlift as wl
from weightlift.cli.arguments import mesh
from weightlift.distributed.paper import on_mesh_alone

FILE_BYTES = 4_300_000_000
HIDDEN, LAYERS, DENSE, EXPERTS, VOCABULARY, HEADS = 7168, 61, 3, 256, 129280, 128
Q_RANK, KV_RANK, NOPE, ROPE, VALUE, WIDE, NARROW = 1536, 512, 128, 64, 128, 18432, 2048


def tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        yield from _attention(at + "self_attn.")
        if layer < DENSE:
            yield from _mlp(at + "mlp.", WIDE)
        else:
            yield at + "mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
            yield at + "mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
            for expert in range(EXPERTS):
                yield from _mlp(f"{at}mlp.experts.{expert}.", NARROW)
            yield from _mlp(at + "mlp.shared_experts.", NARROW)
        yield at + "input_layernorm.weight", "BF16", (HIDDEN,)
        yield at + "post_attention_layernorm.weight", "BF16", (HIDDEN,)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def _attention(at: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield from _fp8(at + "q_a_proj", Q_RANK, HIDDEN)
    yield at + "q_a_layernorm.weight", "BF16", (Q_RANK,)
    yield from _fp8(at + "q_b_proj", HEADS * (NOPE + ROPE), Q_RANK)
    yield from _fp8(at + "kv_a_proj_with_mqa", KV_RANK + ROPE, HIDDEN)
    yield at + "kv_a_layernorm.weight", "BF16", (KV_RANK,)
    yield from _fp8(at + "kv_b_proj", HEADS * (NOPE + VALUE), KV_RANK)
    yield from _fp8(at + "o_proj", HIDDEN, HEADS * VALUE)


def _mlp(at: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield from _fp8(at + "gate_proj", width, HIDDEN)
    yield from _fp8(at + "up_proj", width, HIDDEN)
    yield from _fp8(at + "down_proj", HIDDEN, width)


def _fp8(at: str, rows: int, columns: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield at + ".weight", "F8_E4M3", (rows, columns)
    yield at + ".weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def write(folder: Path) -> None:
    """The shard files, sparse, and their index."""
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
    shards: list[dict[str, dict[str, object]]] = [{}]
    at = 0
    for name, dtype, shape in tensors():
        nbytes = sizes[dtype]
        for extent in shape:
            nbytes *= extent
        if at + nbytes > FILE_BYTES:
            shards.append({})
            at = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    weight_map = {}
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + max(item["data_offsets"][1] for item in header.values()))  # type: ignore[index]
        weight_map.update(dict.fromkeys(header, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--mesh", type=mesh, nargs="*", default=[{"fsdp": 1024}, {"fsdp": 128, "tp": 8}, {"tp": 8}])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        os.makedirs(folder, exist_ok=True)
        write(folder)
        began = time.perf_counter()
        checkpoint = wl.open_checkpoint(folder)
        opened = time.perf_counter() - began
        parameters = sum(entry.numel for key, entry in checkpoint.items() if "scale_inv" not in key)
        print(f"{checkpoint!r}: {parameters:,} parameters; headers read in {opened:.2f} s")
        for shape in arguments.mesh:
            began = time.perf_counter()
            report = on_mesh_alone(checkpoint, shape)
            print(f"\n{report}\nworked out in {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()

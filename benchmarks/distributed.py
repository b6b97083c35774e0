"""Memory, bytes read and time of each rank of a distributed load, ours and the peers', in fresh processes.

    python benchmarks/distributed.py [--ranks 2] [--gigabytes 2.2] [--cases …] [--rounds 3] [--json FILE]

A Llama of the given size in bfloat16 is saved as safetensors shards and loaded under FSDP2. Each case runs in processes
of its own, one thread each, cases taking turns. Memory is what a rank's smaps_rollup shows at the end as anonymous, and
the highest RSS (VmHWM, reset before the load) above what it was before; bytes are ``rchar`` of /proc/self/io.

    sharded      wl.load(…, parallelize=fully_shard)            each rank reads its own byte ranges (copy=True)
    mapped       the same with mapping                          (the default; a page comes in when it is used)
    source       wl.load(…, parallelize=…, source_rank=0)       rank 0 reads and streams
    unfilled     wl.load(…, source_rank=0)                      for another engine to fill; before sharding
    dcp          meta + fully_shard + torch.distributed.checkpoint's HuggingFaceStorageReader
    transformers from_pretrained with FSDP_CPU_RAM_EFFICIENT_LOADING, fully_shard, broadcast of the state
    pretrained   from_pretrained alone, as above; before sharding

Seconds are those of the slower rank: of the process's first load, and "again" the better of two more, when the system
has the memory at hand (on a virtual machine the first touch of a page can cost several times the read). "cpu" are
processor seconds of a rank, all threads, user and system: on a machine that others use meanwhile they say more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CASES = ("sharded", "mapped", "source", "unfilled", "dcp", "transformers", "pretrained")
AGAIN = 2
WIDTHS = (12, 8, 6, 5, 6, 6, 10, 8, 9, 8)


def config(gigabytes: float) -> Any:
    from transformers import LlamaConfig

    layer = 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632)
    layers = max(1, round((gigabytes * 1e9 - 4 * 32000 * 2048) / layer))
    return LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def make(folder: Path, gigabytes: float) -> None:
    """Random weights without an initialiser run: the values do not matter here."""
    import torch
    from transformers import LlamaForCausalLM

    if (folder / "config.json").exists():
        return
    with torch.device("meta"):
        model = LlamaForCausalLM(config(gigabytes))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0, 1 << 14)
    model.save_pretrained(folder, max_shard_size="1GB")


# -- one rank ---------------------------------------------------------------------------------------------------------


def rank_main(case: str, folder: Path, dtype_name: str, port: int) -> None:
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.PrefixStore("bench", store))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, LlamaForCausalLM

    import weightlift as wl

    found = AutoConfig.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (ranks,))
    dtype = getattr(torch, dtype_name)

    def build() -> torch.nn.Module:
        return LlamaForCausalLM(found)

    def shard(model: torch.nn.Module) -> torch.nn.Module:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def load() -> torch.nn.Module:
        mine = str(folder) if rank == 0 else "/nowhere"
        if case in ("sharded", "mapped"):
            return wl.load(build, folder, dtype=dtype, parallelize=shard, copy=case == "sharded")
        if case == "source":
            return wl.load(build, mine, dtype=dtype, parallelize=shard, source_rank=0, copy=True)
        if case == "unfilled":
            return wl.load(build, mine, dtype=dtype, source_rank=0, copy=True)
        if case == "dcp":
            return _dcp(build, folder, dtype, shard)
        return _transformers(folder, dtype, shard if case == "transformers" else None, rank)

    tiny = LlamaForCausalLM(config(0.001))  # everything that a first model imports
    del tiny
    gc.collect()
    dist.barrier()
    before = _memory()
    read = _read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    seconds, worked, model = _timed(load)
    peak = _status("VmHWM") - before["rss"]
    after = _memory()
    result = {
        "rank": rank,
        "seconds": seconds,
        "cpu": worked,
        "anonymous": after["anonymous"] - before["anonymous"],
        "peak": peak,
        "read": _read_bytes() - read,
        "model": sum(p.numel() for p in model.parameters()) * dtype.itemsize,
    }
    del model
    result["again"], result["again_cpu"] = min(_once_more(load) for _ in range(AGAIN))
    Path(os.environ["BENCH_OUT"], f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


def _timed(load: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds until every rank has loaded, processor seconds of this one, and the module."""
    import torch.distributed as dist

    dist.barrier()
    began, worked = time.perf_counter(), time.process_time()
    module = load()
    worked = time.process_time() - worked
    dist.barrier()
    return time.perf_counter() - began, worked, module


def _once_more(load: Callable[[], Any]) -> tuple[float, float]:
    gc.collect()
    return _timed(load)[:2]


def _dcp(build: Any, folder: Path, dtype: Any, shard: Any) -> Any:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    with torch.device("meta"):
        model = build().to(dtype)
    model = shard(model)
    model.to_empty(device="cpu")
    state = model.state_dict()
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    return model


def _transformers(folder: Path, dtype: Any, shard: Any, rank: int) -> Any:
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from transformers import LlamaForCausalLM

    os.environ.update(ACCELERATE_USE_FSDP="1", FSDP_CPU_RAM_EFFICIENT_LOADING="1")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    if shard is None:
        return model
    state = model.state_dict() if rank == 0 else {}
    # As accelerate prepares FSDP2: to meta, shard, then broadcast from the first rank.
    model = model.to(torch.device("meta"))
    shard(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    set_model_state_dict(model, state, options=options)
    return model


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return {"rss": values["Rss"], "anonymous": values["Anonymous"]}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


# -- all of them ------------------------------------------------------------------------------------------------------


def run(case: str, ranks: int, folder: Path, dtype: str) -> list[dict[str, Any]]:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as out:
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "BENCH_OUT": out,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            }  # fmt: skip
            command = [sys.executable, __file__, "--rank", case, str(folder), dtype, str(store.port)]
            processes.append(subprocess.Popen(command, env=environment))
        try:
            for process in processes:
                process.wait(600)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        case, folder, dtype, port = sys.argv[2:]
        rank_main(case, Path(folder), dtype, int(port))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make(folder, arguments.gigabytes)
        files_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results: dict[str, list[list[dict[str, Any]]]] = {case: [] for case in arguments.cases}
        for number in range(arguments.rounds):
            for case in arguments.cases[:: (1, -1)[number % 2]]:  # no case always follows the same one
                results[case].append(run(case, arguments.ranks, folder, arguments.dtype))
        print(f"{files_bytes / 1e9:.2f} GB of bfloat16 on {arguments.ranks} ranks as {arguments.dtype}")
        titles = ("case", "seconds", "again", "rank", "cpu", "again", "anonymous", "peak", "of model", "read")
        print(" ".join(title.rjust(width) for title, width in zip(titles, WIDTHS, strict=True)))
        for case, rounds in results.items():
            _print(case, [found for found in rounds if found])
        if arguments.json:
            arguments.json.write_text(json.dumps({"file_bytes": files_bytes, "results": results}))


def _print(case: str, rounds: list[list[dict[str, Any]]]) -> None:
    if not rounds:
        print(f"{case:13} failed")
        return
    slowest = [
        statistics.median(max(rank[name] for rank in found) for found in rounds) for name in ("seconds", "again")
    ]
    for number in range(len(rounds[0])):
        values = [found[number] for found in rounds if number < len(found)]
        middle = {name: statistics.median(value[name] for value in values) for name in values[0]}
        cells = [f"{value:.2f}" for value in slowest] if number == 0 else ["", ""]
        cells += [str(number), f"{middle['cpu']:.2f}", f"{middle['again_cpu']:.2f}", f"{middle['anonymous'] / 1e9:.3f}"]
        share = middle["peak"] / middle["model"]
        cells += [f"{middle['peak'] / 1e9:.3f}", f"{share:.1%}", f"{middle['read'] / 1e9:.3f}"]
        row = [case if number == 0 else "", *cells]
        print(" ".join(cell.rjust(width) for cell, width in zip(row, WIDTHS, strict=True)))


if __name__ == "__main__":
    main()

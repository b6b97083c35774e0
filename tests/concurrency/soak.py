"""Holds examples/server.py under load: ``python tests/concurrency/soak.py --minutes 10``.

Clients ask, another swaps versions, and every answer is compared with what the official loader and an ordinary module
give for the version that answered. The server's memory, descriptors, threads and mappings are sampled; prints JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        assert answer.status == 200, (answer.status, text[:300])
        found: dict[str, Any] = json.loads(text)
        return found


def expected(folder: Path, prompts: list[list[int]]) -> dict[tuple[str, str, int], list[int]]:
    """The right answer of every model, version and prompt, without weightlift."""
    import server
    import torch
    from safetensors.torch import load_model

    right = {}
    for name, width in server.SIZES.items():
        for version in server.VERSIONS:
            model = server.Scorer(width)
            load_model(model, folder / name / version / "model.safetensors")
            with torch.inference_mode():
                for number, prompt in enumerate(prompts):
                    right[name, version, number] = model(torch.tensor(prompt)).topk(5).indices.tolist()
    return right


def sample(pid: int) -> dict[str, int]:
    """What the server holds."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        "rss_kb": int(status["VmRSS"].split()[0]),
        "anonymous_kb": int(status["RssAnon"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "checkpoint mappings": sum("model.safetensors" in line for line in maps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "server.py"), "--folder", str(folder), "--port", str(port)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("http")
        print(json.dumps(hold(process.pid, port, folder, arguments.minutes, arguments.clients)))
    finally:
        process.terminate()
        process.wait(20)


def hold(pid: int, port: int, folder: Path, minutes: float, clients: int) -> dict[str, Any]:
    rng = random.Random(1)
    prompts = [[rng.randrange(300) for _ in range(rng.randrange(1, 20))] for _ in range(50)]
    right = expected(folder, prompts)
    stop = threading.Event()
    asked, swapped, wrong = [0] * clients, [0], []

    def ask(number: int) -> None:
        rng, client = random.Random(number), None
        while not stop.is_set():
            name, prompt = rng.choice(("small", "large")), rng.randrange(len(prompts))
            try:
                client = client or Client(port)
                answer = client.post(f"/{name}/run", {"tokens": prompts[prompt]})
                if answer["tokens"] != right[name, answer["version"], prompt]:
                    wrong.append(f"{name} {answer['version']} {prompt}: {answer['tokens']}")
            except Exception as error:
                wrong.append(repr(error))
                client = None
            asked[number] += 1

    def swap() -> None:
        rng, client = random.Random(99), Client(port)
        while not stop.is_set():
            client.post(f"/{rng.choice(('small', 'large'))}/swap", {"version": rng.choice("ab")})
            swapped[0] += 1
            time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    threads.append(threading.Thread(target=swap))
    for thread in threads:
        thread.start()
    samples = []
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        time.sleep(min(5.0, minutes * 6))
        samples.append(sample(pid))
    stop.set()
    for thread in threads:
        thread.join()
    half = samples[len(samples) // 4 :]  # the first quarter warms up
    return {
        "minutes": minutes,
        "requests": sum(asked),
        "swaps": swapped[0],
        "wrong": wrong[:5],
        "wrong in all": len(wrong),
        "first": samples[0],
        "warm": half[0],
        "highest": {what: max(one[what] for one in half) for what in half[0]},
        "last": samples[-1],
    }


if __name__ == "__main__":
    main()

"""A web server with several models, whose weights are swapped while requests run.

    pip install flask waitress
    python examples/server.py --folder checkpoints --port 8080
    curl -X POST localhost:8080/small/run -H 'Content-Type: application/json' -d '{"tokens": [1, 2, 3]}'
    curl -X POST localhost:8080/small/swap -H 'Content-Type: application/json' -d '{"version": "b"}'

A swap loads the new weights beside the old ones and then replaces one reference: requests that run keep the model they
began with, which goes, with its mapped pages, when the last of them has ended. The first start writes two versions of
two models to the folder.
"""

from __future__ import annotations

import argparse
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flask import Flask, abort, jsonify, request
from torch import nn

import weightlift as wl

SIZES = {"small": 64, "large": 512}
VERSIONS = ("a", "b")


class Scorer(nn.Module):
    """Embeds tokens, mixes them, and gives a score to every token of the vocabulary; the head is the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(tokens).mean(dim=0)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Served:
    """A model and the version that it is of: replaced together."""

    version: str
    model: Scorer


class Registry:
    """Which model answers to a name. Readers take one reference; one swap of a name runs at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._served = {name: self._load(name, VERSIONS[0]) for name in SIZES}
        self._swapping = {name: threading.Lock() for name in SIZES}

    def __getitem__(self, name: str) -> Served:
        return self._served[name]

    def swap(self, name: str, version: str) -> None:
        """Load a version and put it in place. Raises what `weightlift.load` raises; the old one then stays."""
        with self._swapping[name]:
            self._served[name] = self._load(name, version)

    def _load(self, name: str, version: str) -> Served:
        model = wl.load(lambda: Scorer(SIZES[name]), self._folder / name / version, workers=2)
        return Served(version, model.eval())


def write_checkpoints(folder: Path) -> None:
    """Two versions of every model, unless they are there."""
    for name, width in SIZES.items():
        for number, version in enumerate(VERSIONS):
            target = folder / name / version
            if not target.exists():
                torch.manual_seed(number)
                wl.save(Scorer(width), target)


def make_app(folder: Path) -> Flask:
    app, models = Flask(__name__), Registry(folder)

    @app.post("/<name>/run")
    def run(name: str) -> Any:
        if name not in SIZES:
            abort(404)
        tokens = torch.tensor((request.get_json() or {})["tokens"], dtype=torch.long)
        served = models[name]
        with torch.inference_mode():
            scores = served.model(tokens)
        best = scores.topk(5)
        return jsonify(version=served.version, tokens=best.indices.tolist(), scores=best.values.tolist())

    @app.post("/<name>/swap")
    def swap(name: str) -> Any:
        version = (request.get_json() or {}).get("version")
        if name not in SIZES or version not in VERSIONS:
            abort(404)
        models.swap(name, version)
        return jsonify(version=version)

    return app


def main() -> None:
    from waitress import serve

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("server-checkpoints"))
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=min(8, 2 * (os.cpu_count() or 4)))
    arguments = parser.parse_args()
    write_checkpoints(arguments.folder)
    app = make_app(arguments.folder)
    print(f"http://127.0.0.1:{arguments.port}", flush=True)
    serve(app, host="127.0.0.1", port=arguments.port, threads=arguments.threads)


if __name__ == "__main__":
    main()

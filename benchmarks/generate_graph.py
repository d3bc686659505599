"""Make a large branching cost graph: ``python benchmarks/generate_graph.py 10000 graph.json [--seed 0]``.

The graph is a chain of blocks, as of a deep vision or multi-branch model: each block splits into one to four branches
of one to six nodes, which meet again; some blocks are skipped by a long edge. Times are log-normal; tensors shrink by
half every tenth of the depth, and grow back in its second half, so that some places are much cheaper to cut than others.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any


def generate(count: int, seed: int = 0) -> dict[str, Any]:
    """A graph of ``count`` nodes in the cost-graph format."""
    generator = random.Random(seed)
    before: list[list[int]] = [[]]
    ends, skip = [0], 0
    while len(before) < count:
        joint = len(before)
        before.append([*ends, skip] if generator.random() < 0.2 else list(ends))
        if generator.random() < 0.3:
            skip = joint
        ends = []
        for _ in range(generator.randint(1, 4)):
            last = joint
            for _ in range(generator.randint(1, 6)):
                before.append([last])
                last = len(before) - 1
            ends.append(last)
    before = before[:count]

    edges = sorted({(u, v) for v, sources in enumerate(before) for u in sources if u != v})
    readers: dict[int, list[int]] = {}
    for u, v in edges:
        readers.setdefault(u, []).append(v)
    size = [round(2 ** (24 - 10 * min(k, count - k) / count) * generator.uniform(0.25, 1.0)) for k in range(count)]
    nodes = [
        {
            "id": k,
            "name": f"node{k}",
            "fwd": (forward := round(generator.lognormvariate(0, 1), 4)),
            "bwd": round(2 * forward, 4),
            "param_bytes": 4 * generator.randint(0, 1_000_000),
        }
        for k in range(count)
    ]
    tensors = [{"src": u, "bytes": size[u], "dst": targets, "kind": "F"} for u, targets in readers.items()]
    tensors += [{"src": v, "bytes": size[u], "dst": [u], "kind": "B"} for u, v in edges]
    return {"name": f"branching{count}", "unit": "ms", "nodes": nodes, "edges": edges, "tensors": tensors}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.path.write_text(json.dumps(generate(options.nodes, options.seed)))

"""Measured costs that are kept: a JSON file of costs by key, shared by all models of a user."""

from __future__ import annotations

import json
import os
import sys
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipecompile.cost.graph import NodeCost
from pipecompile.errors import CostError

CACHE_VERSION = 1


def default_cache() -> Path:
    """``pipecompile/costs.json`` in the folder where this platform keeps a user's caches."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "pipecompile" / "costs.json"


def read_cache(path: Path) -> dict[str, NodeCost]:
    """The costs by key; none, with a warning, if the file cannot be understood."""
    if not path.exists():
        return {}
    try:
        whole: Any = json.loads(path.read_text())
        if whole["version"] != CACHE_VERSION:
            return {}
        return {key: NodeCost(**cost) for key, cost in whole["costs"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, CostError) as error:
        warnings.warn(f"cost cache {str(path)!r} is damaged and is written anew: {error!r}", stacklevel=2)
        return {}


def add_to_cache(path: Path, costs: Mapping[str, NodeCost]) -> None:
    """Add ``costs`` to what the file holds by now; a failure to write is a warning, as the costs are known anyway."""
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damage was reported when the measurement began
            known = read_cache(path)
        entries = {key: asdict(cost) for key, cost in sorted({**known, **costs}.items())}
        fresh.write_text(json.dumps({"version": CACHE_VERSION, "costs": entries}, indent=1) + "\n")
        fresh.replace(path)
    except OSError as error:
        warnings.warn(f"measured costs cannot be kept in {str(path)!r}: {error}", stacklevel=2)
        with suppress(OSError):
            fresh.unlink()

"""GPipe's and 1F1B's peak memory over the microbatches of a step, as ``memory.svg``: ``make figures``.

A GPT-2 of 8 layers in 4 stages, four real processes; lines are forecasts, points what was measured (``memory.py``). GPipe
keeps the activations of all M microbatches, 1F1B those of at most S = 4.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from memory import LAYERS, run

MICROBATCHES = (1, 2, 4, 8, 16, 24, 32)
COLOURS = {"gpipe": "tab:red", "1f1b": "tab:blue"}
FIGURE = Path(__file__).with_name("memory.svg")


def main() -> None:
    cases = [("gpt2", schedule, LAYERS, m) for schedule in COLOURS for m in MICROBATCHES]
    peaks = {}
    for case, found in zip(cases, run(cases)):
        peaks[case[1], case[3]] = planned, seen = [size / 2**20 for size in found[0]]
        print(f"{case[1]:5} M={case[3]:<3} forecast {planned:7.2f} MiB  measured {seen:7.2f} MiB", flush=True)
    plt.rcParams |= {"svg.hashsalt": "memory", "svg.fonttype": "none"}
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for schedule, colour in COLOURS.items():
        forecast, measured = ([peaks[schedule, m][i] for m in MICROBATCHES] for i in (0, 1))
        axes.plot(MICROBATCHES, forecast, color=colour, label=f"{schedule}, forecast")
        axes.plot(MICROBATCHES, measured, "o", color=colour, markersize=4, label=f"{schedule}, measured")
    axes.set(xlabel="microbatches M", ylabel="peak memory of rank 0, MiB", ylim=(0, None), xlim=(0, 33))
    axes.set_title("GPT-2 in 4 stages: GPipe holds O(M), 1F1B O(S)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()

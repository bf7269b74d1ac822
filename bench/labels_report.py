"""`python -m bench.labels_report` makes tables and picture of docs/labels.md from bench/results/labels.json."""

import json
from collections import defaultdict
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.common import ROOT
from bench.labels import SETS

NAMES = {"random": "random", "margin": "small margin"}


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[float]]:
    """Accuracies of all seeds by the values of `keys`, in the order of the rows."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row["accuracy"])
    return found


def main() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "labels.json").read_text())["rows"]
    selection = grouped([r for r in rows if r["part"] == "selection"], "set", "labels", "select")
    uses = grouped([r for r in rows if r["part"] == "reliability"], "set", "labels")
    counts = sorted({labels for _, labels, _ in selection})
    print("| labels | " + " | ".join(f"{name}, {how}" for name in SETS for how in NAMES.values()) + " |")
    print("| --- |" + " --- |" * 4)
    for labels in counts:
        cells = [selection[name, labels, how] for name in SETS for how in NAMES]
        print(f"| {labels} | " + " | ".join(f"{mean(c):.3f} ± {stdev(c):.3f}" for c in cells) + " |")
    print("\n| labels | " + " | ".join(SETS) + " |\n| --- | --- | --- |")
    for use in dict.fromkeys(labels for _, labels in uses):
        cells = [uses[name, use] for name in SETS]
        print(f"| {use} | " + " | ".join(f"{mean(c):.3f} ± {stdev(c):.3f}" for c in cells) + " |")
    _, axes = pyplot.subplots(1, len(SETS), figsize=(9, 3.4), layout="constrained", sharex=True)
    for axis, name in zip(axes, SETS, strict=True):
        for how, title in NAMES.items():
            cells = [selection[name, labels, how] for labels in counts]
            axis.errorbar(counts, list(map(mean, cells)), list(map(stdev, cells)), marker="o", capsize=3, label=title)
        axis.axhline(mean(uses[name, "truth"]), color="grey", linestyle=":", label="all 320 labels")
        axis.set(title=name, xlabel="labels", ylabel="held-out reward accuracy", xscale="log", xticks=counts)
        axis.set_xticklabels(counts)
        axis.minorticks_off()
        axis.legend(frameon=False)
    pyplot.savefig(ROOT / "docs" / "labels.png", dpi=110)


if __name__ == "__main__":
    main()

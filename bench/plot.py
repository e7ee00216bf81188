"""Draw how cost grows with size, out of what `make bench` wrote: bench/out/size.png and size.svg."""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl

from bench.__main__ import OUT
from bench.size_rows import NAMES, SPARSE

mpl.use("agg")

from matplotlib import pyplot as plt  # which looks at what is used when it is imported


def main() -> None:
    """Run the command."""
    try:
        rows: list[dict[str, Any]] = json.loads((OUT / "bench.json").read_text())
    except FileNotFoundError:
        sys.exit("bench-plot: nothing has been measured yet; run make bench first")
    figure, axes = plt.subplots(1, len(NAMES), figsize=(13, 5), layout="constrained")
    for axis, title in zip(axes, NAMES.values(), strict=True):
        points = {row["name"].removeprefix(title): row for row in rows if row["name"].startswith(title)}
        sizes = [SPARSE[name] for name in points]
        if not sizes:
            sys.exit("bench-plot: bench.json has no rows by size; run python -m bench --only size_rows")
        values = list(points.values())
        spread = [[row["median"] - row["min"] for row in values], [row["max"] - row["median"] for row in values]]
        axis.errorbar(sizes, [row["median"] for row in values], yerr=spread, marker="o", capsize=3, label="memfs")
        axis.plot(sizes, [row["reference"] for row in values], marker="s", linestyle="--", label="tmpfs")
        axis.set(xscale="log", yscale="log", xlabel="size", ylabel="microseconds", title=title.rstrip(": "))
        axis.set_xticks(sizes, list(points), rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    for suffix in ("png", "svg"):
        figure.savefig(OUT / f"size.{suffix}", dpi=150)
        print(OUT / f"size.{suffix}")


if __name__ == "__main__":
    main()

"""Which architectures can be traced, gated, scored and restricted? Every one of torchvision's, one of each timm family.

python analyses/coverage.py -o data/results/coverage.csv [--only timm] [--again]

Goes on where it was; one process a network, with limits on its time and memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fxpath.coverage import COVERED, Row, cover
from fxpath.subjects import names

GROUPS = ("torchvision", "detection", "timm", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CSV", help="the table, also to go on from")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group; may be given several times")
    parser.add_argument("--again", action="store_true", help="look once more at those that are not covered")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default 2)")
    parser.add_argument("--seconds", type=float, default=900, help="that one network may take (default 900)")
    parser.add_argument("--gib", type=float, default=20, help="of memory that one may take (default 20)")
    options = parser.parse_args()
    chosen = names(options.only or GROUPS, progress=lambda family: print("counting", family, file=sys.stderr))
    table = cover(
        chosen, options.output, threads=options.threads, limit_seconds=options.seconds, limit_gib=options.gib,
        again=options.again, said=say,
    )  # fmt: skip
    table = table[table["name"].isin(chosen)]
    table["group"] = table["name"].str.partition(":")[0]
    done = table[table["status"] == COVERED]
    print(done.groupby(["group", "tracer", "device"]).size().to_string())
    print(f"{len(done)} of {len(table)} covered; output bit for bit equal for {(done['difference'] == 0).sum()}")
    print(table.loc[table["status"] != COVERED, ["name", "status"]].to_string(index=False))


def say(row: Row) -> None:
    print(
        f"{row.name}: {row.status}; {row.sites:g} sites, {row.neurons:g} neurons, {row.tracer}, difference "
        f"{row.difference:g}, {row.seconds:.1f} s", file=sys.stderr, flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()

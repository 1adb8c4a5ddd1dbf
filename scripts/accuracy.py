"""Write docs/accuracy.md: how far predictions are off published measurements, on rows unseen.

    python scripts/accuracy.py [--data DIR] [--output docs/accuracy.md]

Kernel families and engines are fitted again on halves of the tables and judged on the other halves
(every row by a fit that had not seen it); memory is calculated, nothing is fitted. DIR holds tables
of the same names; without it the tables in tests/data/measured are used.
"""

import argparse
import tempfile
from pathlib import Path

from accuracy_figures import draw
from accuracy_judged import Judged, judge_tables
from accuracy_page import page

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "tests" / "data" / "measured"


def unpacked(source: Path, folder: Path) -> list[Path]:
    """The CSV files of a folder and those packed as .csv.xz, the latter unpacked."""
    import lzma

    found: dict[str, Path] = {p.name: p for p in sorted(source.rglob("*.csv"))}
    for packed in sorted(source.rglob("*.csv.xz")):
        name = packed.name.removesuffix(".xz")
        target = folder / name
        target.write_bytes(lzma.decompress(packed.read_bytes()))
        found.setdefault(name, target)
    return [found[name] for name in sorted(found)]


def main() -> None:
    """Judge, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHIPPED, help="folder with the tables")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = unpacked(arguments.data, Path(folder))
        judged: list[Judged] = judge_tables(tables)
        images = draw(judged, arguments.output.parent / "img" / "accuracy")
        arguments.output.write_text(page(judged, tables, images), encoding="utf-8")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()

"""Fit the engines that ship: ``python -m costmodel.serving --table serving.csv --output FILE``."""

import argparse
import datetime
from pathlib import Path

from costmodel.calibration.write import sha256, toml_value
from costmodel.serving.engine_times import POOLED, engine_times, known_engines
from costmodel.serving.fit import PRIORS, engine_table, fit, judge, read_runs
from costmodel.validation.table import read_table

HEAD = """\
# Engines that batch continuously, fitted by `python -m costmodel.serving`; do not edit.
# Parameters: docstring of costmodel/serving/engine_times.py. held_out_percent: errors on runs that
# no fit had seen (both halves of 4 seeded splits by a hash of the shape columns), for dense and
# sparse models. The parameters themselves are of a fit to all runs. interval: factors, likewise.
# Table: {source}
"""


def main() -> None:
    """Fit, judge, write, print."""
    parser = argparse.ArgumentParser(prog="python -m costmodel.serving", description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="serving runs (CSV)")
    parser.add_argument("--output", type=Path, required=True, help="TOML file to write")
    arguments = parser.parse_args()
    table = read_table(arguments.table)
    source = (
        f"{arguments.table.name}, aiconfigurator-core 0.12.0 wheel, Apache-2.0, SHA-256 "
        f"{sha256(arguments.table)}"
    )
    lines = [HEAD.format(source=source), f'fitted = "{datetime.date.today().isoformat()}"', ""]
    prior = {
        "parameters": {name: value for name, (value, _) in PRIORS.items()},
        "n_rows": 0,
        "interval": {"low": [1.0, 1.0], "high": [1.0, 1.0]},
        "held_out_percent": {},
    }
    for name in (*known_engines(), POOLED):
        times = engine_times(name, prior)
        runs = read_runs(table.records, name, times, everyone=name == POOLED)
        if not runs:
            continue
        fitted = engine_table(fit(runs), judge(runs))
        lines.append(f"[engine.{name}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in fitted.items()]
        lines.append("")
        for kind, figures in fitted["held_out_percent"].items():
            print(name, kind, figures, flush=True)
        print(name, fitted["parameters"], fitted["interval"], flush=True)
    arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

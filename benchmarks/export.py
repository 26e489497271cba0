"""Every format and precision of one model: size, time, and how far it is from the model. Refused ones have figures too.

python benchmarks/export.py MODEL DATA [--only openvino:int8,...]
"""

import argparse
import platform
import subprocess
import tempfile
from datetime import date
from pathlib import Path

from ddad.errors import DDADError
from ddad.export import PRECISIONS, ExportDiffers, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="such as onnx:fp32,openvino:bf16")
    given = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, commit {commit}, {date.today()}\n")
    print("| format | precision | MB | ms | largest score difference | verdicts flipped | images | |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for graph_format, precisions in PRECISIONS.items():
        for precision in precisions:
            if given.only and f"{graph_format}:{precision}" not in given.only.split(","):
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    comparison = export(
                        given.model, Path(folder) / "out", format=graph_format, precision=precision, data=given.data
                    ).record["comparison"]
                    outcome = "exported"
                except ExportDiffers as error:
                    comparison, outcome = error.comparison, f"refused (tolerance {error.comparison['tolerance']:g})"
                except DDADError as error:
                    print(f"| {graph_format} | {precision} | {error}", flush=True)
                    continue
            print(
                f"| {graph_format} | {precision} "
                f"| {comparison['bytes'] / 1e6:.1f} | {comparison['milliseconds']:.0f} | "
                f"{comparison['largest_difference']:.2g} | {comparison['verdicts_flipped']} | {comparison['images']} | "
                f"{outcome} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

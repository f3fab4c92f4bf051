"""`stageline report`: everything that storage knows of an experiment as one HTML file (orchestrator/report)."""

import argparse
from pathlib import Path

from modeling.errors import UserError
from orchestrator.cli.commands import reachable
from orchestrator.cli.gc import size
from orchestrator.spec import load_spec


def report(options: argparse.Namespace) -> int:
    """options: experiment, overrides, output."""
    experiment = load_spec(options.experiment, options.overrides)
    output = Path(options.output)
    if output.is_dir():
        raise UserError("this is a folder", where=str(output), remedy="give a file, such as report.html, as --output")
    for parent in output.parents:
        if parent.is_file():
            raise UserError(f"{parent} is a file", where=str(output), remedy="give a file in a folder as --output")
    from orchestrator.report.build import write_report

    write_report(experiment, reachable(experiment), output, options.overrides)
    print(f"{output} ({size(output.stat().st_size)}): open it in a browser; it needs nothing else")
    return 0

"""What an installation puts on the PATH: `dlops-train` is `python -m dlops_dist.train`, and so are the others."""

import sys
from importlib import import_module
from pathlib import Path

from dlops_dist.errors import exit_code_of


def main() -> int:
    """Run the command that this process was started by the name of. Returns its exit code."""
    module = Path(sys.argv[0]).stem.removeprefix("dlops-")
    return exit_code_of(import_module(f"dlops_dist.{module}").main)

"""`python -m dlops_dist.shard`, by the name that it has in a working copy."""

import sys

from dlops_dist.errors import exit_code_of
from dlops_dist.shard import main

if __name__ == "__main__":
    sys.exit(exit_code_of(main))

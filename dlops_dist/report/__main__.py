"""python -m dlops_dist.report"""

import sys

from dlops_dist.errors import exit_code_of
from dlops_dist.report import main

if __name__ == "__main__":
    sys.exit(exit_code_of(main))

#!/usr/bin/env bash
# The set-up of quickstart.sh, then the test suite, in two processes. Arguments go to pytest.
. "$(dirname "$0")/setup.sh"
exec python -m pytest --numprocesses 2 --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# The set-up of quickstart.sh, then the test suite. Arguments go to pytest.
. "$(dirname "$0")/setup.sh"
exec python -m pytest "$@"

#!/usr/bin/env bash
# The set-up of quickstart.sh, then the test suite: unit tests in two processes, the rest in one. Arguments go to pytest.
. "$(dirname "$0")/setup.sh"
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
failed=0
python -m pytest tests/unit --numprocesses 2 --dist worksteal || failed=$?
python -m pytest tests/distributed tests/integration || failed=$?
exit $failed

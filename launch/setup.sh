# Sourced by the launchers: makes .venv from the lock file, once for each lock file, and puts it first on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # without compiled bytecode each Ray process compiles everything again
wanted="$(cat requirements.lock pyproject.toml | cksum)"
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    for python in python3.13 python3.12 python3.11 python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    "$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
    echo "installing into .venv (some minutes the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet "$(grep '^uv==' requirements.lock)"
    .venv/bin/uv pip sync --quiet --python .venv/bin/python --compile-bytecode requirements.lock
    .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
    echo "$wanted" >.venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"

#!/usr/bin/env bash
# What becomes of a run when workers, nodes, links, disks fail: a table of the drills that are named, or of all.
. "$(dirname "$0")/setup.sh"
exec python tests/integration/drills.py "$@"

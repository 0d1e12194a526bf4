#!/usr/bin/env bash
# From nothing to a trained model: installs, packs generated images, trains q1 with centre loss on two Ray workers,
# evaluates. Called again, it re-uses what is there.
. "$(dirname "$0")/setup.sh"
python -m dlops_dist.shard shapes
python -m dlops_dist.train q1 --config configs/quickstart.yaml
python -m dlops_dist.evaluate runs/quickstart
python -m dlops_dist.report runs/quickstart

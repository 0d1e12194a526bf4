"""P10: from the command to its first step in one process, against a bare script with the same imports.

    python benchmarks/first_step.py [--runs 5]

Ours is `train q1 --local` on packed images (decoded beforehand, as after the first run on a node), until the
checkpoint of its first step is there. The bare script imports what ours does, makes torchvision's resnet18, takes one
step and saves its weights and momenta.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import alternate

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet

BARE = """
import sys, fsspec, numpy, PIL.Image, pyarrow.parquet, pydantic, rich.console, rich.live, simplejpeg, yaml
import torch, torchvision
model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
images = torch.randn(64, 3, 64, 64).contiguous(memory_format=torch.channels_last)
torch.nn.functional.cross_entropy(model(images), torch.randint(10, (64,))).backward()
optimizer.step()
torch.save([model.state_dict(), optimizer.state_dict()], sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_tiny_imagenet(Path(scratch) / "shapes.zip", train_per_class=200, test_per_class=2, size=64)
        pack(TinyImageNet(Path(scratch) / "shapes.zip"), Path(scratch) / "shards", "shapes")
        ours_s, bare_s = alternate(lambda: ours(Path(scratch)), lambda: bare(Path(scratch)), arguments.runs)
    print(f"P10 first step: ours {ours_s:.2f} s, bare script {bare_s:.2f} s, {ours_s - bare_s:+.2f} s")


def ours(scratch: Path) -> None:
    name = f"run-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "dlops_dist.train", "q1", "--local", "--name", name, "--checkpoint-every", "1"]
    command += ["--runs-dir", str(scratch / "runs"), "--data.shards", str(scratch / "shards")]
    command += ["--data.cache-dir", str(scratch / "cache"), "--model.stem", "imagenet", "--global-batch-size", "64"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(scratch.glob(f"runs/{name}/checkpoints/step-*.pt")):
        if process.poll() is not None:
            raise SystemExit("train ended before its first step")
        time.sleep(0.005)
    process.kill()
    process.wait()


def bare(scratch: Path) -> None:
    subprocess.run([sys.executable, "-c", BARE, str(scratch / "bare.pt")], check=True)


if __name__ == "__main__":
    main()

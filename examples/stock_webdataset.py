"""The shards without this package: stock webdataset and torch's DataLoader, for whoever wants the images alone.

python examples/stock_webdataset.py shards/shapes
"""

import sys
from pathlib import Path

import torch
import webdataset
from torchvision.transforms import v2


def main(shards: Path) -> None:
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    change = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    batches = webdataset.WebLoader(samples.map_tuple(change).batched(64), batch_size=None, num_workers=1)
    shapes = [tuple(images.shape) for images, _ in batches]
    print(f"{sum(shape[0] for shape in shapes)} images in {len(shapes)} batches, the first {shapes[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

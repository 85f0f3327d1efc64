"""The second half of scripts/demo: read one sample back, stream two batches, save a picture of one with its masks.

python scripts/demo.py SHARDS PICTURE.png
"""

import sys
from pathlib import Path

import cv2
import numpy as np

import sa1b_wds
from sa1b_wds.permutation import hashes


def main(shards: str, picture: str) -> None:
    ds = sa1b_wds.open(shards)
    sample = ds[0]
    a = sample.annotations
    print(f"{len(ds):,} samples; the first is {sample.key}: {a.width} x {a.height}, {len(a)} masks")
    small = a.masks((256, 256), [0])
    print(f"its first mask: bbox {a.bbox[0].tolist()}, area {a.area[0]:,}; at 256 x 256 {small.sum():,} pixels")

    stream = ds.stream(batch_size=4, image_size=512, mask_size=512, masks_per_image=64, seed=0)
    for number, batch in zip(range(2), stream, strict=False):
        shapes = f"image {batch['image'].shape}, masks {batch['masks'].shape}, {batch['valid'].sum()} of them real"
        print(f"batch {number}: {shapes}, keys {batch['key']}")
        if number == 0:
            draw(batch["image"][0], batch["masks"][0][batch["valid"][0]], Path(picture))
            print(f"{picture}: {batch['key'][0]} with its masks")
    stream.close()


def draw(image: np.ndarray, masks: np.ndarray, picture: Path) -> None:
    """Save the image with its masks over it, each in a colour of its own, the large ones below."""
    shown = image.astype(np.float32)
    colours = (hashes(len(masks) * 3, 1).reshape(-1, 3) % 200 + 55).astype(np.float32)
    for i in np.argsort(-masks.sum(axis=(1, 2))):
        inside = masks[i].astype(bool)
        shown[inside] = 0.5 * shown[inside] + 0.5 * colours[i]
    cv2.imwrite(str(picture), cv2.cvtColor(shown.astype(np.uint8), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main(*sys.argv[1:])

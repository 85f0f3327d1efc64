"""The format's name, its limits, which every reader and writer checks before any kernel sees a byte, and its tables."""

import numpy as np

FORMAT = "sa1b-wds/1"
"""In every packed member and in the manifest; a reader refuses what it does not know."""
MEMBER_LIMIT = 256 << 20
"""Bytes a member of a sample may have."""
SIDE_LIMIT = 65_535
"""Pixels an image may be high or wide."""
PIXEL_LIMIT = 1 << 28
"""Pixels an image may have."""

ROW = np.dtype(
    [("image_id", "<i8"), ("source", "<u4"), ("jpg_ordinal", "<u4"), ("json_ordinal", "<u4"), ("crc32", "<u4")]
)
"""A sample in `index/<stem>.rows`, 24 bytes: its id, where it came from, and the CRC-32 of its span in the shard."""
KEY_ROW = np.dtype([("image_id", "<i8"), ("shard", "<u4"), ("index", "<u4")])
"""A sample in `index/keys.bin`, sorted by image_id: its shard's place in the manifest, and its own in the shard."""

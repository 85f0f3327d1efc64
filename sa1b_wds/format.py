"""The format's name and limits, which every reader and writer checks before any kernel sees a byte."""

FORMAT = "sa1b-wds/1"
"""In every packed member and in the manifest; a reader refuses what it does not know."""
MEMBER_LIMIT = 256 << 20
"""Bytes a member of a sample may have."""
SIDE_LIMIT = 65_535
"""Pixels an image may be high or wide."""
PIXEL_LIMIT = 1 << 28
"""Pixels an image may have."""

"""How a part of an image is cut out, padded and mirrored: the same for pixels, masks, boxes and points."""

Window = tuple[int, int, int, int]
"""y0, x0, height, width in source pixels; y0 and x0 may be negative, and the window may end outside the image."""


def square(window: Window, flip: bool = False) -> Window:
    """The smallest square window that pads `window` at the bottom and on the right, as seen after the flip."""
    y, x, h, w = window
    side = max(h, w)
    return y, x + w - side if flip else x, side, side

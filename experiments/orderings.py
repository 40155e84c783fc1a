"""More generation orders, for comparisons: --ordering experiments/orderings.py:high_to_low."""

from far import dct


def high_to_low(x, keep):
    """The control that should lose: the highest frequencies first.

    x [B, C, H, H], keep in [0, 1]; all laws of an ordering hold.
    """
    return x - dct(x, 1 - keep)

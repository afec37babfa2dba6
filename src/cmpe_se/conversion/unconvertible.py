"""What tells the parts of a conversion that a block stays as it is."""


class Unconvertible(Exception):
    """Why a block, or one of its additions, cannot be converted."""

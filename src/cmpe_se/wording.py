"""Numbers as people read them."""


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with two digits or more: ``duration(7200)`` is "120 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 300 else f"{minutes / 60:.1f} h"

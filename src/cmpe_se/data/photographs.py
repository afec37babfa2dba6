"""Two photographs that scikit-learn brings along, for networks whose own test images are not at hand."""

from PIL import Image


def photographs() -> list[tuple[str, Image.Image]]:
    """What each shows, in words, and the image, 640 by 427 pixels."""
    from sklearn.datasets import load_sample_image  # slow to import, and seldom needed

    return [
        (f"Photograph of a {what}", Image.fromarray(load_sample_image(f"{name}.jpg")))
        for name, what in (("china", "temple"), ("flower", "flower"))
    ]

"""What folders in Pascal VOC's layout have in common, whatever is annotated in them."""

from pathlib import Path

from cmpe_se.errors import UserError


def lines_of(file: Path, *, advice: str) -> list[str]:
    """The lines of a text file that hold something, without the spaces around them.

    Args:
        file: UTF-8.
        advice: what it should be, as the end of a sentence.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); {advice}") from None


def listed_names(file: Path) -> list[str]:
    """Names of the images of a part, from its list in ``ImageSets``; what follows a name on its line is not read.

    Raises:
        UserError: it cannot be read.
    """
    return [line.split()[0] for line in lines_of(file, advice="it should list a part's images, one a line")]


def voc_folders(root: Path) -> list[Path]:
    """Where a folder may have VOC's layout: itself, and the years in it or in ``VOCdevkit``."""
    return [root, *sorted(root.glob("VOCdevkit/VOC*")), *sorted(root.glob("VOC*"))]

"""Text that others wrote: read in whatever encoding and line ends, and shown in messages.

Names are compared in one Unicode form (NFC), so a list written on Linux fits files that were named on macOS.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

LONGEST = 5000  # characters of a line, far above any list of names and class ids
SEPARATORS = re.compile(r"[\s,;]+")


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; a byte order mark is no part of the text."""
    if path.exists() and not path.is_file():  # a FIFO would wait for ever
        raise SystemExit(f"{path} cannot be read as text: it is no regular file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"{path} cannot be read as text ({error})") from error
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
        return text.replace("\n\ufeff", "\n")  # of a file that was put together from several
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}, line {line}: cannot be read as text ({error.reason}); save it as UTF-8") from error


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number, without their ends (Unix, Windows or old Macintosh)."""
    # not splitlines(), which would cut a name at a form feed or at U+2028
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in filled:
        if len(line) > LONGEST:
            raise SystemExit(f"{path}, line {number}: expected at most {LONGEST} characters, got {shown(line)}")
    return filled


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    return [line for _, line in numbered_lines(path)]


def same_form(name: str) -> str:
    """A name without spaces round it, in the one Unicode form."""
    return unicodedata.normalize("NFC", name.strip())


def shown(text: str) -> str:
    """A text as an error message shows it: quoted, on one line, not without end."""
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)")


def without_surrogates(text: object) -> str:
    """A text that can be printed: bytes of a file name that are no UTF-8 are spelled out."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def listing(items: Iterable[str], limit: int = 20) -> str:
    """The first items, one a line, and how many more there are."""
    lines = list(items)
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n  {without_surrogates(line)}" for line in lines[:limit] + more)


def unprintable(text: str) -> bool:
    """Whether a text holds line ends, NUL or other control characters, or what cannot be written in UTF-8."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)

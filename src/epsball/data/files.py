"""Local files, opened with suspicion: nothing is read before its kind and its declared sizes are checked."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

from epsball.errors import BadInput

DEFLATE_LIMIT = 1032  # no deflate stream grows by more than this factor, so a bigger claim is a lie
_SLACK = 1 << 16


def one_line(exc: BaseException, limit: int = 160) -> str:
    """The text of an exception on one line of at most ``limit`` characters, safe to put into a message.

    >>> one_line(ValueError("bad\\n  thing"))
    'bad thing'
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(exc)).split())
    text = text or type(exc).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def regular_file(path: str | Path, field: str) -> Path:
    """``path`` as a Path if it is a readable regular file; `BadInput` naming ``field`` otherwise (a folder, a device, a missing file)."""
    found = Path(path)
    try:
        mode = found.stat().st_mode
    except (OSError, ValueError) as exc:
        raise BadInput(f"{field}: cannot read {str(path)!r} ({one_line(exc, 60)}); check the path") from exc
    if not stat.S_ISREG(mode):
        raise BadInput(f"{field}: {str(path)!r} is not a regular file; give the path of a file")
    return found


def open_zip(path: Path, field: str) -> zipfile.ZipFile:
    """A zip archive whose members have unique names and believable sizes.

    Raises:
        BadInput: not a zip file, a truncated one, two members of one name, or a member that claims more bytes than its
            compressed form can hold (a bomb).
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as exc:
        raise BadInput(f"{field}: {str(path)!r} is damaged or no zip archive ({one_line(exc, 60)}); write it again") from exc
    members = archive.infolist()
    length = path.stat().st_size
    twice = len({m.filename for m in members}) != len(members)
    lying = any(m.file_size > DEFLATE_LIMIT * m.compress_size + _SLACK or m.compress_size > length for m in members)
    # members may overlap in a crafted archive, so the total is held against the file too
    if twice or lying or sum(m.compress_size for m in members) > length:
        archive.close()
        raise BadInput(f"{field}: {str(path)!r} claims more than it can hold or repeats a member name; write it again")
    return archive

"""Files that come with the cost model, and files that are written whole or not at all."""

import os
from pathlib import Path

from costmodel.errors import ConfigError

#: Data of the cost model, and the device profiles beside it. Plain paths, because importing
#: ``importlib.resources`` would be felt at every start.
DATA = Path(__file__).parent / "data"
HARDWARE_PROFILES = Path(__file__).parents[1] / "hardware_profiles"


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write beside the target, sync and rename: readers see the old file or the new one.

    Text is written as UTF-8; a lone half of a surrogate pair becomes a question mark. Links are
    followed; devices and pipes (``/dev/stdout``) are written to as they are. Raises ``ConfigError``
    where the file cannot be written.
    """
    path = Path(path)
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    _require_file_name(path)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(raw)
        else:
            _replace(path.resolve(), raw)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def require_writable(path: str | Path) -> None:
    """Raise what ``write_atomic`` would, before the work whose result is to be written."""
    import tempfile

    path = Path(path)
    _require_file_name(path)
    try:
        if path.exists() and not path.is_file():
            return
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def _require_file_name(path: Path) -> None:
    if os.path.isdir(path):  # ``is_dir`` raises where a name is too long
        raise ConfigError(f"{path} is a folder; give a file name")
    if not os.path.isdir(path.parent):
        raise ConfigError(f"{path}: the folder {path.parent} does not exist")


def _replace(path: Path, raw: bytes) -> None:
    import tempfile  # felt at start-up, and most runs write nothing

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; the result has the rights that any new file has.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

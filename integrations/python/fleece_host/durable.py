"""Files and folders that are whole, and there after a crash, or not there at all."""
import json
import os
import shutil

PARTIAL = ".partial"


def write_durably(path, value):
    """A whole JSON file of that name, on stable storage, or none."""
    with open(path + PARTIAL, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + PARTIAL, path)
    fsync_folder(os.path.dirname(path))


def fsync_folder(path):
    """Puts the names in a folder on stable storage."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path):
    """A file or folder goes; a folder loses its name first."""
    if os.path.isdir(path):
        # Half a folder must not look like a backup, not even after a crash.
        if not path.endswith(PARTIAL):
            os.rename(path, path + PARTIAL)
            path += PARTIAL
            fsync_folder(os.path.dirname(path))
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)

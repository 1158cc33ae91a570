"""The directory store: one VM, one folder a backup, one stream file a disk.

    DIR/store.json                            whose store this is
    DIR/lock                                  held by the host that writes
    DIR/000001-20260131T180601Z/backup.json   the manifest
    DIR/000001-20260131T180601Z/<disk>.stream
    DIR/000002-....partial/                   being written, or a crash's remains

A backup counts once its folder has its final name: the streams, the manifest
and the folder are on stable storage before that, and only behind it comes
`backup.commit`. So whatever a crash leaves is either a whole backup or a
`.partial` folder, which the next run removes.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
import urllib.parse

from .durable import PARTIAL, fsync_folder, remove, write_durably

FORMAT = 1
BACKUP_NAME = re.compile(r"(\d{6,})-\d{8}T\d{6}Z")
NO_UUID = "00000000-0000-0000-0000-000000000000"


class StoreError(Exception):
    """The store cannot do what is asked for."""


class Backup:
    """A stored backup: its name, folder and manifest."""

    def __init__(self, path, manifest):
        self.path = path
        self.name = os.path.basename(path)
        self.manifest = manifest
        self.disks = {entry["disk"]: entry for entry in manifest["disks"]}

    @property
    def checkpoint(self):
        return self.manifest["checkpoint"]

    def stream_path(self, disk):
        return os.path.join(self.path, self.disks[disk]["file"])

    def has_whole(self, disk):
        """Whether the disk's stream is there in its full length; `verify` looks inside."""
        try:
            size = os.stat(self.stream_path(disk)).st_size
        except OSError:
            return False
        return size == self.disks[disk]["stored_bytes"]


class Store:
    """The backups of one VM under `path`."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self._sound = {}

    @contextlib.contextmanager
    def locked(self):
        """Writing rights for one host; removes what an earlier one left half done."""
        if not os.path.isdir(self.path):
            os.makedirs(self.path)
            fsync_folder(os.path.dirname(self.path))
        self.is_new()
        with open(os.path.join(self.path, "lock"), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError("another host is writing to %s" % self.path) from None
            for name in os.listdir(self.path):
                if name.endswith(PARTIAL):
                    remove(os.path.join(self.path, name))
            yield

    def is_new(self):
        """Whether nothing is here yet; StoreError where it is something else than a store."""
        if os.path.exists(self._identity_path()):
            return False
        if os.path.exists(self.path) and any(
                name != "lock" and not name.endswith(PARTIAL) for name in os.listdir(self.path)):
            raise StoreError("%s is neither empty nor a store" % self.path)
        return True

    def claim(self, vm):
        """Makes this the store of the VM {name, uuid}, or checks that it is."""
        if self.is_new():
            write_durably(self._identity_path(),
                          {"format": FORMAT, "id": secrets.token_hex(4), "vm": vm})
        self.check(vm)

    def check(self, vm):
        """StoreError where this is the store of another VM."""
        ours = self.identity()["vm"]
        for member in ("uuid", "name"):
            old, new = ours.get(member), vm.get(member)
            if old and new and NO_UUID not in (old, new):
                # A VM may be renamed; its uuid stays.
                if old != new:
                    raise StoreError("%s is the store of the VM whose %s is %s, not %s"
                                     % (self.path, member, old, new))
                return

    def _identity_path(self):
        return os.path.join(self.path, "store.json")

    def identity(self):
        """{format, id, vm}. The id is the chain of this store's checkpoints."""
        try:
            identity = _read_json(self._identity_path())
            if identity["format"] == FORMAT and identity["id"] and identity["vm"] is not None:
                return identity
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError("%s is no store: %s" % (self.path, error)) from None
        raise StoreError("%s has another format than %d" % (self.path, FORMAT))

    def folders(self):
        """The names of all backups, oldest first, sound or not."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise StoreError(str(error)) from None
        return sorted(filter(BACKUP_NAME.fullmatch, names), key=_number)

    def backup(self, name):
        """The backup of that name, or StoreError where its manifest is no good."""
        # It may come from a manifest, which must not lead out of the store.
        if not isinstance(name, str) or not BACKUP_NAME.fullmatch(name):
            raise StoreError("%r is no backup's name" % (name,))
        # A manifest never changes; walking long chains reads each but once.
        if name not in self._sound:
            self._sound[name] = self._read(name)
        return self._sound[name]

    def _read(self, name):
        path = os.path.join(self.path, name)
        try:
            manifest = _read_json(os.path.join(path, "backup.json"))
            for disk in manifest["disks"]:
                if os.path.basename(disk["file"]) != disk["file"]:
                    raise ValueError("odd file name %r" % disk["file"])
                for member in ("disk", "size", "mode", "base", "base_checkpoint", "digest",
                               "stored_bytes"):
                    disk[member]
            if manifest["format"] == FORMAT and manifest["checkpoint"]:
                return Backup(path, manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError("%s has no sound backup.json: %r" % (path, error)) from None
        raise StoreError("%s has another format than %d" % (path, FORMAT))

    def backups(self):
        """All backups with a sound manifest, oldest first."""
        found = []
        for name in self.folders():
            with contextlib.suppress(StoreError):
                found.append(self.backup(name))
        return found

    def find(self, at, disk):
        """The backup of the disk by name or checkpoint, or its `latest`."""
        having = [backup for backup in self.backups() if disk in backup.disks]
        for backup in reversed(having):
            if at in ("latest", backup.name, backup.checkpoint):
                return backup
        disks = sorted({each for backup in self.backups() for each in backup.disks})
        raise StoreError("%s has no backup %s of disk %s; it has the disks: %s"
                         % (self.path, at, disk, ", ".join(disks) or "none"))

    def chain(self, backup, disk):
        """The backups that make the disk as of `backup`: a full first, `backup` last."""
        links = [backup]
        while links[0].disks[disk]["base"] is not None:
            base = self.backup(links[0].disks[disk]["base"])
            if disk not in base.disks:
                raise StoreError("%s lacks disk %s, and %s is based on it"
                                 % (base.name, disk, links[0].name))
            # Only ever older ones: a manifest that lies makes no endless loop.
            if _number(base.name) >= _number(links[0].name):
                raise StoreError("%s is based on %s, which is not older"
                                 % (links[0].name, base.name))
            links.insert(0, base)
        return links

    def base_for(self, disk, checkpoints):
        """The backup that the next one of a disk can build on, or None.

        That is the newest whole one whose checkpoint the VM still has in a
        usable state (`checkpoints`, of `checkpoint.list`). Is there none, the newest
        whole one: the plugin then says why the disk became full.
        """
        usable = {each["checkpoint"] for each in checkpoints if each["health"] == "usable"}
        newest_first = self.backups()[::-1]
        at_vm = (backup for backup in newest_first if backup.checkpoint in usable)
        for candidates in (at_vm, newest_first):
            for backup in candidates:
                if self._has_chain(backup, disk):
                    return backup
        return None

    def _has_chain(self, backup, disk):
        try:
            return disk in backup.disks and all(
                link.has_whole(disk) for link in self.chain(backup, disk))
        except StoreError:
            return False

    def new(self):
        """A backup to be written."""
        numbers = [_number(name) for name in self.folders()]
        name = "%06d-%s" % (max(numbers, default=0) + 1,
                            time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
        return NewBackup(self.path, name)

    def prune(self, keep):
        """Removes all but the newest `keep` backups of each disk and what they are based on.

        Returns the names of those that went. With a chain that cannot be
        followed nothing goes: what it needs is not known.
        """
        backups = self.backups()
        needed = set()
        for disk in {disk for backup in backups for disk in backup.disks}:
            having = [backup for backup in backups if disk in backup.disks]
            for backup in having[-keep:]:
                needed.update(link.name for link in self.chain(backup, disk))
        # The newest first: a crash in between leaves no backup without its base.
        gone = [backup for backup in reversed(backups) if backup.name not in needed]
        for backup in gone:
            remove(backup.path)
            del self._sound[backup.name]
        return [backup.name for backup in gone]


class NewBackup:
    """A backup that is being written, under a name that does not count."""

    def __init__(self, store_path, name):
        self.name = self.checkpoint = name
        self._final = os.path.join(store_path, name)
        self.path = self._final + PARTIAL
        os.mkdir(self.path)

    def open_stream(self, disk):
        """A new file for the disk's stream."""
        return open(os.path.join(self.path, stream_file(disk)), "xb", buffering=1 << 20)

    @staticmethod
    def stream_file(disk):
        """The file's name, for the manifest."""
        return stream_file(disk)

    def finish(self, manifest):
        """Makes it count. The streams are on stable storage already."""
        write_durably(os.path.join(self.path, "backup.json"), manifest)
        os.rename(self.path, self._final)
        self.path = self._final
        fsync_folder(os.path.dirname(self._final))

    def discard(self):
        """Nothing of it stays."""
        remove(self.path)


def stream_file(disk):
    """The file name for a disk's id, which may have slashes, dots, or any length."""
    name = urllib.parse.quote(disk, safe="")
    if len(name) > 200:
        name = "%s%%~%s" % (name[:100], hashlib.sha256(disk.encode()).hexdigest()[:32])
    return name + ".stream"


def _number(name):
    return int(name.split("-")[0])


def _read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)

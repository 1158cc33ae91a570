"""A VM with a committed checkpoint, for pushes that fail and must cost nothing."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time

from . import support
from .guest import MIB
from .life import BASE, SIZE, Life
from .support import QEMU_7_2, Backup, PluginError
from .targets import Nbdkit, Server, until

# What `change` of Life, and `setUp` here, change after the base: offset and length in whole clusters.
CHANGED = [(1 * MIB, 131072), (4 * MIB, MIB), (6 * MIB, 65536), (8 * MIB, 6 * MIB), (15 * MIB, 65536)]
# What "at once" is, on a machine that has other work.
SOON = 5
# How long a target is borne that takes nothing, in ms.
TIMEOUT = 2000
# Writes of a push that is in its middle: there are more.
SOME = 3


class Pushes(Life):
    """`targets` is a folder for targets, `base_image` the raw image of disk a at the base."""

    limit = 120
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.targets = self.places.folder / "targets"
        self.targets.mkdir()
        self.boot()
        self.full()
        self.write(f"write -P 3 {8 * MIB} {6 * MIB}", f"write -P 4 {15 * MIB + 512} 512")
        self.base_image = self.places.folder / "base.raw"
        shutil.copy(self.rig.image("dev-a"), self.base_image)

    def raw(self, name="target.raw", like=None, size=SIZE, fill=None):
        """A raw image to push to: a copy, or of this byte all over, or empty."""
        path = self.targets / name
        if like:
            shutil.copy(like, path)
        else:
            path.write_bytes(bytes([fill]) * size if fill else b"")
            os.truncate(path, size)
        return path

    def nbdkit(self, *parameters, image=None, tcp=False, **more):
        """An nbdkit; with `image`, or with an empty one of the disk's size."""
        image = image or self.raw()
        place = self.places.folder / image.name
        path = None if tcp else place.with_suffix(".sock")
        server = Nbdkit(image, place.with_suffix(".log"), *parameters, path=path, **more)
        self.addCleanup(server.close)
        return server

    def slow(self, *parameters, delay=None, **more):
        """A server of which each write takes a while: what goes wrong finds a push in its middle."""
        # The older QEMU writes a cluster at a time, the others a MiB.
        delay = delay or ("50ms" if self.qemu == QEMU_7_2 else "400ms")
        filters = ["delay", *more.pop("filters", ())]
        return self.nbdkit(f"delay-write={delay}", *parameters, filters=filters, **more)

    def existing(self, path, format="raw", **more):
        return {"kind": "existing", "path": str(path), "format": format, **more}

    def new(self, path, format="qcow2", **more):
        return {"kind": "file", "path": str(path), "format": format, **more}

    def loop(self, image, *options):
        """The block device of an image."""
        command = ["losetup", "--find", "--show", *options, str(image)]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "-d", device], check=True)
        return device

    def listener(self, greet=None):
        """Listens, accepts, and says what `greet` says; without it, nothing."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        kept = []

        def serve():
            with contextlib.suppress(OSError):  # The test is over.
                while True:
                    kept.append(listener.accept()[0])
                    threading.Thread(target=talk, args=kept[-1:], daemon=True).start()

        def talk(client):
            with contextlib.suppress(OSError):
                greet(client)

        if greet:
            threading.Thread(target=serve, daemon=True).start()
            self.addCleanup(listener.shutdown, socket.SHUT_RDWR)
        return {"kind": "nbd", "address": f"tcp:127.0.0.1:{listener.getsockname()[1]}"}

    def keys(self, user, key=b"\1"):
        folder = self.places.folder / f"keys-{user}-{key[0]}"
        if not folder.exists():
            folder.mkdir()
            (folder / "keys.psk").write_text(f"{user}:{key.hex() * 32}\n")
        return str(folder)

    def server(self, *command):
        server = Server(command, self.places.folder / "server.sock")
        self.addCleanup(server.close)
        return server

    def tmpfs(self, size):
        folder = self.places.folder / "small"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        # A server may have it open still.
        self.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
        return folder

    # --- pushing ----------------------------------------------------------------------

    def push(self, backup, target, disk="dev-a", **params):
        """Starts a push: the future of its reply. What is None is left out; records are passed over."""
        params = {name: value for name, value in params.items() if value is not None}
        target = {name: value for name, value in target.items() if value is not None}
        params = {"backup": backup.id, "disk": disk, "target": target, **params}
        return backup.plugin.start("backup.push", params, on_record=lambda *_: None)

    def start(self, backup, server, tls=None, **params):
        """A push of which some has been written; two writes are under way."""
        params = {"workers": 2, "timeout_ms": TIMEOUT, **params}
        future = self.push(backup, server.target(tls=tls), **params)
        server.wait_changes(SOME, future)
        return future

    def pushed(self, backup, target, **params):
        """The reply of a push that succeeds."""
        reply = self.push(backup, target, **params).result(support.SECONDS)
        self.assertEqual([], reply.get("leftovers", []))
        return reply

    def failed(self, code, future):
        """A push fails with this code, or one of these, and the backup is open."""
        codes = (code,) if isinstance(code, str) else code
        error = future.exception(support.SECONDS)
        self.assertIsInstance(error, PluginError, "the push succeeded")
        self.assertIn(error.code, codes, error)
        if error.code != "invalid_params":
            # Which one is true shows when `doomed` ends.
            self.assertIn(error.data["state_left"], ("backup_open", "disk_spent"), error)
            self.spent = error.data["state_left"] == "disk_spent"
        self.assertEqual([], error.data.get("leftovers", []), error)
        return error

    def fails(self, code, backup, target, **params):
        return self.failed(code, self.push(backup, target, **params))

    def equal(self, image, format="raw", node="a"):
        """A target is as QEMU's own copy of the instant."""
        if format != "raw":
            subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
            raw = self.places.folder / "converted.raw"
            subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
            image = raw
        self.assert_equal_files(image, self.rig.oracle()[node], str(image))

    def push_jobs(self):
        """The jobs of pushes."""
        return [job for job in self.rig.qmp.command("query-block-jobs") if job["device"].endswith("-push")]

    def hurry(self):
        """What is pushed slowly, so that it is seen, has been seen: it need not be slow any more."""
        for job in until(self.push_jobs):
            self.rig.qmp.command("block-job-set-speed", {"device": job["device"], "speed": 0})

    def copied(self):
        """Bytes that QEMU has pushed by now, of all disks."""
        return sum(job["offset"] for job in self.push_jobs())

    # --- what holds after each --------------------------------------------------------

    @contextlib.contextmanager
    def doomed(self, base=None, **params):
        """A backup whose pushes fail. It can only be aborted; then all is as if it had not been."""
        before = self.listing()
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base=base, checkpoint="never", **params)
            self.spent = False
            yield backup
            # It comes to its path only where the disk can be pushed again.
            again = self.push(backup, self.existing("relative")).exception(support.SECONDS)
            self.assertEqual("offset_released" if self.spent else "invalid_params", again.code)
            data = self.refused("incomplete", plugin, "backup.commit", {"backup": backup.id})
            self.assertEqual("backup_open", data["state_left"])
            self.assertEqual({"leftovers": []}, backup.abort())
            self.assertEqual([], self.left())
        self.assertEqual(before, self.listing(), "files that were left")
        self.unharmed()

    @contextlib.contextmanager
    def opened(self, base=None, plugin=None, **params):
        """A backup whose pushes may succeed, and that nobody wants."""
        with plugin or self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base=base, strict=True, **params)
            yield backup
            self.assertEqual({"leftovers": []}, backup.abort())
            self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())

    @contextlib.contextmanager
    def backed_up(self, base=None, **params):
        """A backup that is committed."""
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base=base, checkpoint="tuesday", **params)
            yield backup
            self.assertEqual(sorted(backup.disks), sorted(backup.commit()["committed"]))
            self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())

    def listing(self):
        return sorted(os.listdir(self.targets))

    def unharmed(self):
        """Nothing is left, the disks can be written, and the base serves as before."""
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())
        self.within(SOON, self.write, "write -P 8 2M 64K")
        self.assertNotIn("never", self.listed()["dev-a"])
        self.next_is({f"dev-{node}": None for node in self.formats}, ids=True)

    def within(self, seconds, call, *arguments):
        """What the call returns, if it does in time."""
        began = time.monotonic()
        result = call(*arguments)
        self.assertLess(time.monotonic() - began, seconds, f"{call} {arguments}")
        return result

    def answers(self):
        """QEMU stops and goes on at once: each waits for all I/O."""
        for command in ("stop", "cont", "stop"):
            self.within(SOON, self.rig.qmp.command, command)

    def monitor_answers_until(self, future, seconds=1):
        """Asks the other monitor again and again until the future is done; each answer comes in time."""
        deadline = time.monotonic() + support.SECONDS
        while not future.done():
            self.within(seconds, self.rig.qmp.command, "query-status")
            self.assertLess(time.monotonic(), deadline, "no reply")
            time.sleep(0.05)

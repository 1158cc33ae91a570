"""A pretended VM, a store and the host's command line, in a folder that goes again."""
import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
HOST = os.path.join(HERE, "..", "qemu-fleece-host")
FAKE_PLUGIN = os.path.join(HERE, "fake_plugin.py")
SECONDS = 60
# A line of the table of a disk that became full.
FULL = r"(?m)^disk\d +full"


class WithVm(unittest.TestCase):
    """`self.vm` is the folder of the VM that tests/fake_plugin.py plays, `self.store` a store's."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.store = os.path.join(folder.name, "store")
        self.vm = os.path.join(folder.name, "vm")
        os.mkdir(self.vm)
        self.guest_writes("disk0", os.urandom(200000) + bytes(200000) + os.urandom(77))
        self.guest_writes("disk1", bytes(150000))

    def guest_writes(self, disk, content, at=None):
        path = os.path.join(self.vm, disk + ".img")
        with open(path, "wb" if at is None else "r+b") as file:
            file.seek(at or 0)
            file.write(content)

    def guest_has(self, disk):
        with open(os.path.join(self.vm, disk + ".img"), "rb") as file:
            return file.read()

    def checkpoints(self, disk):
        return sorted(name[len(disk) + 1:-4] for name in os.listdir(self.vm)
                      if name.startswith(disk + "@"))

    def host(self, *arguments, fault="", status=0, **environment):
        """Runs the host; returns what it printed, stdout and stderr together."""
        done = subprocess.run(
            [sys.executable, HOST, *arguments], stdout=subprocess.PIPE, timeout=SECONDS,
            stderr=subprocess.STDOUT, encoding="utf-8",
            env=dict(os.environ, QEMU_FLEECE=FAKE_PLUGIN, FAKE_VM=self.vm, FAKE_FAULT=fault,
                     **environment))
        self.assertEqual(done.returncode, status, done.stdout)
        self.assertNotIn("Traceback", done.stdout)
        return done.stdout

    def backup(self, *arguments, **more):
        return self.host("backup", "--qmp", "/vm.sock", "--to", self.store, *arguments, **more)

    def restored(self, disk, *arguments, **more):
        target = os.path.join(self.folder, "restored.img")
        if os.path.exists(target):
            os.unlink(target)
        self.host("restore", self.store, "--disk", disk, "--output", target, *arguments, **more)
        with open(target, "rb") as file:
            return file.read()

    def assert_restores(self):
        """The newest backup of each disk is, byte for byte, what the guest has."""
        for disk in ("disk0", "disk1"):
            self.assertEqual(self.restored(disk), self.guest_has(disk))

    def folders(self):
        return sorted(name for name in os.listdir(self.store) if name.startswith("0"))

    def whole_folders(self):
        """The backups; and nothing half done lies beside them."""
        self.assertEqual([name for name in os.listdir(self.store) if "partial" in name], [])
        return self.folders()

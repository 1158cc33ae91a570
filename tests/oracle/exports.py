"""A machine whose disks are exported, for the tests of exports."""

import subprocess

from . import support
from .guest import MIB
from .support import QEMU, Backup, Rig, Vm, io, make_image, virtio

SOON = 10  # seconds: nothing that the lease's end waits for takes longer
ZERO = 2  # the flag of base:allocation: reads as zeros


def program(*command):
    """What a program says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=support.SECONDS)
    if done.returncode:
        raise AssertionError(f"{command}: {done.stderr}")
    return done.stdout


def device(disk):
    return f"/machine/peripheral/{disk}/virtio-backend"


class Machine(support.Test):
    """Disk `dev-a` is node a, qcow2; `dev-b` is b, raw. The guest overwrites them once a backup is open."""

    qemu = QEMU

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        qcow2, raw = self.places.folder / "a", self.places.folder / "b"
        make_image(qcow2, "qcow2", 16 * MIB + 1536)
        make_image(raw, "raw", 16 * MIB + 512)
        self.rig = Rig(Vm(virtio("a", qcow2) + virtio("b", raw, "raw"), self.qemu))
        self.addCleanup(self.rig.close)
        self.write("write -P 1 0 8M")

    def write(self, *commands):
        for disk in ("dev-a", "dev-b"):
            for command in commands:
                io(self.rig.qmp, device(disk), command)

    def begin(self, plugin, **params):
        backup = Backup(plugin, self.rig.monitor, **params)
        self.write("write -P 2 0 16M")
        return backup

    def nothing_is_left(self):
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())

"""What happens to the VM, or to the monitor, in the middle of a backup."""

import json
import subprocess
import threading

from . import support
from .guest import MIB, Disk, Guest
from .support import QEMU_7_2, Backup, Rig

SECONDS = support.SECONDS
NODES = {"dev0": "disk0", "dev1": "disk1"}


class Midway(support.Test):
    limit = 120
    qemu = "qemu-system-x86_64"

    def setUp(self):
        disks = [Disk(32 * MIB), Disk(32 * MIB, driver="virtio-scsi")]
        self.rig = Rig(Guest(disks, self.qemu))
        self.addCleanup(self.rig.close)
        self.guest = self.rig.machine
        # More than the plugin holds of a disk while its host does not read.
        for disk in NODES.values():
            self.guest.run(f"write {disk} 0 28M 1")
        self.plugin = self.rig.plugin()
        self.addCleanup(self.plugin.close)
        with self.rig.plugin() as plugin:
            base = Backup(plugin, self.rig.monitor, checkpoint="monday")
            base.read_all(self.rig)
            base.commit()
        self.rig.oracle()
        self.rig.forget()
        for disk in NODES.values():
            self.guest.run(f"write {disk} 0 28M 2")

    def midway(self, then):
        """Both disks are read; after the first data of dev1 `then` runs; the errors of the two."""
        backup = Backup(self.plugin, self.rig.monitor, base="monday", checkpoint="tuesday")
        arrived, go_on = threading.Event(), threading.Event()

        def hold(record):
            if record["kind"] == "data":
                arrived.set()
                go_on.wait(SECONDS)

        futures = {
            disk: backup.start(disk, self.rig.image(disk), on_record=hold, record_max=65536) for disk in NODES
        }
        self.assertTrue(arrived.wait(SECONDS))
        then()
        go_on.set()
        return backup, {disk: future.exception(SECONDS) for disk, future in futures.items()}

    def close(self, backup):
        for stream in backup.streams.values():
            stream.close()

    def incremental(self, *disks):
        """The next backup from the base is incremental, and right."""
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base="monday", disks=[{"disk": disk} for disk in disks])
            self.assertEqual({"incremental"}, {disk["mode"] for disk in backup.disks.values()})
            backup.read_all(self.rig)
            self.rig.compare(self, backup, NODES)
            self.assertEqual([], backup.abort()["leftovers"])
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())

    def test_a_disk_is_unplugged(self):
        """Its point in time lives on, and can be committed: the image has the checkpoint."""

        def unplug():
            self.rig.qmp.command("device_del", {"id": "dev1"})
            self.rig.qmp.wait_event("DEVICE_DELETED", device="dev1")

        backup, errors = self.midway(unplug)
        self.assertEqual({"dev0": None, "dev1": None}, errors)
        for stream in backup.streams.values():
            stream.finish()
        self.rig.compare(self, backup, NODES)
        self.assertEqual((["dev0", "dev1"], []), tuple(backup.commit()[key] for key in ("committed", "leftovers")))
        self.assertEqual([], support.ours(self.rig.qmp))
        self.incremental("dev0")

    def test_the_guest_shuts_down(self):
        """QEMU ends with it; the streams fail, and the base is stored in the images."""
        backup, errors = self.midway(self.guest.poweroff)
        # What was in the plugin already may reach its end.
        codes = {error.code for error in errors.values() if error}
        self.assertTrue(codes)
        for code in codes:
            self.assertIn(code, ("nbd_closed", "point_in_time_lost", "monitor_closed", "nbd_unreachable"))
        self.close(backup)
        self.plugin.close()
        self.assertEqual([], self.rig.files())
        for image in self.guest.images:
            names = bitmaps(image)
            self.assertEqual(["monday"], [name.split("/")[3] for name in names])

    def test_the_monitors_connection_ends(self):
        """With QEMU alive: what was under way is lost to the plugin, which begins anew."""
        backup, _ = self.midway(lambda: self.rig.proxy._session.end())
        self.close(backup)
        left = backup.abort()["leftovers"]
        self.assertTrue(left)
        with self.subTest("the same process takes it over, or away"):
            again = Backup(self.plugin, self.rig.monitor, base="monday")
            self.assertEqual([], [each for each in support.ours(self.rig.qmp) if backup.id in each])
            again.abort()
        self.incremental("dev0", "dev1")

    def test_a_stuck_monitor_and_attach(self):
        """After the connection ended, the same process goes on with the same point in time."""
        backup = Backup(self.plugin, self.rig.monitor, base="monday", checkpoint="tuesday")
        copies = self.rig.oracle()
        self.rig.proxy._session.end()
        self.assertTrue(backup.abort()["leftovers"])
        params = {"monitor": self.rig.monitor, "backup": backup.id}
        again = Backup.of(self.plugin, self.plugin.call("backup.attach", params, SECONDS))
        again.read_all(self.rig)
        for disk, node in NODES.items():
            self.assert_equal_files(self.rig.image(disk), copies[node], disk)
        self.assertEqual([], again.commit()["leftovers"])
        self.assertEqual([], support.ours(self.rig.qmp))


class MidwayOn72(Midway):
    qemu = QEMU_7_2


def bitmaps(image):
    told = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, capture_output=True)
    data = json.loads(told.stdout)["format-specific"]["data"]
    return [each["name"] for each in data.get("bitmaps", [])]

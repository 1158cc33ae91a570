"""A base that cannot serve: the disk is full and says why, the others stay incremental."""

import json
import shutil

from . import support
from .guest import MIB
from .support import Backup, Daemon, Rig, Vm, io, make_image, virtio

NODES = {"dev-a": "a", "dev-b": "b", "dev-c": "c"}
FORMATS = {"a": "qcow2", "b": "raw", "c": "qcow2"}
BASE = "base"


def device(disk):
    return f"/machine/peripheral/{disk}/virtio-backend"


class Fallback(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        for node, format in FORMATS.items():
            make_image(self.image(node), format, 16 * MIB)
        self.rig = None
        self.addCleanup(lambda: self.rig and self.rig.close())
        self.boot()
        for disk in NODES:
            io(self.rig.qmp, device(disk), "write -P 1 0 8M")
        with self.rig.plugin() as plugin:
            full = self.backup(plugin, checkpoint=BASE)
            self.ids = {disk: found["checkpoint_id"] for disk, found in full.disks.items()}
            for disk in full.disks.values():
                self.assertEqual(("full", "full"), (disk["planned"], disk["mode"]))
                self.assertNotIn("reason", disk)
            full.commit()
        self.write()

    def image(self, node):
        return self.places.folder / f"{node}.{FORMATS[node]}"

    def boot(self):
        if self.rig:
            self.rig.close()
        arguments = sum((virtio(node, self.image(node), FORMATS[node]) for node in FORMATS), [])
        self.rig = Rig(Vm(arguments), self.places.folder)

    def quit(self):
        self.rig.qmp.command("quit")
        self.rig.machine.process.wait(support.SECONDS)

    def kill(self):
        self.rig.machine.process.kill()
        self.rig.machine.process.wait()

    def write(self):
        for disk in NODES:
            io(self.rig.qmp, device(disk), "write -P 2 1M 128K")
            io(self.rig.qmp, device(disk), "write -z 4M 1M")

    def backup(self, plugin, **params):
        backup = Backup(plugin, self.rig.monitor, **params)
        backup.read_all(self.rig)
        self.rig.compare(self, backup, NODES)
        return backup

    def bitmap(self, node):
        """The name of the base's bitmap."""
        for found in self.rig.qmp.command("query-named-block-nodes", {"flat": True}):
            if found["node-name"] == node:
                names = [bitmap["name"] for bitmap in found["dirty-bitmaps"]]
                return next(name for name in names if f"/{BASE}/" in name)
        raise AssertionError(f"no node {node}")

    def falls_back(self, reasons, base=BASE):
        """These disks are full for these reasons, all others incremental, each byte right."""
        with self.rig.plugin() as plugin:
            if reasons:
                self.strict(plugin, reasons, base)
            backup = self.backup(plugin, base=base)
            for disk, found in backup.disks.items():
                reason = reasons.get(disk)
                begin = backup.streams[disk].begin
                self.assertEqual("incremental", found["planned"], disk)
                self.assertEqual("full" if reason else "incremental", found["mode"], disk)
                self.assertEqual(reason, found.get("reason"), disk)
                for member in ("mode", "reason", "base"):
                    self.assertEqual(found.get(member), begin.get(member), disk)
                if not reason:
                    self.assertGreater(backup.streams[disk].end["same_bytes"], 0)
                    self.assertEqual({"zero"}, backup.streams[disk].kinds(4 * MIB, 5 * MIB))
            self.assertEqual([], backup.abort()["leftovers"])

    def strict(self, plugin, reasons, base):
        """Strict refuses, before anything is opened."""
        rounds = list(self.rig.copies.iterdir())
        params = {"monitor": self.rig.monitor, "base": base, "strict": True}
        data = self.refused("base_unusable", plugin, "backup.begin", params)
        self.assertIn(data["disk"], reasons)
        self.assertEqual(reasons[data["disk"]], data["reason"])
        self.assertEqual(("take_full", "unchanged"), (data["action"], data["state_left"]))
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual(rounds, list(self.rig.copies.iterdir()), "a point in time was opened")
        # The other disks alone are welcome.
        others = [{"disk": disk} for disk in NODES if disk not in reasons]
        if others:
            Backup(plugin, **params, disks=others).abort()

    def health(self, disk):
        with self.rig.plugin() as plugin:
            return self.rig.health(plugin)[disk][BASE]

    def test_no_checkpoint_of_that_name(self):
        self.falls_back({disk: "base_missing" for disk in NODES}, "never-was")

    def test_qemu_is_restarted_in_order(self):
        """qcow2 keeps its checkpoints, and raw does not."""
        self.quit()
        self.boot()
        self.write()
        self.falls_back({"dev-b": "bitmap_lost"})

    def test_qemu_is_killed(self):
        # Only what was stored once can be known to be stale.
        self.quit()
        self.boot()
        io(self.rig.qmp, device("dev-a"), "write -P 3 6M 64K")
        self.kill()
        self.boot()
        self.assertEqual("inconsistent", self.health("dev-a"))
        self.falls_back(
            {"dev-a": "base_inconsistent", "dev-b": "bitmap_lost", "dev-c": "base_inconsistent"}
        )

    def test_qemu_is_killed_before_it_stored_anything(self):
        self.kill()
        self.boot()
        self.falls_back({disk: "base_missing" for disk in NODES})

    def test_the_bitmap_does_not_record(self):
        bitmap = {"node": "c", "name": self.bitmap("c")}
        self.rig.qmp.command("block-dirty-bitmap-disable", bitmap)
        self.assertEqual("not_recording", self.health("dev-c"))
        self.falls_back({"dev-c": "base_not_recording"})

    def test_somebody_exports_the_bitmap(self):
        bitmap = {"node": "b", "name": self.bitmap("b")}
        self.rig.qmp.command("block-dirty-bitmap-disable", bitmap)  # QEMU exports no other.
        path = {"path": str(self.places.folder / "theirs.sock")}
        self.rig.qmp.command("nbd-server-start", {"addr": {"type": "unix", "data": path}})
        export = {"type": "nbd", "id": "theirs", "node-name": "b", "bitmaps": [bitmap["name"]]}
        self.rig.qmp.command("block-export-add", export)
        self.assertEqual("busy", self.health("dev-b"))
        with self.rig.plugin() as plugin:
            self.refused_as_busy(plugin, "dev-b")
            # Without strict it is their NBD server that is in the way.
            self.refused("nbd_server_busy", plugin, "backup.begin", {"monitor": self.rig.monitor, "base": BASE})
        self.rig.qmp.command("block-export-del", {"id": "theirs"})
        self.rig.qmp.wait_event("BLOCK_EXPORT_DELETED", id="theirs")
        self.rig.qmp.command("nbd-server-stop")
        self.rig.qmp.command("block-dirty-bitmap-enable", bitmap)
        self.falls_back({})

    def refused_as_busy(self, plugin, disk):
        params = {"monitor": self.rig.monitor, "base": BASE, "strict": True, "disks": [{"disk": disk}]}
        data = self.refused("base_unusable", plugin, "backup.begin", params)
        self.assertEqual((disk, "base_busy"), (data["disk"], data["reason"]))
        self.assertEqual([], support.ours(self.rig.qmp))

    def test_a_foreign_job_uses_the_bitmap(self):
        self.quit()
        self.rig.close()
        arguments = [["--blockdev", support.blockdev(node, self.image(node), FORMATS[node])] for node in FORMATS]
        make_image(self.places.folder / "theirs", "raw", 16 * MIB)
        theirs = f"driver=file,node-name=theirs,filename={self.places.folder}/theirs"
        self.rig = Rig(Daemon(sum(arguments, ["--blockdev", theirs])), self.places.folder)
        slow = {"job-id": "theirs", "device": "a", "target": "theirs", "speed": 1}
        self.rig.qmp.command(
            "blockdev-backup",
            {**slow, "sync": "bitmap", "bitmap": self.bitmap("a"), "bitmap-mode": "never"},
        )
        # The disks have other ids here: only the checkpoint's own says that c is the same.
        shutil.copy(self.rig.image("dev-c"), self.rig.image("c"))
        with self.rig.plugin() as plugin:
            self.refused_as_busy(plugin, "a")
            disks = [{"disk": "a"}, {"disk": "b"}, {"disk": "c", "base_id": self.ids["dev-c"]}]
            backup = Backup(plugin, self.rig.monitor, base=BASE, disks=disks)
            backup.read_all(self.rig)
            copies = self.rig.oracle()
            found = {}
            for disk, stream in backup.streams.items():
                found[disk] = (stream.begin["mode"], stream.begin.get("reason"))
                self.assert_equal_files(self.rig.image(disk), copies[disk], disk)
            self.assertEqual(
                {"a": ("full", "base_busy"), "b": ("full", "bitmap_lost"), "c": ("incremental", None)}, found
            )
            backup.abort()
        jobs = [job for job in self.rig.qmp.command("query-jobs") if job["id"] == "theirs"]
        self.assertEqual("running", jobs[0]["status"], "a foreign job was touched")

    def test_the_disk_has_another_size(self):
        self.rig.qmp.command("block_resize", {"node-name": "a", "size": 24 * MIB})
        io(self.rig.qmp, device("dev-a"), "write -P 5 20M 64K")
        self.assertEqual("size_changed", self.health("dev-a"))
        self.falls_back({"dev-a": "size_changed"})

    def test_each_disk_can_have_its_own_base(self):
        with self.rig.plugin() as plugin:
            disks = [
                {"disk": "dev-a", "base": None},
                {"disk": "dev-b", "base": "never-was"},
                {"disk": "dev-c"},
            ]
            backup = self.backup(plugin, base=BASE, disks=disks)
            found = [(disk["planned"], disk["mode"], disk.get("reason")) for disk in backup.disks.values()]
            self.assertEqual(
                [
                    ("full", "full", None),
                    ("incremental", "full", "base_missing"),
                    ("incremental", "incremental", None),
                ],
                found,
                json.dumps(backup.reply),
            )
            backup.abort()

"""What others do to the VM while a backup is open: the point in time and the checkpoint hold, or say so."""

from .guest import MIB
from .life import BASE, SIZE, Layered
from .qmp import QmpError
from .support import QEMU_7_2, QEMU_NEW, Backup, Rig, Vm, Wire, make_image, virtio


class OpenBackup(Layered):
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def begin(self, node="a"):
        """Opens a backup whose disk's own image is this node."""
        self.plugin = self.rig.plugin()
        self.addCleanup(self.plugin.close)
        self.opened = node
        self.open = Backup(self.plugin, self.rig.monitor, base=BASE, checkpoint="tuesday", strict=True)
        self.more(9)

    def commit(self):
        """The point in time is as it was when the backup began."""
        self.more(10)
        self.open.read_all(self.rig)
        self.rig.compare(self, self.open, {"dev-a": self.opened})
        self.assertEqual({"committed": ["dev-a"], "deleted": [], "leftovers": []}, self.open.commit())
        self.plugin.close()
        self.more(12)

    def since_tuesday(self, reason=None):
        """The next backup from the new checkpoint, over what the open one has left."""
        known = [{"disk": "dev-a", "base_id": self.open.disks["dev-a"]["checkpoint_id"]}]
        with self.rig.plugin() as plugin:
            backup = self.backup(plugin, base="tuesday", disks=known)
            found = backup.disks["dev-a"]
            self.assertEqual(("full" if reason else "incremental", reason), (found["mode"], found.get("reason")))
            backup.abort()

    def refuses(self, command, **arguments):
        with self.assertRaises(QmpError):
            self.rig.qmp.command(command, arguments)

    # --- allowed ----------------------------------------------------------------------

    def test_an_external_snapshot(self):
        """The new checkpoint began on what is a backing image now, and is told to be there."""
        self.begin()
        self.snapshot("o")
        self.commit()
        self.assertEqual([], self.left())
        told = {name: each["health"] for name, each in self.listed()["dev-a"].items()}
        self.assertEqual({BASE: "on_backing_image", "tuesday": "on_backing_image"}, told)
        self.since_tuesday("on_backing_image")

    def test_an_external_snapshot_with_bitmaps(self):
        """The base goes on in two halves; the new checkpoint's was not there to be copied yet."""
        self.begin()
        self.snapshot("o", bitmaps=True)
        self.commit()
        self.assertEqual([], self.left())
        told = {name: each["health"] for name, each in self.listed()["dev-a"].items()}
        self.assertEqual({BASE: "usable", "tuesday": "on_backing_image"}, told)
        self.since_tuesday("on_backing_image")
        self.next_is({"dev-a": None}, ids=True)

    def test_copies_of_a_sessions_bitmaps_are_repaired(self):
        self.begin()
        self.snapshot("o", bitmaps=self.bitmaps("a"))
        self.commit()
        # The session knows nothing of them, and they are in nobody's way.
        self.assertEqual(2, len(self.left()))
        self.assertEqual("on_backing_image", self.listed()["dev-a"]["tuesday"]["health"])
        self.since_tuesday("on_backing_image")
        self.assertEqual(2, len(self.call("checkpoint.repair")["disks"][0]["removed"]))
        self.assertEqual([], self.left())
        self.next_is({"dev-a": None}, ids=True)

    def test_a_stream(self):
        """It costs the older half of the base, and not the new checkpoint."""
        self.snapshot("o", bitmaps=True)
        self.more(7)
        self.begin("o")
        self.job("block-stream", device="o")
        self.commit()
        told = {name: each["health"] for name, each in self.listed()["dev-a"].items()}
        self.assertEqual({BASE: "mismatch", "tuesday": "usable"}, told)
        self.since_tuesday()

    def test_a_reset(self):
        self.begin()
        self.rig.qmp.command("system_reset")
        self.commit()
        self.since_tuesday()

    # --- refused by QEMU --------------------------------------------------------------

    def test_another_size_another_image_another_state(self):
        self.begin()
        self.refuses("block_resize", **{"node-name": "a", "size": SIZE + MIB})
        make_image(self.image("m"), "qcow2", SIZE)
        file = {"driver": "file", "filename": str(self.image("m"))}
        self.rig.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": "m", "file": file})
        self.refuses("blockdev-mirror", **{"job-id": "theirs", "device": "a", "target": "m", "sync": "full"})
        for line in ("savevm theirs", "loadvm theirs"):
            said = self.rig.qmp.command("human-monitor-command", {"command-line": line})
            self.assertIn("does not support snapshots", said)
        self.commit()
        self.since_tuesday()

    def test_an_active_commit(self):
        self.snapshot("o", bitmaps=True)
        self.more(7)
        self.begin("o")
        self.refuses("block-commit", **{"job-id": "theirs", "device": "o"})
        self.commit()
        self.since_tuesday()

    def test_a_migration(self):
        """It fails, and the VM stays here with its backup."""
        self.begin()
        address = f"unix:{self.places.folder}/migration"
        with Rig(Vm([*virtio("a", self.image("a")), "-incoming", "defer"], self.qemu)) as there:
            events = {"capabilities": [{"capability": "events", "state": True}]}
            self.rig.qmp.command("migrate-set-capabilities", events)
            there.qmp.command("migrate-incoming", {"uri": address})
            self.rig.qmp.command("migrate", {"uri": address})
            self.rig.qmp.wait_event("MIGRATION", status="failed")
        self.commit()
        self.since_tuesday()

    def test_a_backup_of_a_disk_under_a_job(self):
        """The other way round: refused in QEMU's words, and nothing is left."""
        self.snapshot("o", bitmaps=True)
        self.more(7)
        self.rig.qmp.command("block-commit", {"job-id": "theirs", "device": "o"})
        self.rig.qmp.wait_event("BLOCK_JOB_READY", device="theirs")
        with self.rig.plugin() as plugin:
            params = {"monitor": self.rig.monitor, "base": BASE, "checkpoint": "tuesday"}
            data = self.refused("qemu_refused", plugin, "backup.begin", params)
        self.assertEqual("unchanged", data["state_left"])
        self.assertEqual([], self.left())
        self.assertNotIn("tuesday", self.listed()["dev-a"])
        self.rig.qmp.command("job-complete", {"id": "theirs"})
        self.rig.qmp.wait_event("BLOCK_JOB_COMPLETED", device="theirs")
        self.more(12)
        self.next_is({"dev-a": None}, ids=True)

    # --- the end of QEMU --------------------------------------------------------------

    def test_qemu_ends_in_order(self):
        self.begin()
        self.quit()
        self.plugin.close()
        self.boot()
        self.assertEqual([], self.left())
        self.assertEqual({BASE}, set(self.listed()["dev-a"]))
        self.more(10)
        self.next_is({"dev-a": None}, ids=True)

    def test_qemu_is_killed(self):
        self.quit()
        self.boot()  # So that the base is stored.
        self.begin()
        self.kill()
        self.plugin.close()
        self.boot()
        self.assertEqual([], self.left())
        self.assertEqual([BASE], [each["checkpoint"] for each in self.call("checkpoint.repair")["disks"][0]["lost"]])
        self.next_is({"dev-a": "bitmap_lost"}, ids=True)

    def test_the_plugin_is_killed(self):
        """What it leaves in QEMU is named, and costs neither base nor guest; the next backup ends it."""
        wire = Wire(self.rig.command())
        params = {"monitor": self.rig.monitor, "base": BASE, "checkpoint": "tuesday"}
        lost = wire.call("backup.begin", params)["backup"]
        wire.process.kill()
        wire.close()
        self.assertEqual({"dev-a": "usable"}, self.health())
        self.assertEqual([lost], self.call("checkpoint.repair")["open_backups"])
        with self.rig.plugin() as plugin:
            self.assertEqual([], Backup(plugin, **params).abort()["leftovers"])
        self.assertEqual([], self.call("checkpoint.repair")["open_backups"])
        self.assertEqual([], self.left())
        self.more(10)
        self.quit()
        self.boot()
        self.more(12)
        self.next_is({"dev-a": None}, ids=True)
        self.assertNotIn("tuesday", self.listed()["dev-a"])


class OpenBackupIn72(OpenBackup):
    qemu = QEMU_7_2


class OpenBackupInNew(OpenBackup):
    qemu = QEMU_NEW

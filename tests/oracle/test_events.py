"""What becomes of a checkpoint at each event in the VM's life; the next backup is right."""

import json
import shutil
import subprocess

from . import support
from .guest import MIB
from .life import BASE, SIZE, Life
from .support import QEMU_7_2, Daemon, Rig, io, make_image


class Restarts(Life):
    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def test_an_orderly_restart_costs_raw_disks_only(self):
        self.quit()
        self.boot()
        self.change()
        self.assertEqual({"dev-a": "usable", "dev-b": "missing"}, self.health())
        self.next_is({"dev-a": None, "dev-b": "bitmap_lost"})

    def test_a_kill_is_repaired_by_one_call(self):
        self.quit()
        self.boot()
        for name in ("theirs", "libvirt-1"):
            bitmap = {"node": "a", "name": name, "persistent": True}
            self.rig.qmp.command("block-dirty-bitmap-add", bitmap)
        self.quit()
        self.boot()
        self.kill()
        self.boot()
        self.assertEqual({"dev-a": "inconsistent", "dev-b": "missing"}, self.health())
        before = self.bitmaps("a")
        self.assertEqual(3, len(before))
        self.next_is({"dev-a": "base_inconsistent", "dev-b": "bitmap_lost"}, ids=True)
        repaired = {disk["disk"]: disk for disk in self.call("checkpoint.repair")["disks"]}
        self.assertEqual([name for name in before if "/" in name], repaired["dev-a"]["removed"])
        told = {disk: [(each["checkpoint"], each["health"]) for each in found["lost"]] for disk, found in repaired.items()}
        self.assertEqual({"dev-a": [(BASE, "inconsistent")], "dev-b": [(BASE, "missing")]}, told)
        # Inconsistent ones of others are theirs to repair.
        self.assertEqual({"theirs", "libvirt-1"}, set(repaired["dev-a"]["foreign"]))
        self.assertEqual({"theirs", "libvirt-1"}, set(self.bitmaps("a")))
        again = self.call("checkpoint.repair")["disks"]
        self.assertEqual([[], []], [disk["removed"] for disk in again])
        # All full, for the reason that the host can know; then all incremental.
        self.next_is({"dev-a": "bitmap_lost", "dev-b": "bitmap_lost"}, ids=True)
        self.full()
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def test_killed_before_anything_was_stored(self):
        self.kill()
        self.boot()
        self.assertEqual({"dev-a": None, "dev-b": None}, self.health())
        self.next_is({"dev-a": "base_missing", "dev-b": "base_missing"})
        self.next_is({"dev-a": "bitmap_lost", "dev-b": "bitmap_lost"}, ids=True)

    def test_repair_leaves_other_chains_alone_unless_asked(self):
        self.call("checkpoint.create", checkpoint="theirs", chain="other", disks=["dev-a"])
        self.quit()
        self.boot()
        self.kill()
        self.boot()
        first = self.call("checkpoint.repair", chain="other")["disks"][0]
        self.assertEqual(["theirs"], [each["checkpoint"] for each in first["lost"]])
        self.assertEqual("inconsistent", self.health()["dev-a"])
        second = self.call("checkpoint.repair", all_chains=True)["disks"][0]
        self.assertEqual([BASE], [each["checkpoint"] for each in second["lost"]])
        self.assertEqual([], self.bitmaps("a"))


class RestartsIn72(Restarts):
    qemu = QEMU_7_2


class Resized(Life):
    formats = {"a": "qcow2", "b": "raw", "c": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def resize(self, node, size):
        self.rig.qmp.command("block_resize", {"node-name": node, "size": size})

    def test_grown_and_shrunk(self):
        self.resize("a", SIZE + 8 * MIB)
        self.resize("b", SIZE - 8 * MIB)
        io(self.rig.qmp, self.devices()["dev-a"][0], "write -P 7 20M 64K")
        self.assertEqual({"dev-a": "size_changed", "dev-b": "size_changed", "dev-c": "usable"}, self.health())
        dirty = self.listed()["dev-a"][BASE]["dirty_bytes"]
        self.assertGreaterEqual(dirty, 8 * MIB, "the grown area counts")
        self.next_is({"dev-a": "size_changed", "dev-b": "size_changed", "dev-c": None})


class Plugged(Life):
    arguments = ["-device", "pcie-root-port,id=spare,chassis=1"]

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def test_a_disk_is_added_and_goes_again(self):
        make_image(self.image("n"), "qcow2", SIZE)
        file = {"driver": "file", "filename": str(self.image("n"))}
        self.rig.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file})
        device = {"driver": "virtio-blk-pci", "drive": "n", "id": "dev-n", "bus": "spare"}
        self.rig.qmp.command("device_add", device)
        io(self.rig.qmp, self.devices()["dev-n"][0], "write -P 3 0 1M")
        self.assertEqual({"dev-a": "usable", "dev-b": "usable", "dev-n": "missing"}, self.health())
        self.next_is({"dev-a": None, "dev-b": None, "dev-n": "base_missing"})
        with self.rig.plugin() as plugin:
            self.backup(plugin, checkpoint="tuesday").commit()
        # The processor does not run, so no guest lets go of it: a reset does.
        self.rig.qmp.command("device_del", {"id": "dev-n"})
        self.rig.qmp.command("system_reset")
        self.rig.qmp.wait_event("DEVICE_DELETED", device="dev-n")
        self.change()
        with self.rig.plugin() as plugin:
            params = {"monitor": self.rig.monitor, "disks": [{"disk": "dev-n"}]}
            self.refused("unknown_disk", plugin, "backup.begin", params)
            backup = self.backup(plugin, base="tuesday", strict=True)
            self.assertEqual({"dev-a", "dev-b"}, set(backup.disks))
            backup.abort()


class ExternalDataFile(Life):
    """qcow2 that keeps bitmaps, and the guest's bytes in a raw file."""

    formats = {"a": "qcow2"}

    def make(self, node, format):
        data = ["-o", f"data_file={self.places.folder}/data.raw,data_file_raw=on"]
        make_image(self.image(node), format, SIZE, *data)

    def test_it_keeps_its_checkpoints(self):
        self.boot()
        self.full()
        self.quit()
        self.boot()
        self.write("write -P 5 9M 64K")
        self.next_is({"dev-a": None})
        with open(self.places.folder / "data.raw", "rb") as raw:
            raw.seek(9 * MIB)
            self.assertEqual(b"\x05" * 65536, raw.read(65536))


class InternalSnapshots(Life):
    formats = {"a": "qcow2"}

    def test_qemu_loads_none_while_there_are_checkpoints(self):
        self.boot()
        human = lambda line: self.rig.qmp.command("human-monitor-command", {"command-line": line})
        self.assertEqual("", human("savevm before"))
        self.full()
        self.assertIn("bitmap", human("loadvm before"))
        self.next_is({"dev-a": None})
        self.quit()
        command = ["qemu-img", "snapshot", "-a", "before", str(self.image("a"))]
        offline = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertNotEqual(0, offline.returncode)
        self.assertIn("bitmap", offline.stderr)


class OfflineWrites(Life):
    formats = {"a": "qcow2"}

    def test_tools_of_qemus_record_what_they_write(self):
        self.boot()
        self.full()
        self.quit()
        write = ["qemu-io", "-f", "qcow2", "-c", "write -P 9 9M 64K", str(self.image("a"))]
        subprocess.run(write, check=True, capture_output=True)
        self.boot()
        self.next_is({"dev-a": None})


class Foreign(Life):
    formats = {"a": "qcow2"}

    def test_names_like_ours_are_not_taken_for_ours(self):
        self.boot()
        names = [BASE, "qemu-fleece/foo", f"qemu-fleece/1/default/{BASE}", f"qemu-fleece/1/default/{BASE}/{SIZE}/1",
                 f"qemu-fleece/2/default/{BASE}/{SIZE}/1/-/0123456789ab/0123456789ab", "qf"]
        for name in names:
            self.rig.qmp.command("block-dirty-bitmap-add", {"node": "a", "name": name, "persistent": True})
        self.full()
        self.call("checkpoint.create", checkpoint="second")
        told = {name: each["health"] for name, each in self.listed()["dev-a"].items()}
        foreign = {name: "foreign" for name in names if name != BASE}
        self.assertEqual({**foreign, "second": "usable"}, {name: told[name] for name in [*foreign, "second"]})
        before = self.node("a")["dirty-bitmaps"]
        self.call("checkpoint.merge", checkpoint="both", **{"from": [BASE, "second"]}, delete_sources=True)
        self.call("checkpoint.delete", checkpoints=["both"])
        self.call("checkpoint.repair", all_chains=True)
        theirs = lambda bitmaps: [each for each in bitmaps if each["name"] in names]
        self.assertEqual(theirs(before), theirs(self.node("a")["dirty-bitmaps"]))


class StorageDaemon(support.Test):
    """The VM is off: its image is at a storage daemon, where the disk has another id."""

    def test_a_base_is_known_by_its_identity(self):
        places = support.Places()
        self.addCleanup(places.close)
        image = places.folder / "a.qcow2"
        make_image(image, "qcow2", SIZE)

        def daemon(node):
            return Rig(Daemon(["--blockdev", support.blockdev(node, image, "qcow2")]), places.folder)

        with daemon("one") as rig, rig.plugin() as plugin:
            backup = support.Backup(plugin, rig.monitor, checkpoint=BASE)
            backup.read_all(rig)
            backup.commit()
            known = backup.disks["one"]["checkpoint_id"]
            rig.qmp.command("quit")
            rig.machine.process.wait(support.SECONDS)
        write = ["qemu-io", "-f", "qcow2", "-c", "write -P 9 9M 64K", str(image)]
        subprocess.run(write, check=True, capture_output=True)
        shutil.move(rig.image("one"), rig.image("two"))
        with daemon("two") as rig, rig.plugin() as plugin:
            for id, expected in ((None, "base_mismatch"), ("another", "base_mismatch"), (known, None)):
                choice = {"disk": "two", **({"base_id": id} if id else {})}
                params = {"monitor": rig.monitor, "base": BASE, "disks": [choice]}
                (guess,) = plugin.call("backup.estimate", params)["disks"]
                self.assertEqual(expected, guess.get("reason"), json.dumps(guess))
            backup = support.Backup(plugin, rig.monitor, base=BASE, disks=[choice], strict=True)
            self.assertEqual(65536, backup.disks["two"]["changed_bytes"])
            backup.read_all(rig)
            rig.compare(self, backup, {"two": "two"})
            backup.abort()

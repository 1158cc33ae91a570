"""Images on images, when one half of a checkpoint is lost, frozen, of another size or elsewhere."""

import shutil
import subprocess

from .guest import MIB
from .life import BASE, SIZE, Layered
from .support import QEMU_7_2, io, make_image


class Layers(Layered):
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def test_a_half_that_was_never_stored(self):
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.kill()
        self.boot_on("o")
        # The older half was stored when its image became read-only.
        self.assertEqual({"dev-a": "on_backing_image"}, self.health())
        self.next_is({"dev-a": "on_backing_image"}, ids=True)
        self.call("checkpoint.repair")
        self.full()
        self.next_is({"dev-a": None}, ids=True)

    def test_a_half_that_is_inconsistent(self):
        self.snapshot("o", bitmaps=True)
        self.quit()
        self.boot_on("o")
        self.more(9)
        self.kill()
        self.boot()
        self.assertEqual({"dev-a": "inconsistent"}, self.health())
        self.next_is({"dev-a": "base_inconsistent"}, ids=True)
        (repaired,) = self.call("checkpoint.repair")["disks"]
        self.assertEqual(1, len(repaired["removed"]))
        # The half below is read-only, and no half is ever taken for the whole.
        self.next_is({"dev-a": "on_backing_image"}, ids=True)
        self.assertEqual([], self.call("checkpoint.repair")["disks"][0]["removed"])
        self.full()
        self.next_is({"dev-a": None}, ids=True)

    def test_a_half_that_was_frozen(self):
        (name,) = self.bitmaps("a")
        self.rig.qmp.command("block-dirty-bitmap-disable", {"node": "a", "name": name})
        self.more(9)
        self.snapshot("o", bitmaps=[name])
        self.next_is({"dev-a": "base_not_recording"}, ids=True)

    def test_a_half_that_does_not_record(self):
        self.snapshot("o", bitmaps=True)
        self.rig.qmp.command("block-dirty-bitmap-disable", {"node": "o", "name": self.bitmaps("o")[0]})
        self.more(9)
        self.next_is({"dev-a": "base_not_recording"}, ids=True)

    def test_an_overlay_of_another_size(self):
        make_image(self.image("o"), "qcow2", SIZE + 4 * MIB)
        file = {"driver": "file", "filename": str(self.image("o"))}
        self.rig.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": file, "backing": None})
        bitmap = {"node": "o", "name": self.bitmaps("a")[0], "persistent": True}
        actions = [{"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "o"}},
                   {"type": "block-dirty-bitmap-add", "data": bitmap}]
        self.rig.qmp.command("transaction", {"actions": actions})
        io(self.rig.qmp, self.devices()["dev-a"][0], f"write -P 7 {SIZE} 64K")
        self.assertEqual({"dev-a": "size_changed"}, self.health())
        self.next_is({"dev-a": "size_changed"}, ids=True)

    def test_back_to_the_image_of_the_snapshot(self):
        """The overlay is thrown away: the base knows all that the older image has."""
        shutil.copy(self.rig.image("dev-a"), self.image("full"))
        self.snapshot("o", bitmaps=True)
        self.more(9)
        with self.rig.plugin() as plugin:
            thrown = self.backup(plugin, checkpoint="tuesday", base=BASE)
            thrown.commit()
        self.quit()
        self.boot()
        self.more(11)
        self.assertNotIn("tuesday", self.listed()["dev-a"])
        # The image that the host has is of an instant that is no more; it goes back to its base.
        shutil.copy(self.image("full"), self.rig.image("dev-a"))
        self.next_is({"dev-a": None}, ids=True)
        known = {"disk": "dev-a", "base_id": thrown.disks["dev-a"]["checkpoint_id"]}
        (guess,) = self.call("backup.estimate", base="tuesday", disks=[known])["disks"]
        self.assertEqual(("full", "bitmap_lost"), (guess["mode"], guess["reason"]))

    def test_a_commit_by_qemu_img(self):
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.quit()
        below, above = str(self.image("a")), str(self.image("o"))
        subprocess.run(["qemu-img", "rebase", "-u", "-b", below, "-F", "qcow2", above], check=True)
        subprocess.run(["qemu-img", "commit", "-q", above], check=True)
        self.boot()
        self.more(11)
        self.next_is({"dev-a": None}, ids=True)

    def test_a_deleted_half_does_not_come_back(self):
        """Deleted on the overlay, its half below is no base, and its name is free."""
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.call("checkpoint.delete", checkpoints=[BASE])
        self.assertEqual({"dev-a": "on_backing_image"}, self.health())
        self.next_is({"dev-a": "on_backing_image"}, ids=True)
        old = self.ids
        self.full()
        self.more(11)
        self.next_is({"dev-a": None}, ids=True)
        new, self.ids = self.ids, old
        self.next_is({"dev-a": "on_backing_image"}, ids=True)
        # The overlay is committed: now there are two of one name, and the id tells which.
        self.job("block-commit", ready=True, device="o")
        self.next_is({"dev-a": None}, ids=True)
        self.ids = new
        self.next_is({"dev-a": "base_mismatch"}, ids=True)


class LayersIn72(Layers):
    qemu = QEMU_7_2


class OnRaw(Layered):
    """Below the overlay is a raw image, whose half lives as long as QEMU."""

    formats = {"a": "raw"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def test_as_long_as_qemu_runs(self):
        self.snapshot("o")
        self.more(9)
        self.next_is({"dev-a": "on_backing_image"}, ids=True)
        self.job("block-commit", ready=True, device="o")
        self.next_is({"dev-a": None}, ids=True)
        self.rig.qmp.command("blockdev-del", {"node-name": "o"})
        self.snapshot("p", bitmaps=self.bitmaps("a"))
        self.more(11)
        self.next_is({"dev-a": None}, ids=True)

    def test_the_half_that_is_left_after_a_restart_is_no_base(self):
        self.snapshot("o", bitmaps=self.bitmaps("a"))
        self.more(9)
        self.quit()
        self.boot_on("o")
        self.more(11)
        self.assertEqual({"dev-a": "mismatch"}, self.health())
        self.next_is({"dev-a": "base_mismatch"}, ids=True)
        self.next_is({"dev-a": "base_mismatch"})

    def test_nothing_is_left_after_a_kill(self):
        self.snapshot("o", bitmaps=self.bitmaps("a"))
        self.more(9)
        self.kill()
        self.boot_on("o")
        self.next_is({"dev-a": "bitmap_lost"}, ids=True)

"""External snapshots, commits and streams by somebody else, between two backups."""

from .guest import MIB
from .life import BASE, SIZE, Layered
from .support import QEMU_7_2, make_image


class Snapshots(Layered):
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def test_without_bitmaps_it_is_seen(self):
        overlay = {"node-name": "a", "snapshot-file": str(self.image("o")), "snapshot-node-name": "o"}
        self.rig.qmp.command("blockdev-snapshot-sync", overlay)
        self.more(9)
        self.assertEqual({"dev-a": "on_backing_image"}, self.health())
        self.assertNotIn("dirty_bytes", self.listed()["dev-a"][BASE])
        self.next_is({"dev-a": "on_backing_image"})
        self.next_is({"dev-a": "on_backing_image"}, ids=True)
        # The full makes one on the overlay, of the same name if the host likes.
        self.full()
        self.more(11)
        self.next_is({"dev-a": None}, ids=True)

    def test_with_bitmaps_of_the_same_names_both_halves_count(self):
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.next_is({"dev-a": None})
        self.snapshot("p", "o", bitmaps=True)
        self.more(11)
        self.assertEqual({"dev-a": "usable"}, self.health())
        backup = self.next_is({"dev-a": None}, ids=True)
        self.assertEqual({"same"}, backup.streams["dev-a"].kinds(7 * MIB, 8 * MIB))
        # Merged into one, it needs the images below no more.
        self.call("checkpoint.merge", checkpoint=BASE, **{"from": [BASE]})
        self.job("block-stream", device="p")
        self.more(7)
        self.next_is({"dev-a": None}, ids=True)

    def test_a_layer_without_is_a_gap(self):
        self.snapshot("o")
        self.snapshot("p", "o")
        for name in self.bitmaps("a"):
            self.rig.qmp.command("block-dirty-bitmap-add", {"node": "p", "name": name, "persistent": True})
        self.more(9)
        self.next_is({"dev-a": "on_backing_image"})

    def test_after_a_restart_both_halves_are_found_again(self):
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.quit()
        self.boot_on("o")
        self.more(11)
        self.next_is({"dev-a": None}, ids=True)

    def test_active_commit_is_recorded(self):
        for bitmaps in (False, True):
            with self.subTest(bitmaps=bitmaps):
                self.snapshot(f"o{bitmaps}", bitmaps=bitmaps)
                self.more(9)
                self.job("block-commit", ready=True, device=f"o{bitmaps}")
                self.rig.qmp.command("blockdev-del", {"node-name": f"o{bitmaps}"})
                self.more(11)
                self.assertEqual({"dev-a": "usable"}, self.health())
                self.next_is({"dev-a": None}, ids=True)

    def test_commit_of_a_layer_between_is_recorded(self):
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.snapshot("p", "o", bitmaps=True)
        self.more(11)
        self.job("block-commit", device="p", **{"top-node": "o", "base-node": "a"})
        self.next_is({"dev-a": None}, ids=True)

    def test_a_half_that_is_left_alone_is_never_a_base(self):
        """block-stream drops the image that has the older half."""
        self.snapshot("o", bitmaps=True)
        self.more(9)
        self.job("block-stream", device="o")
        self.more(11)
        self.assertEqual({"dev-a": "mismatch"}, self.health())
        self.next_is({"dev-a": "base_mismatch"})
        self.next_is({"dev-a": "base_mismatch"}, ids=True)

    def test_stream_without_bitmaps(self):
        self.snapshot("o")
        self.more(9)
        self.job("block-stream", device="o")
        self.next_is({"dev-a": "base_missing"})
        self.next_is({"dev-a": "bitmap_lost"}, ids=True)

    def test_mirrored_to_another_image(self):
        for copied in (False, True):
            with self.subTest(copied=copied):
                node = self.devices()["dev-a"][1]
                target = f"m{copied}"
                make_image(self.image(target), "qcow2", SIZE)
                file = {"driver": "file", "filename": str(self.image(target)), "discard": "unmap"}
                self.rig.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": target, "file": file})
                for name in self.bitmaps(node) if copied else []:
                    bitmap = {"node": target, "name": name, "persistent": True}
                    self.rig.qmp.command("block-dirty-bitmap-add", bitmap)
                self.job("blockdev-mirror", ready=True, device=node, target=target, sync="full")
                self.assertEqual(target, self.devices()["dev-a"][1])
                self.next_is({"dev-a": "base_mismatch" if copied else "bitmap_lost"}, ids=True)
                if copied:
                    self.call("checkpoint.delete", checkpoints=[BASE])
                self.full()


class SnapshotsIn72(Snapshots):
    qemu = QEMU_7_2

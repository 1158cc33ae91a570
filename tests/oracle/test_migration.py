"""Live migration to a second QEMU, and the next backup there."""

import subprocess

from . import support
from .life import BASE, Life
from .support import QEMU_7_2, Rig, Vm, make_image, virtio


class Migration(Life):
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()

    def to(self, image, bitmaps, node="a"):
        """The VM goes to a second QEMU with its disk at `image`; that is `self.rig` then."""
        source = self.rig
        self.addCleanup(source.close)
        disk = virtio(node, image, self.formats["a"], "dev-a")
        self.rig = Rig(Vm([*disk, "-incoming", "defer"], self.qemu), self.places.folder)
        for rig in (source, self.rig):
            states = [{"capability": "dirty-bitmaps", "state": bitmaps}, {"capability": "events", "state": True}]
            rig.qmp.command("migrate-set-capabilities", {"capabilities": states})
        if image != self.image("a"):
            self.copy(source, self.rig)
        address = f"unix:{self.places.folder}/migration"
        self.rig.qmp.command("migrate-incoming", {"uri": address})
        source.qmp.command("migrate", {"uri": address})
        source.qmp.wait_event("MIGRATION", status="completed")
        self.rig.qmp.wait_event("MIGRATION", status="completed")
        # Images are the second one's from here on, and bitmaps in them are loaded.
        self.rig.qmp.command("cont")
        self.rig.qmp.command("stop")
        source.machine.process.kill()
        source.machine.process.wait()

    def copy(self, source, target):
        """The disk's content: the processor does not run, so it stays as it is."""
        sockets = [f"{self.places.folder}/from", f"{self.places.folder}/to"]
        for rig, path, writable in zip((source, target), sockets, (False, True)):
            address = {"type": "unix", "data": {"path": path}}
            rig.qmp.command("nbd-server-start", {"addr": address})
            export = {"type": "nbd", "id": "e", "node-name": "a", "name": "a", "writable": writable}
            rig.qmp.command("block-export-add", export)
        subprocess.run(["nbdcopy", *(f"nbd+unix:///a?socket={path}" for path in sockets)], check=True)
        for rig in (source, target):
            rig.qmp.command("block-export-del", {"id": "e", "mode": "hard"})
            rig.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e")
            rig.qmp.command("nbd-server-stop")

    def test_shared_storage(self):
        for bitmaps in (True, False):
            with self.subTest(bitmaps=bitmaps):
                self.full(f"{BASE}-{bitmaps}")
                self.to(self.image("a"), bitmaps)
                self.write("write -P 6 9M 64K")
                with self.rig.plugin() as plugin:
                    backup = self.backup(plugin, base=f"{BASE}-{bitmaps}", strict=True)
                    backup.abort()

    def test_to_another_path_with_bitmaps(self):
        self.full()
        make_image(self.image("moved"), "qcow2", support.os.path.getsize(self.rig.image("dev-a")))
        self.to(self.image("moved"), True)
        self.write("write -P 6 9M 64K")
        self.assertEqual({"dev-a": "mismatch"}, self.health())
        self.next_is({"dev-a": "base_mismatch"})
        self.next_is({"dev-a": "base_mismatch"}, ids=True)
        word = {"disk": "dev-a", "changed": "recorded", "id": self.ids["dev-a"]}
        self.call("checkpoint.redefine", checkpoint=BASE, disks=[word])
        self.write("write -P 6 11M 64K")
        self.next_is({"dev-a": None}, ids=True)

    def test_to_another_path_without_bitmaps(self):
        """What the host knows of the changes, it can say."""
        self.full()
        make_image(self.image("moved"), "qcow2", support.os.path.getsize(self.rig.image("dev-a")))
        self.to(self.image("moved"), False)
        self.next_is({"dev-a": "bitmap_lost"}, ids=True)
        changed = [[1 << 20, 128 << 10], [4 << 20, 1 << 20], [6 << 20, 64 << 10]]
        word = {"disk": "dev-a", "changed": changed, "id": self.ids["dev-a"]}
        self.call("checkpoint.redefine", checkpoint=BASE, disks=[word])
        self.write("write -P 6 11M 64K")
        self.next_is({"dev-a": None}, ids=True)

    def test_there_and_back_and_on(self):
        """Also what was stored in the image before."""
        for bitmaps in (True, False):
            with self.subTest(bitmaps=bitmaps):
                self.full()
                self.quit()
                self.boot()
                for at in (9, 10):
                    self.to(self.image("a"), bitmaps)
                    self.write(f"write -P 6 {at}M 64K")
                    self.next_is({"dev-a": None}, ids=True)
                self.quit()
                self.boot()
                self.next_is({"dev-a": None}, ids=True)
                self.call("checkpoint.delete", checkpoints=[BASE])

    def test_other_names_of_nodes(self):
        """QEMU migrates bitmaps by their nodes' names: others than the source's are lost, and seen to be."""
        self.full()
        self.quit()
        self.boot()
        self.to(self.image("a"), True, node="other")
        self.write("write -P 6 9M 64K")
        self.next_is({"dev-a": "base_inconsistent"}, ids=True)
        self.call("checkpoint.repair")
        self.full()
        self.next_is({"dev-a": None}, ids=True)

    def test_the_longest_names_can_be_migrated(self):
        """QEMU migrates no bitmap whose name is longer than 255 bytes."""
        longest = {"chain": "y" * 64, "checkpoint": "x" * 64}
        word = {"disk": "dev-a", "changed": [], "id": "z" * 32, "time_ms": (1 << 64) - 1}
        self.full()
        self.call("checkpoint.redefine", disks=[word], **longest)
        self.to(self.image("a"), True)
        self.assertEqual("usable", self.listed(chain="y" * 64)["dev-a"]["x" * 64]["health"])


class MigrationIn72(Migration):
    qemu = QEMU_7_2

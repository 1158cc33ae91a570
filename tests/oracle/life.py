"""A VM whose disks have a committed checkpoint, and what the next backup makes of it."""

import subprocess

from . import support
from .guest import MIB
from .support import QEMU, Backup, Rig, Vm, io, make_image, virtio

BASE = "monday"
SIZE = 16 * MIB


class Life(support.Test):
    """Disk `dev-X` is node X; `formats` says of which format."""

    formats = {"a": "qcow2", "b": "raw"}
    qemu = QEMU
    arguments = ()

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        self.rig = None
        self.addCleanup(lambda: self.rig and self.rig.close())
        for node, format in self.formats.items():
            self.make(node, format)

    def image(self, node):
        return self.places.folder / f"{node}.img"

    def make(self, node, format):
        make_image(self.image(node), format, SIZE)

    def disks(self):
        """The disks' arguments."""
        return sum((virtio(node, self.image(node), format) for node, format in self.formats.items()), [])

    def boot(self, *more):
        """(Re)starts QEMU: whatever runs is killed."""
        if self.rig:
            self.rig.close()
        vm = Vm([*self.disks(), *self.arguments, *more], self.qemu)
        self.rig = Rig(vm, self.places.folder)

    def quit(self):
        self.rig.qmp.command("quit")
        self.rig.machine.process.wait(support.SECONDS)

    def kill(self):
        self.rig.machine.process.kill()
        self.rig.machine.process.wait()

    def devices(self):
        """{disk: (its device, its node now)}."""
        found = {}
        for block in self.rig.qmp.command("query-block"):
            if "inserted" in block:
                disk = block["qdev"].removeprefix("/machine/peripheral/").split("/")[0]
                found[disk] = (block["qdev"], block["inserted"]["node-name"])
        return found

    def write(self, *commands):
        for device, _ in self.devices().values():
            for command in commands:
                io(self.rig.qmp, device, command)

    def change(self):
        """Something of each kind since the last backup."""
        self.write("write -P 2 1M 128K", "write -z 4M 1M", "discard 6M 64K")

    def full(self, name=BASE, **params):
        """A full, its checkpoint, and changes since."""
        self.write("write -P 1 0 8M")
        with self.rig.plugin() as plugin:
            backup = self.backup(plugin, checkpoint=name, **params)
            backup.commit()
        self.ids = {disk: found["checkpoint_id"] for disk, found in backup.disks.items()}
        self.change()

    def backup(self, plugin, **params):
        """All streams of a new backup, applied to the images of the last one: each byte right."""
        nodes = {disk: node for disk, (_, node) in self.devices().items()}
        backup = Backup(plugin, self.rig.monitor, **params)
        backup.read_all(self.rig)
        self.rig.compare(self, backup, nodes)
        return backup

    def call(self, method, **params):
        with self.rig.plugin() as plugin:
            return plugin.call(method, {"monitor": self.rig.monitor, **params}, support.SECONDS)

    def listed(self, **params):
        """{disk: {checkpoint: what is told of it}}."""
        disks = self.call("checkpoint.list", **params)["disks"]
        return {disk["disk"]: {each["checkpoint"]: each for each in disk["checkpoints"]} for disk in disks}

    def health(self):
        return {disk: found.get(BASE, {}).get("health") for disk, found in self.listed().items()}

    def next_is(self, expected, ids=False):
        """The next backup from the base: per disk None, or the reason why it is full.

        The estimate, a strict request and the backup agree. `ids`: the host says which
        point in time it has stored.
        """
        disks = [{"disk": disk, **({"base_id": self.ids[disk]} if ids else {})} for disk in expected]
        estimate = self.call("backup.estimate", base=BASE, disks=disks)["disks"]
        with self.rig.plugin() as plugin:
            params = {"monitor": self.rig.monitor, "base": BASE, "disks": disks, "strict": True}
            if any(expected.values()):
                data = self.refused("base_unusable", plugin, "backup.begin", params)
                self.assertEqual(expected[data["disk"]], data["reason"])
                self.assertEqual([], self.left())
            backup = self.backup(plugin, base=BASE, disks=disks)
            for guess in estimate:
                found = backup.disks[guess["disk"]]
                reason = expected[guess["disk"]]
                mode = "full" if reason else "incremental"
                self.assertEqual((mode, reason), (found["mode"], found.get("reason")), guess["disk"])
                for member in ("size", "planned", "mode", "reason"):
                    self.assertEqual(guess.get(member), found.get(member), guess["disk"])
                # Halves in two images may overlap.
                self.assertGreaterEqual(guess["changed_bytes"], found["changed_bytes"], guess["disk"])
            self.assertEqual([], backup.abort()["leftovers"])
        return backup

    def node(self, name):
        """What QEMU says of a node."""
        nodes = self.rig.qmp.command("query-named-block-nodes", {"flat": True})
        return next(node for node in nodes if node["node-name"] == name)

    def named(self, name):
        """A node's bitmaps that have a name: jobs have others."""
        return [bitmap for bitmap in self.node(name).get("dirty-bitmaps", []) if "name" in bitmap]

    def bitmaps(self, name):
        """The names of a node's bitmaps."""
        return [bitmap["name"] for bitmap in self.named(name)]

    def left(self):
        """What sessions have left in QEMU."""
        # QEMU 7.2 lets go of removed descriptors only while its processor runs.
        return [each for each in support.ours(self.rig.qmp) if not each.startswith("fdset")]


class Layered(Life):
    """Overlays on its images, and what other programs do with them."""

    def snapshot(self, overlay, below="a", bitmaps=False):
        """An overlay on a node; `bitmaps`: with those that libvirt copies, or with these names."""
        make_image(self.image(overlay), "qcow2", SIZE)
        file = {"driver": "file", "filename": str(self.image(overlay)), "discard": "unmap"}
        node = {"driver": "qcow2", "node-name": overlay, "discard": "unmap", "file": file, "backing": None}
        self.rig.qmp.command("blockdev-add", node)
        if bitmaps is True:
            there = [each for each in self.named(below) if each["persistent"] and each["recording"]]
            bitmaps = [each["name"] for each in there]
        actions = [{"type": "blockdev-snapshot", "data": {"node": below, "overlay": overlay}}]
        for name in bitmaps or []:
            bitmap = {"node": overlay, "name": name, "persistent": True}
            actions.append({"type": "block-dirty-bitmap-add", "data": bitmap})
        self.rig.qmp.command("transaction", {"actions": actions})

    def boot_on(self, overlay):
        """(Re)starts QEMU on the overlay of `a`, which names its backing image itself now."""
        below, above = self.image("a"), self.image(overlay)
        rebase = ["qemu-img", "rebase", "-u", "-b", str(below), "-F", self.formats["a"], str(above)]
        subprocess.run(rebase, check=True, capture_output=True)
        self.image = lambda node: above if node == "a" else above.with_name(f"{node}.img")
        self.formats = {"a": "qcow2"}
        self.boot()

    def more(self, at):
        """Changes at this MiB, and others."""
        self.write(f"write -P 5 {at}M 64K", f"write -z {at + 1}M 64K", f"discard {at + 2}M 64K")

    def job(self, command, ready=False, **arguments):
        """Runs a block job to its end; `ready`: it is one that has to be told when."""
        self.rig.qmp.command(command, {"job-id": "theirs", **arguments})
        if ready:
            self.rig.qmp.wait_event("BLOCK_JOB_READY", device="theirs")
            self.more(13)
            self.rig.qmp.command("job-complete", {"id": "theirs"})
        event = self.rig.qmp.wait_event("BLOCK_JOB_COMPLETED", device="theirs")
        self.assertNotIn("error", event["data"])
        self.rig.qmp.wait_event("JOB_STATUS_CHANGE", id="theirs", status="null")

"""The matrix once more, pushed: QEMU writes to us, to files, to devices' images, to servers.

Every image that a push has made or brought up to date equals the oracle's copy of its instant.
"""

import os
import shutil
import subprocess

from . import support, test_matrix
from .guest import MIB
from .support import Backup, Rig
from .targets import Server

# What a file may take beyond its data: the metadata of its own file system.
SPARE = 64 * 1024


class Records(test_matrix.Matrix):
    """QEMU pushes to the plugin, and the host gets the same stream as from a pull."""

    def consume(self, rig, backup, step):
        replies = {}
        for disk in backup.disks:
            stream = backup.streams[disk] = support.Stream(rig.image(disk))
            params = {"backup": backup.id, "disk": disk, "target": {"kind": "records"}}
            replies[disk] = backup.plugin.start("backup.push", params, on_record=stream.take)
        for disk, future in replies.items():
            reply = future.result(support.SECONDS)
            stream = backup.streams[disk]
            stream.finish()
            self.assertEqual(stream.end["digest"], reply["digest"])
            self.assertEqual(stream.begin["mode"], reply["mode"])

    # A push has no such case of its own.
    test_a_monitor_over_tcp = None


class Targets(test_matrix.Matrix):
    """Each disk to another kind of target: an image that is brought up to date, a chain, a server."""

    def consume(self, rig, backup, step):
        self.folder = rig.folder
        kinds = [self.existing, self.chain, self.server]
        pushes = []
        for number, disk in enumerate(backup.disks):
            target = kinds[number](disk, backup.disks[disk], step)
            params = {"backup": backup.id, "disk": disk, "target": target}
            pushes.append((disk, target, backup.plugin.start("backup.push", params)))
        for disk, target, future in pushes:
            reply = future.result(support.SECONDS)
            self.assertEqual(backup.disks[disk]["mode"], reply["mode"])
            self.assertLessEqual(reply["copied_bytes"], -(-backup.disks[disk]["size"] // 65536) * 65536)
            self.fetch(target, rig.image(disk))
            backup.streams[disk] = None

    def check(self, stream, base, name, step):
        pass  # There is no stream.

    def fetch(self, target, image):
        """What a reader of the target sees."""
        if target["kind"] == "nbd":
            shutil.copy(self.folder / "served.raw", image)
        elif target["format"] == "qcow2":
            subprocess.run(["qemu-img", "convert", "-O", "raw", target["path"], str(image)], check=True)
        else:
            shutil.copy(target["path"], image)

    def existing(self, disk, facts, step):
        """A raw file: the full makes it, each incremental brings it up to date."""
        path = str(self.folder / f"{disk}.raw")
        if step == 0:
            return {"kind": "file", "path": path, "format": "raw"}
        return {"kind": "existing", "path": path, "format": "raw"}

    def chain(self, disk, facts, step):
        """A qcow2 file for each step."""
        target = {"kind": "file", "path": str(self.folder / f"{disk}.{step}.qcow2"), "format": "qcow2"}
        if step > 0:
            target["backing"] = {"path": f"{disk}.{step - 1}.qcow2", "format": "qcow2"}
        return target

    def server(self, disk, facts, step):
        """An nbdkit over a raw file, for each step a new one."""
        image = self.folder / "served.raw"
        if step == 0:
            image.touch()
            os.truncate(image, facts["size"])
        server = Server(["nbdkit", "-f", "file", image], self.folder / f"nbdkit{step}")
        self.addCleanup(server.close)
        return server.target(is_zero=True) if step == 0 else server.target()


class Sparse(support.Test):
    """A full push takes no more room than there is data."""

    def allocated(self, path):
        return os.stat(path).st_blocks * 512

    def rig(self, size=64 * MIB, **how):
        image = support.pathlib.Path(support.tempfile.mkdtemp(prefix="fleece-sparse-")) / "disk.raw"
        self.addCleanup(shutil.rmtree, image.parent)
        support.make_image(image, "raw", size)
        rig = Rig(support.Vm(support.virtio("disk0", image, "raw"), **how))
        self.addCleanup(rig.close)
        return rig

    def test_raw_files(self):
        rig = self.rig()
        for at in (0, 20 * MIB, 63 * MIB):
            support.io(rig.qmp, "dev-disk0/virtio-backend", f"write -P 7 {at} 64K")
        # Written as bytes, and zeros all the same.
        support.io(rig.qmp, "dev-disk0/virtio-backend", f"write -P 0 {40 * MIB} 4M")
        folder = rig.folder
        (folder / "old.raw").write_bytes(b"\xff" * 64 * MIB)
        with rig.plugin() as plugin:
            backup = Backup(plugin, rig.monitor)
            targets = [
                {"kind": "file", "path": str(folder / "new.raw"), "format": "raw"},
                {"kind": "existing", "path": str(folder / "old.raw"), "format": "raw"},
                {"kind": "file", "path": str(folder / "new.qcow2"), "format": "qcow2"},
            ]
            for target in targets:
                params = {"disk": "dev-disk0", "target": target, "discard_source": False}
                backup.call("push", **params)
                image = folder / "seen.raw"
                subprocess.run(["qemu-img", "convert", "-O", "raw", target["path"], str(image)], check=True)
                self.assert_equal_files(image, rig.oracle()["disk0"], target["path"])
                meta = 512 * 1024 if target["format"] == "qcow2" else SPARE
                self.assertLessEqual(self.allocated(target["path"]), 3 * 65536 + meta, target)
            backup.abort()

    def test_the_view_shrinks_with_the_push(self):
        rig = self.rig()
        support.io(rig.qmp, "dev-disk0/virtio-backend", "write -P 7 0 32M")
        with rig.plugin() as plugin:
            backup = Backup(plugin, rig.monitor)
            support.io(rig.qmp, "dev-disk0/virtio-backend", "write -P 8 0 32M")
            reply = backup.call("push", disk="dev-disk0", target={
                "kind": "file", "path": str(rig.folder / "new.raw"), "format": "raw"})
            self.assertGreater(reply["scratch_peak"], 32 * MIB)
            self.assert_equal_files(rig.folder / "new.raw", rig.oracle()["disk0"], "new.raw")
            # What QEMU has written it forgets, so it cannot be had again.
            refused = {"backup": backup.id, "disk": "dev-disk0"}
            self.refused("offset_released", plugin, "backup.read", refused)
            backup.commit()
        self.assertEqual([], support.ours(rig.qmp))


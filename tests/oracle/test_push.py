"""The matrix once more, pushed: QEMU writes to us, to files, to devices' images, to servers.

Every image that a push has made or brought up to date equals the oracle's copy of its instant.
"""

import os
import shutil
import subprocess

from . import support, test_matrix
from .guest import MIB
from .life import SIZE
from .pushes import Pushes
from .support import Backup, Rig
from .targets import Nbdkit, Server

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
    """Each disk to another kind of target: an image that is brought up to date, a chain, a server.

    Of two disks, one goes to its image by turns through a server.
    """

    def consume(self, rig, backup, step):
        self.folder = rig.folder
        kinds = [self.existing, self.chain, self.server]
        if len(backup.disks) < len(kinds) and step % 2:
            kinds = [self.server, self.chain]
        pushes = []
        for number, disk in enumerate(backup.disks):
            target = kinds[number](disk, backup.disks[disk], step)
            params = {"backup": backup.id, "disk": disk, "target": target}
            pushes.append((disk, target, backup.plugin.start("backup.push", params)))
        for disk, target, future in pushes:
            reply = future.result(support.SECONDS)
            self.assertEqual(backup.disks[disk]["mode"], reply["mode"])
            self.assertLessEqual(reply["copied_bytes"], -(-backup.disks[disk]["size"] // 65536) * 65536)
            self.fetch(disk, target, rig.image(disk))
            backup.streams[disk] = None

    def check(self, stream, base, name, step):
        pass  # There is no stream.

    def fetch(self, disk, target, image):
        """What a reader of the target sees."""
        if target.get("format") == "qcow2":
            subprocess.run(["qemu-img", "convert", "-O", "raw", target["path"], str(image)], check=True)
        else:
            shutil.copy(self.raw(disk), image)

    def raw(self, disk):
        return self.folder / f"{disk}.raw"

    def existing(self, disk, facts, step):
        """A raw file: the full makes it, each incremental brings it up to date."""
        path = str(self.raw(disk))
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
        image = self.raw(disk)
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

    def scratch_during_push(self, size, **params):
        """(Bytes pushed, bytes of scratch) as told on the way, when all of the data has gone to scratch before."""
        rig = self.rig()
        support.io(rig.qmp, "dev-disk0/virtio-backend", f"write -P 7 0 {size}")
        image, notes = rig.folder / "image", []
        support.make_image(image, "raw", 64 * MIB)
        # It takes a while, in which progress is told a few times.
        slow = {"filters": ["delay"], "path": rig.folder / "nbd"}
        server = Nbdkit(image, rig.folder / "log", "delay-write=200ms", **slow)
        self.addCleanup(server.close)
        with rig.plugin(on_notice=lambda method, note: method == "progress" and notes.append(note)) as plugin:
            backup = Backup(plugin, rig.monitor)
            support.io(rig.qmp, "dev-disk0/virtio-backend", f"write -P 8 0 {size}")
            reply = backup.call("push", disk="dev-disk0", target=server.target(is_zero=True), workers=1, **params)
            self.assert_equal_files(image, rig.oracle()["disk0"], "the target")
            self.assertGreater(reply["scratch_peak"], size)
            backup.abort()
        told = [(note["done"], note["scratch_bytes"]) for note in notes]
        self.assertEqual(size, told[-1][0])
        # A look at its start and at its end would not do.
        self.assertTrue([done for done, _ in told if size / 4 < done < size * 3 / 4], told)
        return told

    def test_scratch_shrinks_with_the_push(self):
        """What QEMU has written it forgets at once, but for what is under way."""
        size = 32 * MIB
        for done, scratch in self.scratch_during_push(size):
            self.assertLess(scratch, size - done + 4 * MIB)

    def test_scratch_is_kept_for_another_push(self):
        size = 32 * MIB
        for _, scratch in self.scratch_during_push(size, discard_source=False):
            self.assertGreaterEqual(scratch, size)

class Progress(Pushes):
    def test_it_is_told_of_a_push_to_a_target(self):
        told = []

        def notice(method, params):
            if method == "progress":
                told.append(params)

        with self.opened(plugin=self.rig.plugin(on_notice=notice)) as backup:
            server = self.slow()
            self.pushed(backup, server.target(), workers=1)
            self.equal(server.image)
        done = [each["done"] for each in told]
        self.assertEqual(sorted(done), done)
        self.assertGreater(len(set(done)), 2, "it is told of the start and the end only")
        self.assertEqual(told[-1]["total"], done[-1])
        self.assertLessEqual(done[-1], SIZE)
        self.assertGreater(done[-1], 0)
        # Zeros and data are QEMU's affair; the records are those of another target.
        self.assertEqual({("dev-a", 0)}, {(each["disk"], each["data_bytes"]) for each in told})
        self.assertEqual(1, len({each["stream"] for each in told}))
        self.assertGreater(max(each["scratch_bytes"] for each in told), 0)

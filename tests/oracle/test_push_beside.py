"""Pushes of several disks side by side: none is the worse for another."""

from . import support
from .guest import MIB
from .life import BASE
from .pushes import SOON, Pushes
from .support import Backup
from .targets import until


class TwoDisks(Pushes):
    formats = {"a": "qcow2", "b": "raw"}

    def test_one_of_two_hangs(self):
        """The other one's push is none the worse; it can be committed alone."""
        hung, good = self.slow(), self.slow(image=self.raw("good"))
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="tuesday")
            futures = [self.start(backup, hung), self.start(backup, good, disk="dev-b")]
            hung.suspend()
            futures[1].result(support.SECONDS)
            self.assertEqual("disk_spent", self.failed("target_timeout", futures[0]).data["state_left"])
            self.equal(good.image, node="b")
            self.assertEqual(["dev-b"], backup.commit(disks=["dev-b"])["committed"])
            self.assertEqual([], self.left())
            there = {disk: sorted(names) for disk, names in self.rig.checkpoints(plugin).items()}
            self.assertEqual({"dev-a": [BASE], "dev-b": [BASE, "tuesday"]}, there)
        self.assertEqual([], self.rig.files())
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def test_beside_a_slow_one(self):
        """QEMU would wait for each write of a push at many a step of whatever changes its nodes."""
        slow, quick = self.slow(), self.nbdkit(image=self.raw("quick"))
        ours = {"monitor": self.rig.monitor, "disks": [{"disk": "dev-b"}]}
        with self.opened(disks=[{"disk": "dev-a"}]) as first:
            copy = self.rig.oracle()["a"]
            pushed = self.start(first, slow, timeout_ms=60000, workers=1)
            begun = first.plugin.start("backup.begin", ours)
            self.monitor_answers_until(begun)
            second = Backup.of(first.plugin, begun.result())
            other = self.push(second, quick.target(), disk="dev-b")
            self.monitor_answers_until(other)
            other.result()
            self.equal(quick.image, node="b")
            ended = first.plugin.start("backup.abort", {"backup": second.id})
            self.monitor_answers_until(ended)
            self.assertEqual({"leftovers": []}, ended.result())
            self.assertFalse(pushed.done(), "nothing was pushed beside")
            pushed.result(support.SECONDS)
            self.assert_equal_files(slow.image, copy, "the slow one")

    def test_a_running_disks_image_is_no_target(self):
        """QEMU locks what it has open: not even its first byte is lost."""
        link = self.targets / "link"
        link.symlink_to(self.image("b"))
        for path in (self.image("b"), link):
            for kind in ("existing", "file"):
                with self.subTest(path=path, kind=kind), self.doomed(disks=[{"disk": "dev-a"}]) as backup:
                    self.write("flush")
                    before = self.image("b").read_bytes()
                    target = {"kind": kind, "path": str(path), "format": "raw"}
                    self.fails("target_refused" if kind == "existing" else "target_exists", backup, target)
                    self.assertEqual(before, self.image("b").read_bytes())

    def test_one_image_is_not_the_target_of_two(self):
        image = self.raw()
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor)
            target = {"kind": "existing", "path": str(image), "format": "raw"}
            first = self.push(backup, target, speed=MIB)
            # Blocks are there: it has begun.
            until(lambda: image.stat().st_blocks or first.done())
            self.fails("target_refused", backup, target, disk="dev-b")
            self.hurry()
            first.result(support.SECONDS)
            self.equal(image)
            self.assertEqual({"leftovers": []}, backup.abort())
        self.unharmed()


class ThreeDisks(Pushes):
    formats = {"a": "qcow2", "b": "raw", "c": "qcow2"}

    def test_all_at_once(self):
        """None waits for another one that waits for it, whatever they are at."""
        for _ in range(6):
            with self.opened() as backup:
                pushed = [self.push(backup, {"kind": "records"}, disk=disk) for disk in backup.disks]
                for each in pushed:
                    self.within(SOON, each.result, support.SECONDS)

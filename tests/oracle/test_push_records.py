"""Pushes to the plugin: a host that does not read, writes that come out of turn, ends of all kinds."""

import json
import subprocess
import time

from . import support
from .guest import MIB
from .machines import Machine
from .qmp import Qmp
from .records import Freezer, Recorded
from .support import DAEMON, QEMU_7_2, blockdev, make_image
from .targets import Server, until

GIB = 1024 * MIB
# MiB of data: more than the plugin keeps and passes on while its host does not read.
MUCH = 400
# Little data, in more records than the plugin keeps and passes on.
FEW = [f"write -P 1 {128 * number}K 64K" for number in range(64)]
TIMEOUT = 1000  # ms
# How long a read of the disk may take, in seconds.
READ = 60
# What "at once" is, on a machine that has other work, in seconds.
SOON = 5


class Stalled(Recorded):
    """A host that stops to read for a while."""

    limit = 2 * support.Test.limit

    # Bytes of a write of zeros.
    zeros = MIB
    # What the plugin's memory may grow by while it waits for its host.
    grows = 100 * MIB

    def stall(self, seconds=2 * TIMEOUT / 1000):
        """The host does not read for longer than a target would be borne; nobody notices."""
        self.wait_paused()
        self.answers()
        self.write("write -P 98 0 16M")
        time.sleep(seconds)
        self.assertTrue(self.is_paused(), self.job())

    def committed(self, host):
        self.right(host)
        self.assertEqual(["dev-a"], host.call("commit")["result"]["committed"])
        self.nothing_is_left()

    def test_much_data(self):
        self.boot(GIB, f"write -P 1 0 {MUCH}M", f"write -P 2 {MUCH + 100}M 1M")
        host = self.host()
        before = host.memory()
        host.push(timeout_ms=TIMEOUT)
        for offset in (1, 100 * MIB, 200 * MIB):
            host.read_some(offset)
            self.stall()
            self.assertLess(host.memory() - before, self.grows)
        self.committed(host)

    def test_a_hole(self):
        """Its writes have no bytes, and still they are not to be taken without end."""
        hole = 7000 * self.zeros
        self.boot(hole + 16 * MIB, *FEW, f"write -P 2 {hole + 15 * MIB} 1M")
        host = self.host()
        host.push(timeout_ms=TIMEOUT)
        host.read_some()
        self.stall()
        self.committed(host)

    def test_a_monitor_that_hangs_meanwhile(self):
        """QEMU cannot be told to pause the job: it has to stop by itself."""
        self.boot(GIB, f"write -P 1 0 {MUCH}M", f"write -z {MUCH}M 400M")
        monitor = Freezer(self.machine.qmp[0])
        self.addCleanup(monitor.close)
        host = self.host(monitor.address)
        before = host.memory()
        host.push(timeout_ms=TIMEOUT, speed=100 * MIB)
        # The second time, QEMU forgets meanwhile why it has stopped: `cont` clears that.
        for offset, is_forgotten in ((1, False), (150 * MIB, True)):
            host.read_some(offset)
            self.freeze(monitor, host)
            if is_forgotten:
                # Meanwhile, too, it need not wait for us.
                until(lambda: self.answers() or self.is_paused())
            else:
                self.wait_paused(**{"io-status": "nospace"})
            self.assertLess(host.memory() - before, self.grows + 128 * MIB)
            monitor.thaw()
            self.stall()
        self.committed(host)

    def test_a_long_time(self):
        """Longer than any read of the disk may take."""
        self.boot(GIB, f"write -P 1 0 {MUCH}M")
        host = self.host()
        host.push(timeout_ms=TIMEOUT)
        host.read_some()
        self.stall(READ + 5)
        self.committed(host)


class StalledIn72(Stalled):
    qemu = QEMU_7_2
    zeros = 65536
    test_a_long_time = None


class SlowDisk(Recorded):
    """A cluster of the disk is on a server that answers only while `gate` is open."""

    limit = 150
    # With more writes of zeros than are taken in.
    size = 8 * GIB

    def boot(self, at, *writes, size=None):
        """It begins this MiB, which is full of ones; the disk has these writes, and is empty else."""
        self.gate = self.places.folder / "gate"
        slow = f"[ $4 -lt {at * MIB + 65536} ] && while [ -e {self.gate} ]; do sleep 0.05; done"
        read = f"{slow}; head -c $3 /dev/zero | tr '\\0' '\\1'"
        command = ["nbdkit", "-f", "eval", f"get_size=echo {(at + 1) * MIB}", f"pread={read}"]
        server = Server(command, self.places.folder / "disk.sock")
        self.addCleanup(server.close)
        self.addCleanup(self.open)
        size = size or self.size
        make_image(self.image, "qcow2", size)
        address = {"type": "unix", "path": server.address.removeprefix("unix:")}
        below = {"driver": "nbd", "node-name": "slow", "server": address, "read-only": True}
        node = {**json.loads(blockdev("a", self.image, "qcow2")), "backing": "slow"}
        nodes = [word for each in (below, node) for word in ("-blockdev", json.dumps(each))]
        self.run_vm([*nodes, "-device", "virtio-blk-pci,drive=a,id=dev-a"])
        self.write(*writes)
        make_image(self.oracle, "qcow2", size)
        for command in (*writes, f"write -P 1 {at}M 1M"):
            subprocess.run(["qemu-io", "-c", command, str(self.oracle)], check=True, stdout=subprocess.DEVNULL)

    def open(self):
        self.gate.unlink(missing_ok=True)

    def pushed(self, monitor=None, **params):
        """A push in which that read takes as long as the gate is closed."""
        host = self.host(monitor)
        self.gate.touch()
        host.push(timeout_ms=TIMEOUT, **params)
        # It cannot end.
        until(lambda: not self.is_over())
        return host

    def wait_hangs(self):
        """Until QEMU does nothing more: it was told to pause, or waits for that read."""
        until(lambda: self.job()["paused"] or self.stands_still())

    def test_all_else_waits_for_one_read(self):
        """It is no fault of anybody's: not of the target, which is we, and not of QEMU's order."""
        self.boot(0)
        host = self.pushed()
        self.wait_hangs()
        time.sleep(2 * TIMEOUT / 1000)
        self.open()
        self.right(host)
        self.aborted(host)

    def test_one_write_comes_when_there_is_no_room_for_it(self):
        """And what there is has no end without it: the job has to go on all the same."""
        self.boot(100, "write -P 2 0 100M", f"write -P 3 101M {MUCH}M", size=GIB)
        monitor = Freezer(self.machine.qmp[0])
        self.addCleanup(monitor.close)
        host = self.pushed(monitor.address, speed=50 * MIB)
        host.read_some()
        self.freeze(monitor, host)
        # Others are refused by then.
        until(lambda: self.job()["offset"] > 120 * MIB and self.stands_still())
        self.open()
        self.wait_paused(**{"io-status": "nospace"})
        monitor.thaw()
        self.right(host)
        self.aborted(host)

    def stands_still(self):
        before = self.job()["offset"]
        time.sleep(TIMEOUT / 1000)
        return before == self.job()["offset"]

    def test_cancel_while_it_hangs(self):
        """The job cannot end before its read does: the reply tells that it is left, and a later clean-up takes it."""
        self.boot(0)
        host = self.pushed()
        self.wait_hangs()
        host.cancel()
        data = host.error()
        self.assertEqual("cancelled", data["code"])
        self.assertTrue(any("-push" in each for each in data["leftovers"]), data)
        self.open()
        self.aborted(host)

    def test_hung(self):
        """For as long as a pull would wait: then the disk is blamed, and not the target."""
        self.boot(0)
        host = self.pushed()
        data = host.error()
        self.assertEqual(("qemu_timeout", "retry", "disk_spent"), (data["code"], data["action"], data["state_left"]))
        # The job cannot end before its read does.
        self.assertTrue(any("-push" in each for each in data["leftovers"]), data)
        self.open()
        self.aborted(host)


class SlowDiskIn72(SlowDisk):
    qemu = QEMU_7_2
    size = GIB
    test_hung = None
    # It copies no data while a read hangs.
    test_one_write_comes_when_there_is_no_room_for_it = None


class Ends(Recorded):
    """Pushes that do not come to their end: the reply comes when all is cleaned up, and tells what is not."""

    # What a push leaves that began to give back what it had written.
    spent = "disk_spent"

    def start(self, *writes, size=GIB, **params):
        """A push of which the host has read some, and QEMU has pushed all that it can."""
        self.boot(size, *(writes or [f"write -P 1 0 {MUCH}M"]))
        host = self.host()
        host.push(**params)
        host.read_some()
        until(lambda: self.is_over() or self.is_paused())
        return host

    def cancelled(self, host, state):
        """The push's error is the stream's; and nothing of the push is left when it comes."""
        host.cancel()
        data = host.error()
        of_the_push = ("-push", "-pf", "-t", "-tf")
        self.assertEqual([], [each for each in self.left() if each.endswith(of_the_push)])
        self.assertEqual(("cancelled", state), (data["code"], data["state_left"]), data)
        self.assertEqual((data["code"], data["action"]), (host.failed["code"], host.failed["action"]))
        self.assertNotIn("leftovers", data)

    def test_cancel(self):
        host = self.start(discard_source=False)
        self.cancelled(host, "backup_open")
        self.incomplete(host)
        # The disk is free at once, for another push or a pull.
        host.push(discard_source=False)
        host.read_some(MUCH * MIB // 2)
        self.cancelled(host, "backup_open")
        host.stream("backup.read")
        self.right(host)
        self.aborted(host)

    def test_cancel_when_qemu_has_pushed_all(self):
        """The host has not got it, so it is not complete."""
        host = self.start(*FEW, size=16 * MIB)
        self.assertTrue(self.is_over())
        self.cancelled(host, self.spent)
        self.incomplete(host)
        self.aborted(host)

    def test_abort(self):
        host = self.start()
        abort = host.send("backup.abort", {"backup": host.backup})
        # It waits for nobody who does not read.
        until(lambda: not self.left())
        self.assertEqual({"leftovers": []}, host.reply(abort)["result"])
        self.assertEqual("cancelled", host.error()["code"])
        self.nothing_is_left()

    def test_qemu_is_killed(self):
        host = self.start()
        self.machine.process.kill()
        self.machine.process.wait()
        data = host.error()
        # Which connection is missed first is chance.
        self.assertIn(data["code"], ("monitor_closed", "point_in_time_lost"), data)
        host.call("abort")
        self.assertEqual([], self.places.files())

    def test_the_monitor_closes(self):
        """The job stays, paused, and whoever comes back finds it."""
        self.boot(GIB, f"write -P 1 0 {MUCH}M")
        monitor = Freezer(self.machine.qmp[0])
        self.addCleanup(monitor.close)
        host = self.host(monitor.address)
        host.push()
        host.read_some()
        self.wait_paused()
        monitor.cut()
        data = host.error()
        self.assertEqual("monitor_closed", data["code"], data)
        self.assertTrue(any("before all was undone" in each for each in data["leftovers"]), data)
        self.answers()

    def test_standard_input_ends(self):
        host = self.start()
        host.wire.process.stdin.close()
        self.assertEqual(3, host.wire.wait())
        self.nothing_is_left()

    def test_a_disk_is_pushed_once_at_a_time(self):
        host = self.start()
        for method, more in (("read", {}), ("push", {"target": {"kind": "records"}})):
            reply = host.call(method, disk="dev-a", **more)
            self.assertEqual("stream_active", reply["error"]["data"]["code"])
        self.assertIsNone(host.failed)
        self.right(host)
        self.aborted(host)


class EndsIn72(Ends):
    qemu = QEMU_7_2
    spent = "backup_open"


class BadDisk(Recorded):
    """A read of the disk's second MiB fails."""

    def setUp(self):
        super().setUp()
        make_image(self.image, "raw", 16 * MIB)
        file = {"driver": "file", "filename": str(self.image)}
        fails = {"event": "none", "iotype": "read", "errno": 5, "sector": 2 * MIB // 512 - 1}
        node = {"driver": "raw", "node-name": "a"}
        node["file"] = {"driver": "blkdebug", "image": file, "inject-error": [fails]}
        self.run_vm(["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=a,id=dev-a"])
        self.write("write -P 1 0 16M")

    def test_its_read_is_blamed(self):
        """And neither the target, nor the point in time, which is well."""
        host = self.host()
        path = self.places.folder / "new"
        for target in ({"kind": "records"}, {"kind": "file", "path": str(path), "format": "raw"}):
            with self.subTest(**target):
                host.stream("backup.push", target=target, discard_source=False)
                data = host.error()
                self.assertEqual(("qemu_refused", "backup_open"), (data["code"], data["state_left"]), data)
                self.assertNotIn("leftovers", data)
                self.incomplete(host)
        self.assertFalse(path.exists())
        self.aborted(host)


class BadDiskIn72(BadDisk):
    qemu = QEMU_7_2


class FarDaemon(Recorded):
    """A storage daemon that finds nothing any more in our folder: no descriptor can be passed to it."""

    def test_it_cannot_connect(self):
        make_image(self.image, "qcow2", 16 * MIB)
        command = ["unshare", "--mount", "--propagation", "private", DAEMON]
        command += ["--blockdev", blockdev("a", self.image, "qcow2")]
        self.machine = Machine(command, "--chardev", "--monitor", "chardev={}")
        self.addCleanup(self.machine.close)
        self.qmp = Qmp(self.machine.qmp[2])
        self.addCleanup(self.qmp.close)
        host = self.host(disk="a")
        hide = ["nsenter", "-t", str(self.machine.process.pid), "--mount"]
        subprocess.run([*hide, "mount", "-t", "tmpfs", "none", str(self.places.runtime)], check=True)
        began = time.monotonic()
        host.push()
        data = host.error()
        self.assertLess(time.monotonic() - began, SOON)
        self.assertEqual(("target_refused", "backup_open"), (data["code"], data["state_left"]), data)
        self.assertNotIn("leftovers", data)
        subprocess.run([*hide, "umount", str(self.places.runtime)], check=True)
        host.push()
        self.assertIn("result", host.reply())
        self.aborted(host)

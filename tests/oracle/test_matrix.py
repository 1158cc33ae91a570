"""Formats, carriers, monitors and versions of QEMU: every byte of every backup is right.

A guest writes, discards and zeroes all the time; each backup's streams, applied to the
images of the backup before, must equal the oracle's copy of the same instant.
"""

import pathlib
import shutil
import tempfile

from . import support
from .guest import MIB, Disk, Guest, all_write
from .support import DAEMON, DAEMON_7_2, QEMU, QEMU_7_2, QEMU_NEW, Backup, Relay, Rig

# The writers stay below; what happens above is known.
QUIET = 16 * MIB
STEP = 8 * MIB
NODES = {"dev0": "disk0", "dev1": "disk1", "dev2": "disk2"} | {name: name for name in ("disk0", "disk1")}
TARGETS = ["disk0", "disk1", "disk2"]
# The daemon gives all its disks one serial number.
DEVICES = ["/dev/vda", "/dev/vdb"]


class BusyDaemon(support.Daemon):
    """A storage daemon whose disks a guest has, over vhost-user.

    Not over NBD: the daemon's one NBD server is the plugin's.
    """

    def __init__(self, disks, program, qemu):
        self.guest = None
        self.sockets = pathlib.Path(tempfile.mkdtemp(prefix="fleece-vhost-"))
        command = []
        guest = ["-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-numa", "node,memdev=memory"]
        for number, disk in enumerate(disks):
            node, path = f"disk{number}", self.sockets / f"disk{number}"
            support.make_image(path, disk.format, disk.size)
            command += ["--blockdev", support.blockdev(node, path, disk.format)]
            socket = f"{path}.sock"
            address = f"addr.type=unix,addr.path={socket}"
            command += ["--export", f"vhost-user-blk,id={node},node-name={node},writable=on,{address}"]
            guest += ["-chardev", f"socket,id={node},path={socket}"]
            guest += ["-device", f"vhost-user-blk-pci,chardev={node},num-queues=1,id=dev{number}"]
        super().__init__(command, program)
        try:
            support.Qmp(self.qmp[0]).close()  # Its greeting: everything before is set up.
            self.guest = Guest([], qemu=qemu, arguments=guest)
        except BaseException:
            self.close()
            raise

    def run(self, command):
        return self.guest.run(command)

    def close(self):
        if self.guest:
            self.guest.close()
        super().close()
        shutil.rmtree(self.sockets, ignore_errors=True)


class Matrix(support.Test):
    limit = 150

    def backups(self, rig, targets, carrier="framed", monitor=None):
        """A full and three incrementals of a busy machine."""
        run = rig.machine.run
        for number, target in enumerate(targets):
            run(f"write {target} 0 8M {number + 1}")
            run(f"write {target} {QUIET} {3 * STEP} {number + 1}")
            run(f"start w{number} {target} from=0 to={QUIET} zero=20 discard=20 seed={number + 1}")
        base = None
        with rig.plugin(carrier) as plugin:
            for step in range(4):
                if base:
                    for target in targets:
                        self.change(run, target, QUIET + (step - 1) * STEP)
                name = f"c{step}"
                backup = Backup(plugin, monitor or rig.monitor, base=base, checkpoint=name)
                self.assertEqual(len(targets), len(backup.disks))
                all_write(run, len(targets))
                self.consume(rig, backup, step)
                all_write(run, len(targets))
                rig.compare(self, backup, NODES)
                for stream in backup.streams.values():
                    self.check(stream, base, name, step)
                self.assertEqual(sorted(backup.disks), sorted(backup.commit()["committed"]))
                self.assertEqual([], support.ours(rig.qmp))
                base = name
        for number in range(len(targets)):
            run(f"stop w{number}")
        self.assertEqual([], rig.files())

    def consume(self, rig, backup, step):
        """Makes each disk's image one of this point in time."""
        backup.read_all(rig)

    def change(self, run, target, at):
        """Old data that becomes zeros in each of three ways, and new data."""
        # Less than a cluster would not be discarded, and stay as it is.
        run(f"zeroout {target} {at} 2M")
        run(f"discard {target} {at + 2 * MIB} 2M")
        run(f"zero {target} {at + 4 * MIB} 2M")
        run(f"write {target} {at + 6 * MIB} 64K 99")

    def check(self, stream, base, name, step):
        begin, end = stream.begin, stream.end
        self.assertEqual((base, name), (begin.get("base"), begin["checkpoint"]))
        self.assertNotIn("reason", begin)
        if base is None:
            self.assertEqual("full", begin["mode"])
            self.assertEqual(0, end["same_bytes"])
            return
        self.assertEqual("incremental", begin["mode"])
        at = QUIET + (step - 1) * STEP
        self.assertEqual({"zero"}, stream.kinds(at, at + 6 * MIB))
        self.assertEqual({"data"}, stream.kinds(at + 6 * MIB, at + 6 * MIB + 65536))
        # Nobody has touched what lies behind the quiet area.
        self.assertEqual({"same"}, stream.kinds(QUIET + 3 * STEP, begin["size"]))
        self.assertLess(end["data_bytes"] + end["zero_bytes"], begin["size"])

    def guest(self, qemu, iothread):
        disks = [
            # No multiple of anything but a sector.
            Disk(size=44 * MIB + 1536, format="raw", iothread=iothread),
            Disk(size=48 * MIB, iothread=iothread),
            Disk(size=44 * MIB + 512, cluster_size=2 * MIB, iothread=iothread),
        ]
        return Rig(Guest(disks, qemu=qemu))

    def test_iothreads(self):
        with self.guest(QEMU, True) as rig:
            self.backups(rig, TARGETS)

    def test_no_iothreads_and_bytes_inline(self):
        with self.guest(QEMU, False) as rig:
            self.backups(rig, TARGETS, carrier="inline")

    def test_qemu_7_2(self):
        with self.guest(QEMU_7_2, False) as rig:
            self.backups(rig, TARGETS)

    def test_qemu_new(self):
        with self.guest(QEMU_NEW, True) as rig:
            self.backups(rig, TARGETS)

    def test_a_monitor_over_tcp(self):
        disks = [Disk(size=48 * MIB, iothread=True), Disk(size=44 * MIB, format="raw")]
        with Rig(Guest(disks)) as rig:
            relay = Relay(rig.monitor.removeprefix("unix:"))
            self.addCleanup(relay.close)
            self.backups(rig, TARGETS[:2], monitor=relay.address)

    def test_a_storage_daemon(self):
        disks = [Disk(size=48 * MIB), Disk(size=44 * MIB, format="raw")]
        with Rig(BusyDaemon(disks, DAEMON, QEMU)) as rig:
            self.backups(rig, DEVICES)

    def test_a_storage_daemon_of_7_2(self):
        disks = [Disk(size=48 * MIB), Disk(size=44 * MIB, format="raw")]
        with Rig(BusyDaemon(disks, DAEMON_7_2, QEMU_7_2)) as rig:
            self.backups(rig, DEVICES, carrier="inline")


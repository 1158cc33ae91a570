"""Scratch: where it may lie, what it may take, and what becomes of the guest when it is full."""

import os
import queue
import subprocess
import threading
import time

from . import support
from .guest import MIB, Disk, Guest
from .strace import traced
from .support import QEMU, QEMU_7_2, QEMU_NEW, Backup, PluginError, Relay, Rig, Vm, blockdev, make_image, virtio
from .targets import until

SECONDS = support.SECONDS
SIZE = 64 * MIB
CAP = 4 * MIB


class Scratch(support.Test):
    """A guest overwrites a disk whose scratch has little room."""

    limit = 180
    qemu = "qemu-system-x86_64"

    def boot(self, *drivers):
        disks = [Disk(SIZE, driver=driver, iothread=False) for driver in drivers]
        self.rig = Rig(Guest(disks, self.qemu))
        self.addCleanup(self.rig.close)
        self.guest = self.rig.machine
        for number, _ in enumerate(drivers):
            self.guest.run(f"write disk{number} 0 32M {number}")
        self.notices = queue.Queue()
        self.plugin = self.rig.plugin(on_notice=lambda *notice: self.notices.put(notice))
        self.addCleanup(self.plugin.close)

    def heard(self, event):
        """The next notification of scratch: it must be this."""
        while True:
            method, params = self.notices.get(timeout=SECONDS)
            if method == "scratch":
                self.assertEqual(event, params["event"], params)
                return params

    def overwrite(self, disk="disk0", length="32M", seed=9):
        """The guest overwrites it all, in a thread: what it answers at last."""
        if self.qemu == QEMU_7_2:
            # A guest that stops drains its disks: see `Proxy.let_copies_end`.
            self.rig.oracle()
        answers = queue.Queue()

        def run():
            try:
                answers.put(self.guest.run(f"write {disk} 0 {length} {seed}"))
            except Exception as error:  # whatever it is, the test shall see it
                answers.put(error)

        threading.Thread(target=run, daemon=True).start()
        return answers

    def unharmed(self, disk="disk0", length="32M", seed=9):
        """The guest runs, has what it wrote, and knows of no error."""
        self.assertEqual("running", self.rig.qmp.command("query-status")["status"])
        self.guest.run(f"check {disk} 0 {length} {seed}")
        console = (self.guest.folder / "console").read_text(errors="replace")
        self.assertNotIn("I/O error", console)
        self.assertNotIn("I/O Error", console)

    def given_up(self, driver, **params):
        self.boot(driver, "virtio-blk")
        base = Backup(self.plugin, self.rig.monitor, checkpoint="monday")
        base.read_all(self.rig)
        base.commit()
        # Before the guest writes: nothing is read meanwhile.
        self.guest.run("write disk0 0 32M 5")
        backup = Backup(self.plugin, self.rig.monitor, base="monday", checkpoint="tuesday", **params)
        written = self.overwrite()
        paused = self.heard_given_up()
        self.assertEqual("", written.get(timeout=SECONDS))
        self.unharmed()
        target = {"kind": "file", "path": f"{self.rig.folder}/pushed", "format": "qcow2", "backing": self.backing()}
        for method, more in (("read", {}), ("map", {}), ("push", {"target": target})):
            params = {"backup": backup.id, "disk": "dev0", **more}
            data = self.refused("scratch_full", self.plugin, f"backup.{method}", params)
            self.assertEqual(("free_space", "backup_open"), (data["action"], data["state_left"]))
        # The other disk's is not touched, and the checkpoint is not used up.
        backup.read("dev1", self.rig.image("dev1"))
        self.rig.oracle()
        self.assertEqual(["dev1"], backup.commit(disks=["dev1"])["committed"])
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual({"monday"}, set(self.rig.checkpoints(self.plugin)["dev0"]))
        self.rig.forget()
        again = Backup(self.plugin, self.rig.monitor, base="monday")
        again.read_all(self.rig)
        self.assertEqual("incremental", again.disks["dev0"]["mode"])
        self.rig.compare(self, again, {"dev0": "disk0", "dev1": "disk1"})
        again.abort()
        return paused

    def heard_given_up(self):
        """How long the guest stood still, in milliseconds."""
        for event in ("high", "full"):
            self.assertEqual("dev0", self.heard(event)["disk"])
        gone = self.heard("given_up")
        self.assertEqual("dev0", gone["disk"])
        self.assertLess(gone["paused_ms"], 2000)
        return gone["paused_ms"]

    def backing(self):
        support.make_image(self.rig.folder / "below", "raw", SIZE)
        return {"path": "below", "format": "raw"}

    def test_given_up(self):
        self.given_up("virtio-blk", scratch={"disk_max_bytes": CAP})

    def test_given_up_on_scsi(self):
        self.given_up("virtio-scsi", scratch={"disk_max_bytes": CAP})

    def test_a_file_system_is_full(self):
        for kind in self.systems():
            with self.subTest(kind), Mounted(kind, 12 * MIB) as folder:
                self.given_up("virtio-blk", scratch={"dir": folder, "min_free_bytes": 0})
                self.doCleanups()

    def systems(self):
        return ("tmpfs", "ext4")

    def test_the_guest_waits_for_room(self):
        self.boot("virtio-blk")
        scratch = {"disk_max_bytes": CAP, "on_full": "wait"}
        backup = Backup(self.plugin, self.rig.monitor, scratch=scratch)
        written = self.overwrite()
        self.heard("high")
        self.heard("full")
        with self.assertRaises(queue.Empty):
            written.get(timeout=1)  # It stands still for good.
        self.assertEqual("io-error", self.rig.qmp.command("query-status")["status"])
        # What is read is given back, and that is the room it waits for.
        backup.read_all(self.rig)
        self.assertGreater(self.heard("resumed")["paused_ms"], 1000)
        self.assertEqual("", written.get(timeout=SECONDS))
        self.rig.compare(self, backup, {"dev0": "disk0"})
        backup.abort()
        self.unharmed()

    def waits(self, **params):
        """A guest that stands still for want of scratch, as its host has wished: what its write answers at last."""
        self.boot("virtio-blk")
        scratch = {"disk_max_bytes": CAP, "on_full": "wait"}
        self.backup = Backup(self.plugin, self.rig.monitor, scratch=scratch, **params)
        written = self.overwrite()
        self.heard("high")
        self.heard("full")
        self.assertEqual("io-error", self.rig.qmp.command("query-status")["status"])
        return written

    def goes_on(self, written):
        self.assertEqual("", written.get(timeout=SECONDS))
        self.unharmed()

    def test_it_goes_on_when_the_backup_ends(self):
        written = self.waits()
        self.backup.abort()
        self.goes_on(written)
        self.assertEqual([], support.ours(self.rig.qmp))

    def test_it_goes_on_when_the_host_ends(self):
        """Also where the backup is kept: there is nobody who gives anything back."""
        for keep in (0, 60000):
            with self.subTest(keep):
                written = self.waits(keep_ms=keep)
                self.plugin._process.stdin.close()
                self.goes_on(written)
                self.doCleanups()

    def test_nobody_was_there_when_it_was_full(self):
        """Whoever comes next, to take over or to clean up, has the guest go on."""
        for method in ("backup.attach", "reclaim"):
            with self.subTest(method):
                self.boot("virtio-blk")
                scratch = {"disk_max_bytes": CAP}
                backup = Backup(self.plugin, self.rig.monitor, scratch=scratch, keep_ms=60000)
                self.plugin._process.kill()
                self.plugin._process.wait()
                written = self.overwrite()
                until(lambda: self.rig.qmp.command("query-status")["status"] == "io-error")
                with self.assertRaises(queue.Empty):
                    written.get(timeout=1)
                params = {"monitor": self.rig.monitor}
                with self.rig.plugin() as plugin:
                    if method == "reclaim":
                        plugin.call(method, {**params, "backups": [backup.id]}, SECONDS)
                    else:
                        plugin.call(method, {**params, "backup": backup.id}, SECONDS)
                    self.goes_on(written)
                self.doCleanups()

    def test_all_disks_together(self):
        """The largest is given up; the guest does not stand still for it."""
        self.boot("virtio-blk", "virtio-blk")
        scratch = {"max_bytes": 24 * MIB, "min_free_bytes": 0}
        backup = Backup(self.plugin, self.rig.monitor, scratch=scratch)
        first = self.overwrite("disk1", "8M")
        self.assertEqual("", first.get(timeout=SECONDS))
        second = self.overwrite("disk0", "20M")
        while (notice := self.heard_any())["event"] != "given_up":
            self.assertEqual("high", notice["event"])
        self.assertEqual("dev0", notice["disk"])
        self.assertEqual("", second.get(timeout=SECONDS))
        self.unharmed("disk0", "20M")
        backup.read("dev1", self.rig.image("dev1"))
        backup.abort()

    def heard_any(self):
        while True:
            method, params = self.notices.get(timeout=SECONDS)
            if method == "scratch":
                return params

    # How a device that cannot stop its guest comes to need all the room beforehand.
    reserving = {}

    def test_a_device_that_cannot_stop_its_guest(self):
        """NVMe: all the room is taken beforehand, or there is no backup; never an I/O error."""
        self.boot("nvme")
        with Mounted("tmpfs", 32 * MIB) as folder:
            for scratch in ({"dir": folder, "min_free_bytes": 0}, {"disk_max_bytes": CAP}):
                params = {"monitor": self.rig.monitor, "scratch": {**scratch, **self.reserving}}
                data = self.refused("scratch_unavailable", self.plugin, "backup.begin", params)
                self.assertEqual(("dev0", "unchanged"), (data["disk"], data["state_left"]))
                self.assertEqual([], support.ours(self.rig.qmp))
        with Mounted("tmpfs", 80 * MIB) as folder:
            backup = Backup(self.plugin, self.rig.monitor, scratch={"dir": folder, **self.reserving})
            # Somebody takes what is left, and the guest overwrites all of the disk twice.
            fill(f"{folder}/theirs")
            self.overwrite(length="64M", seed=3).get(timeout=SECONDS)
            self.assertEqual("", self.overwrite(length="64M").get(timeout=SECONDS))
            backup.read_all(self.rig)
            self.rig.compare(self, backup, {"dev0": "disk0"})
            backup.abort()
            self.unharmed(length="64M")

    def test_an_incremental_of_such_a_device(self):
        """As much is needed: what did not change is copied too, until it is given back."""
        self.boot("nvme")
        base = Backup(self.plugin, self.rig.monitor, checkpoint="monday")
        base.read_all(self.rig)
        self.rig.compare(self, base, {"dev0": "disk0"})
        base.commit()
        self.guest.run("write disk0 0 1M 5")
        params = {"monitor": self.rig.monitor, "base": "monday"}
        with Mounted("tmpfs", 32 * MIB) as folder:
            scratch = {"dir": folder, "min_free_bytes": 0, **self.reserving}
            data = self.refused("scratch_unavailable", self.plugin, "backup.begin", {**params, "scratch": scratch})
            self.assertEqual(("dev0", "unchanged"), (data["disk"], data["state_left"]))
        with Mounted("tmpfs", 80 * MIB) as folder:
            scratch = {"dir": folder, **self.reserving}
            backup = Backup(self.plugin, **params, scratch=scratch, keep_unchanged=True)
            self.assertEqual("incremental", backup.disks["dev0"]["mode"])
            fill(f"{folder}/theirs")
            self.assertEqual("", self.overwrite(length="64M").get(timeout=SECONDS))
            backup.read_all(self.rig)
            self.rig.compare(self, backup, {"dev0": "disk0"})
            backup.abort()
            self.unharmed(length="64M")


class ScratchOn72(Scratch):
    qemu = QEMU_7_2

    def systems(self):
        return ("tmpfs",)


class ScratchOnNew(Scratch):
    """QEMU gives up the point in time by itself: no guest ever stops, whatever its device can."""

    qemu = QEMU_NEW
    reserving = {"on_full": "wait"}
    # These differ in nothing.
    test_given_up_on_scsi = test_all_disks_together = test_an_incremental_of_such_a_device = None
    test_it_goes_on_when_the_backup_ends = test_it_goes_on_when_the_host_ends = None

    def systems(self):
        return ("tmpfs",)

    def heard_given_up(self):
        while (notice := self.heard_any())["event"] == "high":
            pass
        self.assertEqual(("given_up", "dev0"), (notice["event"], notice["disk"]))
        self.assertNotIn("paused_ms", notice)
        events = self.rig.qmp.events
        self.assertNotIn("STOP", [events.get()["event"] for _ in range(events.qsize())])
        return 0

    def gone(self, plugin, backup):
        params = {"backup": backup, "disk": "dev0"}
        self.tells_full(plugin.start("backup.read", params, on_record=lambda *_: None))

    def tells_full(self, future, left="backup_open"):
        error = future.exception(SECONDS)
        data = (error.code, error.data["action"], error.data["state_left"])
        self.assertEqual(("scratch_full", "free_space", left), data)

    def test_what_has_room_is_not_given_up(self):
        """What was given back is refused as what is broken is."""
        self.boot("virtio-blk")
        target = {"kind": "file", "path": f"{self.rig.folder}/pushed", "format": "raw"}
        for way in ("read", "push"):
            with self.subTest(way):
                # So little that it is looked at all the time.
                backup = Backup(self.plugin, self.rig.monitor, scratch={"disk_max_bytes": CAP})
                self.assertEqual("", self.overwrite(length="1M").get(timeout=SECONDS))
                if way == "read":
                    backup.read_all(self.rig)
                    self.rig.compare(self, backup, {"dev0": "disk0"})
                else:
                    push = {"backup": backup.id, "disk": "dev0", "target": target, "discard_source": True}
                    self.plugin.call("backup.push", push, SECONDS)
                time.sleep(2)
                self.assertEqual([], [told for told in self.notices.queue if told[0] == "scratch"])
                self.assertEqual([], backup.commit()["leftovers"])

    def test_under_a_push(self):
        """Which is what finds out, or is told."""
        self.boot("virtio-blk")
        target = {"kind": "file", "path": f"{self.rig.folder}/pushed", "format": "raw"}
        for discard, left in (False, "backup_open"), (True, "disk_spent"):
            with self.subTest(left):
                backup = Backup(self.plugin, self.rig.monitor, scratch={"disk_max_bytes": CAP})
                push = {"target": target, "speed": MIB, "discard_source": discard}
                future = self.plugin.start("backup.push", {"backup": backup.id, "disk": "dev0", **push})
                written = self.overwrite()
                self.tells_full(future, left)
                self.goes_on(written)
                self.assertEqual([], backup.abort()["leftovers"])
                self.assertEqual([], support.ours(self.rig.qmp))
                self.assertFalse(os.path.exists(target["path"]))

    def test_nobody_was_there_when_it_was_full(self):
        """Nobody needs to have the guest go on; whoever takes over learns of it."""
        self.boot("virtio-blk")
        backup = Backup(self.plugin, self.rig.monitor, scratch={"disk_max_bytes": CAP}, keep_ms=60000)
        self.plugin._process.kill()
        self.plugin._process.wait()
        self.goes_on(self.overwrite())
        with self.rig.plugin() as plugin:
            plugin.call("backup.attach", {"monitor": self.rig.monitor, "backup": backup.id}, SECONDS)
            self.gone(plugin, backup.id)
            plugin.call("backup.abort", {"backup": backup.id}, SECONDS)
        self.assertEqual([], support.ours(self.rig.qmp))

    def test_a_device_that_would_not_stop(self):
        """No room is taken beforehand."""
        self.boot("nvme")
        backup = Backup(self.plugin, self.rig.monitor, scratch={"disk_max_bytes": CAP})
        written = self.overwrite()
        self.heard_given_up()
        self.goes_on(written)
        self.gone(self.plugin, backup.id)
        backup.abort()


class Place(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        image = self.places.folder / "images" / "a.img"
        image.parent.mkdir()
        support.make_image(image, "qcow2", "8M")
        self.beside = str(image.parent)
        self.rig = Rig(support.Vm(support.virtio("a", image, "qcow2")))
        self.addCleanup(self.rig.close)

    def refuse(self, plugin, code="scratch_unavailable", **scratch):
        params = {"monitor": self.rig.monitor, "scratch": scratch}
        data = self.refused(code, plugin, "backup.begin", params)
        self.assertEqual("unchanged", data["state_left"])
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())

    def test_never_beside_an_image_by_accident(self):
        command = [support.PLUGIN, "--scratch-dir", self.beside, "--runtime-dir", str(self.rig.runtime)]
        with support.Plugin(command, "framed") as plugin:
            self.refuse(plugin)
            Backup(plugin, self.rig.monitor, scratch={"dir": self.beside}).abort()

    def test_never_beside_an_image_that_is_named_otherwise(self):
        """By a path that is relative to QEMU's directory, or through links."""
        folder = self.places.folder
        make_image(f"{self.beside}/b.img", "qcow2", "8M")
        (folder / "folder").symlink_to(self.beside)
        (folder / "link.img").symlink_to(f"{self.beside}/b.img")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.beside)
        for image in ("b.img", "../images/b.img", folder / "folder" / "b.img", folder / "link.img"):
            with self.subTest(image), Rig(Vm(virtio("b", image))) as self.rig:
                command = [support.PLUGIN, "--runtime-dir", str(self.rig.runtime), "--scratch-dir"]
                for beside in (self.beside, str(folder / "folder")):
                    with support.Plugin([*command, beside], "framed") as plugin:
                        self.refuse(plugin)
                with self.rig.plugin() as plugin:
                    Backup(plugin, self.rig.monitor).abort()

    def test_never_beside_the_nodes_of_devices(self):
        with self.rig.plugin() as plugin:
            self.assertNotEqual(os.stat("/").st_dev, os.stat("/dev").st_dev)
            self.refuse(plugin, dir="/dev")
            self.refuse(plugin, dir="/dev/null")

    def test_a_file_system_that_hangs(self):
        """It has room, and hangs when a file is made there: the plugin goes on with all else."""
        # For longer than it gets.
        hang = ["-e", "trace=ftruncate", "-e", "inject=ftruncate:delay_enter=13000000"]
        relay = Relay(self.rig.monitor.removeprefix("unix:"))
        self.addCleanup(relay.close)
        for monitor in (self.rig.monitor, relay.address):
            command = traced(self.rig.command(), self.places.folder / "calls", *hang)
            with self.subTest(monitor), support.Plugin(command, "framed") as plugin:
                future = plugin.start("backup.begin", {"monitor": monitor})
                while not future.done():
                    began = time.monotonic()
                    plugin.call("ping", {}, SECONDS)
                    self.assertLess(time.monotonic() - began, 3)
                    time.sleep(0.05)
                with self.assertRaises(PluginError) as caught:
                    future.result(SECONDS)
                self.assertEqual("scratch_unavailable", caught.exception.code)
                self.assertEqual([], support.ours(self.rig.qmp))
                self.assertEqual([], self.rig.files())

    def test_there_must_be_room(self):
        with self.rig.plugin() as plugin:
            self.refuse(plugin, min_free_bytes=1 << 62)
            self.refuse(plugin, "invalid_params", disk_max_bytes=MIB - 1)
            self.refuse(plugin, "invalid_params", max_bytes=0)
            backup = Backup(plugin, self.rig.monitor)
            room = backup.reply["scratch"]
            self.assertEqual(room["most_bytes"] // 8, room["asked_bytes"])
            self.assertGreater(room["most_bytes"], 8 * MIB)
            self.assertGreater(room["free_bytes"], room["asked_bytes"])
            backup.abort()
            for limit in ("max_bytes", "disk_max_bytes"):
                small = Backup(plugin, self.rig.monitor, scratch={limit: MIB})
                room = small.reply["scratch"]
                self.assertEqual((MIB, MIB // 8), (room["most_bytes"], room["asked_bytes"]), limit)
                small.abort()


class Policies(support.Test):
    """Devices' policies for errors, those of reads and of writes."""

    # A device, its policies, and whether all the room has to be reserved.
    disks = (
        ("virtio-blk-pci", "", False),
        ("virtio-blk-pci", ",rerror=stop", False),
        ("virtio-blk-pci", ",rerror=report,werror=stop", False),
        ("virtio-blk-pci", ",werror=report", True),
        ("virtio-blk-pci", ",rerror=stop,werror=report", True),
        ("virtio-blk-pci", ",rerror=stop,werror=ignore", True),
        ("virtio-blk-pci,id=named", ",rerror=stop,werror=report", True),
        ("scsi-hd", "", False),
        ("scsi-hd", ",rerror=stop,werror=report", True),
        ("ide-hd,bus=ide.0", "", False),
        ("ide-hd,bus=ide.1", ",rerror=stop,werror=ignore", True),
    )

    def test_a_device_that_stops_for_reads_only(self):
        places = support.Places()
        self.addCleanup(places.close)
        arguments = ["-device", "virtio-scsi-pci"]
        for number, (device, policies, _) in enumerate(self.disks):
            image = places.folder / f"d{number}"
            make_image(image, "qcow2", "8M")
            arguments += ["-blockdev", blockdev(image.name, image, "qcow2")]
            arguments += ["-device", f"{device},drive={image.name}{policies}"]
        for qemu in (QEMU, QEMU_7_2):
            with Rig(Vm(arguments, qemu)) as rig, rig.plugin() as plugin:
                for number, (device, policies, is_reserved) in enumerate(self.disks):
                    disk = "named" if device.endswith("named") else f"d{number}"
                    # Less than could be reserved.
                    params = {"disks": [{"disk": disk}], "scratch": {"disk_max_bytes": MIB}}
                    with self.subTest(qemu=qemu, device=device, policies=policies):
                        if is_reserved:
                            params["monitor"] = rig.monitor
                            data = self.refused("scratch_unavailable", plugin, "backup.begin", params)
                            self.assertEqual((disk, "unchanged"), (data["disk"], data["state_left"]))
                        else:
                            Backup(plugin, rig.monitor, **params).abort()


class Mounted:
    """A file system of this kind and size."""

    def __init__(self, kind, size):
        self._places = support.Places()
        self._folder = self._places.folder / "mounted"
        self._folder.mkdir()
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        else:
            image = self._places.folder / "image"
            with open(image, "wb") as file:
                file.truncate(size)
            # Without a journal, which would take half of it.
            subprocess.run(["mke2fs", "-q", "-t", kind, "-O", "^has_journal", "-m", "0", image], check=True)
            command = ["mount", "-o", "loop", str(image)]
        subprocess.run([*command, str(self._folder)], check=True)

    def __enter__(self):
        return str(self._folder)

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self._folder)], check=True)
        self._places.close()


def fill(path):
    """A file that takes all the room that is left."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        except OSError:
            pass

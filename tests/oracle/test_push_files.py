"""Files, block devices and descriptors as push targets: those that serve, and those that are refused."""

import contextlib
import errno
import os
import pathlib
import socket
import subprocess
import sys
import threading

from . import support
from .guest import MIB
from .life import BASE, SIZE
from .pushes import SOME, SOON, TIMEOUT, Pushes
from .support import QEMU_7_2, Backup, Plugin
from .targets import until


class Files(Pushes):
    def qcow2(self, name, size=SIZE, *options):
        support.make_image(self.targets / name, "qcow2", size, *options)
        return self.targets / name

    def test_existing_images_that_do_not_fit(self):
        for name, target in {
            "bigger": self.existing(self.raw("bigger", size=SIZE + MIB)),
            "smaller": self.existing(self.raw("smaller", size=SIZE - MIB)),
            "qcow2 bigger": self.existing(self.qcow2("qbigger", SIZE + MIB), "qcow2"),
            "qcow2 smaller": self.existing(self.qcow2("qsmaller", SIZE - MIB), "qcow2"),
            "clusters": self.existing(self.qcow2("clusters", SIZE, "-o", "cluster_size=2M"), "qcow2"),
        }.items():
            with self.subTest(name), self.doomed() as backup:
                before = pathlib.Path(target["path"]).read_bytes()
                self.fails("target_mismatch", backup, target)
                self.assertEqual(before, pathlib.Path(target["path"]).read_bytes())

    def test_existing_images_that_are_none(self):
        os.mkfifo(self.targets / "fifo")
        (self.targets / "loop").symlink_to("loop")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self.targets}/socket")
        for path, format, code in (
            (self.targets / "not", "raw", "target_mismatch"),
            (self.targets / "not", "qcow2", "target_mismatch"),
            (self.targets / "not/there", "raw", "target_mismatch"),
            (self.targets / "loop", "raw", "target_mismatch"),
            (self.targets / ("n" * 256), "raw", "target_mismatch"),
            (self.targets, "raw", "target_mismatch"),
            (self.targets / "fifo", "raw", "target_mismatch"),
            (self.targets / "socket", "raw", "target_mismatch"),
            ("/dev/null", "raw", "target_mismatch"),
            (self.raw("none", fill=0x55), "qcow2", "target_refused"),
            ("relative", "raw", "invalid_params"),
        ):
            with self.subTest(path=path, format=format), self.doomed() as backup:
                future = self.push(backup, self.existing(path, format))
                self.monitor_answers_until(future)
                self.failed(code, future)

    def test_read_only(self):
        folder = self.tmpfs("32M")
        image = folder / "image"
        image.touch()
        os.truncate(image, SIZE)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with self.doomed() as backup:
            self.fails("target_mismatch", backup, self.existing(image))
            self.fails("target_mismatch", backup, self.new(folder / "new"))
        device = self.loop(self.raw(), "-r")
        with self.doomed() as backup:
            self.fails("target_mismatch", backup, self.existing(device))

    def test_no_permission(self):
        """The operator's affair, whoever the plugin runs as: even root may not write to these."""
        image = self.raw("kept", fill=0x66)
        folder = self.targets / "folder"
        folder.mkdir()
        for path in (image, folder):
            subprocess.run(["chattr", "+i", str(path)], check=True)
            self.addCleanup(subprocess.run, ["chattr", "-i", str(path)], check=True)
        with self.doomed() as backup:
            self.fails("target_refused", backup, self.existing(image))
            self.fails("target_refused", backup, self.new(folder / "new"))

    def test_an_image_that_is_in_use(self):
        """By a program that locks it: not even its first byte is lost."""
        image = self.raw("used", fill=0x77)
        before = image.read_bytes()
        server = self.server("qemu-nbd", "-t", "-f", "raw", image)
        # It is up, and has the lock.
        url = f"nbd+unix:///?socket={server.address.removeprefix('unix:')}"
        subprocess.run(["nbdinfo", "--size", url], check=True, capture_output=True)
        with self.doomed() as backup:
            self.fails("target_refused", backup, self.existing(image))
            self.assertEqual(before, image.read_bytes())

    def test_a_disk_of_another_vm(self):
        """It is refused only when the push starts; all is there then to be pushed elsewhere."""
        image = self.raw("used", fill=0x77)
        before = image.read_bytes()
        with support.Vm(support.virtio("used", image, "raw")) as vm, self.opened(BASE) as backup:
            support.Qmp(vm.qmp[0]).close()  # It greets once it has its disks.
            self.fails("target_refused", backup, self.existing(image))
            self.assertEqual(before, image.read_bytes())
            other = self.raw("other", like=self.base_image)
            self.pushed(backup, self.existing(other))
            self.equal(other)

    def test_an_increment_over_a_qcow2_image(self):
        image = self.targets / "image"
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(self.base_image), str(image)]
        subprocess.run(convert, check=True)
        with self.opened(BASE) as backup:
            reply = self.pushed(backup, self.existing(image, "qcow2"))
            self.assertEqual("incremental", reply["mode"])
            self.equal(image, "qcow2")
        self.unharmed()

    def test_new_files_that_cannot_be(self):
        (self.targets / "dangling").symlink_to(self.targets / "nothing")
        there = self.raw("there", fill=1)
        for path, code in (
            (there, "target_exists"),
            (self.targets, "target_exists"),
            (self.targets / "dangling", "target_exists"),
            (self.targets / "no/new", "target_mismatch"),
            (there / "new", "target_mismatch"),
            (self.targets / ("n" * 256), "target_mismatch"),
            ("/proc/new", "target_mismatch"),
            ("relative", "invalid_params"),
            ("", "invalid_params"),
        ):
            for format in ("raw", "qcow2"):
                with self.subTest(path=path, format=format), self.doomed() as backup:
                    self.fails(code, backup, self.new(path, format))
        self.assertEqual({1}, set(there.read_bytes()))

    def test_params_that_make_no_sense(self):
        new = self.new(self.targets / "new")
        raw = self.new(self.targets / "new", "raw")
        nbd = {"kind": "nbd", "address": f"unix:{self.targets}/sock"}
        backing = {"path": str(self.base_image), "format": "raw"}
        there = self.existing(self.qcow2("there"), "qcow2")
        with self.doomed() as backup:
            for target, more in (
                ({"kind": "tape"}, {}),
                ({**new, "format": "vmdk"}, {}),
                ({**new, "is_zero": True}, {}),
                ({**new, "backing": backing}, {}),  # It is a full.
                (raw, {"compress": True}),
                (nbd, {"compress": True}),
                # QEMU writes no compressed cluster where there is one.
                (there, {"compress": True}),
                ({**nbd, "address": "unix:relative"}, {}),
                ({**nbd, "address": "/path"}, {}),
                ({**nbd, "tls": {"kind": "none"}}, {}),
                (new, {"workers": 0}),
                (new, {"workers": 65}),
                (new, {"timeout_ms": 999}),
                (new, {"timeout_ms": 600001}),
                (new, {"speed": -1}),
            ):
                with self.subTest(target=target, **more):
                    self.fails("invalid_params", backup, target, **more)
        with self.doomed(BASE) as backup:
            for target in (new, raw, {**raw, "backing": backing}):
                with self.subTest(target=target):
                    self.fails("invalid_params", backup, target)

    def test_odd_names(self):
        """A name is a name, and no option, protocol or option's end."""
        for name in ("a b", "a,b=c", "json:{}", "nbd:c", "fd:3", "%s\n", "ä'\"", "-q", "n" * 255):
            with self.subTest(name), self.opened() as backup:
                self.pushed(backup, self.new(self.targets / name))
                self.assertEqual([name], self.listing())
                os.rename(self.targets / name, self.places.folder / "odd")
                self.equal(self.places.folder / "odd", "qcow2")

    def test_a_file_that_comes_up_meanwhile(self):
        """It is somebody else's, and is not overwritten."""
        path = self.targets / "new"
        for format in ("raw", "qcow2"):
            with self.subTest(format), self.rig.plugin() as plugin:
                backup = support.Backup(plugin, self.rig.monitor)
                future = self.push(backup, self.new(path, format), speed=MIB)
                until(lambda: self.listing() or future.done())
                path.write_text("precious")
                self.hurry()
                self.failed("target_exists", future)
                self.assertEqual({"leftovers": []}, backup.abort())
                self.assertEqual(["new"], self.listing())
                self.assertEqual("precious", path.read_text())
            path.unlink()
            self.unharmed()

    def test_a_file_system_that_hangs(self):
        """QEMU writes to files by itself: the push ends in time, what is left goes once the file system goes on."""
        image, folder = self.raw("ext4", size=48 * MIB), self.places.folder / "ext4"
        folder.mkdir()
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
        with self.doomed() as backup:
            target = self.new(folder / "new", "raw")
            future = self.push(backup, target, speed=2 * MIB, timeout_ms=TIMEOUT)
            until(lambda: self.blocks(folder) or future.done())
            subprocess.run(["fsfreeze", "-f", str(folder)], check=True)
            try:
                self.within(SOON, self.write, "write -P 9 12M 64K")
                error = future.exception(TIMEOUT / 1000 + 4 * SOON)
                self.assertEqual("target_timeout", error.code, error)
                self.spent = error.data["state_left"] == "disk_spent"
                self.within(SOON, self.write, "write -P 9 12M 64K")
            finally:
                subprocess.run(["fsfreeze", "-u", str(folder)], check=True)
            self.answers()
        self.assertEqual(["lost+found"], os.listdir(folder))

    def blocks(self, folder):
        """Of the files that are being made there."""
        return sum(entry.stat().st_blocks for entry in folder.iterdir() if entry.is_file())

    def test_compressed(self):
        with self.backed_up() as backup:
            self.pushed(backup, self.new(self.targets / "full"), compress=True)
            self.equal(self.targets / "full", "qcow2")
        self.assertLess(os.stat(self.targets / "full").st_blocks * 512, 2 * MIB)
        self.write("write -P 6 3M 640K", "write -z 9M 1M")
        with self.opened("tuesday") as backup:
            target = self.new(self.targets / "next", backing={"path": str(self.targets / "full"), "format": "qcow2"})
            self.assertEqual("incremental", self.pushed(backup, target, compress=True)["mode"])
            self.equal(self.targets / "next", "qcow2")
        self.assertLess(os.stat(self.targets / "next").st_blocks * 512, 512 * 1024)

    # --- block devices ----------------------------------------------------------------

    def free(self, device):
        """Nobody claims it."""
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))

    def claim(self, device):
        """Its descriptor; None: a process that has copied all mounts still has it mounted."""
        try:
            return os.open(device, os.O_RDONLY | os.O_EXCL)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return None

    def test_a_block_device_that_is_mounted(self):
        """Or claimed in another way: Linux tells those who ask."""
        image, folder = self.raw(), self.places.folder / "mounted"
        folder.mkdir()
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        device = self.loop(image)
        (self.targets / "link").symlink_to(device)
        subprocess.run(["mount", device, str(folder)], check=True)
        try:
            (folder / "file").write_text("precious")
            with self.doomed() as backup:
                self.fails("target_refused", backup, self.existing(device))
                self.fails("target_refused", backup, self.existing(self.targets / "link"))
            subprocess.run(["umount", str(folder)], check=True)
            # From the device, not from memory.
            subprocess.run(["mount", device, str(folder)], check=True)
            self.assertEqual("precious", (folder / "file").read_text())
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        claimed = until(lambda: self.claim(device))
        with self.doomed() as backup:
            self.fails("target_refused", backup, self.existing(device))
        os.close(claimed)
        with self.opened() as backup:
            self.pushed(backup, self.existing(device))
            self.free(device)
            self.synced(device)
            self.equal(image)

    def test_a_block_device_is_claimed(self):
        """Nobody can mount it while QEMU writes to it; when the push has ended, anybody can."""
        device, small = self.loop(self.raw()), self.loop(self.raw("small", size=SIZE - MIB))
        with self.doomed() as backup:
            self.fails("target_mismatch", backup, self.existing(small))
            self.free(small)
            request = backup.plugin._next_id
            future = self.push(backup, self.existing(device), speed=MIB)
            until(lambda: self.copied() or future.done())
            with self.assertRaises(OSError, msg="it can be claimed"):
                self.free(device)
            backup.plugin.call("cancel", {"id": request}, support.SECONDS)
            self.failed("cancelled", future)
            self.free(device)

    def test_a_block_device(self):
        """Through a link, as they are named in /dev/disk."""
        image = self.raw(fill=0xAA)
        device = self.loop(image)
        (self.targets / "link").symlink_to(device)
        with self.backed_up() as backup:
            self.pushed(backup, self.existing(self.targets / "link"))
            self.synced(device)
            self.equal(image)
        self.write("write -P 6 3M 640K", "write -z 9M 1M", "discard 11M 1M")
        with self.opened("tuesday") as backup:
            self.assertEqual("incremental", self.pushed(backup, self.existing(device))["mode"])
            self.synced(device)
            self.equal(image)

    def synced(self, device):
        """Nothing is left to be written: what the device holds is in its file."""
        subprocess.run(["blockdev", "--flushbufs", device], check=True)

    def test_a_block_device_that_cannot_hold_what_it_takes(self):
        """The writes are taken by the page cache, and only the flush tells."""
        image = self.tmpfs("4M") / "image"
        image.touch()
        os.truncate(image, SIZE)
        with self.doomed() as backup:
            self.fails(("target_failed", "target_unwritable"), backup, self.existing(self.loop(image)))

    def test_block_devices_of_another_size(self):
        small, large = (self.raw(f"target{size}", size=size, fill=0xAA) for size in (SIZE - MIB, SIZE + MIB))
        with self.doomed() as backup:
            self.fails("target_mismatch", backup, self.existing(self.loop(small)))
        with self.backed_up() as backup:
            self.pushed(backup, self.existing(self.loop(large)))
            subprocess.run(["sync", str(large)], check=True)
            self.assertEqual({0xAA}, set(large.read_bytes()[SIZE:]), "what lies behind the disk")
            os.truncate(large, SIZE)
            self.equal(large)

    # --- descriptors ------------------------------------------------------------------

    def plugin_with(self, path, mode="<>"):
        """A plugin that has inherited this file as descriptor 9."""
        shell = ["sh", "-c", f'file=$0; exec "$@" 9{mode}"$file"', str(path)]
        return Plugin([*shell, *self.rig.command()])

    def plugin_connected(self, server):
        """A plugin that has inherited a connection to a server as descriptor 9."""
        code = "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        code += "os.dup2(s.fileno(), 9); os.execvp(sys.argv[2], sys.argv[2:])"
        return Plugin([sys.executable, "-c", code, server.address.removeprefix("unix:"), *self.rig.command()])

    def test_an_inherited_file(self):
        for format in ("raw", "qcow2"):
            image = self.raw("raw", fill=0xAA) if format == "raw" else self.qcow2("qcow2")
            with self.subTest(format), self.opened(plugin=self.plugin_with(image)) as backup:
                self.pushed(backup, self.existing("fd:9", format))
                self.equal(image, format)
        with self.opened(plugin=self.plugin_with(image, "<")) as backup:
            self.fails("target_mismatch", backup, self.existing("fd:9", "qcow2"))
        self.unharmed()

    def test_a_monitor_that_takes_no_descriptors(self):
        """QEMU opens paths by itself then; what came by descriptor has none."""
        relay = support.Relay(self.rig.monitor.removeprefix("unix:"))
        self.addCleanup(relay.close)
        image = self.raw()
        device = self.loop(image)
        with self.plugin_with(image, "<>") as plugin:
            backup = support.Backup(plugin, relay.address)
            self.fails("qemu_unsupported", backup, self.existing("fd:9"))
            future = self.push(backup, self.existing(device), speed=MIB, discard_source=False)
            until(lambda: self.copied() or future.done())
            with self.assertRaises(OSError, msg="it can be claimed"):
                self.free(device)
            self.hurry()
            future.result(support.SECONDS)
            self.free(device)
            self.synced(device)
            self.equal(image)
            self.assertEqual({"leftovers": []}, backup.abort())
        self.unharmed()

    def test_an_inherited_connection(self):
        server = self.nbdkit()
        with self.opened(plugin=self.plugin_connected(server)) as backup:
            target = {"kind": "nbd", "address": "fd:9"}
            self.pushed(backup, target, discard_source=False)
            self.equal(server.image)
            # It was hung up when the push was over.
            self.fails("target_unreachable", backup, target, timeout_ms=TIMEOUT)
        self.unharmed()

    def test_an_inherited_connection_outlives_requests_that_are_refused(self):
        """It is used up by the push that speaks with its server, and by no other one."""
        server, other = self.nbdkit(), self.slow(image=self.raw("other"))
        ours = {"kind": "nbd", "address": "fd:9"}
        with self.opened(plugin=self.plugin_connected(server)) as backup:
            params = {"backup": backup.id, "disk": "dev-a", "target": ours}
            for code, wrong in (
                ("unknown_backup", {"backup": "0123456789"}),
                ("unknown_disk", {"disk": "dev-z"}),
                ("invalid_params", {"compress": True}),
                ("invalid_params", {"workers": 0}),
                ("invalid_params", {"target": {**ours, "export": "n" * 5000}}),
            ):
                with self.subTest(wrong):
                    self.refused(code, backup.plugin, "backup.push", {**params, **wrong})
            future = self.start(backup, other, discard_source=False)
            self.fails("stream_active", backup, ours)
            self.assertFalse(future.done(), "the other push was over")
            future.result(support.SECONDS)
            self.pushed(backup, ours, discard_source=False)
            self.equal(server.image)
            self.fails("target_unreachable", backup, ours)
        self.unharmed()

    def test_an_inherited_connection_that_hangs(self):
        server = self.slow()
        with self.opened(plugin=self.plugin_connected(server)) as backup:
            future = self.push(backup, {"kind": "nbd", "address": "fd:9"}, timeout_ms=TIMEOUT, workers=2)
            server.wait_changes(SOME, future)
            server.suspend()
            self.failed("target_timeout", future)
            self.answers()
        self.unharmed()

    def test_numbers_that_are_no_inherited_descriptors(self):
        """Those that the plugin has opened itself among them."""
        with self.doomed() as backup:
            for number in (*range(16), 99, -1, 1 << 31, "", "x"):
                with self.subTest(number):
                    self.fails("invalid_params", backup, self.existing(f"fd:{number}"))
                    self.fails("invalid_params", backup, {"kind": "nbd", "address": f"fd:{number}"})


class Asked(Pushes):
    """Somebody asks QEMU for its named nodes, all the time: 7.2 dies of it while it formats an image."""

    qemu = QEMU_7_2

    def test_new_images(self):
        targets = [self.new(self.targets / f"{number}.qcow2") for number in range(5)]
        with self.asking(), self.rig.plugin() as plugin:
            for target in targets:
                backup = Backup(plugin, self.rig.monitor)
                self.pushed(backup, target)
                self.assertEqual({"leftovers": []}, backup.abort())
        self.equal(targets[-1]["path"], "qcow2")
        self.unharmed()

    @contextlib.contextmanager
    def asking(self):
        end = threading.Event()

        def ask():
            while not end.is_set():
                self.rig.qmp.command("query-named-block-nodes")

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            end.set()
            asking.join()

"""Files, block devices and descriptors as push targets: those that serve, and those that are refused."""

import os
import socket
import subprocess
import sys

from . import support
from .guest import MIB
from .life import BASE, SIZE
from .pushes import SOME, SOON, TIMEOUT, Pushes
from .support import Plugin
from .targets import until


class Files(Pushes):
    def existing(self, path, format="raw", **more):
        return {"kind": "existing", "path": str(path), "format": format, **more}

    def new(self, path, format="qcow2", **more):
        return {"kind": "file", "path": str(path), "format": format, **more}

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
                before = open(target["path"], "rb").read()
                self.fails("target_mismatch", backup, target)
                self.assertEqual(before, open(target["path"], "rb").read())

    def test_existing_images_that_are_none(self):
        """Which of these words fits is in the eye of the beholder; hanging is none."""
        words = ("target_refused", "target_unwritable", "target_mismatch")
        os.mkfifo(self.targets / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self.targets}/socket")
        for path, format, codes in (
            (self.targets / "not", "raw", words[:2]),
            (self.targets / "not", "qcow2", words[:2]),
            (self.targets, "raw", words),
            (self.raw("none", fill=0x55), "qcow2", words[:1]),
            (self.targets / "fifo", "raw", words),
            (self.targets / "socket", "raw", words),
            ("/dev/null", "raw", words),
        ):
            with self.subTest(path=path, format=format), self.doomed() as backup:
                future = self.push(backup, self.existing(path, format))
                self.monitor_answers_until(future)
                self.failed(codes, future)

    def test_read_only(self):
        folder = self.tmpfs("32M")
        image = folder / "image"
        image.touch()
        os.truncate(image, SIZE)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        codes = ("target_mismatch", "target_unwritable")
        with self.doomed() as backup:
            self.fails(codes, backup, self.existing(image))
            self.fails("target_unwritable", backup, self.new(folder / "new"))
        device = self.loop(self.raw(), "-r")
        with self.doomed() as backup:
            self.fails(codes, backup, self.existing(device))

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
        with support.Vm(support.virtio("used", image, "raw")), self.opened(BASE) as backup:
            self.fails("target_refused", backup, self.existing(image))
            self.assertEqual(before, image.read_bytes())
            other = self.raw("other", like=self.base_image)
            self.pushed(backup, self.existing(other))
            self.equal(other)

    def test_new_files_that_cannot_be(self):
        (self.targets / "dangling").symlink_to(self.targets / "nothing")
        there = self.raw("there", fill=1)
        for path, code in (
            (there, "target_exists"),
            (self.targets, "target_exists"),
            (self.targets / "dangling", "target_exists"),
            (self.targets / "no/new", "target_unwritable"),
            (there / "new", "target_unwritable"),
            (self.targets / ("n" * 256), "target_unwritable"),
            ("/proc/new", "target_unwritable"),
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
        with self.doomed() as backup:
            for target, more in (
                ({"kind": "tape"}, {}),
                ({**new, "format": "vmdk"}, {}),
                ({**new, "is_zero": True}, {}),
                ({**new, "backing": backing}, {}),  # It is a full.
                (raw, {"compress": True}),
                (nbd, {"compress": True}),
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
                future = self.push(backup, self.new(path, format), speed=8 * MIB)
                until(lambda: self.listing() or future.done())
                path.write_text("precious")
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
                self.within(1, self.write, "write -P 9 12M 64K")
                error = future.exception(TIMEOUT / 1000 + 4 * SOON)
                self.assertEqual(("target_timeout", "backup_open"), (error.code, error.data["state_left"]), error)
                self.within(1, self.write, "write -P 9 12M 64K")
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

    def loop(self, image, *options):
        """The block device of an image."""
        command = ["losetup", "--find", "--show", *options, str(image)]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "-d", device], check=True)
        return device

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
            self.fails(("target_mismatch", "target_unwritable"), backup, self.existing("fd:9", "qcow2"))
        self.unharmed()

    def test_an_inherited_connection(self):
        server = self.nbdkit()
        with self.opened(plugin=self.plugin_connected(server)) as backup:
            self.pushed(backup, {"kind": "nbd", "address": "fd:9"})
            self.equal(server.image)
            # It has been used up.
            codes = ("invalid_params", "target_unreachable", "target_failed", "offset_released")
            self.failed(codes, self.push(backup, {"kind": "nbd", "address": "fd:9"}, timeout_ms=TIMEOUT))
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

"""What a push asks of file systems, in which order; and those that hang, or cannot do it."""

import os
import pathlib
import re
import subprocess
import time

from . import support
from .guest import MIB, die_with_parent
from .life import BASE
from .pushes import SOON, TIMEOUT, Pushes
from .strace import TRACE, calls, traced
from .support import Plugin
from .targets import until


class Storage(Pushes):
    def traced(self, *options):
        """A plugin whose system calls are written down, or meddled with; and where."""
        log = self.places.folder / "calls"
        return Plugin(traced(self.rig.command(), log, *options)), log

    def synced(self, calls, path):
        """A file is synced once QEMU has closed it, by a descriptor from before the first write.

        What is done from there on.
        """
        first = calls.index(("asked", "blockdev-backup"))
        opened = [what[0] for kind, *what in calls[:first] if kind == "opened" and re.fullmatch(path, what[1])]
        after = calls[calls.index(("asked", "job-finalize")) :]
        synced = [
            at for at, (kind, *what) in enumerate(after)
            if kind == "synced" and what[0] in opened and re.fullmatch(path, what[1])
        ]
        self.assertEqual(1, len(synced), calls)
        # By QEMU: the image and its file.
        self.assertGreaterEqual(after[: synced[0]].count(("asked", "blockdev-del")), 2, calls)
        return after[synced[0] :]

    def test_a_new_file_is_durable_before_it_has_its_name(self):
        for format in ("raw", "qcow2"):
            path = self.targets / format
            plugin, log = self.traced(*TRACE)
            with self.subTest(format), self.opened(plugin=plugin) as backup:
                self.pushed(backup, self.new(path, format))
                self.equal(path, format)
            (_, _, partial), named, folder = self.synced(calls(log), rf"{self.targets}/\.qf-\w+\.partial")[:3]
            self.assertEqual(("named", partial, str(path)), named)
            self.assertEqual(("synced", str(self.targets)), folder[::2])

    def test_an_existing_file_or_device_is_durable(self):
        for path in (str(self.raw("image")), self.loop(self.raw("device"))):
            plugin, log = self.traced(*TRACE)
            with self.subTest(path), self.opened(plugin=plugin) as backup:
                self.pushed(backup, self.existing(path))
            self.synced(calls(log), path)

    def test_a_name_that_cannot_be_given_without_replacing(self):
        """As on NFS, which knows no such renaming: a link replaces nothing either."""
        path = self.targets / "new"
        for error in ("EINVAL", "ENOSYS", "EOPNOTSUPP"):
            plugin, _ = self.traced("-e", "trace=renameat2", "-e", f"inject=renameat2:error={error}")
            with self.subTest(error), self.opened(plugin=plugin) as backup:
                self.pushed(backup, self.new(path), discard_source=False)
                self.equal(path, "qcow2")
                self.assertEqual(["new"], self.listing())
                path.unlink()
                future = self.push(backup, self.new(path), speed=MIB)
                until(lambda: self.listing() or future.done())
                path.write_text("precious")
                self.hurry()
                self.failed("target_exists", future)
                self.assertEqual((["new"], "precious"), (self.listing(), path.read_text()))
                path.unlink()

    def test_a_name_that_is_not_durable(self):
        """What may be gone after a crash of the machine is not there to be found before."""
        path = self.targets / "new"
        for more in ([], ["-e", "inject=renameat2:error=EINVAL"]):
            fault = ["-e", "trace=fsync,renameat2", "-P", str(self.targets), "-e", "inject=fsync:error=EIO"]
            plugin, log = self.traced(*fault, "-P", str(path), *more)
            with self.subTest(more), self.opened(plugin=plugin) as backup:
                self.fails("target_unwritable", backup, self.new(path))
                self.assertEqual([], self.listing())
            self.assertEqual(1 + len(more) // 2, log.read_text().count("(INJECTED)"), log.read_text())

    def test_a_sync_that_fails(self):
        image = self.raw()
        for target in (self.new(self.targets / "new"), self.existing(image)):
            plugin, _ = self.traced("-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1")
            with self.subTest(target=target), self.opened(plugin=plugin) as backup:
                self.fails("target_unwritable", backup, target)
                self.assertEqual([image.name], self.listing())

    def test_cancel_while_it_is_synced(self):
        """Which may take as long as it will: nothing comes up later."""
        path = self.targets / "new"
        plugin, log = self.traced("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=12000000")
        with self.opened(plugin=plugin) as backup:
            request = plugin._next_id
            future = self.push(backup, self.new(path), timeout_ms=3000)
            until(lambda: "fsync(" in log.read_text() or future.done())
            self.within(SOON, plugin.call, "ping", {}, support.SECONDS)
            self.within(SOON, plugin.call, "cancel", {"id": request}, support.SECONDS)
            self.within(SOON, self.failed, "cancelled", future)
            self.assertEqual([], self.listing())

    # --- that QEMU waits for ----------------------------------------------------------

    def slow_sync(self, path, seconds):
        """QEMU's syncs of a file take so long from here on: where they are written down."""
        log, pid = self.places.folder / "syncs", self.rig.machine.process.pid
        delay = f"inject=fdatasync:delay_enter={seconds * 1_000_000}"
        fault = ["-e", "trace=fdatasync", "-P", str(path), "-e", delay]
        strace = subprocess.Popen(traced(["-p", str(pid)], log, *fault), preexec_fn=die_with_parent)
        self.addCleanup(strace.wait, support.SECONDS)
        self.addCleanup(strace.terminate)
        threads = pathlib.Path(f"/proc/{pid}/task")
        until(lambda: all("TracerPid:\t0\n" not in each.read_text() for each in threads.glob("*/status")))
        return log

    def test_qemus_sync_takes_as_long_as_it_needs(self):
        path = self.raw()
        log = self.slow_sync(path, 6)
        with self.opened() as backup:
            self.pushed(backup, self.existing(path), timeout_ms=3000)
            self.equal(path)
        self.assertIn("(DELAYED)", log.read_text())

    def test_cancel_while_qemu_syncs(self):
        path = self.raw()
        log = self.slow_sync(path, 12)
        with self.opened() as backup:
            request = backup.plugin._next_id
            future = self.push(backup, self.existing(path), timeout_ms=3000)
            until(lambda: "fdatasync(" in log.read_text() or future.done())
            # Longer than a target is borne.
            time.sleep(4)
            self.within(SOON / 2, backup.plugin.call, "ping", {}, support.SECONDS)
            self.within(SOON / 2, backup.plugin.call, "cancel", {"id": request}, support.SECONDS)
            self.within(12 + SOON, self.failed, "cancelled", future)

    # --- that hang --------------------------------------------------------------------

    def hung(self):
        """A file system that never answers: nobody serves it."""
        folder = self.places.folder / "hung"
        folder.mkdir()
        server = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
        subprocess.run(["mount", "-i", "-t", "fuse", "-o", options, "hung", str(folder)], check=True, pass_fds=[server])

        def end():
            subprocess.run(["umount", "-l", str(folder)], check=True)
            # Whoever waits for it gets an error.
            os.close(server)

        self.addCleanup(end)
        return folder

    def lives(self, plugin, future):
        """The plugin goes on with all else until the future is done."""
        while not future.done():
            self.within(1, plugin.call, "ping", {}, support.SECONDS)

    def test_a_path_on_a_file_system_that_hangs(self):
        folder = self.hung()
        full = [self.new(folder / "new", format) for format in ("raw", "qcow2")]
        full += [self.existing(folder / "image", format) for format in ("raw", "qcow2")]
        below = {"path": f"{folder}/below", "format": "raw"}
        for base, targets in ((None, full), (BASE, [self.new(self.targets / "new", backing=below)])):
            for target in targets:
                with self.subTest(target=target), self.opened(base) as backup:
                    future = self.push(backup, target, timeout_ms=TIMEOUT)
                    self.lives(backup.plugin, future)
                    self.within(TIMEOUT / 1000 + SOON, self.failed, "target_timeout", future)
                    request = backup.plugin._next_id
                    future = self.push(backup, target, timeout_ms=60000)
                    self.within(SOON, backup.plugin.call, "cancel", {"id": request}, support.SECONDS)
                    self.within(SOON, self.failed, "cancelled", future)
                    # QEMU has not heard of it; another target serves.
                    self.answers()
                    other = self.raw(like=self.base_image) if base else self.raw()
                    self.pushed(backup, self.existing(other))
                    self.equal(other)

    def test_the_host_is_gone_while_a_file_system_hangs(self):
        wire = support.Wire(self.rig.command())
        self.addCleanup(wire.close)
        backup = wire.call("backup.begin", {"monitor": self.rig.monitor})["backup"]
        target = self.existing(self.hung() / "image")
        wire.send("backup.push", {"backup": backup, "disk": "dev-a", "target": target, "timeout_ms": 600000})
        self.assertEqual({}, wire.call("ping", {}))
        wire.process.stdin.close()
        self.assertEqual(3, self.within(2 * SOON, wire.wait))
        self.unharmed()

"""A plugin or a host that ends at any step of a session: what is left, and who takes it away."""

import itertools
import json
import os
import signal
import socket
import threading

from . import support
from .life import BASE, SIZE, Life
from .support import QEMU_7_2, Wire, make_image


class Steps(Life):
    """Each command that a session sends to QEMU is a step; they are counted, not listed by hand."""

    limit = 600
    exports = True
    every = 1

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()
        make_image(self.rig.folder / "below.raw", "raw", SIZE)

    def session(self, wire):
        """A session with all that it may make, from begin to commit."""
        monitor = self.rig.monitor
        params = {"monitor": monitor, "base": BASE, "checkpoint": "tuesday"}
        backup = wire.call("backup.begin", params)["backup"]
        disks = {"backup": backup, "disk": "dev-a"}, {"backup": backup, "disk": "dev-b"}
        if self.exports:
            wire.call("backup.export", disks[0])
        wire.call("backup.read", {**disks[0], "release": "on_ack"})
        wire.call("backup.ack", {**disks[0], "offset": SIZE})
        path = str(self.rig.folder / "pushed.qcow2")
        target = {"kind": "file", "path": path, "format": "qcow2", "backing": {"path": "below.raw", "format": "raw"}}
        wire.call("backup.push", {**disks[1], "target": target})
        wire.call("backup.commit", {"backup": backup})
        wire.call("shutdown", {})

    def until(self, step, end):
        """Runs a session and ends it by `end(wire)` at this step; the steps that it took."""
        count, lock = 0, threading.Lock()

        def look(name):
            nonlocal count
            with lock:
                count += 1
                if count == step:
                    end(wire)

        wire = Wire(self.rig.command())
        self.rig.proxy.on_command = look
        try:
            self.session(wire)
        except (AssertionError, OSError, ValueError):
            if step is None:
                raise
        finally:
            wire.close()
            self.rig.proxy.on_command = lambda name: None
            pushed = self.rig.folder / "pushed.qcow2"
            pushed.unlink(missing_ok=True)
        return count

    def clean(self, step):
        """Nothing of a session is left, and the next backup is incremental."""
        self.assertEqual([], self.left(), f"step {step}")
        self.assertEqual([], self.rig.files(), f"step {step}")
        self.assertEqual([], [path.name for path in self.rig.folder.glob(".qf-*")], f"step {step}")
        self.assertEqual({"dev-a": "usable", "dev-b": "usable"}, self.health(), f"step {step}")

    def forget_tuesday(self):
        there = any("tuesday" in each for each in self.listed().values())
        if there:
            self.call("checkpoint.delete", checkpoints=["tuesday"])

    def each_step(self, end, after, every):
        steps = self.until(None, None)
        self.forget_tuesday()
        self.assertGreater(steps, 60)
        for step in range(1, steps + 1, every):
            self.until(step, end)
            after(step)
            self.clean(step)
            self.forget_tuesday()
        self.change()
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def reclaims(self, step):
        first = self.call("reclaim")
        self.assertEqual(([], []), (first["left"], first["leftovers"]), f"step {step}")
        again = self.call("reclaim")
        self.assertEqual({"reclaimed": [], "left": [], "leftovers": []}, again, f"step {step}")

    def test_killed_at_every_step(self):
        self.each_step(lambda wire: wire.process.kill(), self.reclaims, self.every)

    def test_ended_at_every_step(self):
        """In each way by turns."""
        ways = itertools.cycle([
            lambda wire: wire.process.send_signal(signal.SIGTERM),
            lambda wire: wire.process.stdin.close(),
            lambda wire: wire.process.send_signal(signal.SIGINT),
        ])
        self.each_step(lambda wire: next(ways)(wire), lambda step: None, self.every)


class Reclaim(Life):
    limit = 120

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()

    def dead(self, command=None, **params):
        """A backup whose plugin is killed."""
        wire = Wire(command or self.rig.command())
        params = {"monitor": self.rig.monitor, "base": BASE, "checkpoint": "tuesday", **params}
        backup = wire.call("backup.begin", params)["backup"]
        wire.process.kill()
        wire.close()
        return backup

    def test_a_backup_takes_the_dead_away_by_itself(self):
        lost = self.dead()
        self.assertTrue(any(lost in each for each in self.left()))
        with self.rig.plugin() as plugin:
            backup = support.Backup(plugin, self.rig.monitor, base=BASE)
            self.assertFalse(any(lost in each for each in self.left()))
            backup.abort()
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())
        self.change()
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def test_a_directory_that_was_named_from_another_one(self):
        command = ["sh", "-c", 'cd "$0" && exec "$@"', str(self.rig.folder)]
        relative = [support.PLUGIN, "--scratch-dir", "scratch", "--runtime-dir", "run"]
        lost = self.dead([*command, *relative])
        self.assertNotEqual([], self.rig.files())
        self.assertEqual([lost], self.call("reclaim")["reclaimed"])
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())

    def test_one_that_lives_is_left_alone(self):
        nodes = {disk: node for disk, (_, node) in self.devices().items()}
        with self.rig.plugin() as plugin:
            backup = support.Backup(plugin, self.rig.monitor, base=BASE, checkpoint="tuesday")
            for more in ({}, {"backups": [backup.id]}, {"backups": [backup.id], "force": True}):
                result = plugin.call("reclaim", {"monitor": self.rig.monitor, **more}, support.SECONDS)
                left = [{"backup": backup.id, "state": "alive"}]
                self.assertEqual({"reclaimed": [], "left": left, "leftovers": []}, result)
            backup.read_all(self.rig)
            self.rig.compare(self, backup, nodes)
            backup.commit()

    def test_nobody_knows_whose_it_is(self):
        """Of another machine, or without a word: only the host's word removes it."""
        backup = self.dead()
        path = f"/objects/qf-{backup}-owner"
        for note in ('{"form": 2}', "no JSON", None):
            with self.subTest(note):
                if note is None:
                    self.rig.qmp.command("object-del", {"id": f"qf-{backup}-owner"})
                else:
                    self.rig.qmp.command("qom-set", {"path": path, "property": "data", "value": note})
                left = [{"backup": backup, "state": "unknown"}]
                for more in ({}, {"backups": [backup]}):
                    result = self.call("reclaim", **more)
                    self.assertEqual({"reclaimed": [], "left": left, "leftovers": []}, result)
                with self.rig.plugin() as plugin:
                    params = {"monitor": self.rig.monitor, "backup": backup}
                    self.refused("backup_busy", plugin, "backup.attach", params)
                    params = {"monitor": self.rig.monitor, "base": BASE}
                    self.refused("disk_excluded", plugin, "backup.begin", params)
        with self.rig.plugin() as plugin:
            params = {"monitor": self.rig.monitor, "force": True}
            self.refused("invalid_params", plugin, "reclaim", params)
        self.assertEqual([backup], self.call("reclaim", backups=[backup], force=True)["reclaimed"])
        # The server's socket is in a directory that nobody knows any more.
        self.assertEqual([], self.left())

    def test_notes_that_lie_remove_nothing_else(self):
        """A note names a directory, or a file, that is none of ours: it stays."""
        precious = self.rig.folder / "precious"
        link = self.rig.folder / "link"
        link.symlink_to(self.rig.folder)
        for lie in (precious, self.rig.runtime / ".." / precious.name, link / precious.name, "precious"):
            with self.subTest(lie):
                backup = self.dead()
                # The second is where the NBD server of a session with that directory would be.
                for folder in (precious, self.rig.folder / "precious-nbd"):
                    folder.mkdir(exist_ok=True)
                    (folder / "file").write_text("precious")
                path = f"/objects/qf-{backup}-owner"
                note = self.rig.qmp.command("qom-get", {"path": path, "property": "data"})
                claim = {**json.loads(note), "dir": str(lie), "server": f"{lie}-nbd/nbd.sock"}
                self.rig.qmp.command("qom-set", {"path": path, "property": "data", "value": json.dumps(claim)})
                partial = {"qom-type": "secret", "id": f"qf-{backup}-0-tp", "data": f"{lie}/file"}
                self.rig.qmp.command("object-add", partial)
                self.assertEqual([backup], self.call("reclaim")["reclaimed"])
                for folder in (precious, self.rig.folder / "precious-nbd"):
                    self.assertEqual("precious", (folder / "file").read_text())
                self.assertEqual([], self.left())
                # Where the server was nobody knows any more.
                self.rig.qmp.command("nbd-server-stop")

    def test_a_server_that_is_none_of_its_qemu_stays(self):
        """A note names a directory as a server of ours would have it, of another QEMU or of nobody."""
        folder = self.rig.folder / "qf-precious-nbd"
        path = str(folder / "nbd.sock")
        folder.mkdir()
        for is_there, is_running in ((True, True), (True, False), (False, False)):
            with self.subTest(is_there=is_there, is_running=is_running), socket.socket(socket.AF_UNIX) as theirs:
                if is_there:
                    theirs.bind(path)
                    theirs.listen()
                else:
                    (folder / "file").write_text("precious")
                backup = self.dead()
                note = {"path": f"/objects/qf-{backup}-owner", "property": "data"}
                claim = {**json.loads(self.rig.qmp.command("qom-get", note)), "server": path}
                self.rig.qmp.command("qom-set", {**note, "value": json.dumps(claim)})
                if not is_running:
                    for export in self.rig.qmp.command("query-block-exports"):
                        self.rig.qmp.command("block-export-del", {"id": export["id"], "mode": "hard"})
                        self.rig.qmp.wait_event("BLOCK_EXPORT_DELETED", id=export["id"])
                    self.rig.qmp.command("nbd-server-stop")
                self.assertEqual([backup], self.call("reclaim")["reclaimed"])
                self.assertEqual([], self.left())
                self.assertTrue(is_there or (folder / "file").exists())
                self.assertEqual(is_there, os.path.exists(path))
            if is_there:
                os.unlink(path)

    def test_the_server_that_another_one_has_started(self):
        """The one that started it has ended well: the one that used it is the last."""
        wire = Wire(self.rig.command())
        first, second = (
            wire.call("backup.begin", {"monitor": self.rig.monitor, "disks": [{"disk": disk}]})["backup"]
            for disk in self.devices()
        )
        wire.call("backup.abort", {"backup": first})
        wire.process.kill()
        wire.close()
        result = self.call("reclaim")
        self.assertEqual({"reclaimed": [second], "left": [], "leftovers": []}, result)
        self.nothing_is_left()

    def test_the_server_of_one_that_was_kept(self):
        """It ends before the dead one that used its server."""
        kept = self.dead(disks=[{"disk": "dev-a"}], keep_ms=600_000)
        dead = self.dead(disks=[{"disk": "dev-b"}], checkpoint="wednesday")
        with self.rig.plugin() as plugin:
            plugin.call("backup.attach", {"monitor": self.rig.monitor, "backup": kept}, support.SECONDS)
            plugin.call("backup.abort", {"backup": kept}, support.SECONDS)
        self.assertEqual([dead], self.call("reclaim")["reclaimed"])
        self.nothing_is_left()

    def test_the_server_that_one_that_lives_uses(self):
        nodes = {disk: node for disk, (_, node) in self.devices().items()}
        kept = self.dead(disks=[{"disk": "dev-a"}], keep_ms=600_000)
        with self.rig.plugin() as plugin:
            backup = support.Backup(plugin, self.rig.monitor, base=BASE, disks=[{"disk": "dev-b"}])
            params = {"monitor": self.rig.monitor, "backups": [kept]}
            self.assertEqual([kept], plugin.call("reclaim", params, support.SECONDS)["reclaimed"])
            backup.read_all(self.rig)
            self.rig.compare(self, backup, nodes)
            backup.abort()
        self.nothing_is_left()

    def nothing_is_left(self):
        """Nor anything that is in the way of the next one."""
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())
        with self.rig.plugin() as plugin:
            support.Backup(plugin, self.rig.monitor).abort()

    def test_foreign_objects_stay(self):
        foreign = self.rig.folder / "foreign.qcow2"
        make_image(foreign, "qcow2", SIZE)
        file = {"driver": "file", "filename": str(foreign)}
        self.rig.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": "theirs", "file": file})
        self.rig.qmp.command("block-dirty-bitmap-add", {"node": "a", "name": "theirs"})
        self.rig.qmp.command("object-add", {"qom-type": "secret", "id": "theirs", "data": "x"})
        self.dead()
        export = {"type": "nbd", "id": "theirs", "node-name": "theirs", "name": "theirs"}
        self.rig.qmp.command("block-export-add", export)
        self.assertEqual([], self.call("reclaim")["leftovers"])
        self.assertEqual([], self.left())
        exports = [each["id"] for each in self.rig.qmp.command("query-block-exports")]
        self.assertEqual(["theirs"], exports)
        self.assertIn("theirs", self.bitmaps("a"))
        self.assertIn("theirs", [each["name"] for each in self.rig.qmp.command("qom-list", {"path": "/objects"})])


class StepsOn72(Steps):
    qemu = QEMU_7_2
    exports = False  # Below 10.0 there are none.
    every = 5

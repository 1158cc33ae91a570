"""A new process takes over the point in time of one that was killed."""

import contextlib
import json
import os
import select
import subprocess
import sys

from . import support
from .life import BASE, SIZE, Life
from .guest import MIB
from .support import QEMU_7_2, Backup, Stream, Wire

KEEP = {"keep_ms": 600_000}
FIRST = MIB + 65536  # What the first process acknowledges.


class Attach(Life):
    limit = 120
    formats = {"a": "qcow2", "b": "raw"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()
        self.nodes = {disk: node for disk, (_, node) in self.devices().items()}

    def begin(self, **params):
        """A backup of both disks in a plugin that will be killed."""
        self.wire = Wire(self.rig.command())
        params = {"monitor": self.rig.monitor, "base": BASE, "checkpoint": "tuesday", **params}
        self.began = self.wire.call("backup.begin", params)
        return self.began["backup"]

    def kill(self):
        self.wire.process.kill()
        self.wire.close()

    def read(self, wire, disk, stream, until=None, **params):
        """Reads records into a stream, up to `until` or to the reply, which is returned."""
        params = {"backup": self.began["backup"], "disk": disk, "release": "on_ack", "record_max": 65536, **params}
        asked = wire.send("backup.read", params)
        while True:
            message, payload = wire.receive()
            if message.get("id") == asked:
                return message
            if message.get("method") != "record":
                continue
            record = message["params"]["record"]
            if record["kind"] == "begin" and record.get("offset"):
                continue  # It goes on.
            stream.take(record, payload or None)
            if until is not None and record.get("offset", 0) + record.get("length", 0) >= until:
                return None

    def attached(self, plugin):
        reply = plugin.call("backup.attach", {"monitor": self.rig.monitor, "backup": self.began["backup"]}, 60)
        backup = Backup.of(plugin, reply)
        for disk, told in backup.disks.items():
            before = next(each for each in self.began["disks"] if each["disk"] == disk)
            self.assertEqual(before, {key: told[key] for key in before})
        self.assertEqual(self.began["time_ms"], reply["time_ms"])
        return backup

    def finish(self, backup):
        for stream in backup.streams.values():
            stream.finish()
        self.rig.compare(self, backup, self.nodes)
        self.assertEqual(["dev-a", "dev-b"], backup.commit()["committed"])
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())
        self.assertEqual("usable", self.listed()["dev-a"]["tuesday"]["health"])

    def test_a_stream_goes_on_from_the_last_ack(self):
        self.write(f"write -P 5 0 {SIZE}")
        self.begin(base=None, **KEEP)
        stream = Stream(self.rig.image("dev-a"))
        self.read(self.wire, "dev-a", stream, until=FIRST + 65536)
        self.wire.pace = support.SLOWLY
        asked = self.wire.send("backup.ack", {"backup": self.began["backup"], "disk": "dev-a", "offset": FIRST})
        resume = self.wire.reply(asked)["result"]["resume"]
        self.assertLessEqual(MIB, resume)
        kept = [record for record in stream.records if record.get("offset", 0) + record.get("length", 0) <= resume]
        self.kill()
        # The guest overwrites all meanwhile.
        self.write(f"write -P 77 0 {SIZE}")
        plugin = Wire(self.rig.command())
        self.addCleanup(plugin.close)
        reply = plugin.call("backup.attach", {"monitor": self.rig.monitor, "backup": self.began["backup"]})
        told = {disk["disk"]: disk for disk in reply["disks"]}
        self.assertEqual((resume, False), (told["dev-a"]["resume"], told["dev-a"]["complete"]))
        self.assertEqual((0, False), (told["dev-b"]["resume"], told["dev-b"]["complete"]))
        # The host cuts what it has behind the ack, and goes on; the digest is of the whole.
        rest = Stream(self.rig.image("dev-a"))
        stored = self.stored(stream, kept)
        for record, payload in stored:
            rest.take(record, payload)
        result = self.read(plugin, "dev-a", rest, offset=resume)
        self.assertEqual(rest.end["digest"], result["result"]["digest"])
        other = Stream(self.rig.image("dev-b"))
        self.read(plugin, "dev-b", other)
        backup = Backup.of(None, reply)
        backup.streams = {"dev-a": rest, "dev-b": other}
        for each in backup.streams.values():
            each.finish()
        self.rig.compare(self, backup, self.nodes)
        done = plugin.call("backup.commit", {"backup": self.began["backup"]})
        self.assertEqual({"committed": ["dev-a", "dev-b"], "deleted": [], "leftovers": []}, done)
        self.assertEqual([], self.left())

    def stored(self, stream, kept):
        """The records that the host has, with their bytes from the image that it made of them."""
        stream.close()
        with open(self.rig.image("dev-a"), "rb") as image:
            for record in kept:
                payload = None
                if record["kind"] == "data":
                    image.seek(record["offset"])
                    payload = image.read(record["length"])
                yield record, payload

    def test_what_was_read_to_its_end_is_only_committed(self):
        """Also where it was given back as it was read."""
        self.begin()
        streams = {disk: Stream(self.rig.image(disk)) for disk in self.nodes}
        for disk, stream in streams.items():
            self.read(self.wire, disk, stream, release="on_read")
        self.kill()
        self.write(f"write -P 78 0 {SIZE}")
        with self.rig.plugin() as plugin:
            backup = self.attached(plugin)
            for told in backup.disks.values():
                self.assertEqual((None, True), (told.get("resume"), told["complete"]))
            backup.streams = streams
            self.finish(backup)

    def test_what_was_given_back_cannot_be_read_again(self):
        self.write(f"write -P 5 0 {SIZE}")
        self.begin(base=None)
        stream = Stream(self.rig.image("dev-a"))
        self.addCleanup(stream.close)
        self.read(self.wire, "dev-a", stream, until=MIB, release="on_read")
        self.kill()
        with self.rig.plugin() as plugin:
            backup = self.attached(plugin)
            self.assertEqual((None, False), (backup.disks["dev-a"].get("resume"), backup.disks["dev-a"]["complete"]))
            for offset in (0, MIB):
                params = {"backup": backup.id, "disk": "dev-a", "offset": offset}
                self.refused("offset_released", plugin, "backup.read", params)
            self.refused("incomplete", plugin, "backup.commit", {"backup": backup.id})
            backup.read("dev-b", self.rig.image("dev-b"))
            self.assertEqual(["dev-b"], backup.commit(disks=["dev-b"])["committed"])
        self.assertEqual([], self.left())
        self.assertEqual("missing", self.listed()["dev-a"]["tuesday"]["health"])
        self.rig.forget()
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def test_the_host_is_killed(self):
        """With `keep_ms` its plugin lets the point in time stand."""
        params = {"monitor": self.rig.monitor, "base": BASE, "checkpoint": "tuesday", **KEEP}
        for keep in (600_000, 0):
            with self.subTest(keep):
                self.begin(**{**params, "keep_ms": keep})
                self.wire.process.stdin.close()
                self.assertEqual(3, self.wire.process.wait(60))
                self.wire.process.stdout.close()
                with self.rig.plugin() as plugin:
                    if not keep:
                        params = {"monitor": self.rig.monitor, "backup": self.began["backup"]}
                        self.refused("unknown_backup", plugin, "backup.attach", params)
                        continue
                    backup = self.attached(plugin)
                    backup.read_all(self.rig)
                    self.rig.compare(self, backup, self.nodes)
                    backup.abort()

    def test_a_real_host_is_killed(self):
        params = {"monitor": self.rig.monitor, "base": BASE, "checkpoint": "tuesday", **KEEP}
        host = [sys.executable, "-m", "oracle.host_to_kill", json.dumps(self.rig.command()), json.dumps(params)]
        process = subprocess.Popen(host, stdout=subprocess.PIPE, cwd=support.ROOT / "tests")
        plugin = int(process.stdout.readline())
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(plugin)
            select.select([pidfd], [], [], support.SECONDS)
            os.close(pidfd)
        left = self.call("reclaim")
        self.assertEqual([], left["reclaimed"])
        [kept] = left["left"]
        self.assertEqual("kept", kept["state"])
        self.assertEqual([kept["backup"]], self.call("reclaim", backups=[kept["backup"]])["reclaimed"])
        self.assertEqual([], self.left())

    def test_one_that_is_kept_lets_others_begin(self):
        """On another disk; it is removed once its time is over."""
        self.begin(disks=[{"disk": "dev-a"}], keep_ms=600_000)
        self.kill()
        with self.rig.plugin() as plugin:
            other = Backup(plugin, self.rig.monitor, base=BASE, disks=[{"disk": "dev-b"}])
            other.read("dev-b", self.rig.image("dev-b"))
            self.assertEqual([], other.commit()["leftovers"])
        with self.rig.plugin() as plugin:
            kept = self.attached(plugin)
            kept.read("dev-a", self.rig.image("dev-a"))
            self.assertEqual([], kept.abort()["leftovers"])
        self.assertEqual([], self.left())
        self.begin(disks=[{"disk": "dev-a"}], keep_ms=1)
        self.kill()
        self.assertEqual([self.began["backup"]], self.call("reclaim")["reclaimed"])

    def test_who_cannot_be_attached(self):
        backup = self.begin()
        self.kill()
        with self.rig.plugin() as plugin:
            params = {"monitor": self.rig.monitor, "backup": "nothing"}
            self.refused("unknown_backup", plugin, "backup.attach", params)
            # The job that keeps the point in time is ended by somebody.
            self.rig.qmp.command("job-cancel", {"id": f"qf-{backup}-0"})
            params["backup"] = backup
            data = self.refused("point_in_time_lost", plugin, "backup.attach", params)
            self.assertEqual("dev-a", data["disk"])
        self.assertEqual([backup], self.call("reclaim")["reclaimed"])
        self.assertEqual([], self.left())

    def test_notes_that_lie(self):
        """They name what is none of ours: nothing is taken over, nothing is made or removed there."""
        backup = self.begin(**KEEP)
        self.kill()
        precious = self.rig.folder / "precious"
        precious.mkdir()
        (precious / "nbd.sock").write_text("precious")
        path = {"path": f"/objects/qf-{backup}-owner", "property": "data"}
        truth = self.rig.qmp.command("qom-get", path)

        def claim(change):
            lie = json.loads(truth)
            change(lie)
            self.rig.qmp.command("qom-set", {**path, "value": json.dumps(lie)})

        with self.rig.plugin() as plugin:
            for lie in (
                lambda claim: claim.update(dir=str(precious)),
                lambda claim: claim.update(server=str(precious / "nbd.sock")),
                lambda claim: claim.update(server=str(self.rig.folder / "qmp")),
                lambda claim: claim["session"]["disks"][0].update(disk="../../precious"),
                lambda claim: claim["session"]["disks"][0].update(checkpoint="theirs"),
            ):
                claim(lie)
                params = {"monitor": self.rig.monitor, "backup": backup}
                data = self.refused("monitor_protocol", plugin, "backup.attach", params)
                self.assertEqual("unchanged", data["state_left"])
                self.assertEqual("precious", (precious / "nbd.sock").read_text())
            self.rig.qmp.command("qom-set", {**path, "value": truth})
            kept = self.attached(plugin)
            kept.read_all(self.rig)
            self.finish(kept)
        self.assertEqual("precious", (precious / "nbd.sock").read_text())

    def test_a_note_of_more_than_the_disk(self):
        """Nothing of the disk is known to be there then."""
        backup = self.begin(**KEEP)
        asked = self.wire.send("backup.ack", {"backup": backup, "disk": "dev-a", "offset": 0})
        self.wire.reply(asked)
        self.kill()
        lie = {"time_ms": 1, "released": SIZE + 1, "mark": None, "complete": False}
        lie |= {"exported": False, "spent": False, "partial": False}
        note, text = f"qf-{backup}-0-at", json.dumps(lie)
        if note in [each["name"] for each in self.rig.qmp.command("qom-list", {"path": "/objects"})]:
            self.rig.qmp.command("object-del", {"id": note})
        self.rig.qmp.command("object-add", {"qom-type": "secret", "id": note, "data": text})
        with self.rig.plugin() as plugin:
            kept = self.attached(plugin)
            self.assertIsNone(kept.disks["dev-a"].get("resume"))
            for offset in (0, SIZE, SIZE + 1):
                params = {"backup": backup, "disk": "dev-a", "offset": offset}
                self.refused("offset_released", plugin, "backup.read", params)
            kept.abort()
        self.assertEqual([], self.left())

    def test_a_host_asks_twice_at_once(self):
        """One is taken over, the other one is told so, and nothing is lost."""
        backup = self.begin()
        self.kill()
        self.wire = Wire(self.rig.command())
        self.addCleanup(self.wire.close)
        params = {"monitor": self.rig.monitor, "backup": backup}
        asked = {self.wire.send("backup.attach", params) for _ in range(2)}
        replies = {}
        while replies.keys() != asked:
            message, _ = self.wire.receive()
            if message.get("id") in asked:
                replies[message["id"]] = message
        refused = [reply["error"]["data"] for reply in replies.values() if "error" in reply]
        self.assertEqual([("backup_busy", "unchanged")], [(data["code"], data["state_left"]) for data in refused])
        left = self.wire.call("reclaim", {"monitor": self.rig.monitor})
        alive = {"backup": backup, "state": "alive"}
        self.assertEqual({"reclaimed": [], "left": [alive], "leftovers": []}, left)
        streams = {disk: Stream(self.rig.image(disk)) for disk in self.nodes}
        for disk, stream in streams.items():
            self.read(self.wire, disk, stream)
            stream.finish()
        done = Backup.of(None, self.began)
        done.streams = streams
        self.rig.compare(self, done, self.nodes)
        done = self.wire.call("backup.commit", {"backup": backup})
        self.assertEqual({"committed": ["dev-a", "dev-b"], "deleted": [], "leftovers": []}, done)
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())

    def test_one_that_could_not_be_taken_over(self):
        """It can be later, and its NBD server ends with the last one that uses it."""
        backup = self.begin(disks=[{"disk": "dev-a"}], **KEEP)
        self.kill()
        note = f"qf-{backup}-owner"
        path = {"path": f"/objects/{note}", "property": "data"}
        truth = self.rig.qmp.command("qom-get", path)
        params = {"monitor": self.rig.monitor, "backup": backup}

        def look(name):
            # It has been read, and is to be written yet.
            if name == "query-qmp-schema":
                self.rig.proxy.on_command = lambda name: None
                self.rig.qmp.command("object-del", {"id": note})

        with self.rig.plugin() as plugin:
            other = Backup(plugin, self.rig.monitor, base=BASE, disks=[{"disk": "dev-b"}])
            self.rig.proxy.on_command = look
            data = self.refused("qemu_refused", plugin, "backup.attach", params)
            self.assertEqual("unchanged", data["state_left"])
            self.rig.qmp.command("object-add", {"qom-type": "secret", "id": note, "data": truth})
            self.attached(plugin).abort()
            other.abort()
            self.assertEqual([], self.left())
            self.assertEqual([], self.rig.files())
            Backup(plugin, self.rig.monitor).abort()

    def test_one_that_lives(self):
        backup = self.begin()
        reply = self.wire.reply(self.wire.send("backup.attach", {"monitor": self.rig.monitor, "backup": backup}))
        self.assertEqual("backup_busy", reply["error"]["data"]["code"])
        self.wire.call("backup.abort", {"backup": backup})
        self.wire.call("shutdown", {})
        self.wire.close()


class AttachOn72(Attach):
    qemu = QEMU_7_2

"""What counts after a crash at any point, and what may never go."""
import json
import os
import shutil
import tempfile
import unittest
from unittest import mock

from fleece_host import backup, durable, report
from fleece_host.plugin import Plugin
from fleece_host.store import Store, StoreError, stream_file

from .support import FAKE_PLUGIN, FULL, WithVm


class Crashes(WithVm):
    def crashed_at(self, step):
        """A backup in a process that is gone, without clean-up, at its n-th step on disk.

        Returns whether it got that far.
        """
        child = os.fork()
        if child == 0:
            status = 9
            try:
                self.backup_with_crash(step)
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1] >> 8 == 77

    def backup_with_crash(self, step):
        steps = [0]

        def counting(real):
            def call(*arguments, **more):
                if steps[0] == step:
                    os._exit(77)
                steps[0] += 1
                return real(*arguments, **more)
            return call

        os.environ.update(FAKE_VM=self.vm, FAKE_FAULT="")
        store = Store(self.store)
        with open(os.devnull, "w") as devnull, store.locked(), \
                mock.patch("os.fsync", counting(os.fsync)), \
                mock.patch("os.rename", counting(os.rename)), \
                mock.patch("os.mkdir", counting(os.mkdir)), \
                mock.patch.object(backup, "commit", counting(backup.commit)):
            with Plugin([FAKE_PLUGIN], stderr=devnull) as plugin:
                backup.run(plugin, store, backup.Options("/vm.sock"), report.Progress(devnull))
                if steps[0] == step:
                    os._exit(77)

    def test_after_a_crash_at_each_step_the_next_run_recovers(self):
        step, crashed = 0, True
        while crashed:
            self.guest_writes("disk0", b"%d" % step, at=70000)
            crashed = self.crashed_at(step)
            if self.folders_or_none():
                self.host("verify", self.store)
            self.guest_writes("disk0", b"later %d" % step, at=140000)
            out = self.backup()
            if step:
                self.assertNotRegex(out, FULL)
            self.whole_folders()
            self.assert_restores()
            self.assertEqual(len(self.checkpoints("disk0")), 1)
            step += 1
        # Two streams, the manifest, two renames, the folders, the commit.
        self.assertGreater(step, 8)

    def folders_or_none(self):
        return os.path.exists(os.path.join(self.store, "store.json")) and self.folders()


class Recovery(WithVm):
    def test_a_commit_that_gets_its_reply_only_when_asked_again(self):
        os.environ.update(FAKE_VM=self.vm, FAKE_FAULT="commit_silent")
        self.addCleanup(os.environ.pop, "FAKE_FAULT")
        store = Store(self.store)
        with open(os.devnull, "w") as devnull, store.locked(), \
                mock.patch.object(backup, "COMMIT_SECONDS", 3):
            with Plugin([FAKE_PLUGIN], stderr=devnull) as plugin:
                backup.run(plugin, store, backup.Options("/vm.sock"), report.Progress(devnull))
        self.assertNotRegex(self.backup(), FULL)

    def test_a_silent_plugin_is_given_up(self):
        os.environ.update(FAKE_VM=self.vm, FAKE_FAULT="hang")
        self.addCleanup(os.environ.pop, "FAKE_FAULT")
        store = Store(self.store)
        with open(os.devnull, "w") as devnull, store.locked(), \
                mock.patch.object(backup, "SILENCE_SECONDS", 0.5):
            with Plugin([FAKE_PLUGIN], stderr=devnull) as plugin:
                with self.assertRaises(backup.BackupFailed):
                    backup.run(plugin, store, backup.Options("/vm.sock"),
                               report.Progress(devnull))
        self.assertEqual(self.whole_folders(), [])

    def test_a_full_disk_voids_the_backup(self):
        self.backup()
        os.environ.update(FAKE_VM=self.vm, FAKE_FAULT="")
        store = Store(self.store)
        with open(os.devnull, "w") as devnull, store.locked(), \
                mock.patch.object(backup, "write_record", side_effect=OSError(28, "no space")):
            with Plugin([FAKE_PLUGIN], stderr=devnull) as plugin:
                with self.assertRaisesRegex(backup.BackupFailed, "no space"):
                    backup.run(plugin, store, backup.Options("/vm.sock"),
                               report.Progress(devnull))
        self.assertEqual(len(self.whole_folders()), 1)

    def test_a_folder_that_cannot_be_made_durable_does_not_count(self):
        self.backup()
        store = Store(self.store)
        with store.locked():
            new = store.new()
            with mock.patch("fleece_host.store.fsync_folder", side_effect=OSError):
                with self.assertRaises(OSError):
                    new.finish({})
            new.discard()
        self.assertEqual(len(self.whole_folders()), 1)


class Names(unittest.TestCase):
    def test_disk_ids_become_file_names(self):
        ids = ["disk0", "..", ".", "/machine/peripheral-anon/device[0]/virtio-backend", "a%2Fb",
               "a/b", "\u2603", "x" * 300, "x" * 301, "nul\0"]
        names = [stream_file(each) for each in ids]
        self.assertEqual(len(set(names)), len(ids))
        for name in names:
            self.assertRegex(name, r"\A[A-Za-z0-9._~%-]{1,240}\Z")
            self.assertNotIn(name, (".", ".."))


class Manifests(unittest.TestCase):
    """Chains and pruning over manifests alone."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.store = Store(os.path.join(folder.name, "store"))
        with self.store.locked():
            self.store.claim({"name": "vm", "uuid": None})

    def add(self, **bases):
        """A backup of the named disks, each with the name of its base or None."""
        new = self.store.new()
        entries = []
        for disk, base in bases.items():
            with new.open_stream(disk) as file:
                file.write(b"x")
            entries.append({"disk": disk, "size": 1, "mode": "incremental" if base else "full",
                            "base": base, "base_checkpoint": "c", "digest": "", "stored_bytes": 1,
                            "file": new.stream_file(disk)})
        new.finish({"format": 1, "checkpoint": new.checkpoint, "disks": entries})
        return new.name

    def test_the_base_is_the_newest_that_store_and_vm_have(self):
        one = self.add(a=None)
        two = self.add(a=one)
        three = self.add(a=two, b=None)
        point = {name: self.store.backup(name).checkpoint for name in (one, two, three)}

        def base(disk, *known, **more):
            found = self.store.base_for(
                disk, [dict({"health": "usable", "checkpoint": point[name]}, **more)
                       for name in known])
            return found.name if found else None
        self.assertEqual(base("a", one, two, three), three)
        self.assertEqual(base("a", one, two), two)
        self.assertEqual(base("a", one), one)
        self.assertEqual(base("b", one, two), three, "so that the plugin says why it is full")
        self.assertEqual(base("a", one, health="inconsistent"), three)
        self.assertIsNone(base("c", one))
        os.unlink(self.store.backup(two).stream_path("a"))
        self.assertEqual(base("a", one, two, three), one, "what builds on a lost stream is lost")

    def test_what_the_vm_may_forget(self):
        one = self.add(a=None, b=None)
        two = self.add(a=one, b=one)
        new = self.store.new()

        def known(**health):
            return [{"checkpoint": name, "health": how} for name, how in health.items()]

        def forgotten(bases, **disks):
            return backup.superseded(self.store, disks, new, bases)
        there = known(**{one: "usable", two: "usable"})
        self.assertEqual(forgotten(["a", "b"], a=there, b=there), [one, two])
        self.assertEqual(forgotten(["a"], a=there, b=there), [one], "b builds on the other")
        odd = known(**{one: "on_backing_image", two: "inconsistent", "x": "foreign",
                       "y": "missing"})
        self.assertEqual(forgotten(["a"], a=odd), [two])

    def test_pruning_never_takes_a_base(self):
        one = self.add(a=None, b=None)
        two = self.add(a=one)
        three = self.add(a=None)
        four = self.add(a=three)
        self.assertEqual(self.store.prune(2), [two], "b's only backup stays")
        self.assertEqual(self.store.folders(), [one, three, four])

    def test_with_a_broken_chain_nothing_is_pruned(self):
        one = self.add(a=None)
        self.add(a=one)
        durable.remove(self.store.backup(one).path)
        fresh = Store(self.store.path)
        with self.assertRaises(StoreError):
            fresh.prune(1)

    def test_manifests_that_lie(self):
        one = self.add(a=None)
        two = self.add(a=one)
        path = os.path.join(self.store.path, one, "backup.json")
        with open(path) as file:
            manifest = json.load(file)
        for change in ({"file": "../x"}, {"base": two}, {"base": "../x"}):
            changed = json.loads(json.dumps(manifest))
            changed["disks"][0].update(change)
            with open(path, "w") as file:
                json.dump(changed, file)
            fresh = Store(self.store.path)
            with self.assertRaises((StoreError, ValueError)):
                fresh.chain(fresh.backup(two), "a")
                self.fail(change)

    def test_no_manifest_leads_out_of_the_store(self):
        one = self.add(a=None)
        two = self.add(a=one)
        # Another store, whose manifests are sound.
        shutil.copytree(self.store.path, self.store.path + "-beside")
        other = "%s/../../store-beside/%s" % (one, one)
        self.assertTrue(os.path.exists(os.path.join(self.store.path, other, "backup.json")))
        for name in (other, "../store-beside", "", None, 7, [one]):
            with self.subTest(name), self.assertRaises(StoreError):
                self.store.backup(name)
        path = os.path.join(self.store.path, two, "backup.json")
        manifest = self.store.backup(two).manifest
        manifest["disks"][0]["base"] = other
        with open(path, "w") as file:
            json.dump(manifest, file)
        fresh = Store(self.store.path)
        with self.assertRaises(StoreError):
            fresh.chain(fresh.backup(two), "a")


if __name__ == "__main__":
    unittest.main()

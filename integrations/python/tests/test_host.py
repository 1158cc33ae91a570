"""The host's command line against a plugin that plays a VM, and that misbehaves."""
import fcntl
import json
import os
import signal
import subprocess
import sys

from .support import FAKE_PLUGIN, FULL, HOST, SECONDS, WithVm


class Rounds(WithVm):
    def test_a_full_then_incrementals_each_restored(self):
        states = []
        for number in range(4):
            self.guest_writes("disk0", b"%d" % number * 100, at=70000 * number)
            out = self.backup()
            self.assertIn("incremental" if number else "no base", out)
            states.append(self.guest_has("disk0"))
        for name, state in zip(self.whole_folders(), states):
            self.assertEqual(self.restored("disk0", "--at", name), state)
        self.assert_restores()
        self.assertIn("8 streams, 0 problems", self.host("verify", self.store))
        self.assertIn(self.folders()[2], self.host("list", self.store))

    def test_what_became_zero_is_zero_again(self):
        self.backup()
        self.guest_writes("disk0", bytes(131072), at=0)
        self.backup()
        self.assert_restores()

    def test_inline(self):
        self.backup("--inline")
        self.guest_writes("disk0", b"new", at=70000)
        self.backup("--inline")
        self.assertEqual(self.restored("disk0", "--inline"), self.guest_has("disk0"))

    def test_only_the_newest_checkpoint_stays(self):
        for _ in range(3):
            self.backup()
            self.assertEqual(len(self.checkpoints("disk0")), 1)

    def test_checkpoints_of_others_stay(self):
        self.guest_writes("disk0@another+checkpoint", b"x")
        self.backup()
        self.backup()
        self.assertIn("another+checkpoint", self.checkpoints("disk0"))

    def test_two_stores_back_one_vm_up_side_by_side(self):
        other = os.path.join(self.folder, "other")
        for number in range(3):
            self.guest_writes("disk0", b"%d" % number, at=70000)
            for store in (self.store, other):
                out = self.host("backup", "--qmp", "/vm.sock", "--to", store)
                self.assertIn("incremental" if number else "no base", out)
        self.assertEqual(len(self.checkpoints("disk0")), 2)
        self.assert_restores()

    def test_a_base_that_is_another_point_in_time_is_not_built_on(self):
        self.backup()
        (name,) = self.checkpoints("disk0")
        size = len(self.guest_has("disk0"))
        # Somebody put another image in its place, with a checkpoint of the same name.
        self.guest_writes("disk0@" + name, bytes(size))
        self.guest_writes("disk0", os.urandom(size))
        self.assertIn("base_mismatch", self.backup())
        self.assert_restores()

    def test_a_manifest_that_does_not_know_the_point_in_time_goes_by_its_name(self):
        self.backup()
        path = os.path.join(self.store, self.folders()[0], "backup.json")
        with open(path) as file:
            manifest = json.load(file)
        for disk in manifest["disks"]:
            self.assertTrue(disk.pop("checkpoint_id"))
        with open(path, "w") as file:
            json.dump(manifest, file)
        self.guest_writes("disk0", b"new", at=70000)
        self.assertNotRegex(self.backup(), FULL)
        self.assert_restores()

    def test_what_the_vm_remembers_is_shown_and_repaired(self):
        self.backup()
        self.guest_writes("disk0@another+checkpoint", b"x")
        (name,) = self.folders()

        def ask(command, *whose, **more):
            return self.host(command, "--qmp", "/vm.sock", *whose, **more)
        mine = ask("checkpoints", "--to", self.store)
        self.assertRegex(mine, r"(?m)^disk0 +%s +\w+ +usable" % name)
        self.assertNotIn("another", mine)
        self.assertRegex(ask("checkpoints", "--all"), r"(?m)^disk0 +checkpoint +another +usable")
        out = ask("repair", "--to", self.store)
        self.assertIn("nothing had to be removed", out)
        self.assertIn("disk0: still a base: " + name, out)
        self.assertRegex(out, r"(?s)the next backup:.*\ndisk0 .* incremental ")
        out = ask("repair", "--to", self.store, fault="inconsistent")
        self.assertIn("disk1: removed: bitmap of " + name, out)
        self.assertIn("disk1: lost, a backup from it is full: %s (inconsistent)" % name, out)
        self.assertRegex(out, r"(?s)the next backup:.*\ndisk0 .* full +bitmap_lost ")
        self.assertIn("disk1: somebody else's, untouched: theirs", out)
        self.assertIn("a backup is open in QEMU (its plugin runs, or was killed): b7", out)
        self.assertEqual(self.checkpoints("disk0"), ["another+checkpoint"])
        out = ask("repair", "--all", fault="stuck", status=1)
        self.assertIn("disk0: could not be removed: stuck", out)
        self.assertNotIn("next backup:", out)
        self.assertIn("bitmap_lost", self.backup())

    def test_an_estimate(self):
        one, other = "11111111-0000-0000-0000-000000000000", "2" * 36

        def estimate(*arguments, **more):
            return self.host("estimate", "--qmp", "/vm.sock", "--to", self.store, *arguments,
                             FAKE_UUID=one, **more)
        first = r"(?m)^disk1 +146.5 KiB +full +no base +4.0 KiB +146.5 KiB$"
        self.assertRegex(estimate(), first)
        self.assertFalse(os.path.exists(self.store), "it makes nothing")
        self.backup(FAKE_UUID=one)
        self.guest_writes("cd0", bytes(100))
        out = estimate()
        self.assertRegex(out, r"(?m)^disk0 +390.7 KiB +incremental +- +4.0 KiB +390.7 KiB$")
        self.assertIn("left out: cd0 (read_only)", out)
        self.assertRegex(estimate("--full", "--disk", "disk1"), first)
        self.assertIn("base_inconsistent", estimate(fault="inconsistent"))
        self.assertIn(" full  a_later_reason ", estimate(fault="later_reason"))
        self.assertEqual(len(self.folders()), 1)
        one = other
        self.assertIn("store of the VM", estimate(status=1))

    def test_one_disk_alone_does_not_cost_the_other_its_base(self):
        self.backup()
        self.backup("--disk", "disk0")
        self.guest_writes("disk1", b"new", at=70000)
        out = self.backup()
        self.assertNotRegex(out, FULL)
        self.assert_restores()
        self.assertEqual(len(self.checkpoints("disk1")), 1)

    def test_excluded_disks_are_left_out_and_unknown_ones_refused(self):
        self.guest_writes("cd0", bytes(100))
        out = self.backup()
        self.assertIn("left out: cd0 (read_only)", out)
        self.assertNotRegex(out, "(?m)^cd0")
        self.assertNotIn("cd0", self.backup("--disk", "disk0"))
        self.assertIn("no disk disk7", self.backup("--disk", "disk7", status=1))

    def test_a_full_says_why(self):
        self.backup()
        self.assertIn("base_inconsistent", self.backup(fault="inconsistent"))
        self.assertIn("no base", self.backup("--full"))
        for disk in ("disk0", "disk1"):
            for name in self.checkpoints(disk):
                os.unlink(os.path.join(self.vm, "%s@%s.img" % (disk, name)))
        self.assertIn("bitmap_lost", self.backup())
        self.guest_writes("disk0", bytes(1 << 20))
        self.assertIn("size_changed", self.backup())
        self.assert_restores()
        before = self.folders()
        out = self.backup("--strict", fault="inconsistent", status=1)
        self.assertIn("code base_unusable, action take_full", out)
        self.assertEqual(self.whole_folders(), before)

    def test_keep(self):
        for arguments in ([], [], ["--full"], ["--disk", "disk0"]):
            self.backup(*arguments)
        self.backup("--keep", "3")
        self.assertEqual([name[:6] for name in self.whole_folders()],
                         ["000001", "000002", "000003", "000004", "000005"])
        self.backup("--keep", "2")
        self.assertEqual([name[:6] for name in self.whole_folders()],
                         ["000003", "000004", "000005", "000006"])
        self.assert_restores()
        self.host("verify", self.store)

    def test_another_vm_is_refused(self):
        one, other = "11111111-0000-0000-0000-000000000000", "2" * 36
        self.backup(FAKE_UUID=one)
        self.assertIn("store of the VM", self.backup(status=1, FAKE_UUID=other))
        self.backup(FAKE_UUID=one)

    def test_usage(self):
        self.host(status=2)
        self.host("backup", status=2)
        self.host("--help")
        self.backup("--keep", "0", status=2)

    def test_places_that_are_no_store(self):
        self.assertIn("neither empty nor a store", self.host(
            "backup", "--qmp", "/vm.sock", "--to", self.vm, status=1))
        for command in ("list", "verify"):
            self.assertIn("no store", self.host(command, self.vm, status=1))

    def test_two_hosts_on_one_store(self):
        self.backup()
        with open(os.path.join(self.store, "lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.assertIn("another host", self.backup(status=1))


class Faults(WithVm):
    def void(self, fault, *said):
        """The backup fails, nothing of it stays, and the next one is incremental all the same."""
        self.backup()
        before = self.whole_folders()
        self.guest_writes("disk0", b"new" * 50000, at=70000)
        out = self.backup(fault=fault, status=1)
        for text in said:
            self.assertIn(text, out)
        self.assertEqual(self.whole_folders(), before)
        self.assertNotRegex(self.backup(), FULL)
        self.assert_restores()

    def test_plugin_dies_in_the_middle(self):
        self.void("die", "status -9", "middle of a payload")

    def test_stream_fails(self):
        self.void("failed", "code nbd_refused, action retry", "offset 65536")

    def test_stream_without_end(self):
        self.void("no_end", "no `end`")

    def test_record_is_lost(self):
        self.void("lost_record", "offset 65536")

    def test_bytes_are_wrong(self):
        self.void("bad_crc", "CRC-32")

    def test_stream_is_of_another_size(self):
        self.void("other_size", "size")

    def test_stdout_is_polluted(self):
        self.void("not_json", "broke the protocol")

    def test_errors_before_there_is_a_backup(self):
        self.void("monitor_busy", "code monitor_busy, action retry")
        self.assertIn("version_unsupported", self.backup(fault="version", status=1))

    def test_no_plugin(self):
        self.assertIn("cannot start", self.backup("--plugin", "/nowhere", status=1))

    def test_replies_in_reverse_order(self):
        self.backup(fault="reverse")
        self.assert_restores()

    def test_ten_megabytes_of_log(self):
        self.backup(fault="flood")
        self.assert_restores()

    def test_leftovers_are_told(self):
        self.assertIn("left behind: job x", self.backup(fault="leftover"))

    def test_commit_whose_plugin_dies(self):
        self.backup()
        for fault in ("commit_dies_before", "commit_dies_after"):
            before = len(self.folders())
            self.guest_writes("disk0", fault.encode(), at=70000)
            self.assertIn("is stored", self.backup(fault=fault, status=1))
            self.assertEqual(len(self.whole_folders()), before + 1)
            self.assert_restores()
            self.guest_writes("disk0", b"later", at=140000)
            self.assertNotRegex(self.backup(), FULL)
            self.assert_restores()
        self.assertEqual(len(self.checkpoints("disk0")), 1)
        self.host("verify", self.store)

    def test_the_host_is_ended_or_killed_in_the_middle(self):
        self.backup()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            host = subprocess.Popen(
                [sys.executable, HOST, "backup", "--qmp", "/vm.sock", "--to", self.store],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env=dict(os.environ, QEMU_FLEECE=FAKE_PLUGIN, FAKE_VM=self.vm, FAKE_FAULT="hang"))
            with host:
                # The plugin's first notice comes in the middle of a stream.
                self.assertIn(b"paused", host.stderr.readline())
                host.send_signal(number)
                host.communicate(timeout=SECONDS)
            self.assertEqual(host.returncode, -9 if number == signal.SIGKILL else 1)
            if number == signal.SIGKILL:
                self.assertTrue(any("partial" in name for name in os.listdir(self.store)))
            else:
                self.assertEqual(len(self.whole_folders()), 1)
        self.assertNotRegex(self.backup(), FULL)
        self.assertEqual(len(self.whole_folders()), 2)
        self.assert_restores()


class Damaged(WithVm):
    def setUp(self):
        super().setUp()
        self.backup()
        self.guest_writes("disk0", os.urandom(100), at=140000)
        self.backup()
        self.streams = [os.path.join(self.store, name, "disk0.stream") for name in self.folders()]

    def damage(self, path, change):
        with open(path, "rb") as file:
            raw = file.read()
        with open(path, "wb") as file:
            file.write(change(raw))

    def test_verify_and_restore_name_the_place(self):
        self.damage(self.streams[1], lambda raw: raw.replace(b'"crc32":', b'"crc32":1', 1))
        out = self.host("verify", self.store, status=1)
        self.assertIn("disk0.stream: stream 1, offset 131072: ", out)
        self.assertIn(self.folders()[1], out)
        self.assertIn("4 streams, 1 problems", out)
        out = self.host("restore", self.store, "--disk", "disk0", "--output",
                        os.path.join(self.folder, "no.img"), status=1)
        self.assertIn("stream 1, offset 131072", out)
        self.assertFalse(os.path.exists(os.path.join(self.folder, "no.img")))

    def test_whole_streams_in_the_wrong_place(self):
        with open(self.streams[0], "rb") as file:
            raw = file.read()
        self.damage(self.streams[1], lambda _: raw)
        self.assertIn("stream 1, offset 0", self.host("verify", self.store, status=1))

    def test_more_behind_the_end(self):
        self.damage(self.streams[0], lambda raw: raw + b"x")
        self.assertIn("more follows", self.host("verify", self.store, status=1))

    def test_a_lost_base_is_seen_and_not_built_on(self):
        os.rename(os.path.dirname(self.streams[0]), os.path.join(self.folder, "elsewhere"))
        self.assertIn("backup.json", self.host("verify", self.store, status=1))
        self.assertRegex(self.backup(), FULL)
        self.assert_restores()

    def test_a_cut_base_is_not_built_on(self):
        self.damage(self.streams[0], lambda raw: raw[:-1])
        self.assertIn("stream 0, offset", self.host("verify", self.store, status=1))
        self.backup()
        self.assert_restores()

    def test_the_plugins_verdict_names_the_file(self):
        out = self.host("restore", self.store, "--disk", "disk0", "--output",
                        os.path.join(self.folder, "no.img"), fault="restore_damaged", status=1)
        self.assertIn(self.streams[0] + ": ", out)
        self.assertIn("stream_damaged", out)

    def test_restore_refuses_an_output_that_exists(self):
        path = os.path.join(self.folder, "there")
        with open(path, "w"):
            self.assertIn("exists", self.host(
                "restore", self.store, "--disk", "disk0", "--output", path, status=1))

    def test_restore_of_what_is_not_stored(self):
        for arguments in (["--disk", "disk7"], ["--disk", "disk0", "--at", "sunday"]):
            out = self.host("restore", self.store, "--output", "no.img", *arguments, status=1)
            self.assertIn("it has the disks: disk0, disk1", out)

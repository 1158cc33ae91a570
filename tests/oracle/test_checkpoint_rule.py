"""The checkpoint follows the host's word: invariant 2, and 4 with it."""

import os
import select
import signal
import subprocess
import sys
import unittest

from .kit import PLUGIN, SECONDS, Case, Pull, bitmaps, ours
from .machine import Machine

SIZE = 8 << 20


class Rule(Case):
    def setUp(self):
        super().setUp()
        self.vm = Machine(self.folder, [{"size": SIZE}, {"size": SIZE, "format": "raw"}])
        self.addCleanup(self.vm.close)
        self.images = [bytearray(), bytearray()]
        self.truth = [bytearray(SIZE), bytearray(SIZE)]
        self.write(0, 0, 4 << 20, 1)
        self.write(1, 0, 4 << 20, 2)
        self.back_up(None, "a")

    def write(self, number, offset, length, value):
        if value:
            self.vm.io(number, f"write -P {value} {offset} {length}")
        else:
            self.vm.io(number, f"write -z {offset} {length}")
        self.truth[number][offset:offset + length] = bytes([value]) * length

    def begin(self, plugin, base, checkpoint, **more):
        return plugin.call("backup.begin", {"monitor": self.vm.monitor, "base": base, "checkpoint": checkpoint,
                                            **more}, SECONDS)

    def back_up(self, base, checkpoint):
        """A whole backup, applied to the images; the disks as begin told them."""
        plugin = self.plugin()
        began = self.begin(plugin, base, checkpoint)
        for number in range(2):
            Pull(plugin, began["backup"], f"disk{number}", self.images[number]).result()
        plugin.call("backup.commit", {"backup": began["backup"]}, SECONDS)
        self.assertEqual(plugin.close(), [])
        return began["disks"]

    def change(self):
        for number in range(2):
            self.write(number, 1 << 20, 1 << 20, 3)
            self.write(number, 3 << 20, 1 << 19, 0)

    def next_is_incremental(self, base, checkpoint):
        """Whatever became of the last backup: the next builds on the old base, and is right."""
        self.write(0, 5 << 20, 65536, 4)
        disks = self.back_up(base, checkpoint)
        self.assertEqual([disk["mode"] for disk in disks], ["incremental"] * 2)
        for image, truth in zip(self.images, self.truth):
            self.assertTrue(image == truth)
        self.assert_clean(self.vm)

    def checkpoints(self, number):
        names = bitmaps(self.vm, f"node{number}")
        return sorted(name.split("/")[2] for name in names if name.startswith("qemu-fleece/"))

    def after_failure(self):
        self.assert_clean(self.vm)
        self.assertEqual([self.checkpoints(0), self.checkpoints(1)], [["a"], ["a"]])
        self.next_is_incremental("a", "b2")

    def test_commit_keeps_the_new_one_and_the_base(self):
        self.change()
        self.back_up("a", "b")
        self.assertEqual([self.checkpoints(0), self.checkpoints(1)], [["a", "b"], ["a", "b"]])
        self.next_is_incremental("b", "c")

    def test_an_older_base_serves_too(self):
        start = [bytearray(image) for image in self.images]
        self.change()
        self.back_up("a", "b")
        self.images = start
        self.next_is_incremental("a", "c")

    def test_writes_while_the_backup_is_open_are_the_next_ones(self):
        plugin = self.plugin()
        began = self.begin(plugin, "a", "b")
        then = [bytes(truth) for truth in self.truth]
        self.change()
        for number in range(2):
            Pull(plugin, began["backup"], f"disk{number}", self.images[number]).result()
            self.assertTrue(self.images[number] == then[number])
        plugin.call("backup.commit", {"backup": began["backup"], "delete_checkpoints": ["a", "unknown"]}, SECONDS)
        plugin.close()
        self.assertEqual(self.checkpoints(0), ["b"])
        self.next_is_incremental("b", "c")

    def test_abort(self):
        plugin = self.plugin()
        began = self.begin(plugin, "a", "b")
        self.change()
        Pull(plugin, began["backup"], "disk0", bytearray()).result()
        for _ in range(2):
            self.assertEqual(plugin.call("backup.abort", {"backup": began["backup"]}, SECONDS), {"leftovers": []})
        self.refused("backup_ended", plugin, "backup.commit", backup=began["backup"])
        plugin.close()
        self.after_failure()

    def test_commit_twice_and_of_what_was_not_read(self):
        plugin = self.plugin()
        began = self.begin(plugin, "a", "b")
        self.refused("unknown_backup", plugin, "backup.commit", backup="none")
        data = self.refused("incomplete", plugin, "backup.commit", backup=began["backup"])
        self.assertEqual((data["disk"], data["state_left"]), ("disk0", "backup_open"))
        self.refused("unknown_disk", plugin, "backup.commit", backup=began["backup"], disks=["disk7"])
        for number in range(2):
            Pull(plugin, began["backup"], f"disk{number}", self.images[number]).result()
        first = plugin.call("backup.commit", {"backup": began["backup"]}, SECONDS)
        self.assertEqual(plugin.call("backup.commit", {"backup": began["backup"]}, SECONDS), first)
        self.refused("backup_ended", plugin, "backup.abort", backup=began["backup"])
        plugin.close()
        self.assert_clean(self.vm)

    def test_commit_of_one_disk(self):
        plugin = self.plugin()
        began = self.begin(plugin, "a", "b")
        Pull(plugin, began["backup"], "disk1", self.images[1]).result()
        result = plugin.call("backup.commit", {"backup": began["backup"], "disks": ["disk1"],
                                               "delete_checkpoints": ["a"]}, SECONDS)
        self.assertEqual((result["committed"], result["deleted"]), (["disk1"], ["disk1/a"]))
        plugin.close()
        self.assertEqual([self.checkpoints(0), self.checkpoints(1)], [["a"], ["b"]])
        self.assert_clean(self.vm)

    def test_shutdown(self):
        plugin = self.plugin()
        began = self.begin(plugin, "a", "b")
        self.change()
        self.assertEqual(plugin.call("shutdown", {}, SECONDS), {"aborted": [began["backup"]], "leftovers": []})
        plugin.close()
        self.after_failure()

    def test_the_host_is_killed_in_the_middle_of_a_stream(self):
        host = subprocess.Popen([sys.executable, "-c", HOST, PLUGIN, self.vm.monitor, str(self.places)],
                                stdout=subprocess.PIPE, text=True)
        self.addCleanup(host.stdout.close)
        self.addCleanup(host.kill)
        plugin = int(host.stdout.readline())
        self.assertNotEqual(ours(self.vm), [])
        self.change()
        gone = os.pidfd_open(plugin)
        host.kill()
        host.wait()
        wait_for(gone)
        self.after_failure()

    def test_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number):
                plugin = self.plugin(stderr=subprocess.DEVNULL)
                self.begin(plugin, "a", f"b{number}")
                plugin._process.send_signal(number)
                self.assertEqual(plugin._process.wait(SECONDS), 3)
                plugin.close()
                self.assert_clean(self.vm)
        self.after_failure()


# A host that opens a backup, starts to read, and never reads on.
HOST = """
import json, subprocess, sys, time
plugin = subprocess.Popen([sys.argv[1], "--scratch-dir", sys.argv[3], "--runtime-dir", sys.argv[3]],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
def ask(id, method, **params):
    plugin.stdin.write(json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}) + "\\n")
ask(1, "hello", protocols=[1], host={"name": "t", "version": "1"})
plugin.stdout.readline()
ask(2, "backup.begin", monitor=sys.argv[2], base="a", checkpoint="b")
backup = json.loads(plugin.stdout.readline())["result"]["backup"]
ask(3, "backup.read", backup=backup, disk="disk0")
plugin.stdout.readline()
print(plugin.pid, flush=True)
time.sleep(600)
"""


def wait_for(pidfd):
    """Until the process has ended."""
    if not select.select([pidfd], [], [], SECONDS)[0]:
        raise AssertionError("the plugin lives on")
    os.close(pidfd)


if __name__ == "__main__":
    unittest.main()

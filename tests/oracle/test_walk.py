"""The random walk (walk.py): `WALK_SEED=N WALK_STEPS=N` walks as a run before did.

Without a seed it is the same walk each time, so that a failure is the change's own;
`WALK_SEED=new` takes a new one, to look for more.
"""

import os
import secrets
import sys
import unittest

from . import support
from .walk import CLUSTER, Checkpoint, Disk, Walk

SEED = os.environ.get("WALK_SEED") or "20261123"
SEED = secrets.randbits(32) if SEED == "new" else int(SEED)
STEPS = int(os.environ.get("WALK_STEPS") or 2000)


class RandomWalk(support.Test):
    limit = 1200

    def test_thousands_of_steps(self):
        print(f"WALK_SEED={SEED} WALK_STEPS={STEPS}", file=sys.stderr)
        walk = Walk(self, SEED)
        try:
            walk.run(STEPS)
        except BaseException:
            print(f"WALK_SEED={SEED} failed; the last steps:", *walk.log[-40:], sep="\n", file=sys.stderr)
            raise
        finally:
            walk.close()
        if STEPS >= 1000:
            self.assertLess({"backup", "restart", "kill", "repair", "restore", "merge"}, set(walk.counts))


class Model(unittest.TestCase):
    def test_it_knows_what_changed_when(self):
        disk = Disk("dev-a", "raw", bytearray(3 * CLUSTER))
        coarse = disk.checkpoints["c", "coarse"] = Checkpoint("x", bytes(disk.now), CLUSTER)
        fine = disk.checkpoints["c", "fine"] = Checkpoint("y", bytes(disk.now), 4096)
        disk.write(CLUSTER - 512, b"a" * 1024)
        self.assertEqual({15, 16}, fine.dirty)
        self.assertEqual(set(range(32)), coarse.dirty)
        coarse.recording = False
        disk.write(2 * CLUSTER, b"b")
        self.assertEqual((32, 3), (len(coarse.dirty), len(fine.dirty)))
        self.assertEqual(bytes(3 * CLUSTER), fine.image)
        self.assertEqual(("not_recording", "usable"), (coarse.health, fine.health))

"""Guests that are held still for the instant: what their tests share."""

import itertools
import pathlib
import time

from . import support
from .agent import Agent, Gate
from .guest import Disk, Guest
from .support import QEMU, Rig, Wire, ours

SECONDS = support.SECONDS


def wait_for(what, condition):
    """Looks until it is so."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not {what} after {SECONDS} s")
        time.sleep(0.01)


def guardian_of(pid, missing=False):
    """The process id of the plugin's guardian, its only child; None: it may be missing, and is."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    # One before may have ended; and a new one is the plugin's copy first.
    guardians = [int(child) for child in children if is_guardian(child)]
    if missing and not guardians:
        return None
    (guardian,) = guardians
    return guardian


def is_guardian(pid):
    try:
        return b"guardian" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


def has_ended(pid):
    """Also where its parent has not noticed."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Probe:
    """A process of the guest that writes to each file system once."""

    numbers = itertools.count(1)

    def __init__(self, guest, filesystems):
        self.guest = guest
        self.done = f"/tmp/probe{next(self.numbers)}"
        writes = " && ".join(f"echo x >/mnt/{number}/probe && sync" for number in range(filesystems))
        self.pid = guest.run(f"sh ({writes} && touch {self.done}) >/dev/null 2>&1 & echo $!")

    def wait_stuck(self):
        """Until it waits for a thaw."""
        place = f"sh cat /proc/{self.pid}/wchan 2>/dev/null || true"
        wait_for("stuck", lambda: "percpu_rwsem" in self.guest.run(place))

    def wait_through(self):
        wait_for("through", lambda: self.guest.run(f"sh ls {self.done} 2>/dev/null || true"))


class Frozen(support.Test):
    """One guest with two ext4, for all tests; between the plugin and its monitor stands a gate."""

    qemu = QEMU

    @classmethod
    def setUpClass(cls):
        cls.rig = Rig(Guest([Disk(iothread=cls.qemu == QEMU), Disk(format="raw")], qemu=cls.qemu), proxy=Gate)
        cls.addClassCleanup(cls.rig.close)
        cls.guest, cls.gate = cls.rig.machine, cls.rig.proxy
        for number in (0, 1):
            cls.guest.run(f"mkfs disk{number}")
            cls.guest.run(f"mount disk{number} /mnt/{number}")
        cls.agent = cls.guest.start_agent()

    def setUp(self):
        self.wire = None
        self.addCleanup(self.is_over)

    def is_over(self):
        """Nothing is frozen, and nothing is left."""
        if self.gate.is_shut:
            self.gate.drop()
        if self.wire:
            self.wire.close()
        self.probe().wait_through()
        with Agent(self.guest.agent) as agent:
            self.assertEqual("thawed", agent.call("guest-fsfreeze-status"))
        with self.rig.plugin() as plugin:
            # What a killed plugin has left.
            plugin.call("reclaim", {"monitor": self.rig.monitor}, SECONDS)
        self.assertEqual([], ours(self.rig.qmp))

    def start(self):
        """A plugin in a process group of its own, as a host's service has one."""
        self.wire = Wire(["setsid", *self.rig.command("--log", "error")])
        return self.wire

    def consistency(self, policy="require", deadline=None):
        params = {"kind": "agent", "socket": self.guest.agent, "policy": policy}
        return {**params, "deadline_ms": deadline} if deadline else params

    def begin(self, consistency):
        """Sends backup.begin: its id."""
        return self.wire.send("backup.begin", {"monitor": self.rig.monitor, "consistency": consistency})

    def reach(self, consistency):
        """A plugin whose guest is held, before the instant: the id of its backup.begin."""
        self.start()
        self.gate.shut()
        id = self.begin(consistency)
        self.assertTrue(self.gate.reached.wait(SECONDS))
        return id

    def probe(self):
        return Probe(self.guest, 2)

    def fails(self, code, id):
        """The error of a request."""
        error = self.wire.reply(id).get("error")
        self.assertIsNotNone(error)
        self.assertEqual(code, error["data"]["code"], error)
        self.assertEqual("unchanged", error["data"]["state_left"])
        self.assertEqual([], ours(self.rig.qmp))
        return error

    def abort(self, id):
        """The reply of a backup.begin, which is ended."""
        result = self.wire.reply(id)["result"]
        self.wire.call("backup.abort", {"backup": result["backup"]})
        return result["consistency"]

"""Guests that are frozen for the instant: the real agent, a real guest, and who is killed between."""

import os
import signal
import ssl
import subprocess
import sys
import time

from . import support
from .agent import Agent, Gate
from .frozen import SECONDS, Frozen, Probe, guardian_of, has_ended, wait_for
from .guest import Disk, Guest
from .machines import Relay
from .support import PLUGIN, QEMU_7_2, Backup, Rig, ours
from .targets import Authority
from .test_host import HOST

DEADLINE = 1000  # ms; where a test waits for it, and nothing else has to come first
LATER = 5000  # ms; where the guest has to be frozen before


class Agents(Frozen):
    def test_the_reference_host(self):
        for options, says in (
            (["--freeze", self.guest.agent], r"consistent: 2 file systems were frozen, for \d+ ms"),
            (["--try-freeze", f"{self.guest.agent}.not"], r"loss of power \(agent_unreachable\)"),
            (["--pause"], r"the VM was paused for \d+ ms"),
            ([], "consistent as after a loss of power\n"),
        ):
            with self.subTest(options):
                command = [sys.executable, HOST, "backup", "--qmp", self.rig.monitor, "--to", self.rig.folder / "store"]
                environment = dict(os.environ, QEMU_FLEECE=PLUGIN)
                run = {"env": environment, "capture_output": True, "encoding": "utf-8", "timeout": SECONDS}
                done = subprocess.run([*command, *options], **run)
                self.assertEqual(0, done.returncode, done.stderr)
                self.assertRegex(done.stdout, says)

    def test_over_tcp(self):
        self.start()
        relay = Relay(self.guest.agent)
        self.addCleanup(relay.close)
        found = self.abort(self.begin({**self.consistency(), "socket": relay.address}))
        self.assertEqual("agent", found["kind"])

    def test_over_tls(self):
        self.start()
        authority = Authority(self.rig.folder / "authority")
        server, client = authority.issue("server", "localhost"), authority.issue("client")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(server / "server-cert.pem", server / "server-key.pem")
        relay = Relay(self.guest.agent, tls)
        self.addCleanup(relay.close)
        address = relay.address.replace("tcp:127.0.0.1", "tls:localhost")
        found = self.abort(self.begin({**self.consistency(), "socket": f"{address}?x509={client}"}))
        self.assertEqual("agent", found["kind"])

    def test_writes_wait_for_the_instant_and_no_longer(self):
        id = self.reach(self.consistency(deadline=60000))
        probe = self.probe()
        probe.wait_stuck()
        self.gate.open()
        self.assertEqual("agent", self.abort(id)["kind"])
        probe.wait_through()

    def test_the_plugin_is_killed(self):
        self.reach(self.consistency(deadline=60000))
        guardian = guardian_of(self.wire.process.pid)
        probe = self.probe()
        probe.wait_stuck()
        # The whole group: the guardian is not of it.
        os.killpg(self.wire.process.pid, signal.SIGKILL)
        self.wire.wait()
        self.gate.drop()
        probe.wait_through()
        # It has nothing more to do. Whoever adopts it may let it lie.
        wait_for("ended", lambda: has_ended(guardian))

    def test_the_guardian_is_told_to_end(self):
        id = self.reach(self.consistency(deadline=60000))
        probe = self.probe()
        os.kill(guardian_of(self.wire.process.pid), signal.SIGTERM)
        probe.wait_through()
        self.gate.open()
        self.fails("consistency_lost", id)

    def test_the_guardian_is_killed(self):
        id = self.reach(self.consistency(deadline=60000))
        os.kill(guardian_of(self.wire.process.pid), signal.SIGKILL)
        probe = self.probe()
        probe.wait_stuck()
        self.gate.open()
        self.fails("consistency_lost", id)
        probe.wait_through()

    def test_the_deadline_passes(self):
        began = time.monotonic()
        id = self.reach(self.consistency(deadline=LATER))
        # The plugin waits for QEMU; the guest does not.
        self.probe().wait_through()
        self.assertGreater(time.monotonic() - began, LATER / 1000)
        self.gate.open()
        self.fails("consistency_lost", id)
        # The same, where the host takes what there is.
        self.gate.shut()
        id = self.begin(self.consistency("try", LATER))
        self.gate.reached.wait(SECONDS)
        self.probe().wait_through()
        self.gate.open()
        found = self.abort(id)
        self.assertEqual(("crash", "consistency_lost"), (found["kind"], found["reason"]))
        self.assertGreaterEqual(found["frozen_ms"], LATER)

    def test_cancelled(self):
        id = self.reach(self.consistency(deadline=60000))
        probe = self.probe()
        probe.wait_stuck()
        self.assertEqual({"found": True}, self.wire.call("cancel", {"id": id}))
        self.gate.open()
        probe.wait_through()
        self.fails("cancelled", id)

    def test_somebody_thaws_one_file_system(self):
        id = self.reach(self.consistency(deadline=60000))
        self.guest.run("sh fsfreeze --unfreeze /mnt/1")
        self.gate.open()
        self.assertIn("2 file systems were frozen, and 1 ", self.fails("consistency_lost", id)["message"])

    def test_frozen_already(self):
        self.start()
        with Agent(self.guest.agent) as agent:
            self.assertEqual(2, agent.call("guest-fsfreeze-freeze"))
        try:
            error = self.fails("agent_refused", self.begin(self.consistency()))
            self.assertIn("frozen already", error["message"])
            found = self.abort(self.begin(self.consistency("try")))
            self.assertEqual(("crash", "agent_refused"), (found["kind"], found["reason"]))
        finally:
            with Agent(self.guest.agent) as agent:
                # Nobody else has thawed them.
                self.assertEqual(2, agent.call("guest-fsfreeze-thaw"))

    def test_another_client_has_it(self):
        self.start()
        with Agent(self.guest.agent):
            self.fails("agent_unreachable", self.begin(self.consistency(deadline=DEADLINE)))
        self.assertEqual("agent", self.abort(self.begin(self.consistency()))["kind"])

    def test_it_hangs(self):
        self.start()
        self.guest.run(f"sh kill -STOP {self.agent}")
        try:
            self.fails("agent_unreachable", self.begin(self.consistency(deadline=DEADLINE)))
            found = self.abort(self.begin(self.consistency("try", DEADLINE)))
            self.assertEqual(("crash", "agent_unreachable"), (found["kind"], found["reason"]))
            self.assertNotIn("frozen_ms", found)
            id = self.begin(self.consistency(deadline=60000))
            wait_for("started", lambda: guardian_of(self.wire.process.pid, missing=True))
            self.wire.call("cancel", {"id": id})
            self.fails("cancelled", id)
        finally:
            self.guest.run(f"sh kill -CONT {self.agent}")

    def test_it_hangs_when_it_is_to_thaw(self):
        id = self.reach(self.consistency(deadline=LATER))
        guardian = guardian_of(self.wire.process.pid)
        self.guest.run(f"sh kill -STOP {self.agent}")
        try:
            probe = self.probe()
            self.gate.open()
            # It is told, and what is told is so.
            self.assertEqual("ask_operator", self.fails("guest_held", id)["data"]["action"])
            probe.wait_stuck()
        finally:
            self.guest.run(f"sh kill -CONT {self.agent}")
        # The guardian went on.
        probe.wait_through()
        wait_for("ended", lambda: has_ended(guardian))

    def test_what_is_no_consistency(self):
        self.start()
        for odd in (
            {"kind": "agent"},
            {"kind": "agent", "socket": "agent"},
            {"kind": "agent", "socket": "/a", "policy": "off"},
            {"kind": "agent", "socket": "/a", "deadline_ms": 99},
            {"kind": "agent", "socket": "/a", "deadline_ms": 60001},
            {"kind": "pause", "socket": "/a"},
            {"kind": "application"},
        ):
            self.fails("invalid_params", self.begin(odd))
        # The guest is not asked for what it can be asked for before.
        self.assertIsNone(self.abort_plain())

    def abort_plain(self):
        result = self.wire.call("backup.begin", {"monitor": self.rig.monitor})
        self.wire.call("backup.abort", {"backup": result["backup"]})
        return result.get("consistency")


class AgentsOfQemu7(Frozen):
    """One of the older QEMU, whose chardevs and monitors behave in their own way."""

    qemu = QEMU_7_2

    def test_frozen(self):
        self.start()
        self.assertEqual("agent", self.abort(self.begin(self.consistency()))["kind"])

    def test_the_plugin_is_killed(self):
        self.reach(self.consistency(deadline=60000))
        probe = self.probe()
        probe.wait_stuck()
        os.killpg(self.wire.process.pid, signal.SIGKILL)
        self.wire.wait()
        self.gate.drop()
        probe.wait_through()


class OtherAgents(support.Test):
    """Guests whose agent is not as it should be."""

    def setUp(self):
        self.rig = Rig(Guest([Disk()]), proxy=Gate)
        self.addCleanup(self.rig.close)
        self.guest = self.rig.machine

    def begin(self, plugin, policy, deadline=DEADLINE):
        consistency = {"kind": "agent", "socket": self.guest.agent, "policy": policy, "deadline_ms": deadline}
        params = {"monitor": self.rig.monitor, "consistency": consistency}
        if policy == "require":
            return params
        result = plugin.call("backup.begin", params, SECONDS)
        plugin.call("backup.abort", {"backup": result["backup"]}, SECONDS)
        return result["consistency"]

    def test_missing_then_there_then_refusing(self):
        with self.rig.plugin() as plugin:
            # Nothing runs in the guest.
            self.refused("agent_unreachable", plugin, "backup.begin", self.begin(plugin, "require"))
            self.assertEqual("agent_unreachable", self.begin(plugin, "try")["reason"])
            # Started later, it gets to hear what was said before: it must not freeze.
            pid = self.guest.start_agent()
            # No disk's file system is mounted.
            found = self.begin(plugin, "try", 60000)
            self.assertEqual(("agent", 0), (found["kind"], found["filesystems"]))
            # One that could freeze and not thaw.
            self.guest.run(f"sh kill {pid}; until [ -z $(ls /proc/{pid}/fd | head -n 1) ]; do :; done")
            self.guest.run("mkfs disk0")
            self.guest.run("mount disk0 /mnt/0")
            self.guest.start_agent("-b", "guest-fsfreeze-thaw")
            data = self.begin(plugin, "require", 60000)
            self.refused("agent_refused", plugin, "backup.begin", data)
            self.assertEqual("agent_refused", self.begin(plugin, "try", 60000)["reason"])
            self.guest.run("write /mnt/0/file 0 64K 1")
            # QEMU's socket is not where it should be.
            os.unlink(self.guest.agent)
            self.refused("agent_unreachable", plugin, "backup.begin", data)
            self.assertEqual([], ours(self.rig.qmp))


class Ext4(support.Test):
    limit = 120

    def check(self, image, *options):
        return subprocess.run(["e2fsck", "-f", *options, str(image)], capture_output=True, text=True)

    def needs_recovery(self, image):
        told = subprocess.run(["dumpe2fs", "-h", str(image)], capture_output=True, text=True, check=True)
        return "needs_recovery" in told.stdout

    def test_clean_with_freeze_and_recovers_without(self):
        with Rig(Guest([Disk(iothread=True)])) as rig, rig.plugin() as plugin:
            guest = rig.machine
            guest.run("mkfs disk0")
            guest.run("mount disk0 /mnt/0")
            guest.start_agent()
            guest.run("write /mnt/0/file 0 8M 1")
            guest.run("start w /mnt/0/file pause_ms=2 to=8M")
            for kind in ("agent", "crash"):
                guest.run("sh for n in $(seq 50); do echo $n >/mnt/0/$n.new; mv /mnt/0/$n.new /mnt/0/$n; done")
                consistency = {"kind": kind, **({"socket": guest.agent} if kind == "agent" else {})}
                backup = Backup(plugin, rig.monitor, consistency=consistency)
                self.assertEqual(kind, backup.reply.get("consistency", {"kind": "crash"})["kind"])
                backup.read_all(rig)
                rig.compare(self, backup, {"dev0": "disk0"})
                backup.abort()
                image = rig.image("dev0")
                self.assertEqual(kind == "crash", self.needs_recovery(image))
                if kind == "crash":
                    self.assertEqual(0, self.check(image, "-y").returncode & ~1)
                clean = self.check(image, "-n")
                self.assertEqual(0, clean.returncode, clean.stdout)
                image.unlink()
            guest.run("stop w")


class Group(support.Test):
    def test_all_are_held_together_or_none_is(self):
        rigs = []
        for _ in range(2):
            rig = Rig(Guest([Disk()]), proxy=Gate)
            self.addCleanup(rig.close)
            rig.machine.run("mkfs disk0")
            rig.machine.run("mount disk0 /mnt/0")
            rigs.append(rig)
        first, second = rigs
        first.machine.start_agent()

        def member(rig):
            consistency = {"kind": "agent", "socket": rig.machine.agent, "deadline_ms": DEADLINE}
            return {"monitor": rig.monitor, "consistency": consistency}

        members = {"members": [member(rig) for rig in rigs]}
        with first.plugin() as plugin:
            # The second has no agent.
            self.refused("agent_unreachable", plugin, "backup.begin_group", members)
            first.machine.run("write /mnt/0/file 0 64K 1")
            second.machine.start_agent()
            for rig in rigs:
                self.assertEqual([], ours(rig.qmp))
                rig.proxy.shut()
            for each in members["members"]:
                each["consistency"]["deadline_ms"] = 60000
            future = plugin.start("backup.begin_group", members)
            for rig in rigs:
                self.assertTrue(rig.proxy.reached.wait(SECONDS))
            # One is through: its guest waits for the other's instant.
            first.proxy.open()
            probe = Probe(first.machine, 1)
            probe.wait_stuck()
            second.proxy.open()
            kinds = [backup["consistency"]["kind"] for backup in future.result(SECONDS)["backups"]]
            self.assertEqual(["agent", "agent"], kinds)
            probe.wait_through()


class Guardians(support.Test):
    def test_is_nothing_to_be_run_by_hand(self):
        done = subprocess.run([PLUGIN, "guardian"], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
        self.assertNotEqual(0, done.returncode)
        for arguments in (["--help"], ["man"]):
            told = subprocess.run([PLUGIN, *arguments], capture_output=True, text=True, check=True)
            self.assertNotIn("guardian", told.stdout)

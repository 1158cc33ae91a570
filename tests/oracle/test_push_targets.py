"""NBD servers as push targets: what is written to them, and which are refused, with their codes."""

import os
import socket
import struct
import threading
import time

from . import support
from .guest import MIB
from .life import BASE, SIZE
from .pushes import CHANGED, SOON, TIMEOUT, Pushes
from .targets import Authority, until

CLUSTER = 65536


def clusters(ranges):
    """The numbers of the clusters that these offsets and lengths touch."""
    return {at for offset, length in ranges for at in range(offset // CLUSTER, -(-(offset + length) // CLUSTER))}


IHAVEOPT, STARTTLS = 0x49484156454F5054, 5
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
AGREED = struct.pack(">QIII", 0x3E889045565A9, STARTTLS, 1, 0)


def agree_to_tls(client, before=lambda: None, after=lambda: None):
    """All that a server says before the handshake, which has begun then.

    `before` and `after` are called around the last of it.
    """
    client.sendall(GREETING)
    # Its flags, then the option STARTTLS without data.
    client.recv(4 + 16, socket.MSG_WAITALL)
    before()
    client.sendall(AGREED)
    after()
    client.recv(1, socket.MSG_PEEK)


def carry(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)


# Never written by anybody.
HOLE = clusters([(14 * MIB, MIB)])


class Servers(Pushes):
    # --- that do not come up ----------------------------------------------------------

    def test_nobody_listens(self):
        stale = self.places.folder / "stale"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(stale))
        deaf = socket.socket()  # It does not listen.
        self.addCleanup(deaf.close)
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        for address in (f"unix:{stale}", f"unix:{stale}-not", f"tcp:127.0.0.1:{port}", "tcp:nobody.invalid:10809"):
            with self.subTest(address), self.doomed() as backup:
                self.fails("target_unreachable", backup, {"kind": "nbd", "address": address}, timeout_ms=TIMEOUT)

    def unanswered(self, code, target, still=1):
        """`still` is how long QEMU may stand still, in seconds."""
        with self.doomed() as backup:
            began = time.monotonic()
            future = self.push(backup, target, timeout_ms=TIMEOUT)
            self.monitor_answers_until(future, still)
            self.failed(code, future)
            self.assertLess(time.monotonic() - began, TIMEOUT / 1000 + SOON)
            self.answers()

    def test_no_greeting(self):
        self.unanswered("target_unreachable", self.listener())
        server = self.nbdkit()
        server.suspend()
        self.unanswered("target_unreachable", server.target())

    def test_half_a_greeting(self):
        def greet(client):
            client.sendall(b"NBDMAGIC")

        self.unanswered("target_unreachable", self.listener(greet))

    def test_no_answer_to_an_option(self):
        def greet(client):
            client.sendall(GREETING)

        self.unanswered("target_unreachable", self.listener(greet))

    def test_no_answer_to_a_tls_handshake(self):
        tls = {"kind": "x509", "dir": str(Authority(self.places.folder / "ours").issue("client"))}
        self.unanswered("target_timeout", {**self.listener(agree_to_tls), "tls": tls}, still=3)

    def test_another_greeting(self):
        def hang_up(client):
            client.close()

        def another(client):
            client.sendall(b"SSH-2.0-another\r\n" * 100)
            client.close()

        self.unanswered("target_unreachable", self.listener(hang_up))
        self.unanswered("target_refused", self.listener(another))

    def test_slow_to_open(self):
        """The server opens its disk when the client has named it; QEMU does not stand still."""
        server = self.nbdkit("delay-open=3", filters=["delay"])
        with self.backed_up() as backup:
            future = self.push(backup, server.target())
            self.monitor_answers_until(future)
            future.result()
            self.equal(server.image)

    # --- that do not fit --------------------------------------------------------------

    def test_another_size(self):
        for size in (SIZE + MIB, SIZE + 512, SIZE - 512, SIZE - MIB, 0):
            server = self.nbdkit(image=self.raw(f"target{size}", size=size))
            with self.subTest(size), self.doomed() as backup:
                self.fails("target_mismatch", backup, server.target())
                self.assertEqual([], server.changes())

    def test_its_connection_goes_with_the_push(self):
        """Also where the server takes its time to hang up."""
        server = self.nbdkit("delay-close=60", image=self.raw(size=SIZE + MIB), filters=["delay"])
        with self.doomed() as backup:
            descriptors = f"/proc/{backup.plugin._process.pid}/fd"
            before = len(os.listdir(descriptors))
            self.fails("target_mismatch", backup, server.target())
            until(lambda: len(os.listdir(descriptors)) == before, SOON)

    def test_a_read_only_export(self):
        server = self.nbdkit(options=["-r"])
        with self.doomed() as backup:
            self.fails("target_mismatch", backup, server.target())

    def test_names_of_exports(self):
        image = self.raw()
        server = self.server("qemu-nbd", "-t", "-x", "disks/a b", "-f", "raw", image)
        for export in (None, "", "another"):
            with self.subTest(export), self.doomed() as backup:
                self.fails("target_refused", backup, server.target(export=export))
        with self.backed_up() as backup:
            self.pushed(backup, server.target(export="disks/a b"))
            self.equal(image)

    def test_block_sizes(self):
        policy = ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=131072"]
        server = self.nbdkit(*policy, "blocksize-error-policy=error", filters=["blocksize-policy"])
        with self.backed_up() as backup:
            self.pushed(backup, server.target())
            self.equal(server.image)

    def test_servers_that_can_little(self):
        ways = [{"filters": [name]} for name in ("nozero", "noextents", "noparallel")] + [{"options": ["--no-sr"]}]
        for number, way in enumerate(ways):
            server = self.nbdkit(image=self.raw(f"target{number}", fill=0xAA), **way)
            with self.subTest(**way), self.opened() as backup:
                self.pushed(backup, server.target())
                self.equal(server.image)

    # --- what is written --------------------------------------------------------------

    def test_only_what_changed_is_written(self):
        server = self.nbdkit(image=self.raw(like=self.base_image))
        with self.backed_up(BASE) as backup:
            reply = self.pushed(backup, server.target())
            self.assertEqual("incremental", reply["mode"])
            changes = [(each.offset, each.count) for each in server.changes()]
            self.assertEqual(clusters(CHANGED), clusters(changes))
            self.assertEqual(sum(length for _, length in CHANGED), sum(length for _, length in changes))
            self.assertTrue(all(offset % CLUSTER == length % CLUSTER == 0 for offset, length in changes), changes)
            self.assertEqual(0, reply["copied_bytes"] % CLUSTER)
            self.assertLessEqual(reply["copied_bytes"], backup.disks["dev-a"]["changed_bytes"])
            self.assertTrue(server.flushed())
            self.equal(server.image)

    def test_zeros(self):
        """They overwrite what was there; a target that is known to be zero is spared them."""
        for is_zero in (False, True, None):
            server = self.nbdkit(image=self.raw(f"target{is_zero}", fill=None if is_zero else 0xAA))
            with self.subTest(is_zero=is_zero), self.opened() as backup:
                self.pushed(backup, server.target(is_zero=is_zero))
                self.equal(server.image)
                changed = clusters((each.offset, each.count) for each in server.changes())
                self.assertEqual(set() if is_zero else HOLE, changed & HOLE)

    def test_workers(self):
        for workers in (1, 3, None):
            server = self.slow(delay="30ms", image=self.raw(f"target{workers}"))
            with self.subTest(workers), self.opened() as backup:
                self.pushed(backup, server.target(), workers=workers)
                self.assertLessEqual(server.most_at_once(), workers or 8)
                self.assertGreater(server.most_at_once(), 0 if workers == 1 else 1)
                self.equal(server.image)

    def test_speed(self):
        speed, data = 4 * MIB, 14 * MIB
        with self.backed_up() as backup:
            server = self.nbdkit()
            began = time.monotonic()
            self.pushed(backup, server.target(), speed=speed)
            ratio = (time.monotonic() - began) / (data / speed)
            self.assertGreater(ratio, 0.5)
            self.assertLess(ratio, 3)
            self.equal(server.image)


class Encrypted(Pushes):
    """TLS is QEMU's; what it refuses is told as such."""

    def wanted(self, server, good, bad):
        """Only a push with one of the `good` credentials comes through."""
        for tls in [None, *bad]:
            with self.subTest(tls=tls), self.doomed() as backup:
                self.fails("target_refused", backup, server.target(tls=tls))
        for tls in good:
            with self.subTest(tls=tls), self.opened() as backup:
                self.pushed(backup, server.target(tls=tls))
                self.equal(server.image)

    def x509(self, folder, **more):
        return {"kind": "x509", "dir": str(folder), **more}

    def test_certificates(self):
        ours, others = (Authority(self.places.folder / name) for name in ("ours", "others"))
        client, named, stranger = ours.issue("client"), ours.issue("client", "me"), others.issue("client", "me")
        options = ["--tls=require", f"--tls-certificates={ours.issue('server', 'localhost')}"]
        bad = [self.x509(stranger), self.x509(self.targets), self.x509(f"{self.targets}/not")]
        bad += [{"kind": "psk", "dir": self.keys("qemu")}]
        with self.subTest("tcp"):
            server = self.nbdkit(tcp=True, options=options)
            self.wanted(server, [self.x509(client)], [*bad, self.x509(client, hostname="another")])
        with self.subTest("unix"):
            server = self.nbdkit(options=options)
            self.wanted(server, [self.x509(client, hostname="localhost")], bad)
        with self.subTest("clients are verified"):
            server = self.nbdkit(tcp=True, options=[*options, "--tls-verify-peer"])
            self.wanted(server, [self.x509(named)], [self.x509(client), self.x509(stranger)])

    def test_shared_keys(self):
        options = ["--tls=require", f"--tls-psk={self.keys('qemu')}/keys.psk"]
        server = self.nbdkit(tcp=True, options=options)
        bad = [{"kind": "psk", "dir": self.keys("qemu", b"\2")}, {"kind": "psk", "dir": f"{self.targets}/not"}]
        bad += [{"kind": "psk", "dir": self.keys("me"), "username": "me"}]
        self.wanted(server, [{"kind": "psk", "dir": self.keys("qemu")}], bad)
        server.close()
        options = ["--tls=require", f"--tls-psk={self.keys('me')}/keys.psk"]
        self.wanted(self.nbdkit(options=options), [{"kind": "psk", "dir": self.keys("me"), "username": "me"}], [])

    def test_hung(self):
        server = self.slow(tcp=True, options=["--tls=require", f"--tls-psk={self.keys('qemu')}/keys.psk"])
        with self.doomed() as backup:
            future = self.start(backup, server, tls={"kind": "psk", "dir": self.keys("qemu")})
            server.suspend()
            self.failed("target_timeout", future)
            self.answers()

    def test_a_server_without_tls(self):
        server = self.nbdkit(options=["--tls=off"], tcp=True)
        authority = Authority(self.places.folder / "ours")
        for tls in (self.x509(authority.issue("client")), {"kind": "psk", "dir": self.keys("qemu")}):
            with self.subTest(tls=tls), self.doomed() as backup:
                self.fails("target_refused", backup, server.target(tls=tls))
                self.assertEqual([], server.changes())


class InTurn(Pushes):
    formats = {"a": "qcow2", "b": "raw"}

    def both(self, tls, server):
        """Pushes to a server that hangs in the TLS handshake, and to one that takes a while for it.

        Which of the two QEMU took up first.
        """
        upstream = socket.socket(socket.AF_UNIX)
        self.addCleanup(upstream.close)
        upstream.connect(server.address.removeprefix("unix:"))
        ready, agreed, order = threading.Event(), threading.Event(), []

        def hang(client):
            agree_to_tls(client, ready.wait, agreed.set)
            order.append("hung")

        def slow(client):
            upstream.recv(len(GREETING), socket.MSG_WAITALL)
            # At the same time, nearly: the other is to be the first.
            agree_to_tls(client, lambda: ready.set() or agreed.wait())
            order.append("slow")
            upstream.sendall(struct.pack(">IQII", 3, IHAVEOPT, STARTTLS, 0))
            upstream.recv(len(AGREED), socket.MSG_WAITALL)
            time.sleep(0.4)
            threading.Thread(target=carry, args=(upstream, client), daemon=True).start()
            carry(client, upstream)

        with self.opened() as backup:
            hung = self.push(backup, {**self.listener(hang), "tls": tls})
            good = self.push(backup, {**self.listener(slow), "tls": tls}, disk="dev-b", timeout_ms=10000)
            self.failed("target_timeout", hung)
            good.result(support.SECONDS)
            self.equal(server.image, node="b")
        return order[0]

    def test_the_time_of_another_is_not_the_servers(self):
        """QEMU takes up one server after the other: one that hangs costs the next its place, not its time."""
        tls = {"kind": "psk", "dir": self.keys("qemu")}
        server = self.nbdkit(options=["--tls=require", f"--tls-psk={tls['dir']}/keys.psk"])
        # Which is first is chance still.
        self.assertIn("hung", (self.both(tls, server) for _ in range(16)))

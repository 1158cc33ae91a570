"""NBD servers as push targets: what is written to them, and which are refused, with their codes."""

import socket
import struct
import threading
import time

from .guest import MIB
from .life import BASE, SIZE
from .pushes import CHANGED, SOON, TIMEOUT, Pushes
from .targets import Authority

CLUSTER = 65536


def clusters(ranges):
    """The numbers of the clusters that these offsets and lengths touch."""
    return {at for offset, length in ranges for at in range(offset // CLUSTER, -(-(offset + length) // CLUSTER))}


# Never written by anybody.
HOLE = clusters([(14 * MIB, MIB)])


class Servers(Pushes):
    # --- that do not come up ----------------------------------------------------------

    def test_nobody_listens(self):
        stale = self.places.folder / "stale"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(stale))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for address in (f"unix:{stale}", f"unix:{stale}-not", f"tcp:127.0.0.1:{port}", "tcp:nobody.invalid:10809"):
            with self.subTest(address), self.doomed() as backup:
                self.fails("target_unreachable", backup, {"kind": "nbd", "address": address}, timeout_ms=TIMEOUT)

    def listener(self, greet=None):
        """Listens, accepts, and says what `greet` says; without it, nothing."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def serve():
            try:
                while True:
                    client, _ = listener.accept()
                    greet(client)
            except OSError:
                pass  # The test is over.

        if greet:
            threading.Thread(target=serve, daemon=True).start()
            self.addCleanup(listener.shutdown, socket.SHUT_RDWR)
        return {"kind": "nbd", "address": f"tcp:127.0.0.1:{listener.getsockname()[1]}"}

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
        kept = []

        def greet(client):
            client.sendall(b"NBDMAGIC")
            kept.append(client)

        self.unanswered(("target_unreachable", "target_timeout"), self.listener(greet))

    def test_no_answer_to_an_option(self):
        kept = []

        def greet(client):
            client.sendall(b"NBDMAGICIHAVEOPT\x00\x03")
            kept.append(client)

        self.unanswered(("target_unreachable", "target_timeout"), self.listener(greet))

    def test_no_answer_to_a_tls_handshake(self):
        kept = []

        def greet(client):
            client.sendall(b"NBDMAGICIHAVEOPT\x00\x03")
            # Its flags, then the option STARTTLS without data: accepted.
            client.recv(4 + 16, socket.MSG_WAITALL)
            client.sendall(struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0))
            kept.append(client)

        tls = {"kind": "x509", "dir": str(Authority(self.places.folder / "ours").issue("client"))}
        codes = ("target_unreachable", "target_timeout", "target_refused")
        self.unanswered(codes, {**self.listener(greet), "tls": tls}, still=3)

    def test_another_greeting(self):
        def hang_up(client):
            client.close()

        def another(client):
            client.sendall(b"SSH-2.0-another\r\n" * 100)
            client.close()

        self.unanswered("target_unreachable", self.listener(hang_up))
        self.unanswered(("target_unreachable", "target_refused"), self.listener(another))

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

    def keys(self, user, key=b"\1"):
        folder = self.places.folder / f"keys-{user}-{key[0]}"
        if not folder.exists():
            folder.mkdir()
            (folder / "keys.psk").write_text(f"{user}:{key.hex() * 32}\n")
        return str(folder)

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

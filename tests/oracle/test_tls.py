"""A monitor over TCP with TLS: by certificates, and by a key that both know."""

import socket
import subprocess

from . import support
from .life import Life
from .support import QEMU_7_2, Backup
from .targets import Authority


class Tls(Life):
    formats = {"a": "qcow2"}

    def monitor(self, credentials):
        """Boots with one more monitor; returns the start of its address."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = f"host=127.0.0.1,port={port}"
        self.boot(
            *("-object", f"{credentials},id=tls,endpoint=server"),
            *("-chardev", f"socket,id=tls,{address},server=on,wait=off,tls-creds=tls"),
            *("-mon", "chardev=tls,mode=control"),
        )
        return f"tls:localhost:{port}?"

    def works(self, monitor):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, monitor, checkpoint="monday")
            backup.read_all(self.rig)
            backup.commit()
        compare = ["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", self.image("a"), self.rig.image("dev-a")]
        subprocess.run(compare, check=True, stdout=subprocess.DEVNULL)

    def fails(self, monitor, why, code="monitor_unreachable"):
        with self.rig.plugin() as plugin, self.assertRaises(support.PluginError) as caught:
            Backup(plugin, monitor)
        self.assertEqual(code, caught.exception.code)
        self.assertIn(why, str(caught.exception))

    def test_certificates(self):
        ours, others = (Authority(self.places.folder / name) for name in ("ours", "others"))
        client = ours.issue("client", "me")
        monitor = self.monitor(f"tls-creds-x509,dir={ours.issue('server', 'another')},verify-peer=on")
        self.fails(f"{monitor}x509={client}", "mismatch")
        monitor = self.monitor(f"tls-creds-x509,dir={ours.issue('server', 'localhost')},verify-peer=on")
        self.fails(f"{monitor}x509={others.issue('client', 'me')}", "certificate")
        # QEMU says so when we think that all is well.
        self.fails(f"{monitor}x509={ours.issue('client')}", "", "monitor_closed")
        self.fails(f"{monitor}x509={self.places.folder}/none", "ca-cert.pem")
        self.fails(f"{monitor}psk=me:{self.keys('me', '01')}", "")
        (client / "ca-crl.pem").touch()
        self.fails(f"{monitor}x509={client}", "revocation")
        (client / "ca-crl.pem").unlink()
        self.works(f"{monitor}x509={client}")

    def keys(self, user, key):
        folder = self.places.folder / f"keys-{user}-{key}"
        folder.mkdir()
        (folder / "keys.psk").write_text(f"someone:{'ff' * 32}\n{user}:{key * 32}\n")
        return folder

    def test_a_key(self):
        keys = self.keys("me", "01")
        monitor = self.monitor(f"tls-creds-psk,dir={keys}")
        self.fails(f"{monitor}psk=me:{self.keys('me', '02')}", "")
        self.fails(f"{monitor}psk=nobody:{keys}", "no key of this user")
        self.fails(f"{monitor}x509={Authority(self.places.folder / 'ours').issue('client', 'me')}", "")
        self.works(f"{monitor}psk=me:{keys}")

    def test_a_monitor_without_it(self):
        """Nothing that is not encrypted is believed."""
        self.boot()
        relay = support.Relay(self.rig.monitor.removeprefix("unix:"))
        self.addCleanup(relay.close)
        keys = self.keys("me", "01")
        self.fails(f"{relay.address.replace('tcp:', 'tls:')}?psk=me:{keys}", "")


class TlsIn72(Tls):
    """It reads one byte of what comes, and waits for more."""

    qemu = QEMU_7_2
    test_certificates = test_a_monitor_without_it = None

    def test_a_key(self):
        keys = self.keys("me", "01")
        monitor = self.monitor(f"tls-creds-psk,dir={keys}")
        self.fails(f"{monitor}psk=me:{keys}", "TLS", "qemu_unsupported")

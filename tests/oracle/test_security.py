"""What SECURITY.md promises: what others on the machine, hostile images, and links can not do."""

import base64
import hashlib
import io as memory
import os
import pathlib
import socket
import stat
import struct
import subprocess

from . import support
from .guest import MIB
from .life import BASE, SIZE
from .pushes import Pushes
from .support import Backup, Plugin, Relay, io, make_image, read_stream
from .targets import Authority, until

NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


def descendants():
    """The processes that this test has started, and theirs: the plugin, QEMU, servers."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                behind = (entry / "stat").read_text().rsplit(")", 1)[1]
            except OSError:
                continue  # It has ended meanwhile.
            parents[int(entry.name)] = int(behind.split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def descriptors(pid):
    """What a process has open: (the link's text, its stat)."""
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(link), os.stat(link)
        except OSError:
            pass  # It was closed meanwhile.


class Others(Pushes):
    """Others on the machine; all is run without a umask, in folders that anybody may enter."""

    limit = 240

    def setUp(self):
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        super().setUp()
        for folder in (self.places.folder, self.rig.folder):
            os.chmod(folder, 0o777)

    def monitors(self):
        """Where QEMU is handed descriptors, and where it is told paths."""
        yield self.rig.monitor
        relay = Relay(self.rig.monitor.removeprefix("unix:"))
        self.addCleanup(relay.close)
        yield relay.address

    def refused_to_nobody(self):
        """Another user of this machine can neither enter our directories nor connect to what is in them."""
        entries = sorted(self.rig.runtime.rglob("*"))
        for entry in entries:
            found = entry.lstat()
            self.assertEqual(os.geteuid(), found.st_uid, entry)
            if stat.S_ISSOCK(found.st_mode):
                self.assertEqual(stat.S_IFSOCK | 0o600, found.st_mode, entry)
                command = ["/usr/bin/python3", "-c", CONNECT, str(entry)]
            else:
                self.assertEqual(stat.S_IFDIR | 0o700, found.st_mode, entry)
                command = ["ls", str(entry)]
            tried = subprocess.run([*NOBODY, *command], capture_output=True, text=True)
            self.assertNotEqual(0, tried.returncode, entry)
            self.assertIn("Permission", tried.stderr, entry)
        return [entry for entry in entries if entry.is_socket()]

    def test_nobody_else_reaches_a_socket(self):
        for monitor in self.monitors():
            with self.subTest(monitor), self.rig.plugin() as plugin:
                backup = Backup(plugin, monitor)
                address = backup.call("export", disk="dev-a")["address"].removeprefix("unix:")
                sockets = self.refused_to_nobody()
                self.assertEqual(2, len(sockets), "QEMU's, and the one for the host's readers")
                self.assertIn(pathlib.Path(address), sockets)
                # It is there.
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(address)
                backup.abort()
            self.assertEqual([], self.rig.files())

    def test_nobody_else_reaches_what_a_push_listens_on(self):
        for monitor in self.monitors():
            with self.subTest(monitor), self.rig.plugin() as plugin:
                backup = Backup(plugin, monitor)
                # Written so slowly that it is seen.
                future = self.push(backup, {"kind": "records"}, speed=MIB)
                until(lambda: future.done() or self.push_jobs())
                self.assertNotEqual([], self.refused_to_nobody())
                backup.abort()
            self.assertEqual([], self.rig.files())

    def test_no_socket_is_abstract(self):
        """Anybody could connect to one: it has no permissions."""
        for monitor in self.monitors():
            with self.subTest(monitor), self.rig.plugin() as plugin:
                backup = Backup(plugin, monitor)
                backup.call("export", disk="dev-a")
                rows = [row.split() for row in pathlib.Path("/proc/net/unix").read_text().splitlines()[1:]]
                abstract = {f"socket:[{row[6]}]" for row in rows if len(row) > 7 and row[7].startswith("@")}
                ours = {text for pid in descendants() for text, _ in descriptors(pid) if text.startswith("socket:")}
                self.assertGreater(len(ours), 4)
                self.assertEqual(set(), abstract & ours)
                backup.abort()

    def test_scratch_has_no_name_and_is_ours_alone(self):
        for monitor in self.monitors():
            with self.subTest(monitor), self.rig.plugin() as plugin:
                backup = Backup(plugin, monitor)
                self.assertEqual([], os.listdir(self.rig.scratch))
                seen = [found for pid in descendants() for text, found in descriptors(pid) if self.is_scratch(text)]
                # The plugin has it open, and QEMU.
                self.assertGreaterEqual(len(seen), 2)
                for found in seen:
                    self.assertEqual((stat.S_IFREG | 0o600, 0), (found.st_mode, found.st_nlink))
                backup.abort()

    def is_scratch(self, text):
        return text.startswith(str(self.rig.scratch)) and text.endswith(" (deleted)")

    def test_images_are_ours_alone_from_the_first_byte(self):
        path = self.targets / "new"
        for monitor in self.monitors():
            for format in ("raw", "qcow2"):
                with self.subTest(monitor=monitor, format=format), self.rig.plugin() as plugin:
                    backup = Backup(plugin, monitor)
                    target = {"kind": "file", "path": str(path), "format": format}
                    future = self.push(backup, target, speed=MIB)
                    until(lambda: self.listing() or future.done())
                    (partial,) = self.targets.iterdir()
                    self.assertRegex(partial.name, r"^\.qf-[a-z0-9]+\.partial$")
                    self.assertEqual(stat.S_IFREG | 0o600, partial.lstat().st_mode)
                    self.hurry()
                    future.result(support.SECONDS)
                    self.assertEqual(stat.S_IFREG | 0o600, path.lstat().st_mode)
                    backup.abort()
                    path.unlink()
        with self.rig.plugin() as plugin:
            begin = {"target": str(path), "format": "raw", "size": SIZE}
            restore = plugin.call("restore.begin", begin, support.SECONDS)["restore"]
            (partial,) = self.targets.iterdir()
            self.assertEqual(stat.S_IFREG | 0o600, partial.lstat().st_mode)
            # Nobody else finds a way to the storage daemon.
            self.assertEqual([], self.rig.files())
            plugin.call("restore.abort", {"restore": restore}, support.SECONDS)
        self.assertEqual([], self.listing())


class Links(Pushes):
    """Links in what the host names are followed, as it means; one in the place of a new file is not."""

    def test_directories_may_be_links(self):
        run, scratch, targets = (self.places.folder / f"link-{name}" for name in ("run", "scratch", "targets"))
        run.symlink_to(self.rig.runtime)
        scratch.symlink_to(self.rig.scratch)
        targets.symlink_to(self.targets)
        command = [support.PLUGIN, "--runtime-dir", str(run), "--scratch-dir", str(scratch)]
        with Plugin(command) as plugin:
            backup = Backup(plugin, self.rig.monitor)
            self.assertNotEqual([], os.listdir(self.rig.runtime))
            target = {"kind": "file", "path": str(targets / "new"), "format": "raw"}
            self.pushed(backup, target)
            self.equal(self.targets / "new")
            backup.abort()
        self.assertEqual([], self.rig.files())

    def planted(self, future, path, victim):
        """A link to a victim comes up in the place of a new file while that is being written."""
        until(lambda: self.listing() or future.done())
        path.symlink_to(victim)
        self.hurry()
        error = future.exception(support.SECONDS)
        self.assertEqual("target_exists", error.code, error)
        self.assertEqual("precious", victim.read_text())
        self.assertTrue(path.is_symlink())
        path.unlink()
        self.assertEqual([], self.listing())

    def test_a_link_in_the_place_of_a_new_file(self):
        victim, path = self.places.folder / "victim", self.targets / "new"
        victim.write_text("precious")
        for format in ("raw", "qcow2"):
            with self.subTest(format), self.opened() as backup:
                target = {"kind": "file", "path": str(path), "format": format}
                self.planted(self.push(backup, target, speed=MIB), path, victim)
        keep = self.places.folder / "stream"
        with self.opened() as backup:
            backup.read("dev-a", self.rig.image("dev-a"), keep=keep)
        for there in (victim, self.places.folder / "nothing"):
            with self.subTest(there), self.rig.plugin() as plugin:
                begin = {"target": str(path), "format": "raw", "size": SIZE}
                path.symlink_to(there)
                self.refused("target_exists", plugin, "restore.begin", begin)
                path.unlink()
                restore = plugin.call("restore.begin", begin, support.SECONDS)["restore"]
                self.feed(plugin, restore, keep.read_bytes())
                path.symlink_to(there)
                self.refused("target_exists", plugin, "restore.finish", {"restore": restore})
                path.unlink()
                self.assertEqual([], self.listing())
        self.assertEqual("precious", victim.read_text())
        self.assertFalse((self.places.folder / "nothing").exists())

    @staticmethod
    def feed(plugin, restore, stream):
        for record, payload in read_stream(memory.BytesIO(stream)):
            params = {"restore": restore, "record": record}
            plugin.start("restore.write", params, payload).result(support.SECONDS)

    def test_names_in_a_stream_name_no_files(self):
        """A stream of disk `../../x`: it is restored where the host says, and nothing is made elsewhere."""
        disk, checkpoint, zeros = "../../disk", "/../../checkpoint", struct.pack(">cQQI", b"z", 0, 8, 0)
        digest = hashlib.sha256(f"qemu-fleece stream 1\n{disk}\n8\nfull\n\n{checkpoint}\n".encode() + zeros)
        sums = {"records": 1, "data_bytes": 0, "zero_bytes": 8, "same_bytes": 0, "digest": digest.hexdigest()}
        begin = {"disk": disk, "checkpoint": checkpoint, "size": 8, "mode": "full", "granularity": 65536}
        records = [{"kind": "begin", "format": 1, **begin}]
        records += [{"kind": "zero", "offset": 0, "length": 8}, {"kind": "end", **sums}]
        everything = self.everything()
        with self.rig.plugin() as plugin:
            path = self.targets / "restored"
            begin = {"target": str(path), "format": "raw", "size": 8}
            restore = plugin.call("restore.begin", begin, support.SECONDS)["restore"]
            for record in records:
                plugin.call("restore.write", {"restore": restore, "record": record}, support.SECONDS)
            plugin.call("restore.finish", {"restore": restore}, support.SECONDS)
            self.assertEqual(bytes(8), path.read_bytes())
        self.assertEqual(everything | {path}, self.everything())

    def everything(self):
        folders = (self.places.folder, self.rig.folder)
        return {path for folder in folders for path in folder.rglob("*")}


class Hostile(Pushes):
    """Images whose headers were written by somebody who wants another file to be read or written."""

    formats = {"a": "qcow2", "b": "raw"}

    def setUp(self):
        super().setUp()
        self.victim = self.places.folder / "victim"
        self.victim.write_bytes(b"precious" * (SIZE // 8))
        self.fifo = self.places.folder / "fifo"
        os.mkfifo(self.fifo)

    def hostile(self, name, *options):
        path = self.targets / name
        make_image(path, "qcow2", SIZE, "-u", *options)
        return path

    def with_data_file(self, data, name="evil", raw="off"):
        """An image that keeps its data in a file, which qemu-img would empty."""
        empty = self.targets / "a-file-that-qemu-img-has-made"
        path = self.hostile(name, "-o", f"data_file={empty},data_file_raw={raw}")
        empty.unlink()
        # Padded by slashes, which mean nothing: a header's texts have their lengths.
        old, new = str(empty).encode(), str(data).encode()
        header = path.read_bytes()
        self.assertIn(old, header)
        path.write_bytes(header.replace(old, new.rjust(len(old), b"/")))
        return path

    def existing(self, path, format="qcow2"):
        return {"kind": "existing", "path": str(path), "format": format}

    def unharmed_victim(self):
        self.assertEqual(b"precious" * (SIZE // 8), self.victim.read_bytes())

    def test_a_target_that_keeps_its_data_elsewhere(self):
        """It is refused before QEMU sees it: QEMU would open the other file, and wait for a FIFO."""
        relay = Relay(self.rig.monitor.removeprefix("unix:"))
        self.addCleanup(relay.close)
        for monitor in (self.rig.monitor, relay.address):
            for data in (self.victim, self.fifo):
                for raw in ("off", "on"):
                    with self.subTest(monitor=monitor, data=data, raw=raw), self.rig.plugin() as plugin:
                        image = self.with_data_file(data, raw=raw)
                        before = image.read_bytes()
                        backup = Backup(plugin, monitor)
                        future = self.push(backup, self.existing(image))
                        self.monitor_answers_until(future, support.SECONDS / 2)
                        self.failed("target_mismatch", future)
                        self.assertEqual(before, image.read_bytes())
                        backup.abort()
                        self.unharmed_victim()
                        image.unlink()

    def test_a_header_that_changes_once_it_was_looked_at(self):
        """QEMU opens the other file then, and nothing is written to it."""
        image = self.with_data_file(self.victim)
        header = bytearray(image.read_bytes())
        self.assertEqual(4, header[79] & 4)

        def rewrite(features):
            header[79] = header[79] & ~4 | features
            with open(image, "r+b") as file:
                file.write(header[:80])

        rewrite(0)
        with self.opened() as backup:
            opened = []

            def look(name):
                if name == "add-fd":
                    rewrite(4)
                if name == "query-named-block-nodes":
                    nodes = self.rig.qmp.command("query-named-block-nodes", {"flat": True})
                    opened.extend(node for node in nodes if node["file"].endswith(str(self.victim)))

            self.rig.proxy.on_command = look
            self.fails("target_mismatch", backup, self.existing(image))
            self.rig.proxy.on_command = lambda name: None
            self.assertNotEqual([], opened, "QEMU has not seen the change")
        self.unharmed_victim()

    def test_the_image_below_a_target_is_never_opened(self):
        """Neither that of an existing one, nor that of a new one: QEMU would wait for a FIFO."""
        with self.opened() as backup:
            image = self.hostile("evil", "-b", str(self.fifo), "-F", "raw")
            future = self.push(backup, self.existing(image))
            self.monitor_answers_until(future, support.SECONDS / 2)
            future.result(support.SECONDS)
            subprocess.run(["qemu-img", "rebase", "-u", "-b", "", str(image)], check=True)
            self.equal(image, "qcow2")
        with self.opened(BASE) as backup:
            below = {"path": str(self.fifo), "format": "raw"}
            target = {"kind": "file", "path": str(self.targets / "new"), "format": "qcow2", "backing": below}
            future = self.push(backup, target)
            self.monitor_answers_until(future, support.SECONDS / 2)
            self.assertEqual("incremental", future.result(support.SECONDS)["mode"])

    def test_what_a_guest_writes_is_never_taken_for_a_format(self):
        """Its raw disk starts with the header of a qcow2 image, and so does what was pushed or restored."""
        image = self.with_data_file(self.victim)
        command = f"write -s {image} 0 {os.path.getsize(image) // 512 * 512}"
        io(self.rig.qmp, self.devices()["dev-b"][0], command)
        self.assertTrue(self.image("b").read_bytes().startswith(b"QFI\xfb"))
        drivers = []

        def look(name):
            if name == "blockdev-backup":
                nodes = self.rig.qmp.command("query-named-block-nodes", {"flat": True})
                drivers.extend(node["drv"] for node in nodes if node["node-name"].endswith("-t"))

        existing, new = self.raw("existing", fill=0xAA), self.targets / "new"
        for target in (existing, existing, new):
            with self.subTest(target), self.opened() as backup:
                self.rig.proxy.on_command = look
                kind = {"kind": "file", "path": str(new), "format": "raw"} if target == new else None
                self.pushed(backup, kind or self.existing(existing, "raw"), disk="dev-b")
                self.rig.proxy.on_command = lambda name: None
                self.equal(target, node="b")
        self.assertEqual(["raw"] * 3, drivers)
        keep, restored = self.places.folder / "stream", self.targets / "restored"
        with self.opened() as backup:
            backup.read("dev-b", self.rig.image("dev-b"), keep=keep)
        with self.rig.plugin() as plugin:
            begin = {"target": str(restored), "format": "raw", "size": SIZE}
            restore = plugin.call("restore.begin", begin, support.SECONDS)["restore"]
            Links.feed(plugin, restore, keep.read_bytes())
            plugin.call("restore.finish", {"restore": restore}, support.SECONDS)
        self.assertEqual(self.image("b").read_bytes(), restored.read_bytes())
        self.unharmed_victim()


class Secrets(Pushes):
    """Keys and a guest's data are in no log, and on no command line, whatever is logged."""

    KEY = bytes(range(0x51, 0x71))

    def test_neither_keys_nor_data_are_told(self):
        log = self.places.folder / "log"
        keys = self.places.folder / "keys"
        keys.mkdir()
        (keys / "keys.psk").write_text(f"qemu:{self.KEY.hex()}\n")
        certificates = Authority(self.places.folder / "authority")
        client, server = certificates.issue("client", "me"), certificates.issue("server", "localhost")
        private = (client / "client-key.pem").read_text().splitlines()[1]
        secrets = [self.KEY, self.KEY.hex().encode(), base64.b64encode(self.KEY)[:40], private.encode()]
        # What the guest has, as it is, in base64, and as a list of numbers.
        self.write("write -P 0x53 3M 64K")
        secrets += [b"S" * 8, base64.b64encode(b"S" * 9), b"83, 83, 83"]
        by_key = self.nbdkit(tcp=True, options=["--tls=require", f"--tls-psk={keys}/keys.psk"])
        options = ["--tls=require", f"--tls-certificates={server}", "--tls-verify-peer"]
        by_certificate = self.nbdkit(tcp=True, options=options, image=self.raw("other"))
        tls = {"kind": "psk", "dir": str(keys)}, {"kind": "x509", "dir": str(client)}
        wrong = {"kind": "psk", "dir": str(keys), "username": "me"}
        with open(log, "wb") as file:
            for carrier in ("inline", "framed"):
                command = self.rig.command("--log", "trace")
                with Plugin(command, carrier, stderr=file) as plugin:
                    backup = Backup(plugin, self.rig.monitor)
                    self.pushed(backup, by_key.target(tls=tls[0]), discard_source=False)
                    self.pushed(backup, by_certificate.target(tls=tls[1]), discard_source=False)
                    self.fails("target_refused", backup, by_key.target(tls=wrong))
                    backup.read("dev-a", self.rig.image("dev-a"))
                    lines = [pathlib.Path(f"/proc/{pid}/{name}").read_bytes()
                             for pid in descendants() for name in ("cmdline", "environ")]
                    backup.abort()
                self.assertTrue(any(b"trace" in line for line in lines))
                self.tells_none(secrets, lines)
                self.rig.image("dev-a").unlink()
        told = log.read_bytes()
        # It did log, all the way down.
        for word in (b"tls-creds-psk", b"tls-creds-x509", b"blockdev-backup"):
            self.assertIn(word, told)
        self.tells_none(secrets, [told])

    def tells_none(self, secrets, texts):
        for secret in secrets:
            for text in texts:
                self.assertNotIn(secret, text)


del Pushes

"""A small NBD client of the tests' own: one connection, one request at a time."""

import os
import socket
import struct

READ, WRITE, TRIM, ZEROES, STATUS = 0, 1, 4, 6, 7
OPTION, OPTION_REPLY = 0x49484156454F5054, 0x3E889045565A9
EXPORT_NAME, GO, STRUCTURED, SET_CONTEXT = 1, 7, 8, 10
ACK, INFO, CONTEXT = 1, 3, 4
REQUEST, SIMPLE, CHUNK = 0x25609513, 0x67446698, 0x668E33EF
DATA, HOLE, EXTENTS = 1, 2, 5
PIECE = 1 << 20  # of what is read at a time


class NbdError(Exception):
    """The server answered a request with an error."""


class Nbd:
    """`where` is `unix:/path`, or a connected socket; `context` is the one to ask `status` of."""

    def __init__(self, where, export, context=None, seconds=30):
        self.socket = where
        if isinstance(where, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(where.removeprefix("unix:"))
        self.socket.settimeout(seconds)
        self._lines = self.socket.makefile("rb")
        try:
            self._greet()
            self._enter(export, context)
        except BaseException:
            self.close()
            raise

    def _greet(self):
        magic, option, _ = self._take(">8sQH")
        if (magic, option) != (b"NBDMAGIC", OPTION):
            raise NbdError("no NBD server")

    def _enter(self, export, context):
        self.socket.sendall(struct.pack(">I", 3))
        name = struct.pack(">I", len(export)) + export.encode()
        self._option(STRUCTURED, b"")
        if context:
            query = struct.pack(">II", 1, len(context)) + context.encode()
            if not any(kind == CONTEXT for kind, _ in self._option(SET_CONTEXT, name + query)):
                raise NbdError(f"no context {context}")
        infos = [data for kind, data in self._option(GO, name + bytes(2)) if kind == INFO]
        self.size, self.flags = next(struct.unpack(">QH", data[2:]) for data in infos if data[:2] == bytes(2))

    def read(self, offset, length):
        """These bytes; NbdError if a part of them cannot be read."""
        result = bytearray(length)
        for at in range(0, length, PIECE):
            piece = min(PIECE, length - at)
            for kind, data in self.request(READ, offset + at, piece):
                if kind == DATA:
                    start = struct.unpack(">Q", data[:8])[0] - offset
                    result[start : start + len(data) - 8] = data[8:]
        return bytes(result)

    def status(self, offset=0, end=None):
        """The context's (offset, length, flags) in this range; `end` is the disk's, if not told."""
        end, found = end or self.size, []
        while offset < end:
            chunks = self.request(STATUS, offset, min(end - offset, 1 << 30))
            extents = next(data for kind, data in chunks if kind == EXTENTS)
            for length, flags in struct.iter_unpack(">II", extents[4:]):
                length = min(length, end - offset)  # The last one may be longer than asked for.
                found.append((offset, length, flags))
                offset += length
        return found

    def request(self, command, offset, length, payload=b""):
        self.send(command, offset, length, payload)
        return self.answer()

    def answer(self):
        """The chunks of the next answer, (type, data)."""
        chunks, error, done = [], None, False
        while not done:
            magic = self._take(">I")[0]
            if magic == SIMPLE:
                number, _ = self._take(">IQ")
                error, done = number, True
            else:
                assert magic == CHUNK, hex(magic)
                flags, kind, _, size = self._take(">HHQI")
                data, done = self._exactly(size), flags & 1
                if kind & 0x8000:
                    error = struct.unpack(">I", data[:4])[0]
                chunks.append((kind, data))
        if error:
            raise NbdError(os.strerror(error))
        return chunks

    def send(self, command, offset, length, payload=b"", cookie=1):
        self.socket.sendall(struct.pack(">IHHQQI", REQUEST, 0, command, cookie, offset, length) + payload)

    def ends(self):
        """Reads until the server hangs up; TimeoutError if it does not."""
        try:
            while self.socket.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass

    def close(self):
        self._lines.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _option(self, option, data):
        self.socket.sendall(struct.pack(">QII", OPTION, option, len(data)) + data)
        replies = []
        while True:
            magic, _, kind, length = self._take(">QIII")
            assert magic == OPTION_REPLY, hex(magic)
            reply = self._exactly(length)
            if kind & 0x80000000:
                raise NbdError(f"option {option}: {hex(kind)} {reply.decode()}")
            if kind == ACK:
                return replies
            replies.append((kind, reply))

    def _take(self, format):
        return struct.unpack(format, self._exactly(struct.calcsize(format)))

    def _exactly(self, length):
        data = self._lines.read(length)
        if len(data) < length:
            raise ConnectionResetError("the server hung up")
        return data


class OldNbd(Nbd):
    """A client that knows nothing but NBD_OPT_EXPORT_NAME and simple replies; of the oldest, with these flags."""

    def __init__(self, where, export, flags=1):
        self.flags = flags
        super().__init__(where, export)

    def _enter(self, export, context):
        old = struct.pack(">IQII", self.flags, OPTION, EXPORT_NAME, len(export)) + export.encode()
        self.socket.sendall(old)
        zeros = 0 if self.flags & 2 else 124
        self.size, self.flags = self._take(f">QH{zeros}x")

    def read(self, offset, length):
        self.send(READ, offset, length)
        magic, error, _ = self._take(">IIQ")
        assert magic == SIMPLE, hex(magic)
        if error:
            raise NbdError(os.strerror(error))
        return self._exactly(length)


def dirty(extents):
    """The ranges of a bitmap's extents that are dirty."""
    return [(offset, length) for offset, length, flags in extents if flags & 1]


def copy(client, ranges, image):
    """Reads these ranges into an image, which is as large as the disk afterwards."""
    with open(image, "r+b" if os.path.exists(image) else "w+b") as file:
        file.truncate(client.size)
        for offset, length in ranges:
            file.seek(offset)
            file.write(client.read(offset, length))

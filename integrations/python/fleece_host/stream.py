"""The record stream (section 4 of the protocol): its rules and its stored form.

    begin, (data | zero | same)*, end

A stream that stops in any other way is void. Everything that is read or
stored passes through a Checker, so nothing wrong is ever taken for a backup.
"""
import hashlib
import json
import struct
import zlib

FORMAT = 1
MAX_LINE_BYTES = 65536
# The specification leaves the bound of a stored `data` record to the plugin's
# `max_payload_bytes`; this host never asks for longer ones than this.
MAX_DATA_BYTES = 1 << 20
MAX_SIZE = 1 << 63


class Damage(Exception):
    """A stream breaks a rule: `offset` is how far it was good, `stream` its place in the chain."""

    def __init__(self, offset, what, stream=0):
        super().__init__(offset, what, stream)
        self.offset = offset
        self.what = what
        self.stream = stream

    def __str__(self):
        return "stream %d, offset %d: %s" % (self.stream, self.offset, self.what)


class StreamFailed(Exception):
    """The plugin gave the stream up with a `failed` record."""

    def __init__(self, record):
        self.code = record.get("code")
        self.action = record.get("action")
        self.offset = record.get("offset")
        super().__init__("the stream failed at offset %s [code %s, action %s]"
                         % (self.offset, self.code, self.action))


class Checker:
    """Holds the records of one stream to rules 1 to 6, one after the other.

    `begin` and `end` are the records once they have passed, `offset` is where
    the next record must start.
    """

    def __init__(self):
        self.begin = None
        self.end = None
        self.offset = 0
        self._sums = {"records": 0, "data_bytes": 0, "zero_bytes": 0, "same_bytes": 0}
        self._digest = hashlib.sha256()

    @property
    def data_bytes(self):
        return self._sums["data_bytes"]

    def take(self, record, payload=None):
        """Accepts the next record, or raises Damage (StreamFailed at `failed`)."""
        try:
            self._take(record, payload)
        except _Broken as error:
            raise Damage(self.offset, str(error)) from None

    def finish(self):
        """Raises Damage unless the stream is complete."""
        if self.end is None:
            raise Damage(self.offset, "it has no `end`")

    def _take(self, record, payload):
        kind = record.get("kind") if isinstance(record, dict) else None
        if self.end is not None:
            raise _Broken("a record follows the `end`")
        if (self.begin is None) != (kind == "begin"):
            raise _Broken("a stream starts with one `begin`, and this record is %r" % (kind,))
        if payload is not None and kind != "data":
            raise _Broken("a payload with a `%s` record" % kind)
        if kind == "begin":
            self._take_begin(record)
        elif kind in ("data", "zero", "same"):
            self._take_range(kind, record, payload)
        elif kind == "end":
            self._take_end(record)
        elif kind == "failed":
            raise StreamFailed(record)
        else:
            raise _Broken("a record of the unknown kind %r" % (kind,))

    def _take_begin(self, record):
        if _number(record, "format") != FORMAT:
            raise _Broken("its format is %d; only %d is known" % (record["format"], FORMAT))
        disk = _text(record, "disk")
        size = _number(record, "size")
        base = _text(record, "base", optional=True)
        checkpoint = _text(record, "checkpoint", optional=True)
        mode = record.get("mode")
        _number(record, "granularity")
        if record.get("offset") is not None and _number(record, "offset") != 0:
            raise _Broken("it goes on from offset %d: what comes before is missing"
                          % record["offset"])
        if mode not in ("full", "incremental"):
            raise _Broken("its mode is %r" % (mode,))
        if mode == "full" and base is not None:
            raise _Broken("it is full, and yet has the base %s" % base)
        if mode == "incremental" and base is None:
            raise _Broken("it is incremental and has no base")
        head = ["qemu-fleece stream 1", disk, str(size), mode, base or "", checkpoint or ""]
        self._digest.update("".join(line + "\n" for line in head).encode("utf-8"))
        self.begin = record

    def _take_range(self, kind, record, payload):
        offset = _number(record, "offset")
        length = _number(record, "length")
        crc32 = 0
        if length == 0:
            raise _Broken("an empty record")
        if offset != self.offset:
            raise _Broken("%s: the next record is at %d"
                          % ("a gap" if offset > self.offset else "an overlap", offset))
        if offset + length > self.begin["size"]:
            raise _Broken("a record of %d bytes reaches past the disk's %d bytes"
                          % (length, self.begin["size"]))
        if kind == "same" and self.begin["mode"] == "full":
            raise _Broken("a `same` record in a full stream")
        if kind == "data":
            crc32 = _number(record, "crc32")
            if length > MAX_DATA_BYTES:
                raise _Broken("a `data` record is longer than %d bytes" % MAX_DATA_BYTES)
            if payload is None or len(payload) != length:
                raise _Broken("a `data` record of %d bytes with a payload of %s"
                              % (length, "none" if payload is None else len(payload)))
            found = zlib.crc32(payload)
            if found != crc32:
                raise _Broken("the payload's CRC-32 is %d and should be %d" % (found, crc32))
        self._digest.update(struct.pack(">cQQI", kind[0].encode(), offset, length, crc32))
        self._sums["records"] += 1
        self._sums[kind + "_bytes"] += length
        self.offset += length

    def _take_end(self, record):
        if self.offset != self.begin["size"]:
            raise _Broken("it ends although the disk has %d bytes" % self.begin["size"])
        for name, value in self._sums.items():
            if _number(record, name) != value:
                raise _Broken("`end` counts %d %s; there are %d" % (record[name], name, value))
        digest = self._digest.hexdigest()
        if record.get("digest") != digest:
            raise _Broken("its digest is %s and should be %s" % (digest, record.get("digest")))
        self.end = record


class Chain:
    """Holds streams to the rules of a chain: a full, then each based on the one before."""

    def __init__(self):
        self.streams = 0
        self._last = None

    def follow(self, begin):
        """Accepts the `begin` of the next stream, or raises Damage."""
        last, what = self._last, None
        if last is None:
            if begin["mode"] != "full":
                what = "a chain starts with a full; this one needs %s before it" % begin["base"]
        elif begin["disk"] != last["disk"]:
            what = "it is of disk %s, the one before of %s" % (begin["disk"], last["disk"])
        elif begin["size"] != last["size"]:
            what = "its disk has %d bytes, the one before %d" % (begin["size"], last["size"])
        elif begin.get("base") is None or begin["base"] != last.get("checkpoint"):
            what = "its base is %s, the one before made %s" % (
                begin.get("base"), last.get("checkpoint"))
        if what:
            raise Damage(0, what, self.streams)
        self._last = begin
        self.streams += 1


def write_record(file, record, payload=None):
    """Stores one record; returns the bytes that it took."""
    line = json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > MAX_LINE_BYTES + 1:
        raise ValueError("a record's line is longer than %d bytes" % MAX_LINE_BYTES)
    file.write(line)
    if payload is not None:
        file.write(payload)
    return len(line) + len(payload or b"")


def read_stream(file):
    """The checked (record, payload) pairs of the one stream that starts here.

    It stops behind `end`; a stream that does not get there raises Damage.
    """
    checker = Checker()
    while checker.end is None:
        record, payload = _read_record(file, checker.offset)
        try:
            checker.take(record, payload)
        except StreamFailed as error:
            raise Damage(checker.offset, str(error)) from None
        yield record, payload


def read_chain(file):
    """The checked pairs of all streams in a file that holds a whole chain."""
    chain, stream = Chain(), 0
    while stream == 0 or file.peek(1):
        try:
            for record, payload in read_stream(file):
                if record["kind"] == "begin":
                    chain.follow(record)
                yield record, payload
        except Damage as damage:
            damage.stream = stream
            raise
        stream += 1


def _each_once(pairs):
    """An object whose members stand once each: of two, readers would disagree."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _read_record(file, offset):
    line = file.readline(MAX_LINE_BYTES + 1)
    if not line:
        raise Damage(offset, "it has no `end`")
    if not line.endswith(b"\n"):
        long = len(line) > MAX_LINE_BYTES
        raise Damage(offset, "a line is too long" if long else "it is cut off inside a line")
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise Damage(offset, "no record: %s" % error) from None
    payload = None
    if isinstance(record, dict) and record.get("kind") == "data":
        length = record.get("length")
        if type(length) is not int or not 0 < length <= MAX_DATA_BYTES:
            raise Damage(offset, "a `data` record of %r bytes" % (length,))
        payload = file.read(length)
        if len(payload) < length:
            raise Damage(offset, "it is cut off inside a payload")
    return record, payload


class _Broken(Exception):
    """A rule is broken; the Checker adds where."""


def _number(record, name):
    value = record.get(name)
    # `type`, because True is an int to Python and not to JSON.
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise _Broken("`%s` has no sane `%s`: %r" % (record.get("kind"), name, value))
    if name == "crc32" and value > 0xFFFFFFFF:
        raise _Broken("a `crc32` of more than 32 bits")
    return value


def _text(record, name, optional=False):
    value = record.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, str):
        raise _Broken("`begin` has no sane `%s`: %r" % (name, value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Broken("`%s` is no Unicode text" % name) from None
    return value

"""The plugin client against a plugin that says what a test tells it to."""
import subprocess
import sys
import unittest

from fleece_host.plugin import Plugin, PluginError, PluginGone

# Answers hello; `turn()` reads a request; then the test's own lines run.
PRELUDE = r"""
import json, os, sys, time
def turn():
    request = json.loads(sys.stdin.buffer.readline())
    request["raw"] = sys.stdin.buffer.read(request.get("payload_bytes", 0))
    return request
def say(message, raw=b""):
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n" + raw)
    sys.stdout.buffer.flush()
def answer(request, result):
    say({"jsonrpc": "2.0", "id": request["id"], "result": result})
hello = turn()
answer(hello, {"protocol": 1, "carrier": hello["params"]["carrier"], "limits": {
    "max_line_bytes": 100000, "max_payload_bytes": 1 << 20, "max_requests": 6}})
"""
BYE = "\nanswer(turn(), {'leftovers': ['job x']})"


class Client(unittest.TestCase):
    def plugin(self, script, carrier="framed", prelude=PRELUDE, **more):
        plugin = Plugin([sys.executable, "-c", prelude + script], carrier,
                        stderr=subprocess.DEVNULL, **more)
        self.addCleanup(plugin.close)
        return plugin

    def test_replies_in_any_order_find_their_requests(self):
        plugin = self.plugin("for each in [turn(), turn(), turn()][::-1]:\n"
                             "    answer(each, {'was': each['params']['n']})" + BYE)
        futures = [plugin.start("x", {"n": n}) for n in range(3)]
        self.assertEqual([future.result(10)["was"] for future in futures], [0, 1, 2])
        self.assertEqual(plugin.close(), ["job x"])

    def test_payloads_both_ways_in_both_carriers(self):
        script = r"""
one = turn()
if hello["params"]["carrier"] == "framed":
    assert one["raw"] == b"\n{}\n" and "data" not in one["params"]
    say({"method": "record", "params": {"stream": one["id"], "record": {"kind": "data"}},
         "payload_bytes": 4}, b"{\n}\n")
else:
    assert one["params"]["data"] == "Cnt9Cg=="
    say({"method": "record", "params": {"stream": one["id"], "record": {"kind": "data"},
         "data": "ewp9Cg=="}})
answer(one, {})
"""
        for carrier in ("framed", "inline"):
            got = []
            plugin = self.plugin(script + BYE, carrier)
            plugin.start("x", {}, b"\n{}\n", lambda *each: got.append(each)).result(10)
            self.assertEqual(got, [({"kind": "data"}, b"{\n}\n")])

    def test_notices_with_payloads_and_unknown_members_are_borne(self):
        notices = []
        plugin = self.plugin(
            "say({'method': 'later', 'params': {'a': 1}, 'new': 2, 'payload_bytes': 3}, b'\\n{\\n')\n"
            "answer(turn(), {})" + BYE, on_notice=lambda *each: notices.append(each))
        plugin.call("ping", {}, 10)
        self.assertEqual(notices, [("later", {"a": 1})])

    def test_error_replies(self):
        plugin = self.plugin(
            "one = turn()\n"
            "say({'id': one['id'], 'error': {'code': 1, 'message': 'no', 'data': "
            "{'code': 'of_a_later_version', 'action': 'retry', 'disk': 'd'}}})" + BYE)
        with self.assertRaises(PluginError) as caught:
            plugin.call("x", {}, 10)
        self.assertEqual((caught.exception.code, caught.exception.action),
                         ("of_a_later_version", "retry"))
        self.assertIn("x: no [code of_a_later_version, action retry, disk d]",
                      str(caught.exception))

    def test_no_more_requests_than_agreed_and_a_call_always_gets_through(self):
        plugin = self.plugin(
            "all = [turn() for _ in range(5)]\n"
            "assert [each['method'] for each in all] == ['x'] * 4 + ['now']\n"
            "answer(all[4], {})\n"
            "for each in all[:4]: answer(each, {})\n"
            "answer(turn(), {})" + BYE)
        futures = [plugin.start("x", {}) for _ in range(4)]
        plugin.call("now", {}, 10)
        futures.append(plugin.start("x", {}))
        for future in futures:
            future.result(10)

    def test_what_a_store_raises_ends_its_stream_only(self):
        def full(record, payload):
            raise OSError("no space")
        plugin = self.plugin(
            "one = turn()\n"
            "for _ in range(3): say({'method': 'record', 'params': "
            "{'stream': one['id'], 'record': {}}})\n"
            "answer(one, {})\nanswer(turn(), {})" + BYE)
        with self.assertRaisesRegex(OSError, "no space"):
            plugin.start("backup.read", {}, on_record=full).result(10)
        plugin.call("ping", {}, 10)

    def test_breaches_end_all_that_waits(self):
        for said in ("print('Welcome!', flush=True)",
                     "print('[1]', flush=True)",
                     "say({'id': 99, 'result': {}})",
                     "say({'id': None, 'error': {}})",
                     "say({'method': 'record', 'params': {'stream': 99, 'record': {}}})",
                     "say({'method': 'x', 'payload_bytes': 1 << 60})",
                     "say({'method': 'x', 'payload_bytes': -1})",
                     "say({'method': 'x' * 200000})",
                     "sys.stdout.buffer.write(b'{\"cut'); sys.stdout.flush(); os._exit(0)",
                     "say({'method': 'x', 'payload_bytes': 9}, b'short'); os._exit(0)",
                     "os._exit(5)"):
            with self.subTest(said):
                plugin = self.plugin("turn(), turn()\n" + said)
                waits = plugin.start("x", {})
                with self.assertRaises(PluginGone):
                    plugin.call("y", {}, 10)
                with self.assertRaises(PluginGone):
                    waits.result(10)
                with self.assertRaises(PluginGone):
                    plugin.call("z", {}, 10)

    def test_a_reply_that_never_comes(self):
        plugin = self.plugin("turn()" + BYE)
        with self.assertRaises(TimeoutError):
            plugin.call("backup.commit", {}, 0.2)
        self.assertEqual(plugin.close(), ["job x"])

    def test_another_protocol_is_refused(self):
        with self.assertRaisesRegex(PluginGone, "protocol 2"):
            self.plugin(BYE, prelude=PRELUDE.replace('"protocol": 1', '"protocol": 2'))
        with self.assertRaises(PluginGone):
            self.plugin("", prelude="")


if __name__ == "__main__":
    unittest.main()

"""A backup host for the plugin qemu-fleece, in Python's standard library.

plugin   the conversation: requests, replies, notifications
stream   the record stream: its rules, its stored form
store    the directory store: what counts as a backup, and what may go
durable  files that survive a crash whole
backup   VM -> store
estimate what the next backup would be
checkpoints what the VM remembers, and its repair
restore  store -> disk image
verify   is the store sound?
report   what the operator sees
cli      the command line
"""

VERSION = "0.1.0"

"""A base of another VM, disk, image or point in time is never built on."""

import os
import shutil
import subprocess

from .life import BASE, SIZE, Life
from .support import make_image

ONE = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"


class Identity(Life):
    formats = {"a": "qcow2", "b": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot("-uuid", ONE)
        self.full()
        self.quit()

    def test_the_same_vm_goes_on(self):
        self.boot("-uuid", ONE, "-name", "renamed")
        self.next_is({"dev-a": None, "dev-b": None})

    def test_another_vm_with_the_same_images(self):
        self.boot("-uuid", OTHER)
        self.assertEqual({"dev-a": "mismatch", "dev-b": "mismatch"}, self.health())
        self.next_is({"dev-a": "base_mismatch", "dev-b": "base_mismatch"})
        # The host knows that it is the point in time that it has stored.
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def test_images_exchanged_between_two_disks(self):
        """Of one backup, so that the checkpoints differ in nothing but what they belong to."""
        a, b, spare = self.image("a"), self.image("b"), self.image("spare")
        for old, new in ((a, spare), (b, a), (spare, b)):
            os.rename(old, new)
        self.boot("-uuid", ONE)
        self.next_is({"dev-a": "base_mismatch", "dev-b": "base_mismatch"})
        self.next_is({"dev-a": "base_mismatch", "dev-b": "base_mismatch"}, ids=True)

    def test_an_image_replaced_by_an_older_copy_of_itself(self):
        """Same VM, disk, path and name: only the point in time is another."""
        shutil.copy(self.image("a"), self.image("copy"))
        self.boot("-uuid", ONE)
        self.call("checkpoint.delete", checkpoints=[BASE])
        self.write("write -P 9 0 1M")
        self.full()
        self.quit()
        os.rename(self.image("copy"), self.image("a"))
        self.boot("-uuid", ONE)
        self.assertEqual("usable", self.health()["dev-a"])
        self.next_is({"dev-a": "base_mismatch", "dev-b": None}, ids=True)

    def test_an_image_replaced_by_one_with_no_checkpoint(self):
        make_image(self.image("a"), "qcow2", SIZE)
        self.boot("-uuid", ONE)
        self.next_is({"dev-a": "base_missing", "dev-b": None})
        self.next_is({"dev-a": "bitmap_lost", "dev-b": None}, ids=True)

    def test_an_image_that_was_moved(self):
        os.rename(self.image("a"), self.image("moved"))
        image = self.image
        self.image = lambda node: image("moved" if node == "a" else node)
        self.boot("-uuid", ONE)
        self.next_is({"dev-a": "base_mismatch", "dev-b": None}, ids=True)
        word = {"disk": "dev-a", "changed": "recorded", "id": self.ids["dev-a"]}
        self.call("checkpoint.redefine", checkpoint=BASE, disks=[word])
        self.change()
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

    def test_a_converted_image_keeps_them_too(self):
        """qemu-img convert --bitmaps in place of the image: the path is the same, and so is the content."""
        command = ["qemu-img", "convert", "-O", "qcow2", "--bitmaps", str(self.image("a")), str(self.image("new"))]
        subprocess.run(command, check=True)
        os.rename(self.image("new"), self.image("a"))
        self.boot("-uuid", ONE)
        self.change()
        self.next_is({"dev-a": None, "dev-b": None}, ids=True)

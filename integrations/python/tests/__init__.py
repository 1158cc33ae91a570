"""Tests that need no QEMU: python3 -m unittest discover -s integrations/python -t integrations/python"""

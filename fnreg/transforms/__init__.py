"""Transforms: the protocol and mappings, linear transforms, rotations."""

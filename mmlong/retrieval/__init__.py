"""Folders of what is looked up, written whole or not at all and mapped from the disk, and RETRO's neighbours in one. Knows tensors and files, and no models."""

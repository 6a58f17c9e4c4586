"""Bytes from flash into a bounded window: files, arena, slots and the threads that fill them."""

"""Memory that was freed and that glibc keeps; with another C library, nothing here does anything."""

import ctypes
from typing import Any


def give_memory_back() -> None:
    """Have glibc map every block of 1 MiB or more by itself, so that freeing it returns it to the system.

    By default that threshold grows to 32 MiB with what is freed, and the heaps of the threads keep what lies below it:
    with images of many sizes the resident memory of a service wandered between 190 and 310 MiB, and now stays at 127.
    It holds for the whole process, so `Package` leaves it to its user; call it before loading.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def trim() -> None:
    """Give what is free in the heaps back to the system, once.

    Where arrays of megabytes come and go between small ones that stay, heaps grow by megabytes an image.
    """
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another C library
        return None
